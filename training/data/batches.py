"""Minibatches of the rows that fit a model: which rows, in which order, from memory or from disk.

A batch is a function of the seed, the epoch and its place in it, so that a run continues anywhere without a state.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.data.row_store import Floats, RowStore
from training.random_streams import SHUFFLE, epoch_order, random_stream

POOL_BLOCKS = 32  # blocks that are shuffled together, when rows come from disk


class Batches:
    """The fit rows in model units.

    In memory every epoch is a new permutation. From disk it visits the blocks in a new order, POOL of them at a time,
    and permutes the rows of each pool: what is read is read in order, and memory holds one pool.

    Args:
        rows: the table [N, D].
        fit: the indices of the rows that may be used.
        prepare: raw rows [n, D] to model units.
        seed: of the order.
        device: where batches go.
    """

    def __init__(
        self, rows: RowStore, fit: npt.NDArray[np.int64], prepare: Callable[[Tensor], Tensor], seed: int, device: str
    ) -> None:
        self._rows, self._prepare, self._seed, self._device = rows, prepare, seed, device
        self._count = len(fit)
        self._epoch = self._pool = -1  # what is at hand
        self._shuffled_rows = np.empty((0, rows.width), np.float32)
        if rows.on_disk:
            self._fit = np.sort(fit)
            edges = np.arange(0, len(rows) + rows.block, rows.block)
            self._starts = np.searchsorted(self._fit, edges)  # block b has the fit rows _starts[b] to _starts[b + 1]
        else:
            self._x = prepare(torch.from_numpy(rows.take(fit))).to(device)

    def __len__(self) -> int:
        """How many rows an epoch has."""
        return self._count

    def take(self, epoch: int, start: int, stop: int) -> Tensor:
        """The rows [stop - start, D] from place `start` to `stop` of `epoch`, in model units, on the device."""
        if not self._rows.on_disk:
            if epoch != self._epoch:
                self._epoch, self._order = epoch, epoch_order(self._seed, epoch, self._count).to(self._device)
            return self._x.index_select(0, self._order[start:stop])
        parts = []
        if epoch != self._epoch:
            self._open(epoch)
        while start < stop:
            pool = int(np.searchsorted(self._ends, start, side="right"))
            first, end = int(self._ends[pool - 1]) if pool else 0, int(self._ends[pool])
            parts.append(self._shuffled(pool)[start - first : min(stop, end) - first])
            start = end
        return self._prepare(torch.from_numpy(np.concatenate(parts))).to(self._device)

    def _open(self, epoch: int) -> None:
        blocks = epoch_order(self._seed, epoch, len(self._starts) - 1).numpy()
        self._pools = [blocks[first : first + POOL_BLOCKS] for first in range(0, len(blocks), POOL_BLOCKS)]
        sizes = [sum(int(self._starts[b + 1] - self._starts[b]) for b in pool) for pool in self._pools]
        self._ends = np.cumsum(sizes)  # the place in the epoch where each pool ends
        self._epoch, self._pool = epoch, -1

    def _shuffled(self, pool: int) -> Floats:
        """The rows of `pool`, permuted."""
        if pool == self._pool:
            return self._shuffled_rows
        size = int(self._ends[pool]) - (int(self._ends[pool - 1]) if pool else 0)
        random = random_stream(self._seed, SHUFFLE, self._epoch * len(self._pools) + pool)
        places = torch.randperm(size, generator=random).numpy()
        rows, filled = np.empty((size, self._rows.width), np.float32), 0
        for block in self._pools[pool]:
            fit = self._fit[self._starts[block] : self._starts[block + 1]]
            first = int(block) * self._rows.block
            rows[places[filled : filled + len(fit)]] = self._rows.span(first, first + self._rows.block)[fit - first]
            filled += len(fit)
        self._pool, self._shuffled_rows = pool, rows
        return rows
