"""Smooth encodings of the hour and of the day of the week, in local time. This module does not import torch.

The offsets of a time zone are part of the artifact. A server therefore needs no database of time zones, and training
and serving agree even if their databases differ.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, get_args
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

Period = Literal["day", "week"]
PERIODS: tuple[Period, ...] = get_args(Period)
SECONDS: dict[Period, int] = {"day": 86_400, "week": 7 * 86_400}
HARMONICS = 3  # per period: 24, 12 and 8 hours for the day; shapes that change faster are smoothed
PRODUCTS = (2, 4)  # the first 2 columns of the day times the first 4 of the week: days of the week may differ in shape
FIRST_YEAR, LAST_YEAR = 1970, 2100  # offsets are known between the beginnings of these years, and constant outside

_ANGLES = 2 * np.pi * np.arange(1, HARMONICS + 1)  # radians of each harmonic in one period
_WEEK = 1 + 2 * HARMONICS  # the first column of the week, if there are columns of the day

Floats = npt.NDArray[np.float64]


def columns(periods: Sequence[Period]) -> int:
    """Return E, the number of columns of `encode`: 1, 7 for one period, or 21 for both."""
    both = PRODUCTS[0] * PRODUCTS[1] if len(periods) == len(PERIODS) else 0
    return 1 + 2 * HARMONICS * len(periods) + both


def encode(local: Floats, periods: Sequence[Period]) -> Floats:
    """Return the encodings [B, E] of local times.

    The columns are 1, cosine and sine of three harmonics of each period, and products of the two periods. All columns
    but the first have the mean 0 over a week. A row whose time is unknown (NaN) gets this mean.

    Args:
        local: Unix time plus the offset of the time zone, in seconds, [B].
        periods: the periods in the order of PERIODS.
    """
    unknown = ~np.isfinite(local)
    if unknown.any():
        local = np.where(unknown, 0.0, local)
    found = np.empty((len(local), columns(periods)))
    found[:, 0] = 1.0
    lengths = np.array([SECONDS[period] for period in periods], np.float64)  # [P]
    turns = np.remainder(local[:, None], lengths) / lengths  # [B, P], share of each period that has passed
    angles = (turns[:, :, None] * _ANGLES).reshape(len(local), -1)  # [B, 3 P]
    end = 1 + 2 * HARMONICS * len(periods)
    found[:, 1:end:2] = np.cos(angles)
    found[:, 2:end:2] = np.sin(angles)
    if end < found.shape[1]:
        day, week = found[:, 1 : 1 + PRODUCTS[0], None], found[:, None, _WEEK : _WEEK + PRODUCTS[1]]
        found[:, end:] = (day * week).reshape(len(local), -1)
    if unknown.any():
        found[unknown, 1:] = 0.0
    return found


def encode_one(local: float, periods: Sequence[Period]) -> Floats:
    """Return what `encode` returns for one local time, [E]: the same numbers, in half of the time."""
    found = np.zeros(columns(periods))
    found[0] = 1.0
    if not math.isfinite(local):
        return found
    turns = np.array([local % SECONDS[period] / SECONDS[period] for period in periods])
    angles = (turns[:, None] * _ANGLES).ravel()
    end = 1 + 2 * HARMONICS * len(periods)
    found[1:end:2] = np.cos(angles)
    found[2:end:2] = np.sin(angles)
    if end < len(found):
        day, week = found[1 : 1 + PRODUCTS[0], None], found[_WEEK : _WEEK + PRODUCTS[1]]
        found[end:] = (day * week).ravel()
    return found


def offsets_of_zone(name: str) -> tuple[Floats, Floats]:
    """Return the moments at which the offset of a time zone changes, and its offsets.

    Args:
        name: a name of the IANA database, such as Europe/Berlin.

    Returns:
        moments: Unix times in seconds, ascending, [T]; the first is the beginning of FIRST_YEAR.
        offsets: local time minus UTC in seconds, [T + 1]; offset i holds from moment i - 1 up to moment i.

    Raises:
        ValueError: the database of this machine has no zone of this name.
    """
    try:
        zone = ZoneInfo(name)
    except (OSError, ValueError, KeyError) as error:  # ZoneInfoNotFoundError is a KeyError
        raise ValueError(
            f"expected a time zone of the IANA database, such as Europe/Berlin or UTC; this machine has none named "
            f"{name!r}"
        ) from error

    def offset_at(moment: int) -> float:
        offset = datetime.fromtimestamp(moment, zone).utcoffset()
        assert offset is not None
        return offset.total_seconds()

    first, last = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (FIRST_YEAR, LAST_YEAR))
    day, moments, offsets = SECONDS["day"], [float(first)], [offset_at(first)] * 2
    for start in range(first, last, day):
        if offset_at(start + day) == offsets[-1]:
            continue
        low, high = start, start + day  # the offset changes after low, and no later than high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if offset_at(middle) == offsets[-1] else (low, middle)
        moments.append(float(high))
        offsets.append(offset_at(start + day))
    return np.array(moments), np.array(offsets)


def to_local(time: Floats, moments: Floats, offsets: Floats) -> Floats:
    """Return local times in seconds, [B], for Unix times [B]; `moments` and `offsets` are those of the time zone."""
    local: Floats = time + offsets[np.searchsorted(moments, time, side="right")]
    return local
