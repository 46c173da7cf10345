"""Work of requests in the event loop: spread over passes of the loop, and in another thread if it is long."""

import asyncio
import threading
from collections.abc import Awaitable, Generator
from typing import Any

import pytest

from service.endpoints.offload import MAX_LOOP_NS, SHORT_NS, run_in_thread_if_long, take_loop_time


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


class Counted:
    """An awaitable that counts how often it waits for the event loop."""

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self._awaitable = awaitable
        self.waits = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._awaitable.__await__()
        while True:
            try:
                future = next(steps)
            except StopIteration as end:
                return end.value
            self.waits += 1
            yield future


async def wait_for_all(order: list[int], count: int) -> list[Counted]:
    """Let `count` requests with work for half a pass do it, and append their numbers to `order`."""
    requests = [
        Counted(run_in_thread_if_long(lambda number=number: order.append(number), MAX_LOOP_NS / 2))  # type: ignore[misc]
        for number in range(count)
    ]

    async def wait(request: Counted) -> None:
        await request

    await asyncio.gather(*map(wait, requests))
    return requests


def test_requests_that_wait_for_a_pass_have_their_turns_in_order() -> None:
    order: list[int] = []
    asyncio.run(wait_for_all(order, 60))
    assert order == list(range(60))


def test_request_that_waits_for_a_pass_is_woken_once() -> None:
    requests = asyncio.run(wait_for_all([], 60))
    assert [request.waits for request in requests] == [0, 0] + 58 * [1]


def start_tasks(order: list[int], count: int) -> list[asyncio.Task[None]]:
    """Start tasks that each need a whole pass, and then append their numbers to `order`."""
    return [
        asyncio.create_task(run_in_thread_if_long(lambda number=number: order.append(number), MAX_LOOP_NS))  # type: ignore[misc] # the number is bound at once
        for number in range(count)
    ]


def test_request_that_is_cancelled_while_it_waits_leaves_its_turn_to_the_next() -> None:
    async def cancel_most() -> list[int]:
        order: list[int] = []
        tasks = start_tasks(order, 60)
        await asyncio.sleep(0)
        for task in tasks[1:-1]:
            task.cancel()
        async with asyncio.timeout(5):
            await tasks[-1]
        return order

    assert asyncio.run(cancel_most()) == [0, 59]


def test_direct_requests_get_half_of_the_time_beside_waiting_tasks() -> None:
    async def count_turns() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        order: list[int] = []
        waiting = asyncio.create_task(wait_for_all(order, 60))
        await asyncio.sleep(0)
        turns = 0
        while not waiting.done():
            while take_loop_time(loop, MAX_LOOP_NS / 8):
                turns += 1
            await asyncio.sleep(0)
        return len(order), turns

    done, turns = asyncio.run(count_turns())
    assert done == 60
    assert 30 * 4 <= turns <= 30 * 4 + 4 * 8  # 30 passes with tasks in all of them, and at most 4 without


@pytest.mark.parametrize("estimated_ns", [0.75 * MAX_LOOP_NS, 3 * MAX_LOOP_NS])
@pytest.mark.parametrize("tasks", [0, 60])
def test_direct_request_with_a_large_body_has_its_turn_in_each_pass(tasks: int, estimated_ns: float) -> None:
    async def count_turns() -> list[bool]:
        waiting = asyncio.create_task(wait_for_all([], tasks))
        await asyncio.sleep(0)
        turns = []
        for _ in range(20):
            turns.append(take_loop_time(asyncio.get_running_loop(), estimated_ns))
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # a pass may end in either
        await waiting
        return turns

    assert all(asyncio.run(count_turns()))


def test_request_that_is_cancelled_after_its_turn_was_granted_leaves_the_next_turns_to_others() -> None:
    async def cancel_granted() -> list[int]:
        order: list[int] = []
        tasks = start_tasks(order, 4)
        while not order:
            await asyncio.sleep(0)
        tasks[1].cancel()  # `_end` has given it the next pass, or is about to
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks, return_exceptions=True)
        return order

    assert asyncio.run(cancel_granted()) in ([0, 2, 3], [0, 1, 2, 3])


def test_two_event_loops_in_two_threads_do_not_share_their_passes() -> None:
    orders: list[list[int]] = [[], []]
    threads = [threading.Thread(target=lambda order=order: asyncio.run(wait_for_all(order, 400))) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert orders == [list(range(400))] * 2
