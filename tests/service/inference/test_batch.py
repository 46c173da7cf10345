"""A batch that exceeds the device's memory, simulated by an operation that raises an error if it gets many rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.artifact import load
from service.inference.backend_selection import select_backend
from service.inference.backends import Backend
from service.inference.batch import run_batch
from service.inference.operations import Operation
from tests.models.builders import batch
from tests.models.publishing import publish


@pytest.fixture
def backend(tmp_path: Path) -> Backend:
    return select_backend(load(publish(tmp_path, "vae-gaussian")), requested="torchscript").backend


def operation_for_at_most(max_rows: int, error: Exception) -> tuple[Operation, list[int]]:
    """Return an operation that raises `error` if it gets more than `max_rows` rows, and the list of its batch sizes."""
    tried: list[int] = []

    def run(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tried.append(len(x))
        if len(x) > max_rows:
            raise error
        return module(x), x

    return Operation("reconstruct", run), tried


@pytest.mark.parametrize(
    ("jobs", "max_rows", "sizes"),
    [
        ((5, 3), 8, [8]),
        ((20,), 7, [20, 10, 5, 5, 10, 5, 5]),
        ((4, 2, 1), 3, [7, 3, 4, 2, 2]),
        ((2,), 1, [2, 1, 1]),
    ],
)
def test_batch_that_exceeds_memory_is_halved_until_it_fits(
    backend: Backend, jobs: tuple[int, ...], max_rows: int, sizes: list[int]
) -> None:
    x = batch(sum(jobs))[0].numpy()
    ends = np.cumsum(jobs)
    operation, tried = operation_for_at_most(max_rows, torch.OutOfMemoryError("CUDA out of memory"))
    outputs = run_batch(backend, operation, [(x[end - rows : end],) for rows, end in zip(jobs, ends, strict=True)])
    assert tried == sizes
    np.testing.assert_array_equal(outputs[1], x)
    with torch.inference_mode():
        np.testing.assert_allclose(outputs[0], backend.module(torch.from_numpy(x)).numpy(), atol=1e-6)
    assert backend.max_rows >= sum(jobs) if len(sizes) == 1 else backend.max_rows < sum(jobs)


@pytest.mark.parametrize(
    ("rows", "error"), [(1, torch.OutOfMemoryError("CUDA out of memory")), (8, RuntimeError("a fault of the model"))]
)
def test_batch_is_not_tried_again_if_one_row_exceeds_memory_or_the_model_fails(
    backend: Backend, rows: int, error: Exception
) -> None:
    operation, tried = operation_for_at_most(0, error)
    before = backend.max_rows
    with pytest.raises(type(error), match=str(error)):
        run_batch(backend, operation, [(batch(rows)[0].numpy(),)])
    assert tried == [rows]
    assert backend.max_rows == before
