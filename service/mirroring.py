"""Poll the remote repository of a server in the background. Only the leader process does so, for all processes."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from threading import Thread
from typing import TypeVar

from service.inference.registry import Failure
from service.monitoring.metrics import Metrics
from service.monitoring.periodic import PeriodicTask
from service.repository.mirror import Mirror, read_failures
from service.settings import Settings

FIRST_POLL_SECONDS = 60.0  # how long the start of the server waits for the first poll if the cache is empty
CACHED_POLL_SECONDS = 5.0  # how long it waits if the cache has models
CLOSE_SECONDS = 2.0  # how long the end of the server waits for a poll

T = TypeVar("T")
log = logging.getLogger("elbo.repository")


class RepositoryPolling:
    """Mirrors the remote repository into the cache every ELBO_POLL_SECONDS, from `start` to `close`.

    A poll runs in a thread, because downloads and hashes would block the event loop.

    Args:
        settings: the repository, the cache and the time between two polls. Without a repository, nothing is polled.
        metrics: counts the polls.
        on_change: called after a poll that has changed the cache.
    """

    def __init__(self, settings: Settings, metrics: Metrics, on_change: Callable[[], Awaitable[object]]) -> None:
        self._mirror = None
        if settings.repository and metrics.is_leader:
            self._mirror = Mirror(settings.repository, settings.artifact_folder, settings.keep_versions)
        self._metrics = metrics
        self._on_change = on_change
        self._is_started = False
        self._task = PeriodicTask(self._poll, settings.poll_seconds, "failed to poll the remote repository")
        self._first: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Poll now. If the poll takes long, return while it goes on. The models in the cache are served meanwhile."""
        if self._mirror is None:
            return
        seconds = CACHED_POLL_SECONDS if self._mirror.has_versions() else FIRST_POLL_SECONDS
        self._first = asyncio.create_task(self._task.run_now())
        await asyncio.wait([self._first], timeout=seconds)
        self._is_started = True
        self._task.start()

    async def close(self) -> None:
        """Stop polling, and abandon a download. If it hangs for CLOSE_SECONDS, a later poll removes its files."""
        if self._mirror is None:
            return
        self._mirror.is_stopped = True
        closing = asyncio.create_task(self._task.close())
        await asyncio.wait([closing], timeout=CLOSE_SECONDS)

    async def _poll(self) -> None:
        assert self._mirror is not None
        poll = await run_in_daemon_thread(self._mirror.poll)
        self._metrics.count_repository_poll(poll.outcome)
        if poll.changed and self._is_started:
            await self._on_change()


def registry_failures(settings: Settings) -> tuple[Failure, ...]:
    """Return the failures of the last poll of the repository, whichever process or server polled."""
    failures = read_failures(settings.artifact_folder)
    return tuple(Failure(each.name, each.version, each.code, each.detail) for each in failures)


async def run_in_daemon_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns. The process may end while `work` runs: it does not wait for a hanging connection."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def finish(value: T | None, error: BaseException | None) -> None:
        if result.cancelled():
            return
        if error:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type] # without an error, the value is there

    def run() -> None:
        value, error = None, None
        try:
            value = work()
        except Exception as raised:  # noqa: BLE001 - the caller raises it
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, value, error)

    Thread(target=run, name="repository", daemon=True).start()
    return await result
