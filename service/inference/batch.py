"""Run the rows of several requests as one batch, or in halves if the batch does not fit in memory."""

from collections.abc import Sequence

import numpy as np

from service.inference.backends import Array, Backend, is_out_of_memory
from service.inference.operations import Operation


def run_batch(backend: Backend, operation: Operation, inputs: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Return the outputs of `operation`, each [B, ...], for the inputs of all jobs, in the order of the jobs."""
    return _run_within_memory(backend, operation, inputs[0] if len(inputs) == 1 else concatenate(inputs))


def _run_within_memory(backend: Backend, operation: Operation, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
    """Run `operation` on `inputs`, each [B, ...], or on one half of the rows after the other if memory runs out.

    If memory runs out, the backend also lowers its `max_rows`, so that later batches are smaller.
    """
    rows = len(inputs[0])
    try:
        return backend.run(operation, inputs)
    except Exception as error:
        if rows == 1 or not is_out_of_memory(error):
            raise
        backend.limit_rows(rows)
    # These calls are outside the except block, in which the traceback would keep the memory of the failed attempt.
    half = rows // 2
    first = _run_within_memory(backend, operation, tuple(array[:half] for array in inputs))
    second = _run_within_memory(backend, operation, tuple(array[half:] for array in inputs))
    return concatenate([first, second])


def concatenate(parts: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Concatenate along the rows: the first arrays of all `parts`, then the second arrays, and so on."""
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
