"""When an alert opens and ends, compared with a server that updates the rule with each row and every second."""

import numpy as np
import pytest

from service.anomaly.alert_rule import AlertRule, find_alerts

INCIDENT_SECONDS = 300.0


def alerts_by_the_second(
    times: list[int], alarms: set[int], incidents: set[int], calm: float
) -> list[tuple[float, float]]:
    """Return the start and the last abnormal moment of each alert, from a rule that is updated every second."""
    rule, found = AlertRule(calm), list[tuple[float, float]]()
    rows = {time: row for row, time in enumerate(times)}
    latest, seen_at, opened, abnormal_row = -1, 0, -1, -1
    for now in range(times[-1] + int(INCIDENT_SECONDS + calm) + 2):
        row = rows.get(now, -1)
        if row >= 0:
            latest, seen_at = row, now
        was_open = rule.started is not None
        is_incident = latest in incidents and now - seen_at <= INCIDENT_SECONDS
        is_open = rule.update(now, row in alarms, is_incident)
        if is_open and not was_open:
            opened = row
        if is_open and row >= 0 and (row in alarms or row in incidents):
            abnormal_row = row
        if was_open and not is_open:
            found.append((opened, abnormal_row))
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("calm", [20.0, 60.0, 150.0])
def test_alerts_found_from_rows_equal_those_of_a_rule_that_is_updated_every_second(seed: int, calm: float) -> None:
    random = np.random.default_rng(seed)
    steps = random.choice([10, 20, 60, 61, 400], 120, p=[0.2, 0.2, 0.3, 0.2, 0.1])
    times = np.cumsum(steps)
    is_alarm = random.random(120) < 0.2
    is_incident = np.zeros(120, bool)
    for start in random.integers(0, 110, 3).tolist():
        is_incident[start : start + 8] = True
        is_alarm[start : start + 8] |= random.random(len(is_alarm[start : start + 8])) < 0.5
    alarms, incidents = np.flatnonzero(is_alarm).tolist(), np.flatnonzero(is_incident).tolist()
    found = find_alerts(times.tolist(), alarms, incidents, calm, INCIDENT_SECONDS)
    assert found == alerts_by_the_second(times.tolist(), set(alarms), set(incidents), calm)
    assert len(found) > 1


def test_alert_opens_at_an_alarm_but_not_at_an_incident_and_ends_after_the_calm_time() -> None:
    rule = AlertRule(60.0)
    assert not rule.update(0, has_alarm=False, is_incident=True)
    assert rule.update(1, has_alarm=True, is_incident=False)
    assert rule.update(60.9, has_alarm=False, is_incident=False)
    assert rule.started == 1
    assert not rule.update(61, has_alarm=False, is_incident=False)
    assert rule.started is None
