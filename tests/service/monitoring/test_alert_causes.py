"""The causes that alerts name: kept in shared memory, and written as text."""

import math

import pytest

from service.monitoring.alert_causes import FAMILY, AlertCauses, Cause, format_cause
from service.shared_memory import Segment, SharedCounters

LABELS = ("hosts", "1", "a")


def test_latest_causes_are_those_of_the_newest_row_of_any_process() -> None:
    segments = [Segment(), Segment()]
    first, second = (AlertCauses(SharedCounters(segments, index)) for index in range(2))
    assert first.latest(LABELS) == []
    first.record(LABELS, 20.0, [Cause(0, 1.5, 0.5, 10.0), Cause(3, 2.0, 4.0, 5.0)])
    second.record(LABELS, 10.0, [Cause(1, 9.0, 8.0, 7.0)])
    assert second.latest(LABELS) == [Cause(0, 1.5, 0.5, 10.0), Cause(3, 2.0, 4.0, 5.0)]
    second.record(LABELS, 30.0, [Cause(1, 9.0, 8.0, 7.0)])
    assert first.latest(LABELS) == second.latest(LABELS) == [Cause(1, 9.0, 8.0, 7.0)]


def test_causes_that_a_killed_process_had_not_written_completely_are_left_out() -> None:
    counters = SharedCounters([Segment()], 0)
    causes = AlertCauses(counters)
    causes.record(LABELS, 20.0, [Cause(0, 1.5, 0.5, 10.0)])
    counters.arrays(FAMILY)[LABELS][0][0] += 1.0  # `record` leaves it even
    assert causes.latest(LABELS) == []


@pytest.mark.parametrize(
    ("unit", "cause", "text"),
    [
        ("ms", Cause(0, 900.0, 195.0, 1_741_000_000.0), "900 ms (expected 195 ms) since 2025-03-03T11:06:40Z"),
        (None, Cause(0, 0.125, -3.0), "0.125 (expected -3)"),
        ("%", Cause(0, math.nan, 50.0), "is missing (expected 50 %)"),
        (None, Cause(0, 1.0, 2.0, 1e12), "1 (expected 2) since 1000000000000"),
    ],
    ids=["unit and time", "neither", "missing", "year 33658"],
)
def test_cause_is_written_with_its_unit_and_the_time_since_it_deviates(
    unit: str | None, cause: Cause, text: str
) -> None:
    assert format_cause("latency", unit, cause) == f"latency {text}"
