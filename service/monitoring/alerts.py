"""Alerts for Alertmanager: which groups are abnormal, as the sums of all processes say, sent until it has taken them.

One process decides, every second, and a thread of its own sends: no request ever waits for an Alertmanager. What waits
is one alert for each model and group, always the latest, so the queue is bounded by the groups.
"""

import http.client
import logging
import math
import threading
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import orjson

log = logging.getLogger("elbo.alerts")
RESEND = 30.0  # seconds after which an alert that lasts is sent again
LASTS = 180.0  # seconds after which Alertmanager forgets one that is not: several lost sendings may fail before
BACKOFF = (1.0, 60.0)  # seconds before the next try: at first, and at most
TIMEOUT = 5.0  # seconds for one try
BATCH = 100  # alerts in one request
PATH = "/api/v2/alerts"
NAME = "ElboAnomaly"
NAMED_CAUSES = 3  # features that an alert names

Key = tuple[str, str]  # model, group
Labels = tuple[str, ...]
Alert = dict[str, Any]
Counted = Mapping[Labels, Sequence[float]]


@dataclass
class Active:
    """An alert that has not been resolved. Times in Unix seconds.

    blamed: how often each feature had been blamed, by model, version and feature, when it began.
    """

    started: float
    last: float  # when its group last was abnormal
    version: str
    blamed: Mapping[Labels, float]
    rows: float = 0.0
    sent: float = -math.inf


class AlertState:
    """Which alerts there are, from the counts of abnormal rows as they grow. Knows no network and no clock.

    calm: seconds without an abnormal row after which an alert is resolved.
    """

    def __init__(self, calm: float) -> None:
        self._calm = calm
        self._before: tuple[dict[Labels, float], dict[Labels, float]] | None = None
        self.active: dict[Key, Active] = {}

    def look(self, now: float, alarms: Counted, causes: Counted) -> dict[Key, Alert]:
        """The alerts to send. The first look tells none: what it finds is of before.

        Args:
            now: Unix seconds.
            alarms: abnormal rows by model, version and group, of all time.
            causes: anomalous rows by model, version and feature, of all time.
        """
        counted = {labels: numbers[0] for labels, numbers in alarms.items()}
        blamed = {labels: numbers[0] for labels, numbers in causes.items()}
        counted_before, blamed_before = self._before or (counted, blamed)
        self._before = counted, blamed
        for labels, count in counted.items():
            if (grown := count - counted_before.get(labels, 0.0)) > 0:
                model, version, group = labels
                active = self.active.setdefault((model, group), Active(now, now, version, blamed_before))
                active.last, active.version, active.rows = now, version, active.rows + grown
        due = {key: self._due(now, key, blamed) for key in list(self.active)}
        return {key: alert for key, alert in due.items() if alert is not None}

    def _due(self, now: float, key: Key, blamed: Mapping[Labels, float]) -> Alert | None:
        active = self.active[key]
        if now - active.last >= self._calm:
            del self.active[key]
            return _alert(key, active, blamed, now)
        if now - active.sent < RESEND:
            return None
        active.sent = now
        return _alert(key, active, blamed, now + LASTS)


class AlertSender:
    """Posts alerts from a thread of its own, and tries again until Alertmanager has taken or refused them.

    Args:
        url: of Alertmanager, with its path prefix and its user:password, if it has any.
        backoff: seconds before the next try, at first and at most.
    """

    def __init__(self, url: str, backoff: tuple[float, float] = BACKOFF) -> None:
        self._address = urlsplit(url)
        self._backoff = backoff
        self._waiting: dict[Key, Alert] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
        self.outcomes = {"sent": 0, "refused": 0, "retried": 0}  # alerts; the thread alone writes

    def start(self) -> None:
        """Begin to send what is put."""
        self._thread.start()

    def put(self, alerts: Mapping[Key, Alert]) -> None:
        """Send `alerts`, each in the place of an earlier one for the same group that still waits."""
        if not alerts:
            return
        with self._changed:
            self._waiting.update(alerts)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Alerts that have not been taken."""
        return len(self._waiting)

    def close(self) -> None:
        """Send no more; what waits is given one last try."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(2 * TIMEOUT)

    def _run(self) -> None:
        wait = 0.0
        while True:
            with self._changed:
                if wait:
                    self._changed.wait_for(lambda: self._closing, wait)
                else:
                    self._changed.wait_for(lambda: self._closing or bool(self._waiting))
                closing, batch = self._closing, dict(list(self._waiting.items())[:BATCH])
            taken = not batch or self._try(batch)
            if closing and not (taken and self._waiting):
                return
            wait = 0.0 if taken else min(max(2 * wait, self._backoff[0]), self._backoff[1])

    def _try(self, batch: dict[Key, Alert]) -> bool:
        """Whether Alertmanager has answered for `batch`, in one way or the other."""
        try:
            status, reason = self._post(orjson.dumps(list(batch.values())))
        except (OSError, http.client.HTTPException) as error:
            status, reason = 0, str(error)
        if status == 0 or status == 429 or status >= 500:
            self.outcomes["retried"] += len(batch)
            log.warning("Alertmanager takes no alerts: %s", reason, extra={"fields": {"status": status}})
            return False
        if status >= 300:
            log.error("Alertmanager refused alerts: %s", reason, extra={"fields": {"status": status}})
        self.outcomes["sent" if status < 300 else "refused"] += len(batch)
        with self._changed:
            for key, alert in batch.items():
                if self._waiting.get(key) is alert:  # no later one has come meanwhile
                    del self._waiting[key]
        return True

    def _post(self, body: bytes) -> tuple[int, str]:
        address = self._address
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        connection = kind(address.hostname or "", address.port, timeout=TIMEOUT)
        headers = {"Content-Type": "application/json"}
        if address.username:
            secret = f"{unquote(address.username)}:{unquote(address.password or '')}"
            headers["Authorization"] = f"Basic {b64encode(secret.encode()).decode()}"
        try:
            connection.request("POST", address.path.rstrip("/") + PATH, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(200).decode(errors="replace") or answer.reason
        finally:
            connection.close()


def _alert(key: Key, active: Active, blamed: Mapping[Labels, float], ends: float) -> Alert:
    """As /api/v2/alerts wants it; it is the same alert as long as its labels are."""
    model, group = key
    where = f" in {group}" if group else ""
    grown = {
        feature: count - active.blamed.get((name, version, feature), 0.0)
        for (name, version, feature), count in blamed.items()
        if (name, version) == (model, active.version)
    }
    causes = sorted((feature for feature in grown if grown[feature] > 0), key=lambda feature: -grown[feature])
    because = f", most of all {', '.join(causes[:NAMED_CAUSES])}" if causes else ""
    return {
        "labels": {"alertname": NAME, "model": model, **({"group": group} if group else {})},
        "annotations": {
            "summary": f"rows of {model}{where} are abnormal",
            "description": f"{active.rows:.0f} rows since {_iso(active.started)}{because} (version {active.version})",
        },
        "startsAt": _iso(active.started),
        "endsAt": _iso(ends),
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
