"""What reading one request may cost, in the reader's thread and in the event loop."""

import time
from collections.abc import Callable
from time import perf_counter

import pytest

from service.codec.budget import ROW_BYTES, Budget, NoLimit, TurnOver
from service.errors import BodyTooLarge, ClientGone, DeadlineExceeded, Overloaded, TooManyRows


class Account:
    """Counts held bytes, up to a limit."""

    def __init__(self, limit: int = 2**40) -> None:
        self.held = 0
        self._limit = limit

    def hold(self, size: int) -> None:
        if self.held + size > self._limit:
            raise Overloaded("full")
        self.held += size

    def release(self, size: int) -> None:
        self.held -= size


def budget_of(account: Account, *, max_bytes: int = 2**20, max_rows: int = 100, seconds: float = 60.0) -> Budget:
    return Budget(
        max_bytes=max_bytes,
        max_rows=max_rows,
        deadline=perf_counter() + seconds,
        hold=account.hold,
        release=account.release,
    )


def test_bytes_beyond_the_limit_of_a_request_are_refused() -> None:
    budget = budget_of(Account(), max_bytes=1000)
    budget.take_bytes(1000)
    with pytest.raises(BodyTooLarge):
        budget.take_bytes(1)


def test_bytes_beyond_the_room_of_all_requests_are_refused_as_overload() -> None:
    account = Account(limit=2**19)
    budget = budget_of(account)
    budget.take_bytes(2**18)
    with pytest.raises(Overloaded):
        budget.take_bytes(2**18 + 1)
    assert account.held == 2**18


@pytest.mark.parametrize("take", [lambda budget: budget.take_row(8), lambda budget: budget.take_rows(1)])
def test_row_beyond_the_maximum_is_refused(take: Callable[[Budget], None]) -> None:
    budget = budget_of(Account(), max_rows=10)
    budget.start(in_event_loop=True)
    for _ in range(10):
        take(budget)
    with pytest.raises(TooManyRows, match="at most 10 rows"):
        take(budget)


def test_rows_count_against_the_memory_of_all_requests() -> None:
    account = Account()
    budget = budget_of(account, max_rows=1000, max_bytes=2**22)
    budget.start(in_event_loop=False)
    for _ in range(1000):
        budget.take_row(100)
    assert account.held >= 1000 * (ROW_BYTES + 100)


def test_reading_beyond_the_deadline_is_refused() -> None:
    budget = budget_of(Account(), seconds=0.05)
    budget.start(in_event_loop=False)
    budget.check_time()
    time.sleep(0.06)
    with pytest.raises(DeadlineExceeded):
        budget.check_time()


def test_long_work_is_interrupted_in_the_event_loop_and_can_restart_in_a_thread() -> None:
    budget = budget_of(Account())
    budget.start(in_event_loop=True)
    budget.take_row(1)
    time.sleep(0.02)
    with pytest.raises(TurnOver):
        budget.take_row(1)
    budget.start(in_event_loop=False)
    assert budget.rows == 0
    budget.take_row(1)


def test_memory_is_freed_only_when_the_thread_that_reads_has_ended() -> None:
    account = Account()
    budget = budget_of(account)
    budget.start(in_event_loop=False)
    budget.take_bytes(1000)
    budget.close()  # the client has disconnected
    assert account.held >= 1000
    with pytest.raises(ClientGone):
        budget.check_time()
    budget.stop()
    assert account.held == 0
    with pytest.raises(ClientGone):
        budget.start(in_event_loop=False)


def test_memory_of_a_request_is_freed_once() -> None:
    account = Account()
    budget = budget_of(account)
    budget.start(in_event_loop=True)
    budget.take_bytes(10)
    budget.stop()
    budget.close()
    budget.close()
    assert account.held == 0


def test_budget_without_limits_accepts_everything() -> None:
    budget = NoLimit()
    budget.take_bytes(2**50)
    budget.take_rows(2**40)
    budget.take_row(2**40)
    budget.check_time()
    assert budget.held_bytes == 0
