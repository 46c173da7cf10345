"""Periodic tasks: failing runs, and closing while a run is in progress."""

import asyncio
import logging

import pytest

from service.monitoring.periodic import PeriodicTask


def test_error_in_a_run_is_logged_and_does_not_prevent_the_next_run(caplog: pytest.LogCaptureFixture) -> None:
    runs = 0

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs == 2:
            raise RuntimeError("the second run fails")

    async def scenario() -> None:
        task = PeriodicTask(work, 0.001, "the work failed")
        task.start()
        async with asyncio.timeout(10):
            while runs < 4:
                await asyncio.sleep(0.001)
        await task.close()
        runs_at_close = runs
        await asyncio.sleep(0.02)
        assert runs == runs_at_close

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    (logged,) = caplog.records
    assert logged.message == "the work failed"
    assert "the second run fails" in str(logged.exc_info and logged.exc_info[1])


def test_close_waits_until_the_current_run_ends_and_then_calls_the_final_function() -> None:
    events: list[str] = []

    async def final() -> None:
        events.append("final")

    async def scenario() -> None:
        begun, may_end = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            events.append("begun")
            begun.set()
            await may_end.wait()
            events.append("ended")

        task = PeriodicTask(work, 0.0, "the work failed", final=final)
        task.start()
        async with asyncio.timeout(10):
            await begun.wait()
            closing = asyncio.create_task(task.close())
            await asyncio.sleep(0.02)
            assert not closing.done()
            may_end.set()
            await closing
        await asyncio.sleep(0.02)

    asyncio.run(scenario())
    assert events == ["begun", "ended", "final"]
