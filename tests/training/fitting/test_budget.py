"""The alpha of a budget of alarms keeps the budget on simulated hosts, also if their rows depend on each other."""

from dataclasses import replace

import numpy as np
import pytest

from models.policy_rules import AlarmRule
from training.data.timeline import Timeline
from training.errors import FitError
from training.fitting.budget import alpha_of_budget

STEP = 60  # seconds
PER_DAY = 86_400 // STEP


def hosts(days: int, count: int, correlation: float, seed: int) -> tuple[Timeline, np.ndarray]:
    """Return the timeline and the scores of hosts, whose scores are an autoregressive process of the first order."""
    rows = days * PER_DAY
    noise = np.random.RandomState(seed).standard_normal((rows, count))
    scores = noise.copy()
    for row in range(1, rows):
        scores[row] = correlation * scores[row - 1] + np.sqrt(1 - correlation**2) * noise[row]
    timeline = Timeline(
        time=np.tile(np.arange(rows, dtype=np.int64) * STEP * 10**9, count),
        group=np.repeat(np.arange(count, dtype=np.int32), rows),
        groups=tuple(f"h{i}" for i in range(count)),
        time_column="time",
        group_column="host",
        source_rows=np.arange(rows * count),
    )
    return timeline, scores.T.ravel().astype(np.float32)


def alarms_per_day(rule: AlarmRule, flagged: np.ndarray, days: int, hosts: int) -> float:
    """Return the number of stretches of `rule.rows` flagged rows or more, per day and host."""
    count = 0
    for host in flagged.reshape(hosts, -1):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], host.astype(int), [0]))))
        count += int((edges[1::2] - edges[::2] >= rule.rows).sum())
    return count / (days * hosts)


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("rule", [AlarmRule(per_day=2.0), AlarmRule(per_day=2.0, rows=3)], ids=["1 row", "3 rows"])
def test_alpha_keeps_the_budget_on_later_rows_of_simulated_hosts(rule: AlarmRule, correlation: float) -> None:
    timeline, scores = hosts(days=10, count=10, correlation=correlation, seed=1)
    alpha = alpha_of_budget(rule, scores, timeline, np.arange(len(scores)))
    _, later = hosts(days=20, count=10, correlation=correlation, seed=2)
    found = alarms_per_day(rule, later > np.quantile(scores, 1 - alpha), 20, 10)
    assert 1.6 < found < 2.4  # 400 alarms are expected: their standard deviation is at most 0.1 or, in bursts, 0.14
    if rule.rows == 1 and correlation == 0.0:
        assert alpha == pytest.approx(2.0 / PER_DAY, rel=0.05)  # hardly any two anomalous rows are neighbours


def test_alpha_without_times_counts_every_row_as_an_alarm() -> None:
    rule = AlarmRule(per_day=2.0)
    alpha = alpha_of_budget(rule, np.arange(2879, dtype=np.float32), None, np.arange(2879), STEP)
    assert alpha == 4 / 2880


def test_order_of_the_calibration_rows_does_not_matter() -> None:
    rule = AlarmRule(per_day=3.0, rows=2)
    timeline, scores = hosts(days=4, count=3, correlation=0.8, seed=3)
    order = np.random.RandomState(0).permutation(len(scores))
    alpha = alpha_of_budget(rule, scores, timeline, np.arange(len(scores)))
    assert alpha_of_budget(rule, scores[order], timeline, order) == alpha


def test_alarm_that_must_last_counts_its_seconds() -> None:
    """Of ten stretches, one lasts five minutes. Only this one counts, so that all of them may be anomalous."""
    timeline, _ = hosts(days=1, count=1, correlation=0.0, seed=0)
    scores = np.zeros(PER_DAY, np.float32)
    for start in range(100, 1000, 100):
        scores[start : start + 2] = 5.0
    scores[1200:1206] = 5.0
    rows = np.arange(PER_DAY)
    lasting = alpha_of_budget(AlarmRule(per_day=2.0, seconds=300.0), scores, timeline, rows)
    short = alpha_of_budget(AlarmRule(per_day=2.0), scores, timeline, rows)
    assert lasting * (PER_DAY + 1) >= 24  # all 24 rows
    assert short * (PER_DAY + 1) < 5


def test_too_few_calibration_rows_for_the_budget_are_refused() -> None:
    timeline, scores = hosts(days=1, count=1, correlation=0.0, seed=0)
    with pytest.raises(FitError, match=r"0\.5 alarms a day need calibration rows of at least 2 days of one group"):
        alpha_of_budget(AlarmRule(per_day=0.5), scores, timeline, np.arange(len(scores)))


def test_budget_without_a_known_step_is_refused() -> None:
    timeline, scores = hosts(days=1, count=1, correlation=0.0, seed=0)
    same_time = replace(timeline, time=np.zeros_like(timeline.time))
    with pytest.raises(FitError, match="name the column of the times with --time"):
        alpha_of_budget(AlarmRule(per_day=5.0), scores, same_time, np.arange(len(scores)))
