"""Minibatches from memory and from disk.

Each epoch contains every fit row once, in an order that depends on the seed and the epoch.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from training.data.batches import POOL_BLOCKS, Batches
from training.data.row_store import RowStore

ROWS, WIDTH = 1000, 3


class SmallBlocks(RowStore):
    @property
    def block_rows(self) -> int:
        return 7


def unscaled(x: Tensor) -> Tensor:
    return x


@pytest.fixture(params=["memory", "disk"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> RowStore:
    """Return a table whose row i has the value i in every column."""
    values = np.repeat(np.arange(ROWS, dtype=np.float32)[:, None], WIDTH, axis=1)
    if request.param == "memory":
        return RowStore(values)
    np.save(tmp_path / "rows.npy", values)
    return SmallBlocks(np.load(tmp_path / "rows.npy", mmap_mode="r"))


@pytest.fixture
def fit() -> np.ndarray:
    return np.random.RandomState(0).permutation(ROWS)[:700]


def epoch(batches: Batches, number: int, size: int = 64) -> Tensor:
    count = len(batches)
    return torch.cat([batches.take(number, start, min(start + size, count)) for start in range(0, count, size)])


def test_epoch_contains_every_fit_row_once_and_no_other_row(rows: RowStore, fit: np.ndarray) -> None:
    batches = Batches(rows, fit, unscaled, seed=1, device="cpu")
    for number in (0, 5):
        seen = epoch(batches, number)
        assert seen.shape == (700, WIDTH)
        assert sorted(seen[:, 0].int().tolist()) == sorted(fit.tolist())


def test_order_of_rows_depends_on_the_seed_and_the_epoch(rows: RowStore, fit: np.ndarray) -> None:
    batches = Batches(rows, fit, unscaled, seed=1, device="cpu")
    first = epoch(batches, 0)
    assert not torch.equal(first, epoch(batches, 1))
    assert torch.equal(first, epoch(Batches(rows, fit, unscaled, seed=1, device="cpu"), 0))
    assert not torch.equal(first, epoch(Batches(rows, fit, unscaled, seed=2, device="cpu"), 0))


def test_batches_can_start_at_any_position_of_any_epoch(
    rows: RowStore,
    fit: np.ndarray,
) -> None:
    whole = epoch(Batches(rows, fit, unscaled, seed=1, device="cpu"), 3)
    for start, stop in ((0, 1), (333, 444), (650, 700), (10, 690)):
        assert torch.equal(Batches(rows, fit, unscaled, seed=1, device="cpu").take(3, start, stop), whole[start:stop])


def test_batches_contain_scaled_rows(rows: RowStore, fit: np.ndarray) -> None:
    doubled = Batches(rows, fit, lambda x: 2 * x, seed=1, device="cpu")
    assert torch.equal(epoch(doubled, 0), 2 * epoch(Batches(rows, fit, unscaled, seed=1, device="cpu"), 0))


def test_rows_that_are_neighbours_on_disk_are_rarely_neighbours_in_an_epoch(tmp_path: Path) -> None:
    """The rows of a block are spread over a pool, and the blocks of a pool are spread over the file."""
    np.save(tmp_path / "rows.npy", np.arange(ROWS, dtype=np.float32)[:, None])
    batches = Batches(
        SmallBlocks(np.load(tmp_path / "rows.npy", mmap_mode="r")), np.arange(ROWS), unscaled, seed=0, device="cpu"
    )
    seen = epoch(batches, 0)[:, 0]
    neighbours = (seen.diff().abs() == 1).double().mean()
    assert neighbours < 2 / (7 * POOL_BLOCKS) + 0.05
    pool = seen[: 7 * POOL_BLOCKS].sort().values
    assert pool[-1] - pool[0] > ROWS / 2
