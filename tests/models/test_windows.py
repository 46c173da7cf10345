"""The summaries of a table agree with the definition, row by row, and with the module in the artifact."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from models.manifest import Window
from models.windowed import Summaries
from models.windows import (
    count_earlier_rows,
    default_scales,
    summarise,
    summary_names,
    summary_width,
    take_windows,
)

ROWS, FEATURES = 150, 3


def series(begins: tuple[int, ...] = (0, 60, 75)) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return rows [ROWS, FEATURES] and how many rows of its stretch precede each of them."""
    x = np.random.RandomState(0).standard_normal((ROWS, FEATURES)).astype(np.float32)
    starts = np.zeros(ROWS, bool)
    starts[list(begins)] = True
    return x, count_earlier_rows(starts)


def by_definition(
    x: npt.NDArray[np.floating], earlier: npt.NDArray[np.int64], scales: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    """Return the summaries of every row, computed from the rows of its window."""
    found = []
    for row in range(len(x)):
        windows = [x[max(row - scale + 1, row - earlier[row]) : row + 1].astype(np.float64) for scale in scales]
        found.append([x[row], *(w.mean(axis=0) for w in windows), *(w.std(axis=0) for w in windows)])
    return np.array(found).reshape(len(x), -1)


def test_rows_before_a_row_count_from_the_start_of_its_stretch() -> None:
    begins = np.array([True, False, False, True, True, False])
    assert count_earlier_rows(begins).tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize(
    ("rows", "scales"), [(2, (2,)), (5, (2, 5)), (10, (3, 10)), (30, (3, 10, 30)), (120, (12, 40, 120))]
)
def test_scales_are_a_tenth_a_third_and_all_of_the_window_without_scales_of_one_row(
    rows: int, scales: tuple[int, ...]
) -> None:
    assert default_scales(rows) == scales


@pytest.mark.parametrize("scales", [(2,), (3, 10, 30), (7, 64), (5, 200)])
def test_summaries_of_a_table_are_means_and_deviations_of_the_last_rows_of_the_stretch(scales: tuple[int, ...]) -> None:
    x, earlier = series()
    found = summarise(x, earlier, scales)
    assert found.shape == (ROWS, summary_width(FEATURES, scales)) == (ROWS, len(summary_names(["a", "b", "c"], scales)))
    np.testing.assert_allclose(found, by_definition(x, earlier, scales), rtol=1e-6, atol=1e-6)


def test_summaries_of_a_table_in_parts_equal_those_of_the_whole_table() -> None:
    x, earlier = series()
    whole = summarise(x, earlier, (3, 10, 30))
    part = summarise(x[100 - 29 : 130], earlier[100 - 29 : 130], (3, 10, 30))[29:]
    np.testing.assert_allclose(part, whole[100:130], rtol=1e-6, atol=1e-7)


def test_deviation_of_equal_rows_is_exactly_zero_beside_a_huge_value() -> None:
    x = np.full((100, 1), 0.1, np.float32)
    x[40] = 1e7
    found = summarise(x, np.arange(100), (10,))
    assert found[50, 2] == 0.0
    assert found[50, 1] == np.float32(0.1)


def test_deviation_is_exact_for_small_changes_of_large_values() -> None:
    x = (1e6 + np.arange(100) % 2).astype(np.float32)[:, None]
    assert summarise(x, np.arange(100), (10,))[50, 2] == 0.5


def test_module_gives_the_summaries_of_the_table_for_whole_and_partial_windows() -> None:
    x, earlier = series()
    windows = torch.from_numpy(take_windows(x, np.arange(ROWS), earlier, 30))
    assert windows.shape == (ROWS, 30, FEATURES)
    present = 1.0 - windows.isnan().float().amin(dim=2)
    assert present.sum(dim=1).tolist() == np.minimum(earlier + 1, 30).tolist()
    found = Summaries((3, 10, 30))(windows, present)
    np.testing.assert_allclose(found, summarise(x, earlier, (3, 10, 30)), rtol=1e-5, atol=3e-6)


def test_window_is_judged_from_a_third_of_its_rows_on_and_ends_at_a_gap_of_a_third() -> None:
    window = Window(rows=30, scales=[3, 10, 30])
    assert window.least_rows == 10
    assert window.longest_gap_seconds(60.0) == 600.0
    assert window.longest_gap_seconds(None) == float("inf")


@pytest.mark.parametrize(
    "fields", [{"rows": 1, "scales": [1]}, {"rows": 9, "scales": [3]}, {"rows": 9, "scales": [9, 3]}]
)
def test_window_with_impossible_scales_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"ascending scales|greater than or equal to 2"):
        Window.model_validate(fields)
