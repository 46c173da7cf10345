"""Large responses are sent in slices: other connections get their turn, and no byte is lost or out of order."""

import asyncio
import socket
import threading

import pytest
import uvloop

from service.http.lingering import SLICE_BYTES, LingeringTransport
from service.http.unread import SMALL_RESPONSE

MIB = 2**20


class Writer(asyncio.Protocol):
    """A protocol that writes through a `LingeringTransport`, as the protocol of the server does."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.is_paused = False
        self.large = 0
        self.lost = self.loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.set_write_buffer_limits(high=SMALL_RESPONSE, low=0)  # type: ignore[attr-defined] # uvloop's class
        self.transport = LingeringTransport(transport, self, self.loop.call_soon)  # type: ignore[arg-type]

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport.detach()
        self.lost.set_result(exc)

    def linger_if_receiving(self) -> bool:
        return False

    def begin_unread(self) -> None:
        pass

    def count_large_write(self, size: int) -> None:
        self.large += size

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        if not self.transport.write_rest():
            self.is_paused = False


def receive_all(connection: socket.socket, received: list[bytes], pause: threading.Event) -> None:
    pause.wait()
    while data := connection.recv(MIB):
        received.append(data)


def send(parts: list[bytes], *, closes_at_once: bool) -> tuple[bytes, int, Writer]:
    """Write `parts`; a thread reads. Return what it read, the turns of the loop meanwhile, and the writer."""

    async def scenario() -> tuple[int, Writer]:
        loop = asyncio.get_running_loop()
        _, writer = await loop.create_connection(Writer, sock=ours)
        turns = 0
        for part in parts:
            writer.transport.write(part)
        if closes_at_once:
            writer.transport.close()
            assert writer.transport.is_closing()
        readable.set()
        while not writer.lost.done() and (writer.transport.get_write_buffer_size() or writer.is_paused):
            turns += 1
            await asyncio.sleep(0)
        if not closes_at_once:
            assert not writer.is_paused
            writer.transport.close()
        assert await writer.lost is None
        return turns, writer

    ours, theirs = socket.socketpair()
    received: list[bytes] = []
    readable = threading.Event()
    reader = threading.Thread(target=receive_all, args=(theirs, received, readable))
    reader.start()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, theirs:
        turns, writer = runner.run(scenario())
        reader.join()
    return b"".join(received), turns, writer


@pytest.mark.parametrize("closes_at_once", [False, True], ids=["open", "closed"])
def test_large_and_small_parts_arrive_whole_and_in_order(closes_at_once: bool) -> None:
    parts = [b"head", bytes(range(256)) * (20 * MIB // 256 + 1), b"small", b"x" * (SLICE_BYTES + 1), b"", b"end"]
    received, _, writer = send(parts, closes_at_once=closes_at_once)
    assert received == b"".join(parts)
    assert writer.large == len(parts[1]) + len(parts[3])


def test_loop_runs_other_callbacks_between_the_slices_of_a_large_response() -> None:
    _, turns, _ = send([b"x" * (64 * MIB)], closes_at_once=False)
    assert turns >= 64 * MIB // SLICE_BYTES


def test_connection_that_is_lost_forgets_the_rest_of_a_large_response() -> None:
    async def scenario() -> None:
        _, writer = await asyncio.get_running_loop().create_connection(Writer, sock=ours)
        writer.transport.write(b"x" * (16 * MIB))
        assert writer.transport.get_write_buffer_size() > 8 * MIB
        writer.transport.abort()
        await writer.lost
        assert not writer.transport.write_rest()

    ours, theirs = socket.socketpair()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, theirs:
        runner.run(scenario())
