"""The components that all endpoints share."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from service.anomaly.group_memory import GroupMemory
from service.errors import NotReady
from service.http.admission import AdmissionControl
from service.inference.batcher import Batcher
from service.inference.registry import ModelRegistry
from service.inference.served_model import ServedModel
from service.monitoring.metrics import Metrics
from service.monitoring.unknown_metrics import UnknownMetricsLog
from service.settings import Settings

log = logging.getLogger("elbo.service")
READER_THREADS = 2  # each of them competes with the event loop for the interpreter lock


@dataclass
class ServiceContext:
    """The components of one application. `draining` becomes true when the server begins to shut down.

    `readers` are the threads that read large request bodies. `on_reload` are the functions that read configured files
    again. To make SIGHUP read another file, append a function.
    """

    settings: Settings
    registry: ModelRegistry
    batcher: Batcher
    metrics: Metrics
    admission: AdmissionControl
    groups: GroupMemory
    draining: bool = False
    unknown_metrics: UnknownMetricsLog = field(default_factory=UnknownMetricsLog)
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(READER_THREADS, "reader"))

    on_reload: list[Callable[[], Awaitable[object]]] = field(default_factory=list)

    async def reload(self) -> None:
        """Call all functions of `on_reload`. An exception is logged and does not prevent the other calls."""
        for read_again in self.on_reload:
            try:
                await read_again()
            except Exception:
                log.exception("failed to reload")
        log.info("reloaded")

    async def count_groups(self) -> None:
        """Update the metric of the groups that are remembered. Only the leader process may call it."""
        for versions in self.registry.catalogue.models.values():
            for served in versions.values():
                if served.has_past:
                    with suppress(NotReady):  # requests report it
                        memory = await self.groups.of(served)
                        tally = await asyncio.to_thread(memory.file.tally)
                        self.metrics.anomalies.set_groups(served, tally)

    def find(self, reference: str | None) -> ServedModel:
        """Return the model that `reference` names, or the default model. Raises NotReady, ModelNotFound."""
        return self.registry.catalogue.find(reference)

    def require_ready(self) -> None:
        """Raise NotReady if no model is served, or if the server is shutting down."""
        if self.draining:
            raise NotReady("the server is shutting down")
        self.find(None)
