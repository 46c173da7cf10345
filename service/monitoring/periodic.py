"""A task that repeats while the service runs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

log = logging.getLogger("elbo.periodic")


class PeriodicTask:
    """Runs `work` every `seconds` from `start` to `close`. An exception is logged and does not prevent the next run.

    Args:
        work: the coroutine function to run.
        seconds: pause before each run.
        failure: the message that is logged when a run raises an exception.
        final: the coroutine function that `close` runs once, after the last run of `work`.
    """

    def __init__(
        self,
        work: Callable[[], Awaitable[object]],
        seconds: float,
        failure: str,
        final: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._work = work
        self._seconds = seconds
        self._failure = failure
        self._final = final
        self._running = asyncio.Lock()

    def start(self) -> None:
        """Schedule the first run, `seconds` from now."""
        self._task = asyncio.get_running_loop().create_task(self._repeat())

    async def run_now(self) -> None:
        """Run `work` once, after the present run has ended."""
        async with self._running:
            await self._run(self._work)

    async def close(self) -> None:
        """Wait until the current run of `work`, if any, has finished. Then stop repeating, and run `final`."""
        async with self._running:
            self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        if self._final:
            await self._run(self._final)

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            async with self._running:
                await self._run(self._work)

    async def _run(self, work: Callable[[], Awaitable[object]]) -> None:
        try:
            await work()
        except Exception:
            log.exception("%s", self._failure)
