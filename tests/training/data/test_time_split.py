"""The splits by time: fit rows, a gap, held-out rows, a gap, calibration rows, once or in each block of the history.

The moments that divide the parts are the same for all groups.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import manifest
from training.data.table import MAX_HELD_OUT_ROWS, DataError
from training.data.time_split import HELD_OUT_STARTS, SplitName, TimeSplit, describe_split, split_by_time, summarise
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


@pytest.mark.parametrize("split_name", ["newest", "blocks"])
@given(
    groups=st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=60), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    gap_rows=st.integers(0, 3),
)
def test_each_row_is_in_one_part_or_in_the_gap_before_its_part(
    groups: list[list[int]], seed: int, gap_rows: int, split_name: SplitName
) -> None:
    rows = timeline({f"h{index}": each for index, each in enumerate(groups)})
    try:
        split = split_by_time(rows, seed, gap_rows=gap_rows, split=split_name)
    except DataError:
        assert split_name == "blocks" or len(rows) < 100 or len(np.unique(rows.time)) < 100
        return
    sets = (split.fit, split.held_out, split.calibration)
    assert len(np.unique(np.concatenate(sets))) == sum(map(len, sets))
    edges = [-1, *split.cuts, rows.time.max() + 1]
    for group in range(len(groups)):
        for part, (first, end) in enumerate(pairwise(edges)):
            own = np.flatnonzero((rows.group == group) & (rows.time >= first) & (rows.time < end))
            found = [np.intersect1d(own, each).tolist() for each in sets]
            assert found[part % 3] == own[gap_rows if part else 0 :].tolist()
            assert not found[(part + 1) % 3]
            assert not found[(part + 2) % 3]
    again = split_by_time(rows, seed, gap_rows=gap_rows, split=split_name)
    assert all(np.array_equal(a, b) for a, b in zip(vars(split).values(), vars(again).values(), strict=True))


def test_parts_of_the_newest_split_follow_each_other_in_time() -> None:
    rows = timeline({"a": list(range(100)), "b": list(range(50, 100))})
    split = split_by_time(rows, seed=0)
    assert split.blocks == 1
    assert rows.time[split.fit].max() < rows.time[split.held_out].min()
    assert rows.time[split.held_out].max() < rows.time[split.calibration].min()


def test_blocks_spread_the_parts_over_the_history_in_the_shares_of_the_newest_split() -> None:
    rows = timeline({"a": list(range(5_000)), "b": list(range(5_000))})
    split = split_by_time(rows, seed=0, gap_rows=10, split="blocks")
    assert split.blocks == 5
    left_out = 14 * 10 * 2
    assert len(split.fit) + len(split.held_out) + len(split.calibration) == 10_000 - left_out
    assert len(split.fit) == 7_000 - 4 * 10 * 2
    assert len(split.held_out) == 1_000 - 5 * 10 * 2
    assert len(split.calibration) == 2_000 - 5 * 10 * 2
    for part in (split.fit, split.held_out, split.calibration):
        assert np.unique(rows.time[part] // (1_000 * MINUTE)).tolist() == [0, 1, 2, 3, 4]
    assert rows.time[split.calibration].max() == rows.time.max()


@pytest.mark.parametrize("days", [14, 21, 28, 30, 31, 35, 42, 60, 70, 90, 120])
def test_calibration_rows_of_blocks_cover_more_than_half_of_the_possible_hours_of_the_week(
    days: int,
) -> None:
    week = 7 * 24 * 60
    rows = timeline({"a": list(range(0, days * 24 * 60, 10))})
    calibration = split_by_time(rows, seed=0, split="blocks").calibration_period
    covered = len(np.unique(rows.time[calibration] // MINUTE % week)) / (week / 10)
    assert covered > 0.55 * min(1, days / 5 / 7)


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


@pytest.mark.parametrize(
    ("groups", "gap_rows", "expected"),
    [
        ({"a": list(range(80))}, 1, "about 100 rows of a group, enough for 5 blocks, each with 70 % that fit"),
        ({"a": list(range(1_400)), "b": list(range(1_400))}, 30, "about 1,550 rows of a group, enough for 5 blocks"),
        ({"a": [0] * 500, "b": [1] * 500}, 1, "different times: 2, groups: 2"),
    ],
)
def test_too_few_rows_for_blocks_are_refused_with_the_number_that_is_needed(
    groups: dict[str, list[int]], gap_rows: int, expected: str
) -> None:
    with pytest.raises(DataError, match="too few rows to split by time") as refusal:
        split_by_time(timeline(groups), 0, gap_rows=gap_rows, split="blocks")
    assert expected in str(refusal.value)
    advice = (
        "add rows, shorten --window, or leave out --split blocks" if gap_rows > 1 else "or leave out --split blocks"
    )
    assert str(refusal.value).endswith(advice)


@pytest.mark.parametrize(("rows", "gap_rows"), [(110, 1), (1_600, 30)])
def test_slightly_more_rows_than_blocks_need_are_split(rows: int, gap_rows: int) -> None:
    found = split_by_time(timeline({"a": list(range(rows))}), 0, gap_rows=gap_rows, split="blocks")
    assert found.blocks == 5


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
    assert summary.blocks == []


def test_summary_of_blocks_holds_the_periods_of_each_block() -> None:
    rows = timeline({"a": list(range(1_000))})
    split = split_by_time(rows, 0, split="blocks")
    summary = summarise(rows, split)
    assert len(summary.blocks) == len(HELD_OUT_STARTS["blocks"])
    fields: list[Any] = [period for block in summary.blocks for period in block.model_dump().values()]
    moments = [moment for period in fields for moment in (period["first"], period["last"])]
    assert moments == sorted(moments)
    assert moments[0] == summary.fit.first == "1970-01-01T00:00:00+00:00"
    assert summary.calibration is not None
    assert moments[-1] == summary.calibration.last == "1970-01-01T16:39:00+00:00"
    # A block is 200 of the 1,000 rows. It has 140 fit rows, of which the first 112 come before the held-out rows.
    assert fields[0]["last"] == "1970-01-01T01:51:00+00:00"
    assert fields[1] == {"first": "1970-01-01T01:53:00+00:00", "last": "1970-01-01T02:11:00+00:00"}
    assert fields[2] == {"first": "1970-01-01T02:13:00+00:00", "last": "1970-01-01T02:51:00+00:00"}
    assert manifest.Timeline.model_validate(summary.model_dump()) == summary


def test_group_that_is_only_in_the_newest_block_is_among_its_fit_rows() -> None:
    rows = timeline({"new": list(range(800, 1_000)), "whole": list(range(1_000)), "late": list(range(995, 1_000))})
    notes = describe_split(rows, split_by_time(rows, 0, split="blocks"))
    assert notes[0].startswith("split by time into 5 blocks: fit 1970-01-01 00:00 to ")
    assert "with gaps of 1 row of each group" in notes[1]
    assert any("1 of 3 groups have no rows among the fit rows" in note and note.endswith(": late") for note in notes)
    assert not any("calibration rows, so" in note for note in notes)
