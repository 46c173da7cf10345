"""Stop the work for a request whose client has disconnected."""

import asyncio

from service.errors import ClientGone
from service.http.request import RequestContext


class DisconnectWatch:
    """Cancels the current task when the client disconnects.

    The watch starts only if a request waits long, so that most requests avoid the cost of a second task.
    """

    def __init__(self, request: RequestContext) -> None:
        self._request = request
        self._watched = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._is_disconnected = False

    def start(self) -> None:
        """Start watching in another task."""
        self._watcher = asyncio.get_running_loop().create_task(self._cancel_on_disconnect())

    def stop(self) -> None:
        """Stop watching."""
        if self._watcher:
            self._watcher.cancel()

    def raise_if_disconnected(self) -> None:
        """Raise ClientGone if the disconnect is the only reason why the task was cancelled."""
        if self._is_disconnected and self._watched and self._watched.uncancel() == 0:
            raise ClientGone("the client disconnected before its response was ready")

    async def _cancel_on_disconnect(self) -> None:
        await self._request.wait_for_disconnect()
        self._is_disconnected = True
        if self._watched:
            self._watched.cancel()
