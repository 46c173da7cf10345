"""Split the rows of a table so that every row both fits and calibrates: cross-conformal calibration."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.data.copies import Copies
from training.data.table import Split, most_kept_rows, split_rows
from training.errors import DataError

HELD_OUT_SHARE = 0.1  # of the distinct rows that a model may use, as in `split_rows`


@dataclass(frozen=True)
class CrossSplit(Split):
    """A split in which 90 % of the rows fit the published model, and a tenth is held out.

    The calibration rows are the first of each set of copies. Each is scored by a model that has seen neither the row
    nor a copy of it: see `folds`.
    """

    order: npt.NDArray[np.int64]  # [distinct], the distinct rows in random order
    copies: Copies | None  # which rows are copies of each other; None if no row has a copy

    def folds(self, count: int) -> list[Split]:
        """Return `count` splits. Every calibration row calibrates in exactly one of them.

        In each split, the rows of one fold calibrate. Of the other rows, a tenth is held out, and the rest fit.
        Further copies of a calibration row are in no set.

        Args:
            count: at most the number of distinct rows.
        """
        splits = []
        for calibration in np.array_split(np.arange(len(self.order)), count):
            others = np.roll(self.order, -int(calibration[-1]) - 1)[: len(self.order) - len(calibration)]
            fit, held_out = _divide(others, self.copies)
            rows = _first_rows(self.order[calibration], self.copies)
            splits.append(Split(fit, held_out, rows[np.isin(rows, self.calibration)]))
        return splits


def cross_split(count: int, seed: int, width: int = 1, copies: Copies | None = None) -> CrossSplit:
    """Split `count` rows for cross-conformal calibration. The same arguments give the same split.

    Args:
        seed: at least 0 and below 2^32.
        width: values per row.
        copies: which rows are copies of each other; None if no row has a copy.

    Raises:
        DataError: there are fewer than MINIMUM_ROWS distinct rows, or more than can be kept in memory.
    """
    split_rows(count, seed, width, copies)  # raises DataError if there are too few rows
    distinct = count if copies is None else copies.distinct
    if distinct > most_kept_rows(width):
        raise DataError(
            f"--calibration cross keeps all rows in memory: expected at most {most_kept_rows(width):,} distinct rows "
            f"of {width:,} values, got {distinct:,}; use --calibration split, whose calibration set is large enough"
        )
    if distinct == count:
        copies = None
    order = np.random.RandomState(seed).permutation(distinct)
    fit, held_out = _divide(order, copies)
    return CrossSplit(fit, held_out, _first_rows(order, copies), order=order, copies=copies)


def _divide(
    distinct: npt.NDArray[np.int64], copies: Copies | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the fit rows, with all their copies, and the held-out rows, without further copies."""
    held_out = round(HELD_OUT_SHARE * len(distinct)) or 1
    fit = distinct[held_out:]
    if copies is not None:
        fit = np.flatnonzero(np.isin(copies.groups, fit))
        fit = fit[np.random.RandomState(len(fit)).permutation(len(fit))]
    return fit, _first_rows(distinct[:held_out], copies)


def _first_rows(distinct: npt.NDArray[np.int64], copies: Copies | None) -> npt.NDArray[np.int64]:
    """Return the first row of each of these sets of copies."""
    return distinct if copies is None else copies.first_rows[distinct]
