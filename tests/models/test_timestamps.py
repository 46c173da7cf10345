"""Timestamps as exact moments."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.timestamps import Moment, to_moment, to_unix_seconds

SECONDS = 1_706_702_400  # 2024-01-31T12:00:00Z


@pytest.mark.parametrize(
    ("value", "nanoseconds", "form"),
    [
        ("2024-01-31T12:00:00Z", SECONDS * 10**9, "zone"),
        ("2024-01-31 13:00:00+01:00", SECONDS * 10**9, "zone"),
        ("20240131T120000Z", SECONDS * 10**9, "zone"),
        ("2024-01-31T12:00", SECONDS * 10**9, "no zone"),
        ("2024-01-31", (SECONDS - 12 * 3600) * 10**9, "no zone"),
        ("2024-01-31T12:00:00.123456789Z", SECONDS * 10**9 + 123_456_789, "zone"),
        ("2024-01-31T12:00:00.1234567Z", SECONDS * 10**9 + 123_456_700, "zone"),
        (" 2024-01-31t12:00:00z ", SECONDS * 10**9, "zone"),
        (SECONDS, SECONDS * 10**9, "s"),
        (str(SECONDS), SECONDS * 10**9, "s"),
        (f"{SECONDS}.25", SECONDS * 10**9 + 250_000_000, "s"),
        (SECONDS + 0.123, SECONDS * 10**9 + 123_000_000, "s"),
        (f"{SECONDS}123", SECONDS * 10**9 + 123_000_000, "ms"),
        (f"{SECONDS}123456", SECONDS * 10**9 + 123_456_000, "us"),
        (f"{SECONDS}123456789", SECONDS * 10**9 + 123_456_789, "ns"),
        (-1, -(10**9), "s"),
    ],
)
def test_timestamp_of_each_form_gives_the_exact_moment(value: object, nanoseconds: int, form: str) -> None:
    assert to_moment(value) == (nanoseconds, form)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "yesterday",
        "31.01.2024",
        "nan",
        "inf",
        "1e999999999",
        "1_000",
        "2024-13-01",
        "2300-01-01",
        1e19,
        99e9,
        None,
        True,
    ],
)
def test_value_that_is_no_timestamp_or_is_beyond_the_year_2262_gives_none(value: object) -> None:
    assert to_moment(value) is None


@given(st.datetimes(datetime(1700, 1, 1), datetime(2250, 1, 1)))  # noqa: DTZ001  # hypothesis wants naive limits
def test_moment_of_any_text_agrees_with_the_seconds_that_requests_use(moment: datetime) -> None:
    text = moment.isoformat()
    found = to_moment(text)
    assert isinstance(found, Moment)
    assert found.nanoseconds / 1e9 == pytest.approx(to_unix_seconds(text), abs=1e-5)
    exact = (moment.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()
    assert found.nanoseconds / 1e9 == pytest.approx(exact, abs=1e-5)
