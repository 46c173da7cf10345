"""A running batcher, and a model outside a registry, for the tests of batching, memory and admission control."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import torch

from service.inference.backends import Backend
from service.inference.batcher import Batcher

Batches = list[tuple[str, int]]  # the operation and the number of rows of each batch


@dataclass(frozen=True)
class BareModel:
    """A model that belongs to no registry."""

    backend: Backend
    row_bytes: int = 256


@asynccontextmanager
async def running_batcher(
    batches: Batches | None = None, max_batch_rows: int = 64, max_batch_bytes: int = 2**20
) -> AsyncIterator[Batcher]:
    """Yield a batcher that runs until the block ends and appends every batch to `batches`."""
    seen: Batches = [] if batches is None else batches
    batcher = Batcher(
        max_batch_rows=max_batch_rows,
        max_batch_bytes=max_batch_bytes,
        threads=1,
        on_batch=lambda operation, rows: seen.append((operation, rows)),
    )
    batcher.start()
    try:
        yield batcher
    finally:
        await batcher.close()


def random_rows(count: int, seed: int = 0) -> np.ndarray:
    """Return random rows with as many features as the digits, [count, 64]."""
    return np.random.default_rng(seed).random((count, 64)).astype(np.float32)


def reconstruction(model: BareModel, x: np.ndarray) -> np.ndarray:
    """Return the output of the model's module for `x`."""
    with torch.inference_mode():
        output: np.ndarray = model.backend.module(torch.from_numpy(x)).numpy()
    return output
