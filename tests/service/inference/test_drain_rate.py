"""Retry-After from the measured speed of a queue."""

import pytest

from service.inference import drain_rate
from service.inference.drain_rate import DrainRate


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(drain_rate, "perf_counter", made)
    return made


def test_nothing_measured_is_a_second() -> None:
    assert DrainRate().seconds(1e9) == 1


def test_the_time_for_what_is_too_much_follows_from_the_rate(clock: Clock) -> None:
    queue = DrainRate()
    queue.began()
    for _ in range(100):  # 20 rows in 0.1 s: 200 a second
        clock.now += 0.1
        queue.left(20, rest=500)
    assert queue.seconds(1990) == 10
    assert queue.seconds(1) == 1
    assert queue.seconds(10**9) == drain_rate.LONGEST


def test_idle_time_does_not_count(clock: Clock) -> None:
    queue = DrainRate()
    for _ in range(100):  # each alone, 5 ms of work for 10 rows, then a minute of nothing
        queue.began()
        clock.now += 0.005
        queue.left(10, rest=0)
        clock.now += 60
    assert queue.seconds(19_990) == 10
