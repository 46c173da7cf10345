"""The split by time: fit rows, a gap, held-out rows, a gap, calibration rows, at the same moments for all groups."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.table import MAX_HELD_OUT_ROWS, DataError
from training.data.time_split import TimeSplit, describe_split, split_by_time, summarise
from training.data.timeline import Timeline

MINUTE = 60 * 10**9


def timeline(groups: dict[str, list[int]]) -> Timeline:
    """Return a timeline with rows at these minutes, by group."""
    time = np.concatenate([np.sort(np.array(minutes, np.int64)) * MINUTE for minutes in groups.values()])
    return Timeline(
        time=time,
        group=np.repeat(np.arange(len(groups), dtype=np.int32), [len(minutes) for minutes in groups.values()]),
        groups=tuple(groups),
        time_column="ts",
        group_column="host",
        source_rows=np.arange(len(time)),
    )


def minutes(rows: Timeline, part: np.ndarray[tuple[int], np.dtype[np.int64]], group: int) -> list[int]:
    own = np.sort(part[rows.group[part] == group])
    found: list[int] = (rows.time[own] // MINUTE).tolist()
    return found


def test_two_hosts_are_split_at_the_same_moments_with_a_gap_of_one_row() -> None:
    rows = timeline({"a": list(range(100)), "b": list(range(50, 100))})
    split = split_by_time(rows, seed=0)
    # 70 % of the 150 rows are 105. 104 rows come before minute 77 (77 + 27), and 106 before minute 78 (78 + 28).
    # 80 % are 120, and so many come before minute 85 (85 + 35).
    for group, start in ((0, 0), (1, 50)):
        fit, held_out, calibration = (
            minutes(rows, part, group) for part in (split.fit, split.held_out, split.calibration)
        )
        assert fit == list(range(start, fit[-1] + 1))
        assert held_out == list(range(fit[-1] + 2, held_out[-1] + 1))
        assert calibration == list(range(held_out[-1] + 2, 100))
        assert (fit[-1], held_out[-1]) in {(76, 84), (77, 84)}
    assert split.gap_rows == 1


@pytest.mark.parametrize("gap_rows", [0, 1, 7])
def test_given_number_of_rows_of_each_group_is_left_out_after_each_moment(gap_rows: int) -> None:
    rows = timeline({"a": list(range(100)), "b": list(range(100))})
    split = split_by_time(rows, seed=0, gap_rows=gap_rows)
    for group in (0, 1):
        assert minutes(rows, split.fit, group) == list(range(70))
        assert minutes(rows, split.held_out, group) == list(range(70 + gap_rows, 80))
        assert minutes(rows, split.calibration, group) == list(range(80 + gap_rows, 100))


@given(
    st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=60), min_size=1, max_size=5), st.integers(0, 2**32 - 1)
)
def test_parts_are_disjoint_and_in_time_order_unless_the_rows_are_refused(groups: list[list[int]], seed: int) -> None:
    rows = timeline({f"h{index}": each for index, each in enumerate(groups)})
    try:
        split = split_by_time(rows, seed)
    except DataError:
        assert len(rows) < 100 or len(np.unique(rows.time)) < 50
        return
    together = np.concatenate((split.fit, split.held_out, split.calibration))
    assert len(np.unique(together)) == len(together) >= len(rows) - 2 * len(groups)
    assert rows.time[split.fit].max() < rows.time[split.held_out].min()
    assert rows.time[split.held_out].max() < rows.time[split.calibration].min()
    again = split_by_time(rows, seed)
    assert all(np.array_equal(a, b) for a, b in zip(vars(split).values(), vars(again).values(), strict=True))


def test_part_above_the_maximum_size_is_a_random_sample_of_its_whole_period() -> None:
    rows = timeline({"a": list(range(1_000_000))})
    split = split_by_time(rows, seed=0)
    assert len(split.calibration) == len(split.held_out) == MAX_HELD_OUT_ROWS
    assert len(split.fit) == 700_000
    calibrated = rows.time[split.calibration] // MINUTE
    counts, _ = np.histogram(calibrated, bins=10, range=(800_000, 1_000_000))
    assert counts.min() > 4_500
    assert counts.max() < 5_500


@pytest.mark.parametrize(
    "groups",
    [
        {"a": list(range(9))},
        {"a": [0] * 500, "b": [1] * 500},
        {f"h{index}": [0, 1, 2] for index in range(50)},  # the gap takes every held-out row
    ],
)
def test_rows_at_too_few_moments_are_refused(groups: dict[str, list[int]]) -> None:
    with pytest.raises(
        DataError, match=r"too few rows to split by time .* expected at least 10 rows at different times"
    ):
        split_by_time(timeline(groups), 0)


def test_groups_that_are_not_in_all_parts_are_named() -> None:
    rows = timeline({"old": list(range(60)), "new": list(range(90, 100)), "whole": list(range(100))})
    notes = describe_split(rows, split := split_by_time(rows, 0))
    assert isinstance(split, TimeSplit)
    assert notes[0].startswith("split by time: fit 1970-01-01 00:00 to 1970-01-01 00:58 UTC (118 rows), held out ")
    assert any("1 of 3 groups have no rows before" in note and note.endswith("fitted to them: new") for note in notes)
    assert any("no rows among the calibration rows" in note and note.endswith(": old") for note in notes)


def test_summary_holds_the_first_and_last_moment_of_each_part() -> None:
    rows = timeline({"a": list(range(100))})
    summary = summarise(rows, split_by_time(rows, 0))
    assert summary.fit.model_dump() == {"first": "1970-01-01T00:00:00+00:00", "last": "1970-01-01T01:09:00+00:00"}
    assert summary.held_out.model_dump() == {"first": "1970-01-01T01:11:00+00:00", "last": "1970-01-01T01:19:00+00:00"}
    assert summary.calibration is not None
    assert summary.calibration.last == "1970-01-01T01:39:00+00:00"
    assert (summary.usual_step_seconds, summary.gap_rows, summary.groups) == (60.0, 1, 1)
