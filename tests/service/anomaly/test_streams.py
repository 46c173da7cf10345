"""Rows joined to the past of their groups: windows, repeated and late rows, gaps, and the steps of the calibration."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from service.anomaly.online_calibration import OnlineCalibration
from service.anomaly.streams import (
    RESTART_ROWS,
    Group,
    History,
    JoinedRows,
    Judgements,
    Outcome,
    Rules,
    StartSet,
    join_rows,
    judge,
)

START = StartSet(tuple(np.random.default_rng(1).gamma(2.0, size=200).tolist()), is_own=False)
NEW, REPEATED, LATE = Outcome.NEW, Outcome.REPEATED, Outcome.LATE


def rules(rows: int = 6, usual_step: float | None = 10.0) -> Rules:
    return Rules(rows, max(1, round(rows / 3)), 2, usual_step)


def join(history: History, times: Sequence[float]) -> list[tuple[Outcome, list[int]]]:
    """Join rows with the sources 0, 1, ..."""
    return [history.join(source, time) for source, time in enumerate(times)]


def test_rows_in_order_fill_the_window() -> None:
    found = join(History(rules(3)), [0.0, 10.0, 20.0, 30.0, 40.0])
    assert found == [(NEW, [0]), (NEW, [0, 1]), (NEW, [0, 1, 2]), (NEW, [1, 2, 3]), (NEW, [2, 3, 4])]


def test_repeated_row_has_its_own_values_in_the_window_of_its_time() -> None:
    found = join(History(rules(3)), [0.0, 10.0, 20.0, 10.0, 20.0, 30.0])
    assert found[3:] == [(REPEATED, [0, 3]), (REPEATED, [0, 1, 4]), (NEW, [1, 2, 5])]


def test_late_row_is_inserted_at_its_place() -> None:
    found = join(History(rules(3)), [0.0, 10.0, 30.0, 20.0, 40.0])
    assert found[3:] == [(LATE, [0, 1, 3]), (NEW, [3, 2, 4])]


def test_late_row_that_is_older_than_the_history_is_judged_alone() -> None:
    history = History(rules(3))
    join(history, [100.0 + 10 * row for row in range(20)])
    assert history.join(20, 5.0) == (LATE, [20])
    assert history.join(21, 300.0) == (NEW, [18, 19, 21])  # 10 s after the newest row
    assert history.join(22, 5.0) == (LATE, [22])  # it was not remembered


@pytest.mark.parametrize(("step", "rows"), [(20.0, 6), (20.1, 1)])
def test_gap_of_more_than_a_third_of_the_window_begins_a_new_window(step: float, rows: int) -> None:
    times = [10.0 * row for row in range(10)]
    assert len(join(History(rules()), [*times, times[-1] + step])[-1][1]) == rows


def test_late_row_closes_a_gap() -> None:
    history = History(rules())
    assert join(history, [0.0, 10.0, 40.0])[-1] == (NEW, [2])
    assert history.join(3, 25.0) == (LATE, [0, 1, 3])
    assert history.join(4, 50.0) == (NEW, [0, 1, 3, 2, 4])


def test_usual_step_of_the_group_replaces_that_of_the_training_rows() -> None:
    times = [300.0 * row for row in range(12)]  # every step is 30 usual steps
    lengths = [len(window) for _, window in join(History(rules()), times)]
    assert lengths == [1, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6, 6]  # known after five steps
    assert [len(window) for _, window in join(History(rules(usual_step=None)), times)][:6] == [1, 2, 3, 4, 5, 6]


def test_rows_without_a_time_follow_in_order_of_arrival() -> None:
    nan = math.nan
    found = join(History(rules(3)), [nan, nan, nan, nan])
    assert found == [(NEW, [0]), (NEW, [0, 1]), (NEW, [0, 1, 2]), (NEW, [1, 2, 3])]
    found = join(History(rules(3)), [0.0, 10.0, nan, 20.0, 10.0])
    assert found[2:] == [(NEW, [0, 1, 2]), (NEW, [1, 2, 3]), (REPEATED, [0, 4])]


def test_row_far_in_the_future_does_not_make_all_later_rows_late_for_ever() -> None:
    history = History(rules(3))
    join(history, [0.0, 10.0, 20.0, 1e9])
    outcomes = [history.join(10 + row, 30.0 + 10 * row)[0] for row in range(RESTART_ROWS + 3)]
    assert outcomes == [LATE] * RESTART_ROWS + [NEW] * 3
    assert len(history.join(1000, 30.0 + 10 * (RESTART_ROWS + 3))[1]) == 3


def test_model_without_window_recognises_repeated_and_late_rows() -> None:
    found = join(History(rules(1)), [0.0, 10.0, 30.0, 10.0, 20.0, 20.0, 40.0])
    assert [outcome for outcome, _ in found] == [NEW, NEW, NEW, REPEATED, LATE, REPEATED, NEW]
    assert all(window == [row] for row, (_, window) in enumerate(found))


# Requests


class Stream:
    """Rows that are joined and judged in requests; the groups are written and read between two requests."""

    def __init__(self, stream_rules: Rules) -> None:
        self.rules = stream_rules
        self.payloads: dict[str, bytes] = {}

    def request(self, x: np.ndarray, times: Sequence[float], names: Sequence[str]) -> tuple[JoinedRows, Judgements]:
        groups = {name: Group(self.rules, self.payloads.get(name, b""), START) for name in dict.fromkeys(names)}
        time = np.array(times)
        joined = join_rows(self.rules, x, time, list(names), groups)
        with np.errstate(invalid="ignore"):
            score = np.nansum(joined.inputs(slice(None)).reshape(len(x), -1) ** 2, axis=1).astype(np.float32)
        fixed = np.zeros(len(x), np.float32)
        found = judge(joined, self.rules, score, np.ones(len(x), bool), time, (fixed, fixed), 0.05, False)
        for name in joined.changed_groups():
            payload = groups[name].dump(joined.pool)
            assert len(payload) <= self.rules.payload_bytes
            self.payloads[name] = payload
        return joined, found


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("seed", range(3))
def test_verdicts_do_not_depend_on_how_rows_are_divided_into_requests(rows: int, seed: int) -> None:
    choices, normal = random.Random(seed), np.random.default_rng(seed)
    count = 400
    names = [choices.choice(["a", "b", "c"]) for _ in range(count)]
    times = [float(10 * row + (200 if row > 250 else 0)) for row in range(count)]
    x = normal.standard_normal((count, 2)).astype(np.float32)
    whole, judged = Stream(rules(rows)).request(x, times, names)
    parts = Stream(rules(rows))
    start = 0
    while start < count:
        end = min(count, start + choices.choice([1, 1, 2, 7, 50]))
        order = list(range(start, end))
        choices.shuffle(order)  # a request may have its rows in any order
        joined, found = parts.request(x[order], [times[row] for row in order], [names[row] for row in order])
        assert found.p_value.tolist() == judged.p_value[order].tolist()
        assert found.severity.tolist() == judged.severity[order].tolist()
        assert np.array_equal(joined.inputs(slice(None)), whole.inputs(slice(0, count))[order], equal_nan=True)
        if len(order) <= 7:  # the history has room for them, so that the client may send them again
            repeated, again = parts.request(x[order], [times[row] for row in order], [names[row] for row in order])
            assert set(repeated.outcomes) == {REPEATED}
            assert np.array_equal(repeated.inputs(slice(None)), joined.inputs(slice(None)), equal_nan=True)
            assert again.incidents == again.changes == []
        start = end
    assert parts.payloads.keys() == {"a", "b", "c"}


def test_windows_equal_those_of_a_plain_loop_over_the_rows_of_each_group() -> None:
    normal = np.random.default_rng(0)
    names = ["a", "b"] * 60
    times = np.repeat(np.arange(60) * 10.0, 2)
    x = normal.standard_normal((120, 2)).astype(np.float32)
    stream = Stream(rules(6))
    for row in range(120):
        joined, _ = stream.request(x[row : row + 1], times[row : row + 1].tolist(), names[row : row + 1])
        past = [earlier for earlier in range(row + 1) if names[earlier] == names[row]][-6:]
        window = joined.inputs(slice(None))[0]
        assert np.isnan(window[: 6 - len(past)]).all()
        assert np.array_equal(window[6 - len(past) :], x[past])
        assert joined.window_rows == [len(past)]


def test_only_new_rows_with_enough_of_their_window_step_the_calibration() -> None:
    stream = Stream(rules(6))
    x = np.ones((1, 2), np.float32)

    def rows() -> int:
        calibration = Group(stream.rules, stream.payloads["a"], START).calibration
        assert calibration is not None
        return calibration.rows

    counts = []
    for time in (0.0, 10.0, 20.0, 20.0, 15.0, 30.0, 500.0, 510.0):
        stream.request(x, [time], ["a"])
        counts.append(rows())
    # the first row has too little past; the next are repeated, late, new, after a gap, and new
    assert counts == [0, 1, 2, 2, 2, 3, 3, 4]


def test_judgements_equal_those_of_a_calibration_that_sees_the_rows_one_by_one() -> None:
    stream, expected = Stream(rules(1)), OnlineCalibration(START.scores, 1)
    x = np.random.default_rng(0).gamma(2.0, size=(300, 2)).astype(np.float32)
    x[150:] *= 5  # an incident that becomes a change
    joined, found = stream.request(x, [float(row) for row in range(300)], ["a"] * 300)
    score = (x**2).sum(axis=1)
    for row in range(300):
        p_value, severity = expected.judge(float(score[row]), 0.05)
        expected.step(float(score[row]), float(row))
        assert found.p_value[row] == np.float32(p_value)
        assert found.severity[row] == np.float32(severity)
        assert found.states[row] == expected.state
    assert set(found.states) == {"usual", "incident", "changed"}
    assert (found.incidents, found.changes) == (["a"] * expected.incidents, ["a"] * expected.changes)
    assert not found.has_own_calibration[0]
    assert found.has_own_calibration[-1]
    assert joined.groups["a"].tag == 2


@pytest.mark.parametrize("cut", [0, 3, 10, 100, -1])
def test_damaged_payload_begins_anew(cut: int) -> None:
    stream = Stream(rules(6))
    stream.request(np.ones((20, 2), np.float32), [float(row) for row in range(20)], ["a"] * 20)
    group = Group(stream.rules, stream.payloads["a"][:cut], START)
    assert group.calibration is not None
    assert group.calibration.rows == 0
    assert Group(stream.rules, bytes(500), START).history.join(0, 5.0) == (NEW, [0])
