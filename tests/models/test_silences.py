"""Silences by the clock on the wall: time zones, the hours when clocks are set, midnight, dates and groups."""

from datetime import UTC, datetime

import numpy as np
import pytest

from models.policy_rules import Silence
from models.silences import Silences


def held(silence: Silence, *times: str, groups: list[str | None] | None = None) -> list[bool]:
    """Return whether the silence holds at times in ISO 8601 and UTC."""
    seconds = np.array([datetime.fromisoformat(time).replace(tzinfo=UTC).timestamp() for time in times])
    found: list[bool] = Silences([silence]).hold(seconds, groups, len(seconds), now=0.0).tolist()
    return found


NIGHT = Silence(zone="Europe/Berlin", start="02:00", end="04:00")


def test_times_are_those_of_the_time_zone_in_winter_and_in_summer() -> None:
    assert held(NIGHT, "2024-01-15T00:59:59", "2024-01-15T01:00", "2024-01-15T02:59:59", "2024-01-15T03:00") == [
        False, True, True, False,
    ]  # fmt: skip
    assert held(NIGHT, "2024-07-15T00:00", "2024-07-15T01:59:59", "2024-07-15T02:00") == [True, True, False]


def test_silence_lasts_one_hour_less_when_clocks_are_set_forward() -> None:
    """On 31 March 2024, the clock in Berlin goes from 01:59:59 (00:59:59 UTC) to 03:00 (01:00 UTC)."""
    times = "2024-03-31T00:59:59", "2024-03-31T01:00", "2024-03-31T01:59:59", "2024-03-31T02:00"
    assert held(NIGHT, *times) == [False, True, True, False]


def test_silence_holds_in_both_of_the_repeated_hours_when_clocks_are_set_back() -> None:
    """On 27 October 2024, the clock in Berlin shows 02:00 to 02:59 twice: from 00:00 and from 01:00 UTC."""
    times = "2024-10-26T23:59:59", "2024-10-27T00:00", "2024-10-27T01:30", "2024-10-27T02:59:59", "2024-10-27T03:00"
    assert held(NIGHT, *times) == [False, True, True, True, False]


def test_silence_past_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    silence = Silence(days=["fri"], start="22:00", end="06:00")
    friday, saturday = "2024-05-03", "2024-05-04"
    times = f"{friday}T05:00", f"{friday}T22:00", f"{saturday}T05:59", f"{saturday}T06:00", f"{saturday}T23:00"
    assert held(silence, *times) == [False, True, True, False, False]


def test_dates_include_the_first_and_the_last_day_in_the_time_zone() -> None:
    silence = Silence(zone="Asia/Tokyo", first="2024-12-30", last="2024-12-31")
    times = "2024-12-29T14:59:59", "2024-12-29T15:00", "2024-12-31T14:59:59", "2024-12-31T15:00"
    assert held(silence, *times) == [False, True, True, False]


def test_groups_are_patterns_and_a_row_without_a_group_matches_none() -> None:
    silence = Silence(groups=["db-*", "web-1"])
    times = ["2024-05-03T00:00"] * 4
    assert held(silence, *times, groups=["db-7", "web-1", "web-2", None]) == [True, True, False, False]
    assert held(silence, *times) == [False] * 4


def test_row_without_a_time_is_of_now() -> None:
    silences = Silences([NIGHT])
    now = datetime(2024, 1, 15, 1, 30, tzinfo=UTC).timestamp()
    assert silences.hold(None, None, 2, now).tolist() == [True, True]
    assert silences.hold(np.array([np.nan, now + 3600 * 12]), None, 2, now).tolist() == [True, False]


def test_time_that_no_calendar_has_is_in_utc() -> None:
    assert Silences([NIGHT]).hold(np.array([5e6 * 86_400 + 3 * 3600]), None, 1, 0.0).tolist() == [True]


@pytest.mark.parametrize("half_hour", range(0, 48 * 366, 977))
def test_silence_agrees_with_the_local_time_of_the_standard_library(half_hour: int) -> None:
    from zoneinfo import ZoneInfo

    seconds = datetime(2024, 1, 1, tzinfo=UTC).timestamp() + 1800 * half_hour
    local = datetime.fromtimestamp(seconds, ZoneInfo("Australia/Lord_Howe"))
    silence = Silence(zone="Australia/Lord_Howe", days=["sun", "wed"], start="05:30", end="17:00")
    expected = local.weekday() in (2, 6) and (5, 30) <= (local.hour, local.minute) < (17, 0)
    assert Silences([silence]).hold(np.array([seconds]), None, 1, 0.0).tolist() == [expected]
