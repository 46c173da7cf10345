"""What goes on during a long pass of the event loop, and how such a pass ends."""

import asyncio
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest

from service.http import reading_window, turns
from service.http.reading_window import ReadingWindow
from service.http.turns import Turns
from service.settings import Settings
from tests.service.gate import Gate
from tests.service.serving import REQUEST, ROWS, serving


class Connection:
    """A connection that records whether it reads. It is its own transport and flow control."""

    def __init__(self, read_paused: bool = False, has_ended: bool = False) -> None:
        self.transport = self.flow = self
        self.read_paused = read_paused
        self.reads = not read_paused and not has_ended

    def is_reading(self) -> bool:
        return self.reads

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


def reading(connections: list[Connection]) -> list[int]:
    """Return the places of the connections that read."""
    return [place for place, connection in enumerate(connections) if connection.reads]


def test_callbacks_take_a_turn_only_in_a_long_pass_and_an_error_stops_no_other_callback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(turns, "perf_counter", lambda: clock[0])

    async def scenario() -> None:
        errors: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        calls: list[str] = []
        work = Turns()

        def fail() -> None:
            calls.append("failed")
            raise ValueError("no room")

        work.work += fail, lambda: calls.append("second")
        work.take(())
        work.take(())
        assert not calls
        clock[0] += 2 * turns.TURN_SECONDS
        work.take(())
        assert calls == ["failed", "second"]
        clock[0] += 2 * turns.TURN_SECONDS
        await asyncio.sleep(0)
        work.take(())  # in another pass
        assert calls == ["failed", "second"]
        assert [str(context["exception"]) for context in errors] == ["no room"]
        work.stop(fail)
        clock[0] += 2 * turns.TURN_SECONDS
        work.take(())
        assert calls == ["failed", "second", "second"]

    asyncio.run(scenario())


def test_each_connection_reads_in_one_pass_of_a_rotation_and_all_read_again_after_a_short_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading_window, "WINDOW", 2)
    monkeypatch.setattr(reading_window, "LONG_SECONDS", 0.05)

    async def scenario() -> None:
        connections = [Connection() for _ in range(5)]
        connections.append(Connection(read_paused=True))  # by its own flow control
        connections.append(Connection(has_ended=True))  # its client sends nothing more
        window = ReadingWindow()
        window.open(connections)
        assert reading(connections) == []
        passes = []
        for _ in range(5):
            await asyncio.sleep(0)
            passes.append(reading(connections))
            if len(passes) == 1:
                sleep(0.06)  # the first pass is long, so a second rotation follows
            await asyncio.sleep(0)
        assert window.is_open
        assert passes == [[0, 1], [2, 3], [4], [], [0, 1]]
        monkeypatch.setattr(reading_window, "LONG_SECONDS", 60.0)  # so that the second rotation is short on any machine
        for _ in range(8):
            await asyncio.sleep(0)
        assert not window.is_open
        assert reading(connections) == [0, 1, 2, 3, 4]

    asyncio.run(scenario())


def test_all_connections_read_again_when_the_window_ends_and_it_opens_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_window, "WINDOW", 1)
    monkeypatch.setattr(reading_window, "LONG_SECONDS", -60.0)  # every rotation is too long

    async def scenario() -> None:
        connections = [Connection() for _ in range(3)]
        window = ReadingWindow()
        window.open(connections)
        for _ in range(7):
            await asyncio.sleep(0)
        assert len(reading(connections)) <= 1
        window.end()
        assert reading(connections) == [0, 1, 2]
        window.open(connections)
        await asyncio.sleep(0)
        assert reading(connections) == [0, 1, 2]

    asyncio.run(scenario())


@pytest.mark.slow
def test_refused_requests_of_all_connections_get_answers_while_only_a_window_of_them_reads(
    vae_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(turns, "LONG_SECONDS", -1.0)  # every pass and every rotation is too long
    monkeypatch.setattr(reading_window, "LONG_SECONDS", -1.0)
    monkeypatch.setattr(reading_window, "WINDOW", 2)

    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only, max_rows=3, queue_rows=3)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), np.repeat(ROWS, 3, axis=0))

            async def refused_three_times() -> int:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                refusals = 0
                for _ in range(3):
                    writer.write(REQUEST)
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
                    await reader.readexactly(int(length[15:]))
                    refusals += head.startswith(b"HTTP/1.1 429 ")
                writer.close()
                return refusals

            async with asyncio.timeout(20):
                assert await asyncio.gather(*[refused_three_times() for _ in range(7)]) == [3] * 7
                gate.open.set()
                await held

    asyncio.run(scenario())
