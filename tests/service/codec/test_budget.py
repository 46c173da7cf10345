"""What reading one request may cost, in the reader's thread and in the event loop."""

import time
from collections.abc import Callable
from time import perf_counter

import pytest

from service.codec import budget as budget_module
from service.codec.budget import ROW_BYTES, Budget, NoLimit, TurnOver
from service.errors import BodyTooLarge, ClientGone, DeadlineExceeded, Overloaded, ServiceError, TooManyRows


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


def take_one_row(budget: Budget) -> int:
    budget.take_rows(1)
    return 1


@pytest.mark.parametrize("size", [1, 2**14])
@pytest.mark.parametrize("max_rows", [10, 16, 40])
def test_row_beyond_the_maximum_is_refused(size: int, max_rows: int) -> None:
    for take in (lambda budget: budget.take_next_rows(size), take_one_row):
        budget = budget_of(Account(), max_rows=max_rows)
        budget.start(in_event_loop=True)
        taken = 0
        while taken < max_rows:
            taken += take(budget)
        assert taken == max_rows
        with pytest.raises(TooManyRows, match=f"at most {max_rows} rows"):
            take(budget)


def test_rows_that_need_much_memory_are_counted_one_by_one() -> None:
    account = Account()
    budget = budget_of(account)
    budget.start(in_event_loop=True)
    assert budget.take_next_rows(2**16) == 1
    assert account.held <= 2 * 2**16


def test_rows_count_against_the_memory_of_all_requests() -> None:
    account = Account()
    budget = budget_of(account, max_rows=1000, max_bytes=2**22)
    budget.start(in_event_loop=False)
    rows = 0
    while rows < 1000:
        rows += budget.take_next_rows(100)
    assert account.held >= 1000 * (ROW_BYTES + 100)


def test_reading_beyond_the_deadline_is_refused() -> None:
    budget = budget_of(Account(), seconds=1.0)
    budget.start(in_event_loop=False)
    budget.check_time()
    time.sleep(1.01)
    with pytest.raises(DeadlineExceeded):
        budget.check_time()


def test_long_work_is_interrupted_in_the_event_loop_and_can_restart_in_a_thread() -> None:
    budget = budget_of(Account())
    budget.start(in_event_loop=True)
    budget.take_next_rows(1)
    ended = time.thread_time() + 0.02
    while time.thread_time() < ended:
        pass
    with pytest.raises(TurnOver):
        budget.take_next_rows(1)
    budget.start(in_event_loop=False)
    assert budget.rows == 0
    budget.take_next_rows(1)


def test_turn_in_the_event_loop_goes_on_after_another_program_had_the_processor() -> None:
    budget = budget_of(Account())
    budget.start(in_event_loop=True)
    before = budget.take_next_rows(1)
    time.sleep(0.02)  # as if another program ran
    after = budget.take_next_rows(1)
    assert before > 0
    assert after > 0
    assert budget.rows == before + after


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
    budget.take_next_rows(2**40)
    budget.check_time()
    assert budget.held_bytes == 0


def take_too_many_bytes(budget: Budget) -> None:
    budget.take_bytes(1001)


def take_too_many_rows(budget: Budget) -> None:
    budget.take_rows(8)


def read_for_too_long(budget: Budget) -> None:
    budget.start(in_event_loop=False)
    ended = time.thread_time() + 0.05
    while time.thread_time() < ended:
        pass
    budget.check_time()


def check_time(budget: Budget) -> None:
    budget.check_time()


@pytest.mark.parametrize(
    ("read", "seconds", "kind", "detail", "expected", "hint"),
    [
        (take_too_many_bytes, 60.0, BodyTooLarge, "more than 1000 bytes of memory", "at most 1000 bytes", "fewer rows"),
        (
            take_too_many_rows,
            60.0,
            TooManyRows,
            r"at most 7 rows \(ELBO_MAX_ROWS\)",
            "at most 7 rows",
            "split the rows",
        ),
        (read_for_too_long, 60.0, BodyTooLarge, "more than 0.02 s of processor", "read within 0.02 s", "fewer rows"),
        (check_time, -1.0, DeadlineExceeded, "timed out while its body was read", None, "allow more time"),
    ],
)
def test_refusal_of_a_costly_body_says_what_is_allowed_and_what_to_do(
    read: Callable[[Budget], None],
    seconds: float,
    kind: type[ServiceError],
    detail: str,
    expected: str | None,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget_module, "MAX_CPU_SECONDS", 0.02)
    with pytest.raises(kind, match=detail) as caught:
        read(budget_of(Account(), max_bytes=1000, max_rows=7, seconds=seconds))
    assert hint in (caught.value.hint or "")
    if expected is not None:
        assert expected in (caught.value.expected or "")
        assert caught.value.got == "more"


def test_bytes_that_are_given_back_and_taken_again_are_held_only_once() -> None:
    account = Account()
    budget = budget_of(account, max_bytes=1000)
    for _ in range(3):
        budget.take_bytes(900)
        budget.give_back_bytes(900)
    assert account.held == 1000
    with pytest.raises(BodyTooLarge):
        budget.take_bytes(1001)


def test_bytes_are_held_in_steps_of_64_kib_up_to_the_limit_of_the_request() -> None:
    account = Account()
    budget = budget_of(account, max_bytes=100 * 1024)
    held = []
    for size in (1, 64 * 1024 - 1, 1, 36 * 1024 - 1):
        budget.take_bytes(size)
        held.append(account.held)
    assert held == [64 * 1024, 64 * 1024, 100 * 1024, 100 * 1024]


def test_budget_without_limits_can_be_started_stopped_and_closed() -> None:
    budget = NoLimit()
    budget.start(in_event_loop=True)
    budget.stop()
    budget.close()
    assert budget.held_bytes == 0


def test_rows_are_counted_16_at_a_time_up_to_the_maximum() -> None:
    budget = budget_of(Account(), max_rows=20)
    budget.start(in_event_loop=True)
    assert [budget.take_next_rows(4096), budget.take_next_rows(1)] == [16, 4]
    budget.start(in_event_loop=True)
    assert budget.take_next_rows(4097) == 1
