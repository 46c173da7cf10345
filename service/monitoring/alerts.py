"""Alerts: decide which groups are abnormal, and send alerts about them to Alertmanager.

The leader process decides once per second, from the counts of all processes. A separate thread sends the alerts, so
that no request waits for Alertmanager. The queue of alerts cannot grow without bound, because it holds only the latest
alert per model and group.
"""

import http.client
import logging
import math
import threading
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import orjson

from service.anomaly.alert_rule import AlertRule, calm_for_step
from service.anomaly.online_calibration import State
from service.monitoring.metric_types import Labels

log = logging.getLogger("elbo.alerts")
RESEND_SECONDS = 30.0  # an active alert is sent again after this time
EXPIRY_SECONDS = 180.0  # Alertmanager resolves an alert that is not sent again within this time
RETRY_SECONDS = (1.0, 60.0)  # pauses after a failed attempt to send: the first, and the longest
TIMEOUT_SECONDS = 5.0  # time limit of one attempt to send alerts
MAX_BATCH = 100  # maximum number of alerts per request
API_PATH = "/api/v2/alerts"
STATE_TEXTS: dict[State | None, str] = {
    "incident": "; the incident goes on",
    "changed": "; the group has changed for so long that its present rows are judged as its new normal",
}
ALERT_NAME = "ElboAnomaly"

Key = tuple[str, str]  # model, group
Alert = dict[str, Any]
Counts = Mapping[Labels, Sequence[float]]


@dataclass
class ActiveAlert:
    """An alert that is not resolved. Times are Unix seconds.

    `causes`: the features that explain the latest abnormal row, with the values seen and expected.
    `state`: the state of the group's online calibration; None without online calibration.
    """

    rule: AlertRule
    started: float
    version: str
    causes: Sequence[str] = ()
    rows: float = 0.0
    state: State | None = None
    last_sent: float = -math.inf


class AlertState:
    """Decides which alerts are active, from counters of abnormal rows. It does no I/O and reads no clock.

    An alert begins when the counter of its group grows. The alert is resolved when, for `resolve_seconds`, the counter
    has not grown and the group has not been in an incident: see `AlertRule`.

    Args:
        resolve_seconds: time without an abnormal row after which an alert is resolved; see `calm_for_step`.
        severity: the value of the label `severity`.
    """

    def __init__(self, resolve_seconds: float, severity: str = "page") -> None:
        self._resolve_seconds = resolve_seconds
        self._severity = severity
        self._counts_before: dict[Labels, float] | None = None
        self.active: dict[Key, ActiveAlert] = {}

    def update(
        self,
        now: float,
        alarms: Counts,
        causes_of: Callable[[Labels], Sequence[str]],
        state_of: Callable[[Labels], State | None] = lambda _: None,
        step_of: Callable[[Labels], float | None] = lambda _: None,
    ) -> dict[Key, Alert]:
        """Return the alerts to send now: those that have begun, are due again, have changed state, or are resolved.

        The first call returns no alerts: it only records the counters.

        Args:
            now: Unix seconds.
            alarms: counters of abnormal rows by model, version and group.
            causes_of: returns the features that explain the latest abnormal row of a model, version and group, as text.
            state_of: returns the state of the online calibration of a model, version and group, if it has one.
            step_of: returns the usual time in seconds between two rows of a model, version and group, if it is known.
        """
        counts = {labels: values[0] for labels, values in alarms.items()}
        counts_before = counts if self._counts_before is None else self._counts_before
        self._counts_before = counts
        abnormal: set[Key] = set()
        for labels, count in counts.items():
            new_rows = count - counts_before.get(labels, 0.0)
            if new_rows > 0:
                model, version, group = labels
                key = model, group
                if key not in self.active:
                    calm_seconds = calm_for_step(self._resolve_seconds, step_of(labels))
                    self.active[key] = ActiveAlert(AlertRule(calm_seconds), now, version)
                alert = self.active[key]
                alert.version = version
                alert.causes = causes_of(labels)
                alert.rows += new_rows
                abnormal.add(key)
        due = {
            key: self._due(now, key, key in abnormal, state_of((key[0], alert.version, key[1])))
            for key, alert in list(self.active.items())
        }
        return {key: alert for key, alert in due.items() if alert is not None}

    def _due(self, now: float, key: Key, is_abnormal: bool, state: State | None) -> Alert | None:
        """Return the alert of `key` if it must be sent now, else None. Remove the alert if it is resolved."""
        alert = self.active[key]
        has_changed = alert.state != state
        alert.state = state
        if not alert.rule.update(now, is_abnormal, state == "incident"):
            del self.active[key]
            return _payload(key, alert, self._severity, ends=now)
        if now - alert.last_sent < RESEND_SECONDS and not has_changed:
            return None
        alert.last_sent = now
        return _payload(key, alert, self._severity, ends=now + EXPIRY_SECONDS)


class AlertSender:
    """Posts alerts to Alertmanager from a thread, and retries until they are accepted or refused.

    Args:
        url: the URL of Alertmanager; it may have a path prefix and user:password.
        retry_seconds: the pauses after a failed attempt to send: the first, and the longest.
    """

    def __init__(self, url: str, retry_seconds: tuple[float, float] = RETRY_SECONDS) -> None:
        self._address = urlsplit(url)
        self._retry_seconds = retry_seconds
        self._queue: dict[Key, Alert] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
        self.outcomes = {"sent": 0, "refused": 0, "retried": 0}  # numbers of alerts; only the thread changes them

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def enqueue(self, alerts: Mapping[Key, Alert]) -> None:
        """Queue alerts. An alert replaces an undelivered alert for the same model and group."""
        if not alerts:
            return
        with self._changed:
            self._queue.update(alerts)
            self._changed.notify()

    @property
    def pending(self) -> int:
        """Number of alerts that Alertmanager has not yet accepted or refused."""
        return len(self._queue)

    def close(self) -> None:
        """Try one last time to send the queued alerts, then stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(2 * TIMEOUT_SECONDS)

    def _run(self) -> None:
        first_pause, longest_pause = self._retry_seconds
        pause = 0.0
        while True:
            with self._changed:
                if pause:
                    self._changed.wait_for(lambda: self._closing, pause)
                else:
                    self._changed.wait_for(lambda: self._closing or bool(self._queue))
                closing = self._closing
                batch = dict(list(self._queue.items())[:MAX_BATCH])
            delivered = not batch or self._send(batch)
            if closing and not (delivered and self._queue):
                return
            pause = 0.0 if delivered else min(max(2 * pause, first_pause), longest_pause)

    def _send(self, batch: dict[Key, Alert]) -> bool:
        """Try once to send `batch`. Return False if it must be sent again: it was neither accepted nor refused."""
        try:
            status, reason = self._post(orjson.dumps(list(batch.values())))
        except (OSError, http.client.HTTPException) as error:
            status, reason = 0, str(error)
        fields = {"status": status, "alerts": len(batch)}
        if status == 0 or status == 429 or status >= 500:
            self.outcomes["retried"] += len(batch)
            log.warning(
                "failed to send alerts to Alertmanager, will retry: %s; check ELBO_ALERTMANAGER_URL and Alertmanager",
                reason,
                extra={"fields": fields},
            )
            return False
        if status >= 300:
            self.outcomes["refused"] += len(batch)
            log.error("Alertmanager refused alerts, which are dropped: %s", reason, extra={"fields": fields})
        else:
            self.outcomes["sent"] += len(batch)
        with self._changed:
            for key, alert in batch.items():
                if self._queue.get(key) is alert:  # no newer alert has replaced it
                    del self._queue[key]
        return True

    def _post(self, body: bytes) -> tuple[int, str]:
        """Post `body` to Alertmanager. Return the status and the beginning of the response body."""
        address = self._address
        connection_class = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = connection_class(address.hostname or "", address.port, timeout=TIMEOUT_SECONDS)
        headers = {"Content-Type": "application/json"}
        if address.username:
            credentials = f"{unquote(address.username)}:{unquote(address.password or '')}"
            headers["Authorization"] = f"Basic {b64encode(credentials.encode()).decode()}"
        try:
            connection.request("POST", address.path.rstrip("/") + API_PATH, body, headers)
            response = connection.getresponse()
            return response.status, response.read(200).decode(errors="replace") or response.reason
        finally:
            connection.close()


def _payload(key: Key, alert: ActiveAlert, severity: str, ends: float) -> Alert:
    """Return an alert in the format of /api/v2/alerts.

    The labels of an alert never change, because Alertmanager identifies the alert by them.
    """
    model, group = key
    main_causes = f"; main causes: {', '.join(alert.causes)}" if alert.causes else ""
    where = f" of {group}" if group else ""
    return {
        "labels": {
            "alertname": ALERT_NAME,
            "severity": severity,
            "model": model,
            **({"group": group} if group else {}),
        },
        "annotations": {
            "summary": f"model {model} finds rows{where} abnormal",
            "description": (
                f"{alert.rows:.0f} abnormal rows since {_iso(alert.started)}{main_causes}"
                f"{STATE_TEXTS.get(alert.state, '')} (model version {alert.version})"
            ),
            **({"state": alert.state} if alert.state else {}),
        },
        "startsAt": _iso(alert.started),
        "endsAt": _iso(ends),
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
