"""What one process does for all, every second: it looks for drift in their p-values, and for groups to alert about."""

import asyncio
import time

from service.inference.registry import ModelRegistry
from service.monitoring.alerts import AlertSender, AlertState
from service.monitoring.metrics import Metrics
from service.monitoring.periodic import Periodic
from service.settings import Settings

SECONDS = 1.0  # between two looks


class BackgroundMonitor:
    """Runs from `start` to `close`.

    Args:
        settings: where Alertmanager is, and when alerts end.
        metrics: what is counted, of all processes; nothing happens here unless this one leads.
        registry: of the models.
    """

    def __init__(self, settings: Settings, metrics: Metrics, registry: ModelRegistry) -> None:
        self._telemetry, self._repository = metrics, registry
        self._deciding = AlertState(settings.alert_calm_seconds)
        self._sender = AlertSender(settings.alertmanager_url) if settings.alertmanager_url and metrics.leads else None
        self._looking = Periodic(self._look, SECONDS, "a look at the counts failed")

    async def start(self) -> None:
        """Look, and look again and again."""
        if not self._telemetry.leads:
            return
        if self._sender:
            self._sender.start()
        await self._look()
        self._looking.start()

    async def close(self) -> None:
        """Look once more, and tell what is to be told."""
        if not self._telemetry.leads:
            return
        await self._looking.close()
        await self._look()
        if self._sender:
            await asyncio.to_thread(self._sender.close)

    async def _look(self) -> None:
        judged = self._telemetry.judged
        judged.look_for_drift(self._repository.catalogue)
        if self._sender:
            due = self._deciding.look(time.time(), judged.alarms.sums(), judged.causes.sums())
            self._sender.put(due)
            judged.tell_of_alerts(self._deciding.active, self._sender.waiting, self._sender.outcomes)
