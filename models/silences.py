"""Find the rows for which a silence of the policy holds. This module does not import torch."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from fnmatch import fnmatchcase
from functools import lru_cache
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

from models.policy_rules import DAYS, Silence

# Seconds. Time zones change their offset at the beginning of a quarter of an hour. A change at another minute, as in
# Antarctica/Casey in 2022 (16:01 UTC), is taken to happen up to a quarter of an hour later.
BLOCK = 900
DAY = 86_400  # seconds
Mask = npt.NDArray[np.bool_]
_EPOCH = date(1970, 1, 1)
_EPOCH_WEEKDAY = 3  # 1 January 1970 was a Thursday


class Silences:
    """The silences of one model. A silence holds while a clock on the wall in its time zone shows one of its times.

    If the clock is set forward past the start, the silence begins at the new time. If it is set back, a silence holds
    in both of the repeated hours.

    Raises:
        ZoneInfoNotFoundError: this machine does not know a time zone.
    """

    def __init__(self, silences: Sequence[Silence]) -> None:
        self._silences = [_Clock(silence) for silence in silences]

    def estimate_ns(self, rows: int) -> float:
        """Return the estimated time that `hold` takes for `rows` rows, in nanoseconds."""
        return (50_000 + 3_000 * rows) * len(self._silences)

    def hold(
        self, times: npt.NDArray[np.float64] | None, groups: Sequence[str | None] | None, rows: int, now: float
    ) -> Mask:
        """Return for which rows a silence holds, [N].

        Args:
            times: [N] in Unix seconds. A row without a time (NaN), or every row if this is None, gets the time `now`.
            groups: [N], with None for a row without a group; None if no row has one.
            rows: the number N.
            now: Unix seconds.
        """
        seconds = np.full(rows, now) if times is None else np.where(np.isnan(times), now, times)
        held = np.zeros(rows, bool)
        for silence in self._silences:
            held |= silence.hold(seconds, groups)
        return held


class _Clock:
    """One silence, with its times as seconds after midnight and its dates as days since 1 January 1970."""

    def __init__(self, silence: Silence) -> None:
        self._zone = ZoneInfo(silence.zone)
        self._patterns = None if silence.groups is None else tuple(silence.groups)
        self._days = np.array([day in silence.days for day in DAYS])
        self._start = 0 if silence.start is None else _seconds(silence.start)
        self._end = DAY if silence.end is None or silence.end == time() else _seconds(silence.end)
        self._first = -np.inf if silence.first is None else (silence.first - _EPOCH).days
        self._last = np.inf if silence.last is None else (silence.last - _EPOCH).days

    def hold(self, seconds: npt.NDArray[np.float64], groups: Sequence[str | None] | None) -> Mask:
        """Return for which rows [N] the silence holds, given their times in Unix seconds [N] and their groups [N]."""
        blocks, places = np.unique(seconds // BLOCK, return_inverse=True)
        offsets = np.array([_offset_in_block(self._zone, block) for block in blocks.tolist()])
        local = seconds + offsets[places]
        day = np.floor(local / DAY)
        of_day = local - day * DAY
        if self._start < self._end:
            held = self._is_on(day) & (of_day >= self._start) & (of_day < self._end)
        else:  # past midnight
            held = (self._is_on(day) & (of_day >= self._start)) | (self._is_on(day - 1) & (of_day < self._end))
        if self._patterns is not None:
            if groups is None:
                return np.zeros(len(seconds), bool)
            held &= np.array([group is not None and _matches(self._patterns, group) for group in groups], bool)
        return np.asarray(held)

    def _is_on(self, day: npt.NDArray[np.float64]) -> Mask:
        """Return whether the silence can begin on these days [N], counted from 1 January 1970."""
        weekday = ((day + _EPOCH_WEEKDAY) % 7).astype(np.intp)
        return np.asarray(self._days[weekday] & (day >= self._first) & (day <= self._last))


@lru_cache(maxsize=10_000)
def _offset_in_block(zone: ZoneInfo, block: float) -> float:
    """Return the offset of the zone from UTC, in seconds, at the beginning of block number `block` since 1970."""
    try:
        offset = datetime.fromtimestamp(block * BLOCK, UTC).astimezone(zone).utcoffset()
    except (ValueError, OverflowError, OSError):  # the block is before the year 1 or after the year 9999
        return 0.0
    return 0.0 if offset is None else offset.total_seconds()


@lru_cache(maxsize=10_000)
def _matches(patterns: tuple[str, ...], group: str) -> bool:
    return any(fnmatchcase(group, pattern) for pattern in patterns)


def _seconds(moment: time) -> int:
    return moment.hour * 3600 + moment.minute * 60 + moment.second
