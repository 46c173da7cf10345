"""A running batcher with a model outside a registry, shared by the tests of batching, memory and admission."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import torch

from service.inference.backends import Backend
from service.inference.batcher import Batcher

Batches = list[tuple[str, int]]  # the operation and the rows of each batch


@dataclass(frozen=True)
class BareModel:
    """A model outside a registry."""

    backend: Backend
    row_bytes: int = 256


@asynccontextmanager
async def running_batcher(
    batches: Batches | None = None, max_batch_rows: int = 64, max_batch_bytes: int = 2**20
) -> AsyncIterator[Batcher]:
    """A batcher that runs until the block ends, and appends every batch to `batches`."""
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
    """Rows of the digits' width, [count, 64]."""
    return np.random.default_rng(seed).random((count, 64)).astype(np.float32)


def reconstruction(model: BareModel, x: np.ndarray) -> np.ndarray:
    """What the model's module itself gives for `x`."""
    with torch.inference_mode():
        output: np.ndarray = model.backend.module(torch.from_numpy(x)).numpy()
    return output
