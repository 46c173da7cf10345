"""Results of verdicts: the largest contributions, columns with categories, optional fields, errors and parts."""

from typing import Any

import numpy as np
import orjson
import pytest

from models.categories import CategoryColumns, UnseenLevel
from service.anomaly.inputs import InputRows
from service.anomaly.verdicts import (
    MAX_SORTED_FEATURES,
    OVERFLOW_DETAIL,
    PART_ROWS,
    Past,
    Scores,
    Verdicts,
    all_errors,
    benjamini_hochberg,
    decide,
    largest,
    results_and_errors,
    results_in_parts,
    score_array,
)
from service.codec.row_schema import ParsedRows, RowError
from service.errors import InvalidRows
from service.schemas import AnomalyBody

PARTS = ("t2", "q")
COLUMNS = CategoryColumns(["load", "heat"], [("kind", ["a", "b", "c"], []), ("site", ["x", "y"], [])])


def random_scores(rows: int, width: int, seed: int = 0) -> Scores:
    random = np.random.RandomState(seed)
    return Scores(
        random.uniform(0.0, 9.0, rows).astype(np.float32),
        random.uniform(0.01, 1.0, rows).astype(np.float32),
        random.uniform(0.0, 2.0, rows).astype(np.float32),
        random.uniform(0.0, 9.0, (rows, len(PARTS))).astype(np.float32),
        random.uniform(0.0, 9.0, (rows, width)).astype(np.float32),
        random.standard_normal((rows, width)).astype(np.float32),
    )


def input_rows(x: np.ndarray, **fields: Any) -> InputRows:
    missing = np.isnan(x)
    parsed = ParsedRows(x, list(range(len(x))), [], missing if missing.any() else None)
    return InputRows(parsed, len(x))._replace(**fields)


@pytest.mark.parametrize("width", [1, 5, MAX_SORTED_FEATURES, MAX_SORTED_FEATURES + 1, 300])
@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_largest_values_come_first_and_equal_ones_in_column_order(width: int, count: int) -> None:
    array = np.random.default_rng(width).permuted(np.tile(np.arange(width, dtype=np.float32), (20, 1)), axis=1)
    expected = [sorted(range(width), key=lambda column: -row[column])[:count] for row in array]
    assert largest(array, count).tolist() == expected
    ties = np.zeros((3, width), np.float32)
    ties[:, width // 2] = 1.0
    assert largest(ties, 1)[:, :count].tolist() == [[width // 2][:count]] * 3
    if width <= MAX_SORTED_FEATURES:
        rest = [column for column in range(width) if column != width // 2]
        assert largest(ties, count).tolist() == [[width // 2, *rest][:count]] * 3


def test_results_list_the_columns_of_a_table_with_categories() -> None:
    x = np.array([[1.5, 2.5, 0, 1, 0, 1, 0], [0.5, np.nan, 0, 0, 0, np.nan, np.nan]], np.float32)
    scores = random_scores(2, COLUMNS.width)
    scores.contribution[:] = [[1, 2, 9, 9, 9, 4, 4], [1, 2, 9, 9, 9, 4, 4]]
    scores.expected[:] = [[7, 8, 0.1, 0.2, 0.7, 0.6, 0.4], [7, 8, 0.1, 0.7, 0.2, 0.4, 0.6]]
    unseen = [(), (UnseenLevel("kind", "z", ["a", "b", "c"]),)]
    rows = input_rows(x, columns=COLUMNS, unseen=unseen)
    results, errors = results_and_errors(Verdicts(rows, scores, [True, False], None), 4, COLUMNS.features, PARTS)
    assert errors == []
    first, second = ([list(feature.values()) for feature in result["features"]] for result in results)
    assert first == [["kind", "b", "c", 9.0], ["site", "x", "x", 4.0], ["heat", 2.5, 8.0, 2.0], ["load", 1.5, 7.0, 1.0]]
    assert [feature[:3] for feature in second[:2]] == [["kind", "z", "b"], ["site", None, "y"]]
    assert "unseen_levels" not in results[0]
    assert results[1]["unseen_levels"] == [{"feature": "kind", "got": "z", "known": ["a", "b", "c"]}]
    assert "imputed" not in results[0]
    assert results[1]["imputed"] == ["heat", "site"]


def past_of(rows: int) -> Past:
    own = [row % 2 == 0 for row in range(rows)]
    return Past(list(range(rows)), 3, own, ["normal", "incident"] * (rows // 2), incidents=["web"])


def test_parts_of_a_large_response_have_the_results_of_the_whole() -> None:
    rows, width = 2 * PART_ROWS + 2, 3
    x = np.random.RandomState(1).standard_normal((rows, width)).astype(np.float32)
    x[PART_ROWS + 1, 2] = np.nan
    given = input_rows(
        x,
        time=np.arange(float(rows)),
        group=[f"host{row}" if row % 3 else None for row in range(rows)],
        silenced=np.arange(rows) % 5 == 0,
    )
    smoothed = np.linspace(0.0, 2.0, rows)
    verdicts = Verdicts(
        given, random_scores(rows, width), [row % 4 == 1 for row in range(rows)], smoothed, past_of(rows)
    )
    parts = list(results_in_parts(verdicts, 2, ["a", "b", "c"], PARTS))
    whole, errors = results_and_errors(verdicts, 2, ["a", "b", "c"], PARTS)
    assert [len(part) for part in parts] == [PART_ROWS, PART_ROWS, 2]
    joined = [result for part in parts for result in part]
    assert orjson.dumps(joined, option=orjson.OPT_SERIALIZE_NUMPY) == orjson.dumps(
        whole, option=orjson.OPT_SERIALIZE_NUMPY
    )
    assert errors == all_errors(verdicts) == []
    result = whole[PART_ROWS + 1]
    assert {name: result[name] for name in ("row", "time", "imputed", "window_rows", "warming_up", "state")} == {
        "row": PART_ROWS + 1,
        "time": PART_ROWS + 1,
        "imputed": ["c"],
        "window_rows": PART_ROWS + 1,
        "warming_up": False,
        "state": "incident",
    }
    assert (whole[0]["calibration"], whole[1]["calibration"]) == ("group", "pool")
    assert (whole[0]["warming_up"], whole[3]["warming_up"]) == (True, False)
    assert ("group" in whole[0], whole[1]["group"]) == (False, "host1")
    assert (whole[0]["silenced"], "silenced" in whole[1]) == (True, False)


def test_row_whose_output_overflows_has_an_error_in_the_order_of_the_rows() -> None:
    scores = random_scores(3, 2)
    expected = scores.expected.copy()
    expected[1, 0] = np.inf
    score = scores.score.copy()
    score[2] = np.inf
    scores = Scores(score, scores.p_value, scores.severity, scores.parts, scores.contribution, expected)
    errors = [RowError(0, InvalidRows("is no number")), RowError(4, InvalidRows("is too long"))]
    given = InputRows(ParsedRows(np.zeros((3, 2), np.float32), [1, 2, 3], errors, None), 5)
    verdicts = decide(given, scores, AnomalyBody())
    results, found = results_and_errors(verdicts, 1, ["a", "b"], PARTS)
    assert [result["row"] for result in results] == [1, 3]
    assert results[1]["score"] == np.finfo(np.float32).max
    assert [(error["row"], error["detail"]) for error in found] == [
        (0, "is no number"),
        (2, OVERFLOW_DETAIL),
        (4, "is too long"),
    ]
    array = score_array(given, verdicts)
    assert np.isnan(array).all(axis=1).tolist() == [True, False, True, False, True]
    assert array[1].tolist() == [scores.score[0], scores.p_value[0], scores.severity[0]]


def test_benjamini_hochberg_rejects_up_to_the_last_p_value_below_its_bound() -> None:
    """With q = 0.05, the bounds of the ten ordered p-values are 0.005, 0.01, 0.015 and so on."""
    p_value = np.array([0.9, 0.014, 0.001, 0.2, 0.012, 0.5, 0.6, 0.7, 0.8, 0.95], np.float32)
    assert np.flatnonzero(benjamini_hochberg(p_value, 0.05)).tolist() == [1, 2, 4]
    assert not benjamini_hochberg(p_value, 0.005).any()


def test_silenced_rows_are_never_anomalous_and_do_not_count_for_the_false_discovery_rate() -> None:
    scores = random_scores(10, 2)
    scores.p_value[:] = 0.9
    scores.p_value[[0, 1]] = 0.001, 0.009
    scores.severity[:] = 2.0
    silenced = np.zeros(10, bool)
    silenced[0] = True
    given = input_rows(np.zeros((10, 2), np.float32), silenced=silenced)
    assert decide(given, scores, AnomalyBody()).is_anomaly == [False] + [True] * 9
    assert decide(given, scores, AnomalyBody(fdr=0.05)).is_anomaly == [False] * 10  # 0.009 > 0.05 / 9
    heard = given._replace(silenced=None)
    assert decide(heard, scores, AnomalyBody(fdr=0.05)).is_anomaly == [True, True] + [False] * 8
