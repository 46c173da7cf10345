"""Work of requests in the event loop: spread over passes of the loop, and in another thread if it is long."""

import asyncio
import threading

import pytest

from service.endpoints.offload import MAX_LOOP_NS, SHORT_NS, run_in_thread_if_long


async def passes_of_work(count: int, estimated_ns: float) -> list[int]:
    """Return the pass of the event loop in which each of `count` requests does its work."""
    current = 0
    done: list[int] = []
    loop = asyncio.get_running_loop()

    def count_pass() -> None:
        nonlocal current
        current += 1
        if len(done) < count:
            loop.call_soon(count_pass)

    async def request() -> None:
        await run_in_thread_if_long(lambda: done.append(current), estimated_ns)

    loop.call_soon(count_pass)
    await asyncio.gather(*[request() for _ in range(count)])
    return done


@pytest.mark.parametrize("per_pass", [1, 2, 10])
def test_work_of_many_requests_is_spread_over_passes_of_the_event_loop(per_pass: int) -> None:
    for _ in range(2):  # a second event loop, too
        done = asyncio.run(passes_of_work(60, MAX_LOOP_NS / per_pass))
        assert max(done.count(number) for number in set(done)) == per_pass
        assert max(done) - min(done) <= 60


def test_short_work_of_many_requests_is_done_in_one_pass() -> None:
    assert len(set(asyncio.run(passes_of_work(60, SHORT_NS)))) == 1


@pytest.mark.parametrize("estimated_ns", [0, MAX_LOOP_NS, MAX_LOOP_NS + 1])
def test_work_runs_in_another_thread_only_if_it_is_long(estimated_ns: int) -> None:
    thread = asyncio.run(run_in_thread_if_long(threading.current_thread, estimated_ns))
    assert (thread is not threading.current_thread()) == (estimated_ns > MAX_LOOP_NS)
