"""The rule that decides how long the alert of a group stays open. The server and `elbo backtest` share it."""

import math
from collections.abc import Sequence

MAX_ALERT_GROUPS = 100  # number of groups of a model that have alerts of their own; further groups share one alert
CALM_STEPS = 1.5  # wait for the next row before an alert ends, and half a step more because it may be late


def calm_for_step(calm_seconds: float, usual_step: float | None) -> float:
    """Return the time without an alarm after which an alert ends, for groups with a row every `usual_step` seconds.

    It is at least CALM_STEPS steps. Otherwise, with rows every 15 minutes and the default calm of 2 minutes, each row
    of an incident would be an alert of its own.

    Args:
        calm_seconds: the value of ELBO_ALERT_CALM_SECONDS. The result is never shorter.
        usual_step: the usual time between two rows of a group in the training data; None if it is unknown.
    """
    return max(calm_seconds, CALM_STEPS * (usual_step or 0.0))


class AlertRule:
    """Whether the alert of one group is open.

    An alert opens at an alarm: a row at which the running mean severity of the group has been above 1 for as long as
    the policy demands. The alert stays open while more alarms follow, and while the online calibration of the group is
    in the state "incident", even if the severities fall meanwhile. It ends after `calm_seconds` without an alarm and
    without an incident.

    Args:
        calm_seconds: time without an alarm and without an incident after which the alert ends.

    Attributes:
        started: when the alert opened; None if no alert is open.
        last_abnormal: the last moment with an alarm or an incident.
    """

    __slots__ = ("_calm_seconds", "last_abnormal", "started")

    def __init__(self, calm_seconds: float) -> None:
        self._calm_seconds = calm_seconds
        self.started: float | None = None
        self.last_abnormal = -math.inf

    def update(self, now: float, has_alarm: bool, is_incident: bool) -> bool:
        """Return whether the alert is open.

        Args:
            now: the time in seconds. It does not fall from call to call.
            has_alarm: whether there was an alarm since the last call.
            is_incident: whether the group is in an incident now.
        """
        if has_alarm or (is_incident and self.started is not None):
            if self.started is None:
                self.started = now
            self.last_abnormal = now
        elif self.started is not None and now - self.last_abnormal >= self._calm_seconds:
            self.started = None
        return self.started is not None


def find_alerts(
    times: Sequence[float],
    alarms: Sequence[int],
    incidents: Sequence[int],
    calm_seconds: float,
    incident_seconds: float,
) -> list[tuple[int, int]]:
    """Return the first and the last row of each alert that the rows of one group raise if each arrives at its time.

    Args:
        times: the times of the rows in seconds, in order.
        alarms: the rows with an alarm, in order.
        incidents: the rows after which the group is in an incident, in order.
        calm_seconds: see `AlertRule`.
        incident_seconds: how long an incident keeps the alert open if no more rows arrive.
    """
    alerts: list[tuple[int, int]] = []
    rule = AlertRule(calm_seconds)
    has_alarm, in_incident = set(alarms), set(incidents)
    first, previous, seen = 0, -1, -1
    for row in sorted(has_alarm | in_incident):
        if rule.started is not None:
            if seen in in_incident:  # until just before the next row
                until = min(math.nextafter(times[seen + 1], -math.inf), times[seen] + incident_seconds)
                rule.update(until, has_alarm=False, is_incident=True)
            if times[row] - rule.last_abnormal > calm_seconds:
                rule.update(rule.last_abnormal + calm_seconds, has_alarm=False, is_incident=False)
                alerts.append((first, previous))
        was_open = rule.started is not None
        if rule.update(times[row], row in has_alarm, row in in_incident):
            first, previous = (first if was_open else row), row
        seen = row
    if rule.started is not None:
        alerts.append((first, previous))
    return alerts
