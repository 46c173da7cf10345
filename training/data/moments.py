"""Mean, covariance and range of the rows of a table, computed in float64 in one pass over blocks of rows.

Preprocessing and PCA need only these moments. The table is therefore read only once, one block at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MAX_EXACT = 2.0**24  # float32 sums of integers are exact up to this value
MARGIN = 0.75  # the largest sum of squares in a float32 product should be about this share of MAX_EXACT
SMALL_MEAN = 0.01  # columns whose squared mean is below this share of their variance need no shift
MIN_ROWS = 64  # minimum number of rows per float32 product; with fewer rows, float32 is not faster than float64
MAX_ROWS = 2_048  # maximum number of rows per product; more rows exceed the processor's cache

Doubles = npt.NDArray[np.float64]
Block = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Moments:
    """The moments of N rows of D features, in float64."""

    rows: int  # N
    mean: Tensor  # [D]
    variance: Tensor  # [D], divided by N - 1: the diagonal of the covariance
    covariance: Tensor | None  # [D, D], divided by N - 1; None if it was not requested
    low: Tensor  # [D], the smallest values
    high: Tensor  # [D], the largest values

    def scaled(self, shift: Tensor, scale: Tensor) -> "Moments":
        """Return the moments of (x - shift) / scale, for shift [D] and scale [D] > 0."""
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
    """Return the moments of all rows in `blocks`, each [n, D] and finite.

    The sums are over deviations from a shift, not over the values themselves. The variance is the mean of the squared
    deviations minus the square of the mean deviation. The shift is near the mean of the first rows, so the mean
    deviation is small and the subtraction loses little precision.

    Args:
        with_covariance: whether to compute the covariance, which takes memory for a few [D, D] matrices.

    Raises:
        ValueError: there are no rows.
    """
    sums: _Sums | None = None
    for block in filter(len, blocks):
        sums = sums or _Sums(block, with_covariance)
        sums.add(block)
    if sums is None:
        raise ValueError("expected at least one row, got none")
    return sums.moments()


class _Sums:
    """Sums of deviations from a shift, over the rows added so far. The first block determines the shift."""

    def __init__(self, first: Block, with_covariance: bool) -> None:
        first = first[:MAX_ROWS]
        mean = first.mean(axis=0, dtype=np.float64)  # [D]
        variance = np.square(first - mean).mean(axis=0)  # [D]
        integers = _are_integers(first)
        shift = np.float64(np.float32(np.rint(mean))) if integers else mean  # [D]
        # `add` skips a column in a block if all values of the column there equal the shift. A column that is mostly 0
        # has a small mean. Its shift is therefore 0, so that `add` can often skip the column.
        self._shift = np.where(mean**2 > SMALL_MEAN * variance, shift, 0.0)  # [D]
        largest = float((variance + (mean - self._shift) ** 2).max())  # largest mean squared deviation of a column
        rows = int(MARGIN * MAX_EXACT / max(largest, 1.0))
        self._float32_rows = min(rows, MAX_ROWS) if integers and rows >= MIN_ROWS else 0
        self._rows = 0
        self._sum, self._squares = np.zeros_like(mean), np.zeros_like(mean)
        self._products = np.zeros((len(mean), len(mean))) if with_covariance else None  # lower triangle
        self._low, self._high = np.full_like(mean, np.inf), np.full_like(mean, -np.inf)

    def add(self, block: Block) -> None:
        """Add the rows of `block` [n, D]."""
        self._rows += len(block)
        low, high = block.min(axis=0), block.max(axis=0)  # [D], [D]
        self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)
        nonzero = np.flatnonzero((low != self._shift) | (high != self._shift))  # [d], columns that deviate from shift
        if len(nonzero) == 0:
            return
        part = block if len(nonzero) == len(low) else block.take(nonzero, axis=1)  # [n, d]
        if self._products is None:
            u = part - self._shift[nonzero]  # [n, d]
            self._sum[nonzero] += u.sum(axis=0)
            self._squares[nonzero] += np.einsum("nd,nd->d", u, u)
            return
        total, products = _sum_and_products(part, self._shift[nonzero], self._float32_rows)
        self._sum[nonzero] += total
        if len(nonzero) == len(low):
            self._products += products
        else:
            self._products[np.ix_(nonzero, nonzero)] += products

    def moments(self) -> Moments:
        """Return the moments of the rows so far."""
        deviation = self._sum / self._rows  # [D], mean - shift
        divisor = max(self._rows - 1, 1)
        if self._products is None:
            covariance, variance = None, (self._squares - self._rows * deviation**2) / divisor
        else:
            lower = np.tril(self._products - self._rows * np.outer(deviation, deviation)) / divisor
            np.fill_diagonal(lower, np.maximum(lower.diagonal(), 0.0))
            covariance, variance = torch.from_numpy(lower + np.tril(lower, -1).T), lower.diagonal().copy()
        return Moments(
            rows=self._rows,
            mean=torch.from_numpy(self._shift + deviation),
            variance=torch.from_numpy(np.maximum(variance, 0.0)),
            covariance=covariance,
            low=torch.from_numpy(self._low),
            high=torch.from_numpy(self._high),
        )


def _sum_and_products(x: Block, shift: Doubles, float32_rows: int) -> tuple[Doubles, Doubles]:
    """Return the sums of the deviations and of their products over the rows x [n, D], in float64.

    The deviations are u = x minus the shift. Their sum has the shape [D]. The products are the lower triangle of the
    matrix u' u [D, D].

    Integers are multiplied in float32, which is twice as fast as float64. The rows are divided into parts so short that
    the float32 sums of a part are normally exact: if every column's sum of squares is below MAX_EXACT, so is every
    other sum. Parts with larger sums are computed in float64, and so are parts that contain fractions.

    Args:
        float32_rows: rows per float32 product; 0 to use float64 only. A positive value requires every shift to be an
            integer that float32 represents exactly.
    """
    from scipy.linalg.blas import dsyrk, ssyrk  # each computes one triangle of x.T @ x, and can add it to a matrix

    size, shift32 = len(shift), shift.astype(np.float32)
    total, products = np.zeros(size), np.zeros((size, size), order="F")
    product = np.zeros((size, size), np.float32, order="F")
    step = float32_rows or MAX_ROWS
    for part in (x[start : start + step] for start in range(0, len(x), step)):
        if float32_rows and _are_integers(part):
            u = (part - shift32).astype(np.float32, copy=False)
            product = ssyrk(1.0, u.T, c=product, overwrite_c=True)  # upper triangle, in Fortran order
            if product.diagonal().max(initial=0.0) < MAX_EXACT:
                total += u.sum(axis=0)
                products += product
                continue
        v = part - shift
        total += v.sum(axis=0)
        products = dsyrk(1.0, v.T, beta=1.0, c=products, overwrite_c=True)
    return total, products.T


def _are_integers(values: Block) -> bool:
    """Return whether all `values` are integers. Fractions usually occur in the first row, so it is checked first."""
    if values.dtype.kind in "iu":
        return True
    return bool((values[:1] == np.rint(values[:1])).all() and (values == np.rint(values)).all())
