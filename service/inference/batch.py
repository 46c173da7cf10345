"""One batch on one backend: requests' rows together, and in halves where the device's memory is too small for them."""

from collections.abc import Sequence

import numpy as np

from service.inference.backends import Array, Backend, is_out_of_memory
from service.inference.operations import Operation


def compute(backend: Backend, operation: Operation, inputs: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    """The outputs of `operation`, each [B, ...], for the rows of several requests together, in their order."""
    columns = inputs[0] if len(inputs) == 1 else tuple(np.concatenate(column) for column in zip(*inputs, strict=True))
    return _within_memory(backend, operation, columns)


def _within_memory(backend: Backend, operation: Operation, columns: tuple[Array, ...]) -> tuple[Array, ...]:
    """`operation` on rows [B, ...]; where the device's memory is too small for them, half of them at a time.

    What was too much is not tried again: the backend's batches stay as small as that.
    """
    rows = len(columns[0])
    try:
        return backend.run(operation, columns)
    except Exception as error:
        if rows == 1 or not is_out_of_memory(error):
            raise
        half = rows // 2
        backend.limit_rows(rows)
    # Outside of the handler, whose traceback would keep the memory of the attempt.
    parts = [_within_memory(backend, operation, tuple(c[part] for c in columns)) for part in _halves(half)]
    return stacked(parts)


def _halves(half: int) -> tuple[slice, slice]:
    return slice(0, half), slice(half, None)


def stacked(parts: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Several outputs as one."""
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
