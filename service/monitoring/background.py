"""Update drift detection and alerts once per second. Only the leader process does so, for all processes."""

import asyncio
import time
from collections.abc import Sequence
from functools import partial

from service.inference.registry import Catalogue, ModelRegistry
from service.monitoring.alerts import AlertSender, AlertState
from service.monitoring.metrics import Metrics
from service.monitoring.periodic import PeriodicTask
from service.settings import Settings

UPDATE_SECONDS = 1.0


class BackgroundMonitor:
    """Updates the drift gauges and sends alerts, from `start` to `close`. Only the leader process does so.

    Args:
        settings: the URL of Alertmanager, the severity of alerts, and the time after which an alert is resolved.
        metrics: the counts of all processes.
        registry: the models whose drift is watched.
    """

    def __init__(self, settings: Settings, metrics: Metrics, registry: ModelRegistry) -> None:
        self._metrics = metrics
        self._registry = registry
        self._alerts = AlertState(settings.alert_calm_seconds, settings.alert_severity)
        sends_alerts = settings.alertmanager_url and metrics.is_leader
        self._sender = AlertSender(settings.alertmanager_url) if sends_alerts else None
        failure = "failed to update drift and alerts"
        self._task = PeriodicTask(self._update, UPDATE_SECONDS, failure, final=self._update)

    async def start(self) -> None:
        """Record the present counts as the baseline, then update once per second."""
        if not self._metrics.is_leader:
            return
        if self._sender:
            self._sender.start()
        await self._update()
        self._task.start()

    async def close(self) -> None:
        """Update one last time, and try to send the remaining alerts."""
        if not self._metrics.is_leader:
            return
        await self._task.close()
        if self._sender:
            await asyncio.to_thread(self._sender.close)

    async def _update(self) -> None:
        anomalies = self._metrics.anomalies
        anomalies.update_drift(self._registry.catalogue)
        if self._sender:
            causes_of = partial(anomalies.causes_of_alert, self._registry.catalogue)
            step_of = partial(find_usual_step, self._registry.catalogue)
            due = self._alerts.update(
                time.time(), anomalies.alarms.sums(), causes_of, anomalies.alert_states.latest, step_of
            )
            self._sender.enqueue(due)
            states = [(model, alert.state) for (model, _), alert in self._alerts.active.items()]
            anomalies.update_alerts(states, self._sender.pending, self._sender.outcomes)


def find_usual_step(catalogue: Catalogue, labels: Sequence[str]) -> float | None:
    """Return the usual time in seconds between two rows of a group in the training data; None if it is unknown.

    Args:
        catalogue: the models that this process has loaded.
        labels: model, version and group.
    """
    name, version, _ = labels
    served = catalogue.models.get(name, {}).get(int(version))
    timeline = None if served is None else served.manifest.timeline
    return None if timeline is None else timeline.usual_step_seconds
