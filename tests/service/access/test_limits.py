"""The limits of API keys, on a clock that the tests set, and in several processes."""

import os
from collections.abc import Callable

import pytest

from service.access import limits
from service.access.key_file import ApiKey
from service.access.limits import Bucket, KeyLimits
from service.access.scopes import Scope
from service.errors import RateLimited
from service.shared_memory import Segment, SharedCounters


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that lets time pass. Without it, no time passes."""
    now = 1000.0
    monkeypatch.setattr(limits, "perf_counter", lambda: now)

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    return advance


def limits_of(counters: SharedCounters | None = None, **values: float) -> KeyLimits:
    key = ApiKey(sha256="0" * 64, scopes=frozenset({Scope.INFER}), **values)
    return KeyLimits("shop", key, counters or SharedCounters())


def accepted(*workers: KeyLimits, tries: int) -> int:
    """Return how many of `tries` requests are accepted, if they go to the workers in turn and end at once."""
    count = 0
    for number in range(tries):
        worker = workers[number % len(workers)]
        try:
            worker.enter()
        except RateLimited:
            continue
        worker.exit()
        count += 1
    return count


def test_bucket_holds_at_most_its_burst_and_fills_at_its_rate() -> None:
    bucket = Bucket(rate=10, burst=5, used=100, now=0)
    assert bucket.level(used=100, now=50) == 5
    assert bucket.level(used=105, now=50) == 0
    assert bucket.level(used=105, now=50.25) == pytest.approx(2.5)
    assert bucket.level(used=115, now=50.25) == pytest.approx(-7.5)
    assert bucket.seconds_until(1) == 1
    assert bucket.seconds_until(20) == 3


def test_key_gets_its_burst_and_then_its_rate(clock: Callable[[float], None]) -> None:
    key = limits_of(requests_per_second=4, burst=10)
    assert accepted(key, tries=30) == 10
    clock(1)
    assert accepted(key, tries=30) == 4
    clock(100)
    assert accepted(key, tries=30) == 10


def test_refusal_says_when_the_next_request_is_accepted(clock: Callable[[float], None]) -> None:
    key = limits_of(requests_per_second=0.25)
    key.enter()
    with pytest.raises(RateLimited) as caught:
        key.enter()
    error = caught.value
    assert error.status == 429
    assert error.headers == {
        "ratelimit-policy": '"requests";q=1;w=4',
        "ratelimit": '"requests";r=0;t=4',
        "retry-after": "4",
    }
    clock(float(error.headers["retry-after"]))
    key.enter()


@pytest.mark.usefixtures("clock")
def test_headers_say_what_is_left() -> None:
    key = limits_of(requests_per_second=2, burst=6, concurrent_requests=3)
    policy = b'"requests";q=6;w=3, "concurrent";q=3;qu="concurrent-requests"'
    key.enter()
    assert key.headers() == ((b"ratelimit-policy", policy), (b"ratelimit", b'"requests";r=5;t=1, "concurrent";r=2'))
    key.enter()
    assert key.headers()[1][1] == b'"requests";r=4;t=1, "concurrent";r=1'


def test_key_with_rows_in_debt_is_refused_until_the_debt_is_repaid(clock: Callable[[float], None]) -> None:
    key = limits_of(rows_per_second=100)
    key.enter()
    key.exit()
    key.count_rows(350)
    with pytest.raises(RateLimited) as caught:
        key.enter()
    assert caught.value.headers["retry-after"] == "3"
    clock(2.4)
    assert accepted(key, tries=1) == 0
    clock(0.2)
    assert accepted(key, tries=1) == 1


def test_key_may_have_as_many_requests_at_once_as_its_limit_and_no_more() -> None:
    key = limits_of(concurrent_requests=2)
    key.enter()
    key.enter()
    with pytest.raises(RateLimited, match="2 requests at once"):
        key.enter()
    key.exit()
    key.enter()


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_share_one_limit(clock: Callable[[float], None], workers: int) -> None:
    segments = [Segment() for _ in range(workers)]
    keys = [limits_of(SharedCounters(segments, i), requests_per_second=10, burst=20) for i in range(workers)]
    for key in keys:
        key.refresh()
    assert accepted(*keys, tries=200) == 20
    for _ in range(10):
        clock(0.1)
        for key in keys:
            key.refresh()
    assert accepted(*keys, tries=200) == 10


def test_requests_that_move_to_an_idle_worker_get_no_second_burst(clock: Callable[[float], None]) -> None:
    segments = [Segment(), Segment()]
    busy, idle = (limits_of(SharedCounters(segments, i), requests_per_second=10, burst=50) for i in range(2))
    for _ in range(100):  # for 10 s, the first worker gets more requests than the limit allows
        accepted(busy, tries=10)
        clock(0.1)
        busy.refresh()
        idle.refresh()
    assert accepted(idle, tries=100) <= 2


def test_concurrent_requests_of_all_processes_count_and_those_of_a_killed_process_do_not() -> None:
    segments = [Segment(), Segment()]
    here = limits_of(SharedCounters(segments, 0), concurrent_requests=2)
    pid = os.fork()
    if not pid:
        other = limits_of(SharedCounters(segments, 1), concurrent_requests=2)
        other.enter()
        other.enter()
        os._exit(0)
    os.waitpid(pid, 0)
    here.refresh()
    with pytest.raises(RateLimited):
        here.enter()
    segments[1].reset_transient()  # the supervisor does this when a worker has ended
    here.enter()
