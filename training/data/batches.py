"""Shuffled minibatches of the fit rows, from memory or from disk.

A batch depends only on the seed, the number of the epoch, and the position of the batch in that epoch. Training can
therefore resume at any batch without a saved state.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.data.row_store import Floats, RowStore
from training.random_streams import SHUFFLE, epoch_order, random_stream

POOL_BLOCKS = 32  # number of blocks in a pool; see `Batches`


class Batches:
    """The fit rows in model units, in a new order every epoch.

    If the rows are in memory, each epoch permutes all rows. If the rows are on disk, each epoch permutes the blocks and
    divides them into pools of POOL_BLOCKS blocks. The rows of a pool are read block by block and then permuted in
    memory.

    Args:
        rows: the table [N, D].
        fit: the indices of the fit rows.
        scale: maps raw rows [n, D] to model units.
        seed: determines the order.
        device: the device that holds the batches.
    """

    def __init__(
        self, rows: RowStore, fit: npt.NDArray[np.int64], scale: Callable[[Tensor], Tensor], seed: int, device: str
    ) -> None:
        self._rows, self._scale, self._seed, self._device = rows, scale, seed, device
        self._count = len(fit)
        # the epoch whose order is in memory, and the pool whose rows are in memory; -1 if there is none
        self._epoch = self._pool = -1
        self._pool_rows = np.empty((0, rows.width), np.float32)
        if rows.on_disk:
            self._fit = np.sort(fit)
            edges = np.arange(0, len(rows) + rows.block_rows, rows.block_rows)
            # block b contains the fit rows _fit[_block_starts[b] : _block_starts[b + 1]]
            self._block_starts = np.searchsorted(self._fit, edges)
        else:
            self._x = scale(torch.from_numpy(rows.take(fit))).to(device)

    def __len__(self) -> int:
        """Return the number of rows per epoch."""
        return self._count

    def take(self, epoch: int, start: int, stop: int) -> Tensor:
        """Return the rows of `epoch` from position `start` up to but not including `stop`, in model units."""
        if self._rows.on_disk:
            return self._take_from_disk(epoch, start, stop)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._seed, epoch, self._count).to(self._device)
        return self._x.index_select(0, self._order[start:stop])

    def _take_from_disk(self, epoch: int, start: int, stop: int) -> Tensor:
        if epoch != self._epoch:
            self._start_epoch(epoch)
        parts = []
        while start < stop:
            pool = int(np.searchsorted(self._pool_ends, start, side="right"))
            first, end = self._pool_range(pool)
            parts.append(self._shuffled_pool(pool)[start - first : min(stop, end) - first])
            start = end
        return self._scale(torch.from_numpy(np.concatenate(parts))).to(self._device)

    def _start_epoch(self, epoch: int) -> None:
        """Choose the order of the blocks, and divide them into pools."""
        blocks = epoch_order(self._seed, epoch, len(self._block_starts) - 1).numpy()
        self._pools = [blocks[first : first + POOL_BLOCKS] for first in range(0, len(blocks), POOL_BLOCKS)]
        sizes = [sum(int(self._block_starts[b + 1] - self._block_starts[b]) for b in pool) for pool in self._pools]
        self._pool_ends = np.cumsum(sizes)  # position in the epoch where each pool ends
        self._epoch, self._pool = epoch, -1

    def _pool_range(self, pool: int) -> tuple[int, int]:
        """Return the positions in the epoch where `pool` starts and ends."""
        return (int(self._pool_ends[pool - 1]) if pool else 0), int(self._pool_ends[pool])

    def _shuffled_pool(self, pool: int) -> Floats:
        """Return the rows of `pool`, permuted. Only the last pool that was read stays in memory."""
        if pool == self._pool:
            return self._pool_rows
        first, end = self._pool_range(pool)
        size = end - first
        random = random_stream(self._seed, SHUFFLE, self._epoch * len(self._pools) + pool)
        positions = torch.randperm(size, generator=random).numpy()
        rows, filled = np.empty((size, self._rows.width), np.float32), 0
        for block in self._pools[pool]:
            fit = self._fit[self._block_starts[block] : self._block_starts[block + 1]]
            start = int(block) * self._rows.block_rows
            values = self._rows.read_range(start, start + self._rows.block_rows)
            rows[positions[filled : filled + len(fit)]] = values[fit - start]
            filled += len(fit)
        self._pool, self._pool_rows = pool, rows
        return rows
