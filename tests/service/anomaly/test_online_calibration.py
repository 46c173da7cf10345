"""Online calibration: its guarantees, an independent implementation of its p-values, its rules, and its records."""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from models.calibration import Calibration
from service.anomaly.online_calibration import (
    CORRECTION_STEP,
    FORMER_ROWS,
    INCIDENT_ROWS,
    MAX_BYTES,
    MAX_CORRECTION,
    MIN_SET_ROWS,
    RECENT_ROWS,
    REFERENCE_ALPHA,
    SET_ROWS,
    CorruptRecordError,
    OnlineCalibration,
    count_differences,
    default_incident_rows,
)

Scores = npt.NDArray[np.float32]


def normal_scores(rows: int, seed: int = 0) -> Scores:
    return np.random.default_rng(seed).gamma(2.0, 1.0, rows).astype(np.float32)


def fresh(**options: int) -> OnlineCalibration:
    return OnlineCalibration(normal_scores(SET_ROWS), **options)


def state_of(calibration: OnlineCalibration) -> str:
    """Return the state as a str: mypy would assume that a Literal stays the same between two assertions."""
    return calibration.state


def feed(calibration: OnlineCalibration, scores: Scores | list[float]) -> list[tuple[float, float]]:
    """Judge and take in scores one by one; return their p-values and severities at the reference alpha."""
    verdicts = []
    for score in np.asarray(scores, float).tolist():
        verdicts.append(calibration.judge(score, REFERENCE_ALPHA))
        calibration.step(score)
    return verdicts


# Pieces of a stream of scores: quiet, loud, constant, alternating and drifting rows.
PIECES: dict[str, Callable[[int, int], npt.ArrayLike]] = {
    "normal": normal_scores,
    "loud": lambda rows, seed: 30 + normal_scores(rows, seed),
    "quiet": lambda rows, seed: normal_scores(rows, seed) / 100,
    "constant": lambda rows, seed: np.full(rows, seed % 7),
    "alternating": lambda rows, seed: np.where(np.arange(rows) % 2, 50.0, seed % 5),
    "drift": lambda rows, seed: normal_scores(rows, seed) + np.linspace(0, 20, rows),
    "not finite": lambda rows, seed: np.resize([math.nan, math.inf, -math.inf, 1e300, float(seed)], rows),
}
STREAMS = st.lists(
    st.tuples(st.sampled_from(sorted(PIECES)), st.integers(1, 400), st.integers(0, 1000)), min_size=1, max_size=6
)


def stream(pieces: list[tuple[str, int, int]]) -> list[float]:
    return [float(score) for name, rows, seed in pieces for score in np.asarray(PIECES[name](rows, seed))]


@given(STREAMS, st.sampled_from([1, 10, 30]))
@settings(max_examples=25)
def test_alarms_of_any_stream_are_alpha_times_rows_plus_correction_plus_lost(
    pieces: list[tuple[str, int, int]], window_rows: int
) -> None:
    calibration = OnlineCalibration(normal_scores(300), window_rows)
    severities = [severity for _, severity in feed(calibration, stream(pieces))]
    assert calibration.rows == len(severities)
    assert calibration.alarms == sum(severity > 1 for severity in severities)
    assert calibration.rows == calibration.counted_rows + calibration.discarded_rows + calibration.held_rows
    assert calibration.alarms == calibration.counted_alarms + calibration.discarded_alarms + calibration.held_alarms
    expected = REFERENCE_ALPHA * calibration.counted_rows + calibration.correction / CORRECTION_STEP + calibration.lost
    assert calibration.counted_alarms == pytest.approx(expected, abs=1e-6)
    assert abs(calibration.correction) <= MAX_CORRECTION


@given(
    st.integers(1, SET_ROWS + 50),
    st.floats(-MAX_CORRECTION, MAX_CORRECTION),
    st.one_of(st.sampled_from([0.5, 0.1, 0.05, 0.01, 0.001, 1e-9]), st.floats(1e-6, 0.999)),
    st.integers(0, 1000),
    st.booleans(),
)
def test_p_values_and_verdicts_agree_with_counting_scores(
    rows: int, correction: float, alpha: float, seed: int, rounded: bool
) -> None:
    start = normal_scores(rows, seed)
    if rounded:  # many equal scores
        start = start.round()
    calibration = OnlineCalibration(start)
    calibration.correction = correction
    known = start[-SET_ROWS:]
    asked = np.concatenate(
        (known[:5], normal_scores(5, seed + 1), [-1, known.min(), known.max(), known.max() + 1, 1e9])
    )
    for score in asked.astype(np.float32):
        raw = (1 + int((known >= score).sum())) / (len(known) + 1)
        expected = 1 - (1 - raw) ** math.exp(correction)
        p_value, severity = calibration.judge(float(score), alpha)
        assert p_value == pytest.approx(expected, rel=1e-9)
        if abs(expected - alpha) > 1e-5 / (len(known) + 1):  # else rounding may decide
            assert (severity > 1) == (p_value <= alpha)
            assert np.float32(severity) == 1 or (np.float32(severity) > 1) == (severity > 1)


@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.01, 0.001])
@pytest.mark.parametrize("rows", [12, 999])
def test_verdicts_without_correction_equal_those_of_the_artifact_calibration(alpha: float, rows: int) -> None:
    import torch

    start = normal_scores(rows)
    fixed = Calibration(torch.from_numpy(start))
    calibration = OnlineCalibration(fixed.scores.numpy())  # raised scores: see `models.calibration`
    asked = np.concatenate((normal_scores(200, 1), start[:50], [0, 30, 1000])).astype(np.float32)
    verdicts = [calibration.judge(score, alpha, extrapolated=True) for score in asked.tolist()]
    tensor = torch.from_numpy(asked)
    np.testing.assert_allclose([p for p, _ in verdicts], fixed.p_value(tensor), rtol=1e-6)
    np.testing.assert_allclose([severity for _, severity in verdicts], fixed.severity(tensor, alpha), rtol=1e-5)
    assert calibration.threshold(alpha) == pytest.approx(float(fixed.threshold(alpha)), rel=1e-6)


def test_alpha_below_the_floor_raises_no_alarm_unless_extrapolated() -> None:
    calibration = fresh()
    assert calibration.floor == pytest.approx(1 / (SET_ROWS + 1))
    assert calibration.judge(1e6, calibration.floor)[1] > 1
    assert calibration.judge(1e6, calibration.floor / 2)[1] == 1
    assert calibration.judge(1e6, calibration.floor / 2, extrapolated=True)[1] > 1
    assert calibration.judge(2.0, calibration.floor / 2, extrapolated=True)[1] < 1


@pytest.mark.parametrize("alpha", [0.2, 0.05, 0.01])
def test_rate_of_alarms_of_exchangeable_scores_is_alpha(alpha: float) -> None:
    """A margin of 0.3 alpha is for the dependence of successive p-values, which share the set."""
    rows = 20_000
    calibration = fresh()
    alarms = 0
    for score in normal_scores(rows, 1).tolist():
        alarms += calibration.judge(score, alpha)[1] > 1
        calibration.step(score)
    # A correct implementation fails with a probability below 1e-6 on a new seed.
    assert binom.ppf(5e-7, rows, 0.7 * alpha) <= alarms <= binom.ppf(1 - 5e-7, rows, 1.3 * alpha)
    assert calibration.incidents == 0


def test_p_value_of_a_row_exchangeable_with_the_start_set_is_uniform() -> None:
    """Over many independent start sets, P(p <= k / (n + 1)) = k / (n + 1) exactly (Vovk et al. 2005)."""
    rows, trials = 39, 4000
    scores = normal_scores(trials * (rows + 1)).reshape(trials, rows + 1)
    p_values = np.array([OnlineCalibration(row[:-1]).judge(float(row[-1]), 0.05)[0] for row in scores])
    for alpha in (0.05, 0.25, 0.5):
        count = int((p_values <= alpha + 1e-9).sum())
        assert binom.ppf(1e-7, trials, alpha) <= count <= binom.ppf(1 - 1e-7, trials, alpha)


def test_restarting_every_few_rows_changes_no_verdict() -> None:
    pieces = [("normal", 300, 1), ("loud", 60, 2), ("normal", 200, 3), ("drift", 400, 4), ("normal", 700, 5)]
    scores = stream(pieces)
    uninterrupted, restarted = fresh(), fresh()
    expected = feed(uninterrupted, scores)
    got = []
    for index in range(0, len(scores), 17):
        restarted = OnlineCalibration.load(restarted.dump())
        got += feed(restarted, scores[index : index + 17])
    assert got == expected
    assert restarted.dump() == uninterrupted.dump()
    assert uninterrupted.changes > 0  # the stream visits the branches
    assert uninterrupted.discarded_rows > 0


def test_incident_that_ends_is_not_learnt() -> None:
    calibration = fresh()
    feed(calibration, normal_scores(200, 1))
    before = calibration.threshold(REFERENCE_ALPHA)
    loud = [severity for _, severity in feed(calibration, 50 + normal_scores(60, 2))]
    assert state_of(calibration) == "incident"
    assert min(loud) > 1  # every row of it is an alarm
    feed(calibration, normal_scores(60, 3))
    assert state_of(calibration) == "usual"
    assert calibration.incidents == 1
    assert calibration.changes == 0
    assert calibration.discarded_alarms >= 60
    assert calibration.threshold(REFERENCE_ALPHA) == pytest.approx(before, rel=0.05)


def test_shift_that_stays_is_a_change_after_incident_rows_and_raises_no_more_alarms() -> None:
    calibration = fresh()
    feed(calibration, normal_scores(200, 1))
    shift = 50 + normal_scores(INCIDENT_ROWS + 2 * FORMER_ROWS, 2)
    severities = np.array([severity for _, severity in feed(calibration, shift)])
    assert (severities[: INCIDENT_ROWS - 5] > 1).all()
    assert (severities[INCIDENT_ROWS + 5 :] > 1).mean() < 0.1
    assert calibration.changes == 1
    assert state_of(calibration) == "usual"  # the former set is forgotten
    assert calibration.judge(5.0, REFERENCE_ALPHA)[0] == 1.0


def test_former_set_returns_when_the_rows_fit_it_again() -> None:
    calibration = fresh()
    feed(calibration, 50 + normal_scores(INCIDENT_ROWS + 10, 2))
    assert state_of(calibration) == "changed"
    feed(calibration, normal_scores(300, 3))
    assert state_of(calibration) == "usual"
    assert calibration.returns == 1
    assert calibration.judge(50.0, REFERENCE_ALPHA)[1] > 1


def test_normal_feedback_learns_an_incident_at_once() -> None:
    calibration = fresh()
    feed(calibration, 50 + normal_scores(60, 2))
    assert state_of(calibration) == "incident"
    calibration.normal()
    assert state_of(calibration) == "changed"
    severities = [severity for _, severity in feed(calibration, 50 + normal_scores(40, 3))]
    assert sum(severity > 1 for severity in severities) < 8
    calibration.normal()
    assert state_of(calibration) == "usual"
    feed(calibration, 50 + normal_scores(50, 4))
    assert calibration.set_rows < SET_ROWS  # the former set is gone for good


def test_incident_feedback_brings_the_former_set_back() -> None:
    calibration = fresh()
    threshold = calibration.threshold(REFERENCE_ALPHA)
    feed(calibration, 50 + normal_scores(INCIDENT_ROWS + 5, 2))
    assert state_of(calibration) == "changed"
    calibration.incident()
    assert state_of(calibration) == "usual"
    assert calibration.judge(50.0, REFERENCE_ALPHA)[1] > 1
    calibration.correction = 0.0
    assert calibration.threshold(REFERENCE_ALPHA) == threshold


def test_incident_feedback_during_an_incident_discards_its_rows() -> None:
    calibration = fresh()
    feed(calibration, 50 + normal_scores(60, 2))
    calibration.incident()
    assert state_of(calibration) == "usual"
    assert calibration.held_rows == 0
    assert calibration.discarded_rows == 60


def as_scores(values: npt.ArrayLike) -> Scores:
    return np.asarray(values, np.float32)


@pytest.mark.parametrize("seed", range(8))
def test_normal_feedback_that_is_sent_again_changes_nothing_more(seed: int) -> None:
    random = np.random.default_rng(seed)
    names = random.choice([name for name in sorted(PIECES) if name != "not finite"], 3)
    scores = as_scores(stream([(name, int(random.integers(1, 300)), seed) for name in names]))
    calibration = OnlineCalibration(normal_scores(300))
    feed(calibration, scores)
    again = np.concatenate((scores[-30:], 20 + normal_scores(30, seed)))
    calibration.add(again)
    expected, state = calibration.scores, state_of(calibration)
    # Rounding differs a little if the same rows are scored in another batch.
    calibration.add(again * as_scores(1 + 3e-7))
    np.testing.assert_array_equal(calibration.scores, expected)
    assert state_of(calibration) == state


def test_incident_feedback_that_is_sent_again_changes_nothing_more() -> None:
    calibration = OnlineCalibration(normal_scores(500))
    strange = 50 + normal_scores(60, 2)
    calibration.add(strange)
    calibration.remove(strange)
    expected = calibration.scores
    calibration.remove(strange)
    np.testing.assert_array_equal(calibration.scores, expected)


def test_added_scores_raise_the_p_values_by_their_share() -> None:
    calibration = OnlineCalibration(normal_scores(900))
    assert calibration.judge(40.0, 0.05)[0] == pytest.approx(1 / 901)
    calibration.add(as_scores(np.linspace(40, 50, 60)))
    assert calibration.set_rows == 960
    assert calibration.judge(40.0, 0.05)[0] == pytest.approx(61 / 961)
    assert calibration.own_rows == 60
    assert (calibration.rows, calibration.correction) == (0, 0.0)  # feedback is no evidence of the false-alarm rate


def test_score_that_is_added_for_n_equal_rows_is_in_the_set_n_times() -> None:
    calibration = OnlineCalibration(normal_scores(900))
    calibration.add(as_scores(np.full(30, 40.0)))
    assert calibration.set_rows == 930
    calibration.add(as_scores(np.full(50, 40.0)))
    assert calibration.set_rows == 950


def test_rows_of_an_ended_incident_are_learnt_when_they_are_added() -> None:
    calibration = fresh()
    incident = 50 + normal_scores(60, 2)
    feed(calibration, incident)
    feed(calibration, normal_scores(100, 3))
    assert (state_of(calibration), calibration.incidents) == ("usual", 1)
    assert calibration.judge(50.5, REFERENCE_ALPHA)[1] > 1
    calibration.add(incident)
    assert calibration.judge(50.5, REFERENCE_ALPHA)[1] <= 1
    assert calibration.set_rows == SET_ROWS


def test_rows_of_an_ongoing_incident_become_the_calibration_set_when_they_are_added() -> None:
    calibration = fresh()
    feed(calibration, normal_scores(50, 1))
    incident = 50 + normal_scores(40, 2)
    feed(calibration, incident)
    calibration.add(incident[:10])  # too few to decide about the incident
    assert state_of(calibration) == "incident"
    calibration.add(incident)
    assert state_of(calibration) == "changed"
    assert calibration.judge(51.0, REFERENCE_ALPHA)[1] <= 1


def test_removed_rows_leave_the_calibration_set_and_are_anomalous_again() -> None:
    calibration = OnlineCalibration(normal_scores(500))
    strange = 50 + normal_scores(60, 2)
    calibration.add(strange)
    assert calibration.judge(51.0, REFERENCE_ALPHA)[1] <= 1
    calibration.remove(strange)
    assert (calibration.set_rows, calibration.own_rows) == (500, 0)
    assert calibration.judge(51.0, REFERENCE_ALPHA)[1] > 1
    np.testing.assert_array_equal(np.sort(calibration.scores), np.sort(normal_scores(500)))


def test_removal_of_the_rows_of_a_change_restores_the_former_set() -> None:
    calibration = fresh()
    feed(calibration, normal_scores(50, 1))
    incident = 50 + normal_scores(INCIDENT_ROWS, 2)
    feed(calibration, incident)
    assert state_of(calibration) == "changed"
    calibration.remove(incident)
    assert state_of(calibration) == "usual"
    assert calibration.set_rows == SET_ROWS
    assert calibration.judge(51.0, REFERENCE_ALPHA)[1] > 1


def test_removal_of_all_scores_keeps_enough_of_them_for_a_p_value_of_five_percent() -> None:
    calibration = OnlineCalibration(normal_scores(200))
    feed(calibration, normal_scores(100, 1))
    calibration.remove(calibration.scores)
    assert calibration.set_rows == MIN_SET_ROWS
    assert calibration.floor <= 0.05
    assert calibration.judge(1e6, 0.05)[1] > 1


def test_recent_rows_are_found_by_time_until_newer_rows_displace_them() -> None:
    calibration = fresh()
    scores = normal_scores(RECENT_ROWS + 50, 1)
    for time, score in enumerate(scores[:100].tolist()):
        calibration.step(score, float(time))
    assert calibration.remembered_since == -math.inf
    calibration = OnlineCalibration.load(calibration.dump())
    assert calibration.recent(-math.inf, 9).tolist() == scores[:10].tolist()
    calibration.step(99.0)  # a row without a time belongs to no period
    for time, score in enumerate(scores.tolist()[100:], 100):
        calibration.step(score, float(time))
    assert calibration.remembered_since == 50 + 1
    assert calibration.recent(0, 60).tolist() == scores[51:61].tolist()
    assert calibration.recent(200, math.inf).tolist() == scores[200:].tolist()
    assert len(calibration.recent(1e9, 2e9)) == 0


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_equal_scores_are_counted_one_by_one_in_differences_between_sets(before: list[int], after: list[int]) -> None:
    one, other = Counter(before), Counter(after)
    expected = ((other - one).total(), (one - other).total())
    assert count_differences(as_scores(before), as_scores(after)) == expected


def test_since_is_the_time_of_the_first_row_of_an_incident_and_of_the_change_that_it_becomes() -> None:
    calibration = fresh()
    for time in range(100):
        calibration.step(0.5, float(time))
    assert math.isnan(calibration.since)
    for time in range(100, 150):
        calibration.step(60.0 + time, float(time))
    assert (calibration.state, calibration.since) == ("incident", 100.0)
    for time in range(150, 230):
        calibration.step(60.0 + time % 7, float(time))
    assert (calibration.state, calibration.since) == ("changed", 100.0)
    assert OnlineCalibration.load(calibration.dump()).since == 100.0


@pytest.mark.parametrize("rare", [0.5, 0.01, 0.002])
@pytest.mark.parametrize("level", [-7.0, 0.0, 3.7, 1e4])
def test_equal_rows_whose_scores_differ_by_rounding_raise_no_alarm(level: float, rare: float) -> None:
    calibration = OnlineCalibration(level + normal_scores(200) - 2)
    random = np.random.default_rng(0)
    error = 5e-6 * (abs(level) + 1) * (random.random(5000) < rare)
    scores = (level + error).astype(np.float32)
    feed(calibration, scores[:1500])
    assert max(severity for _, severity in feed(calibration, scores[1500:])) <= 1


def test_own_rows_replace_the_start_set_one_by_one() -> None:
    calibration = OnlineCalibration(normal_scores(50))
    assert (calibration.set_rows, calibration.own_rows) == (50, 0)
    feed(calibration, normal_scores(400, 1))
    learnt = calibration.counted_rows
    assert (calibration.set_rows, calibration.own_rows) == (50 + learnt, learnt)
    feed(calibration, normal_scores(1200, 2))
    assert (calibration.set_rows, calibration.own_rows) == (SET_ROWS, SET_ROWS)


def test_score_that_is_not_finite_is_the_largest_alarm_and_the_set_stays_finite() -> None:
    calibration = fresh()
    for score in (math.nan, math.inf, -math.inf, 1e300):
        p_value, severity = calibration.judge(score, REFERENCE_ALPHA)
        assert p_value == pytest.approx(1 / (SET_ROWS + 1))
        assert severity > 1
        assert math.isfinite(severity)
        calibration.step(score)
    feed(calibration, normal_scores(20, 1))
    assert calibration.held_rows == 0  # the scores were learnt
    assert all(math.isfinite(number) for number in calibration.judge(math.inf, REFERENCE_ALPHA))


@pytest.mark.parametrize("window_rows", [1, 10, 30, 100, 1000, 10**6])
def test_incident_is_recognised_before_it_is_a_change_for_every_window(window_rows: int) -> None:
    calibration = OnlineCalibration(normal_scores(100), window_rows)
    assert calibration.incident_alarms < calibration.incident_rows <= SET_ROWS
    feed(calibration, 50 + normal_scores(calibration.incident_rows, 2))
    assert (calibration.incidents, calibration.changes) == (1, 1)


def test_record_has_at_most_max_bytes_when_all_sets_are_full() -> None:
    calibration = OnlineCalibration(normal_scores(SET_ROWS), incident_rows=SET_ROWS)
    feed(calibration, 50 + normal_scores(SET_ROWS, 1))  # the former set is full, and so is the new one
    feed(calibration, 1000 + normal_scores(400, 2))
    record = calibration.dump()
    assert state_of(calibration) == "incident"
    assert len(record) > MAX_BYTES - 4 * SET_ROWS
    assert len(record) <= MAX_BYTES
    assert OnlineCalibration.load(record).dump() == record


@given(st.data())
def test_altered_or_cut_off_record_is_refused(data: st.DataObject) -> None:
    record = fresh().dump()
    kind = data.draw(st.sampled_from(["flip", "cut", "append"]))
    if kind == "flip":
        position = data.draw(st.integers(0, len(record) - 1))
        flipped = record[position] ^ data.draw(st.integers(1, 255))
        broken = record[:position] + bytes([flipped]) + record[position + 1 :]
    elif kind == "cut":
        broken = record[: data.draw(st.integers(0, len(record) - 1))]
    else:
        broken = record + data.draw(st.binary(min_size=1, max_size=20))
    with pytest.raises(CorruptRecordError, match="online calibration"):
        OnlineCalibration.load(broken)


@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        ([], {}, "at least one score"),
        ([1.0], {"window_rows": 0}, "window of at least 1 row"),
        ([1.0], {"incident_rows": 10}, "incident_rows from 30 to 1000, got 10"),
        ([1.0], {"incident_rows": 1001}, "incident_rows from 30 to 1000, got 1001"),
    ],
)
def test_invalid_arguments_are_refused(start: list[float], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineCalibration(start, **options)


def test_incident_rows_by_default_leave_80_rows_after_an_incident_is_recognised() -> None:
    assert [default_incident_rows(rows) for rows in (1, 10, 30, 60)] == [120, 120, 160, 220]
