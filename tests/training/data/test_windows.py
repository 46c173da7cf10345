"""The windows of a table: they stay within a group and a stretch without gaps, and are read in parts."""

from contextlib import closing

import numpy as np
import numpy.typing as npt
import pytest

from models.manifest import Window
from models.windows import summarise
from training.data.row_store import RowStore, RowWriter
from training.data.timeline import SECOND, Timeline
from training.data.windows import TableWindows, summarise_table, windows_of_timeline

WINDOW = Window(rows=6, scales=[2, 6])
STEP = 60.0  # seconds


def timeline(*groups: list[float]) -> Timeline:
    """Return the timeline of groups with these times, in steps."""
    time = np.concatenate([np.array(times) * STEP * SECOND for times in groups]).astype(np.int64)
    group = np.repeat(np.arange(len(groups), dtype=np.int32), [len(times) for times in groups])
    names = tuple(f"web-{index}" for index in range(len(groups)))
    return Timeline(time, group, names, "ts", "host", np.arange(len(time)))


def store(rows: int, on_disk: bool = False) -> RowStore:
    """Return rows of two features. The first feature is the number of the row."""
    noise = np.random.RandomState(0).standard_normal(rows)
    x = np.column_stack((np.arange(rows), noise)).astype(np.float32)
    if not on_disk:
        return RowStore(x)
    with closing(RowWriter(2, np.float32, limit=0)) as writer:
        writer.add(x)
        return writer.rows()


def rows_in(window: npt.NDArray[np.float32]) -> list[int]:
    """Return the numbers of the rows in a window [N, 2] of `store`."""
    return [int(row[0]) for row in window if not np.isnan(row).all()]


@pytest.mark.parametrize("on_disk", [False, True])
def test_window_holds_no_rows_of_another_group_and_none_before_a_gap(on_disk: bool) -> None:
    times = timeline([0, 1, 2, 3, 4.9, 7, 8], [0, 1, 2])  # 2.1 steps from 4.9 to 7: longer than a third of 6 rows
    windows = windows_of_timeline(store(10, on_disk), times, WINDOW, STEP)
    assert windows.earlier.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]
    found = windows.take(np.arange(10))
    assert found.shape == (10, 6, 2)
    expected = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [5], [5, 6], [7], [7, 8], [7, 8, 9]]
    assert [rows_in(window) for window in found] == expected
    assert windows.judged.tolist() == [len(rows) >= 2 for rows in expected]


def test_gap_of_a_third_of_the_window_does_not_end_it() -> None:
    windows = windows_of_timeline(store(3), timeline([0, 2, 4]), WINDOW, STEP)
    assert windows.earlier.tolist() == [0, 1, 2]


def test_rows_without_a_usual_step_have_no_gaps() -> None:
    windows = windows_of_timeline(store(3), timeline([0, 2, 4000]), WINDOW, None)
    assert windows.earlier.tolist() == [0, 1, 2]


def test_windows_of_rows_in_any_order_are_those_of_the_rows() -> None:
    windows = windows_of_timeline(store(40), timeline(list(range(40))), WINDOW, STEP)
    positions = np.array([39, 0, 17, 17, 5])
    found = [rows_in(window) for window in windows.take(positions)]
    assert found == [list(range(max(0, row - 5), row + 1)) for row in positions.tolist()]


@pytest.mark.parametrize("on_disk", [False, True])
def test_summaries_that_are_computed_in_parts_are_those_of_the_whole_table(
    on_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = timeline(list(range(50)), [*range(20), *range(100, 130)])
    windows = windows_of_timeline(store(100), times, WINDOW, STEP)
    whole = summarise(store(100).read_range(0, 100), windows.earlier, WINDOW.scales)[windows.judged]
    monkeypatch.setattr("training.data.windows.SUMMARISED_VALUES", 14)  # parts of seven rows
    in_parts = TableWindows(store(100, on_disk), WINDOW, windows.earlier)
    found = summarise_table(in_parts, lambda x: x, WINDOW.scales, limit=0 if on_disk else 1 << 20)
    assert found.on_disk == on_disk
    np.testing.assert_allclose(found.read_range(0, len(found)), whole, rtol=1e-6, atol=1e-6)
