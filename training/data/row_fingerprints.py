"""Recognise rows that trained a model, by hashes that the artifact contains.

The hashes are a bottom-k sketch (Cohen, "Size-estimation framework with applications to transitive closure and
reachability", 1997): the smallest hashes of all rows. Of any other set of rows, those whose hash is at most the largest
hash in the sketch are a random sample, and the sketch tells exactly which of them trained the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.data.copies import Hashes, row_hashes
from training.data.row_store import RowStore

SKETCH_SIZE = 16_384  # hashes, 8 bytes each
MANTISSA_BITS = 12  # values are rounded to about four digits, because files are often saved again with fewer digits
MANY_ROWS = 100  # a table with this many distinct rows, each of which occurs several times, was copied
FEW_SINGLE_ROWS = 0.01
EXCESS = 0.1  # rows count as training rows if the share of known rows exceeds the usual share by more than this
WARNING_PROBABILITY = 1e-3  # and if chance gives such a share with at most this probability


@dataclass(frozen=True)
class KnownRows:
    """The share of rows that trained a model.

    Args:
        share: estimated share of the rows that trained the model.
        usual: share to expect of new rows, because rows repeat by themselves.
        significant: whether chance does not explain the difference.
    """

    share: float
    usual: float
    significant: bool


def make_sketch(x: RowStore, trained: npt.NDArray[np.int64]) -> bytes:
    """Return the sketch of the rows at `trained`: 16 bytes of header, and sorted hashes.

    The header is the share of rows in `x` that occur again, as float64, and the largest hash that the sketch can
    contain, as uint64, both little-endian.
    """
    hashes = np.concatenate(list(_hashes(x)))
    kept = np.unique(hashes[trained])
    limit = np.iinfo(np.uint64).max if len(kept) <= SKETCH_SIZE else kept[SKETCH_SIZE - 1]
    header = np.array([_repeated_share(hashes)], "<f8").tobytes() + np.array([limit], "<u8").tobytes()
    return header + kept[:SKETCH_SIZE].astype("<u8").tobytes()


def find_known_rows(sketch: bytes, x: RowStore, rows: npt.NDArray[np.int64]) -> KnownRows:
    """Return the share of the rows of `x` at `rows` that are in `sketch`, the result of `make_sketch`."""
    from scipy.stats import binom

    usual, limit = float(np.frombuffer(sketch, "<f8", 1)[0]), np.frombuffer(sketch, "<u8", 1, 8)[0]
    known = np.frombuffer(sketch, "<u8", offset=16)
    hashes = np.concatenate(list(_hashes(x)))[rows]
    hashes = hashes[hashes <= limit]
    if not len(hashes):
        return KnownRows(0.0, usual, significant=False)
    hits = int(np.isin(hashes, known).sum())
    share = hits / len(hashes)
    probability = binom(len(hashes), max(usual, 0.01)).sf(hits - 1)
    return KnownRows(share, usual, significant=share > usual + EXCESS and probability < WARNING_PROBABILITY)


def _hashes(x: RowStore) -> Iterator[Hashes]:
    for _, rows in x.blocks():
        yield row_hashes(rows, MANTISSA_BITS)


def _repeated_share(hashes: Hashes) -> float:
    """Return the probability that a new row equals a row that has occurred (Good and Turing).

    If the table was copied as a whole, so that hardly any row occurs only once, the result is 0.
    """
    counts = np.unique(hashes, return_counts=True)[1]
    single = float((counts == 1).sum()) / len(hashes)
    was_copied = single < FEW_SINGLE_ROWS and len(counts) >= MANY_ROWS
    return 0.0 if was_copied else 1.0 - single
