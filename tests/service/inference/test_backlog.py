"""The backlog's measured rate, and the Retry-After that follows from it."""

import pytest

from service.http.admission import MAX_RETRY_AFTER, retry_after
from service.inference import backlog as backlog_module
from service.inference.backlog import Backlog


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(backlog_module, "perf_counter", made)
    return made


def test_retry_after_is_one_second_if_no_rate_was_measured() -> None:
    assert retry_after(Backlog().seconds_for(1e9)) == 1


def test_retry_after_follows_from_the_measured_rate(clock: Clock) -> None:
    backlog = Backlog()
    backlog.add(2500)
    for _ in range(100):  # 20 rows in 0.1 s: 200 rows per second
        clock.now += 0.1
        backlog.finish(20)
    assert backlog.amount == 500
    assert backlog.expected_wait == pytest.approx(2.5)
    assert retry_after(backlog.seconds_for(1990)) == 10
    assert retry_after(backlog.seconds_for(1)) == 1
    assert retry_after(backlog.seconds_for(10**9)) == MAX_RETRY_AFTER


def test_idle_time_does_not_lower_the_measured_rate(clock: Clock) -> None:
    backlog = Backlog()
    for _ in range(100):  # 10 rows in 5 ms, then an idle minute
        backlog.add(10)
        clock.now += 0.005
        backlog.finish(10)
        clock.now += 60
    assert retry_after(backlog.seconds_for(19_990)) == 10
