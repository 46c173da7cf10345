"""Work that comes round again and again while the service runs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

log = logging.getLogger("elbo.periodic")


class Periodic:
    """Does `work` from `start` to `close`. What it raises is logged, and its next turn comes all the same.

    Args:
        work: one turn.
        seconds: between two turns.
        failure: what the log says of a turn that failed.
    """

    def __init__(self, work: Callable[[], Awaitable[object]], seconds: float, failure: str) -> None:
        self._work = work
        self._seconds = seconds
        self._failure = failure
        self._turn = asyncio.Lock()

    def start(self) -> None:
        """The first turn comes after `seconds`."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """End, after the turn that is under way: what it has begun with is not lost."""
        async with self._turn:
            self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            async with self._turn:
                try:
                    await self._work()
                except Exception:
                    log.exception("%s", self._failure)
