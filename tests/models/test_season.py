"""Encodings of the time, and the offsets of time zones."""

import math
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from models.season import PERIODS, Period, columns, encode, encode_one, offsets_of_zone, to_local

HOUR, DAY = 3600.0, 86_400.0
ZONES = ["UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Asia/Kathmandu", "Africa/Casablanca"]


def local_seconds(moment: datetime) -> float:
    """Return the time that a clock shows, in seconds since 1970."""
    return (moment.replace(tzinfo=None) - datetime(1970, 1, 1)).total_seconds()  # noqa: DTZ001 - a time on a clock


@pytest.mark.parametrize("name", ZONES)
def test_local_time_of_a_zone_equals_that_of_the_clock_from_1973_to_2099(name: str) -> None:
    random = np.random.RandomState(0)
    times = random.randint(100_000_000, 4_000_000_000, 3000).astype(float)
    expected = [local_seconds(datetime.fromtimestamp(time, ZoneInfo(name))) for time in times]
    np.testing.assert_array_equal(to_local(times, *offsets_of_zone(name)), expected)


def test_local_time_at_the_second_of_both_changes_of_the_clock_gives_the_new_offset() -> None:
    moments, offsets = offsets_of_zone("Europe/Berlin")
    spring = datetime(2024, 3, 31, 1, tzinfo=UTC).timestamp()  # 02:00 becomes 03:00
    autumn = datetime(2024, 10, 27, 1, tzinfo=UTC).timestamp()  # 03:00 becomes 02:00
    times = np.array([spring - 1, spring, autumn - 1, autumn])
    np.testing.assert_array_equal((to_local(times, moments, offsets) - times) / HOUR, [1, 2, 2, 1])


def test_encodings_of_one_local_hour_in_winter_and_in_summer_are_equal() -> None:
    zone = ZoneInfo("Europe/Berlin")
    monday = datetime(2024, 1, 8, 9, tzinfo=zone)
    times = np.array([monday.timestamp(), (monday + timedelta(weeks=26)).timestamp()])  # on the clock: 9:00 on Mondays
    assert (times[1] - times[0]) % DAY == DAY - HOUR
    local = to_local(times, *offsets_of_zone("Europe/Berlin"))
    first, second = encode(local, ("day", "week"))
    np.testing.assert_allclose(first, second, atol=1e-12)


def test_encodings_of_a_week_have_21_columns_of_mean_0_that_a_direct_computation_confirms() -> None:
    local = np.arange(0, 7 * DAY, 600)
    found = encode(local, ("day", "week"))
    day, week = (
        [f(2 * np.pi * k * local / length) for k in (1, 2, 3) for f in (np.cos, np.sin)] for length in (DAY, 7 * DAY)
    )
    products = [a * b for a in day[:2] for b in week[:4]]
    np.testing.assert_allclose(found, np.column_stack([np.ones(len(local)), *day, *week, *products]), atol=1e-9)
    np.testing.assert_allclose(found.mean(axis=0), np.eye(21)[0], atol=1e-12)
    assert [columns(()), columns(("day",)), columns(("week",)), columns(("day", "week"))] == [1, 7, 7, 21]


@pytest.mark.parametrize("time", [np.nan, np.inf, -np.inf])
def test_encodings_of_an_unknown_time_are_the_mean_over_the_week(time: float) -> None:
    np.testing.assert_array_equal(encode(np.array([time, 0.0]), ("day", "week"))[0], np.eye(21)[0])


@pytest.mark.parametrize("name", ["Mars/Olympus", "", "../../etc/passwd", "Europe", "a\0b", "x" * 300])
def test_offsets_of_a_zone_that_does_not_exist_raise_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match="expected a time zone of the IANA database"):
        offsets_of_zone(name)


@pytest.mark.parametrize("periods", [("day",), ("week",), PERIODS])
def test_encodings_of_one_time_equal_those_of_many_times_bit_for_bit(periods: tuple[Period, ...]) -> None:
    times = np.append(np.random.RandomState(0).uniform(-1e9, 4e9, 500), [0.0, math.nan, math.inf])
    single = np.array([encode_one(time, periods) for time in times.tolist()])
    np.testing.assert_array_equal(single, encode(times, periods))
