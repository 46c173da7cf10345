"""Connections that are being opened, in the event loop of the service."""

import asyncio
import socket
import ssl
import time
from collections.abc import Callable

import pytest
import uvloop

from service.http.protocol import GRACE_SECONDS
from service.server.connections import OpeningConnections


class Recorder(asyncio.Protocol):
    """Calls `when_open` when its connection is open, and records whether the connection is lost."""

    def __init__(self) -> None:
        self.transport: asyncio.BaseTransport | None = None
        self.when_open: Callable[[], object] = lambda: None
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.when_open()

    def connection_lost(self, _: Exception | None) -> None:
        self.is_lost = True


@pytest.mark.parametrize("opens", [False, True])
def test_slow_opening_is_cancelled_and_its_connection_counts_as_failed_or_lost(opens: bool) -> None:
    protocol = Recorder()
    failed: list[int] = []
    client, accepted = socket.socketpair()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # the client begins no handshake

    async def open_slowly() -> None:
        opening = OpeningConnections(lambda: protocol, lambda: failed.append(1), {} if opens else {"ssl": server})
        opening.open(accepted)
        assert not opening.cancel_slow()  # it has just begun
        await asyncio.sleep(0)  # without TLS, `connection_made` is called next
        time.sleep(GRACE_SECONDS)  # the loop stalls
        assert opening.cancel_slow()
        assert len(opening) == 0
        await asyncio.sleep(0.01)

    with client:
        uvloop.run(open_slowly())
    assert (protocol.transport is not None, protocol.is_lost, failed) == (opens, opens, [] if opens else [1])


def test_open_connection_is_not_cancelled_before_its_task_ends() -> None:
    protocol = Recorder()
    failed: list[int] = []
    cancelled: list[bool] = []
    client, accepted = socket.socketpair()

    async def stall_when_open() -> None:
        opening = OpeningConnections(lambda: protocol, lambda: failed.append(1), {})

        def stall() -> None:
            time.sleep(GRACE_SECONDS)
            assert len(opening) == 1  # the task has not ended
            cancelled.append(opening.cancel_slow())

        protocol.when_open = stall
        opening.open(accepted)
        await opening.wait()
        assert protocol.transport is not None
        assert not protocol.transport.is_closing()
        client.close()
        while not protocol.is_lost:
            await asyncio.sleep(0.001)

    uvloop.run(asyncio.wait_for(stall_when_open(), 10))
    assert (cancelled, failed) == ([False], [])
