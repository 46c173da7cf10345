"""Mean, covariance and range of any number of rows: one pass over blocks of them, exact to float64.

What preprocessing and PCA need of the rows is here, so they are read once, and no more of them than a block is held.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

EXACT = 2.0**24  # float32 tells whole numbers apart up to here: sums of whole products that stay below are exact
MARGIN = 0.75  # of EXACT that is aimed at: not all rows are alike
SMALL = 0.01  # share of the variance: a squared mean below it may stay, nothing is lost when it is subtracted
FEWEST_ROWS, MOST_ROWS = 64, 2_048  # at a time in float32: fewer are not faster, more are not in the cache

Doubles = npt.NDArray[np.float64]
Block = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Moments:
    """What N rows of D features are like, column by column and two columns at a time. All float64."""

    rows: int  # N
    mean: Tensor  # [D]
    variance: Tensor  # [D], divided by N - 1, as the covariance's diagonal is
    covariance: Tensor | None  # [D, D], divided by N - 1; None where it was not asked for
    low: Tensor  # [D], the smallest values
    high: Tensor  # [D], the largest values

    def scaled(self, shift: Tensor, scale: Tensor) -> "Moments":
        """The moments of (x - shift) / scale, for shift and scale > 0, [D] each."""
        shift, scale = shift.double(), scale.double()
        return replace(
            self,
            mean=(self.mean - shift) / scale,
            variance=self.variance / scale.square(),
            covariance=None if self.covariance is None else self.covariance / torch.outer(scale, scale),
            low=(self.low - shift) / scale,
            high=(self.high - shift) / scale,
        )


def compute_moments(blocks: Iterable[Block], with_covariance: bool = True) -> Moments:
    """The moments of all rows in `blocks`, each [n, D], finite. Holds a block and a few [D, D] matrices.

    Sums are of deviations from the mean of the first rows, or near it: wherever the columns lie, little is lost when
    the square of the mean deviation is subtracted from the mean square.

    Args:
        with_covariance: whether the covariance is wanted. Without it the memory is a block.

    Raises ValueError if there are no rows.
    """
    sums: _Sums | None = None
    for block in filter(len, blocks):
        sums = sums or _Sums(block, with_covariance)
        sums.add(block)
    if sums is None:
        raise ValueError("expected at least one row, got none")
    return sums.moments()


class _Sums:
    """Sums over the rows so far, of deviations from a shift that the first block decides."""

    def __init__(self, first: Block, with_covariance: bool) -> None:
        first = first[:MOST_ROWS]
        mean = first.mean(axis=0, dtype=np.float64)  # [D]
        variance = np.square(first - mean).mean(axis=0)  # [D]
        whole = _whole(first)
        shift = np.float64(np.float32(np.rint(mean))) if whole else mean  # [D]
        self._shift = np.where(mean**2 > SMALL * variance, shift, 0.0)  # [D]; 0 spares the columns that are mostly 0
        largest = float((variance + (mean - self._shift) ** 2).max())  # mean square of a column
        rows = int(MARGIN * EXACT / max(largest, 1.0))
        self._float32_rows = min(rows, MOST_ROWS) if whole and rows >= FEWEST_ROWS else 0
        self._rows = 0
        self._sum, self._squares = np.zeros_like(mean), np.zeros_like(mean)
        self._products = np.zeros((len(mean), len(mean))) if with_covariance else None  # the lower triangle
        self._low, self._high = np.full_like(mean, np.inf), np.full_like(mean, -np.inf)

    def add(self, block: Block) -> None:
        """Count `block` [n, D] in."""
        self._rows += len(block)
        low, high = block.min(axis=0), block.max(axis=0)  # [D], [D]
        self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)
        away = np.flatnonzero((low != self._shift) | (high != self._shift))  # [d], the columns that count
        if len(away) == 0:
            return
        part = block if len(away) == len(low) else block.take(away, axis=1)  # [n, d]
        if self._products is None:
            u = part - self._shift[away]  # [n, d]
            self._sum[away] += u.sum(axis=0)
            self._squares[away] += np.einsum("nd,nd->d", u, u)
            return
        total, products = _sums(part, self._shift[away], self._float32_rows)
        self._sum[away] += total
        if len(away) == len(low):
            self._products += products
        else:
            self._products[np.ix_(away, away)] += products

    def moments(self) -> Moments:
        """Mean and covariance of what was counted."""
        away = self._sum / self._rows  # [D], of the mean from the shift
        free = max(self._rows - 1, 1)
        if self._products is None:
            covariance, spread = None, (self._squares - self._rows * away**2) / free
        else:
            lower = np.tril(self._products - self._rows * np.outer(away, away)) / free
            np.fill_diagonal(lower, np.maximum(lower.diagonal(), 0.0))
            covariance, spread = torch.from_numpy(lower + np.tril(lower, -1).T), lower.diagonal().copy()
        values = (self._shift + away, np.maximum(spread, 0.0), self._low, self._high)
        mean, variance, low, high = (torch.from_numpy(value) for value in values)
        return Moments(self._rows, mean, variance, covariance, low, high)


def _sums(x: Block, shift: Doubles, float32_rows: int) -> tuple[Doubles, Doubles]:
    """The sums of u [D] and of u' u [D, D] for the deviations u = x - shift of rows x [n, D], in float64.

    Of u' u it gives the lower triangle. Whole numbers are multiplied in float32, twice as fast, so few rows at a time
    that it is exact: a sum of squares below EXACT was exact all the way, and in size no sum of products exceeds the
    larger of its two sums of squares, nor does a sum of whole numbers. Where it was not exact, and for other numbers,
    float64 does it.

    Args:
        float32_rows: how many rows at a time; 0 to not try. Above 0 every shift is a whole float32.
    """
    from scipy.linalg.blas import dsyrk, ssyrk  # half of the work that x.T @ x would be, into memory that is there

    size, short = len(shift), shift.astype(np.float32)
    total, products = np.zeros(size), np.zeros((size, size), order="F")
    product = np.zeros((size, size), np.float32, order="F")
    step = float32_rows or MOST_ROWS
    for part in (x[start : start + step] for start in range(0, len(x), step)):
        if float32_rows and _whole(part):
            u = (part - short).astype(np.float32, copy=False)
            product = ssyrk(1.0, u.T, c=product, overwrite_c=True)  # its upper triangle: Fortran's rows are columns
            if product.diagonal().max(initial=0.0) < EXACT:
                total += u.sum(axis=0)
                products += product
                continue
        v = part - shift
        total += v.sum(axis=0)
        products = dsyrk(1.0, v.T, beta=1.0, c=products, overwrite_c=True)
    return total, products.T


def _whole(values: Block) -> bool:
    """Whether all of `values` are whole numbers; most that are not are told by their first row."""
    if values.dtype.kind in "iu":
        return True
    return bool((values[:1] == np.rint(values[:1])).all() and (values == np.rint(values)).all())
