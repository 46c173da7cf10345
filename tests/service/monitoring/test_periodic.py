"""Work that comes round again."""

import asyncio
import logging

import pytest

from service.monitoring.periodic import Periodic


def test_a_turn_that_fails_is_told_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    turns: list[int] = []

    async def work() -> None:
        turns.append(len(turns))
        if len(turns) == 2:
            raise RuntimeError("for once")

    async def scenario() -> None:
        periodic = Periodic(work, 0.001, "the work failed")
        periodic.start()
        async with asyncio.timeout(10):
            while len(turns) < 4:
                await asyncio.sleep(0.001)
        await periodic.close()
        done = len(turns)
        await asyncio.sleep(0.02)
        assert len(turns) == done

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    (told,) = caplog.records
    assert told.message == "the work failed"
    assert "for once" in str(told.exc_info and told.exc_info[1])


def test_a_turn_under_way_is_finished_and_no_other_begins() -> None:
    heard: list[str] = []

    async def scenario() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            heard.append("begun")
            begun.set()
            await go_on.wait()
            heard.append("done")

        periodic = Periodic(work, 0.0, "the work failed")
        periodic.start()
        async with asyncio.timeout(10):
            await begun.wait()
            closing = asyncio.create_task(periodic.close())
            await asyncio.sleep(0.02)
            assert not closing.done()
            go_on.set()
            await closing
        await asyncio.sleep(0.02)

    asyncio.run(scenario())
    assert heard == ["begun", "done"]
