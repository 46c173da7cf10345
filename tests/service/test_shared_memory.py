"""Shared counters: every process reads the right sums, also after a process has been killed."""

import os
import random
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import pytest

from service.shared_memory import Segment, SharedCounters, SharedDecisions
from tests.waiting import wait_until

# Forking is safe although libraries have started threads: the children only count and exit.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def run_in_child(function: Callable[[], None], kill_with: int | None = None) -> None:
    """Call `function` in a child process, and wait until the child ends.

    With `kill_with`, the child then ends itself with this signal instead of exiting.
    """
    pid = os.fork()
    if not pid:
        try:
            function()
            if kill_with is not None:
                os.kill(os.getpid(), kill_with)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (-kill_with if kill_with else 0)


def exit_unless(condition: bool) -> None:
    """Unless `condition` is true, end the child process with an exit code that fails the test."""
    if not condition:
        os._exit(3)


def test_sums_in_every_process_include_the_counts_of_all_processes() -> None:
    segments = [Segment(), Segment(), Segment()]

    def count(index: int) -> None:
        requests = SharedCounters(segments, index).local.array(("requests", "/encode", 'vae "β"'), 1)
        for _ in range(index + 1):
            requests[0] += 1

    for index in range(3):
        run_in_child(lambda index=index: count(index))  # type: ignore[misc] # a default binds the loop variable
    expected = {("/encode", 'vae "β"'): [6.0]}
    assert SharedCounters(segments, 0).sums("requests") == expected
    run_in_child(lambda: exit_unless(SharedCounters(segments, 2).sums("requests") == expected))


def test_reset_after_a_process_is_killed_clears_transient_numbers_but_keeps_counts() -> None:
    segments = [Segment(), Segment()]

    def serve(rows: float) -> None:
        counters = SharedCounters(segments, 1)
        counters.local.array(("rows",), 1)[0] += rows
        counters.local.array(("pending",), 1, transient=True)[0] += rows

    run_in_child(lambda: serve(5), kill_with=signal.SIGKILL)
    reader = SharedCounters(segments, 0)
    assert (reader.sums("rows"), reader.sums("pending")) == ({(): [5.0]}, {(): [5.0]})
    segments[1].reset_transient()
    assert (reader.sums("rows"), reader.sums("pending")) == ({(): [5.0]}, {(): [0.0]})
    run_in_child(lambda: serve(2))  # the replacement process
    assert (reader.sums("rows"), reader.sums("pending")) == ({(): [7.0]}, {(): [2.0]})


@pytest.mark.slow
def test_sums_never_fall_while_writers_are_killed_at_random_moments() -> None:
    segments = [Segment(), Segment()]
    reader, rng = SharedCounters(segments, 0), random.Random(0)

    def total() -> float:
        return sum(values[2] for values in reader.sums("n").values())

    for _ in range(20):
        start = seen = total()
        pid = os.fork()
        if not pid:
            count_forever(SharedCounters(segments, 1))
        kill_at = start + rng.randrange(1, 5000)
        while (now := total()) < kill_at:
            assert now >= seen
            seen = now
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert total() >= seen
    assert len(reader.sums("n")) == 50


def count_forever(counters: SharedCounters) -> NoReturn:
    number = 0
    while True:
        counters.local.array(("n", str(number % 50)), 3)[2] += 1
        number += 1


def test_choice_recorded_by_one_process_is_read_by_another() -> None:
    segments = [Segment(), Segment(), Segment()]

    def decisions(index: int) -> SharedDecisions:
        return SharedDecisions(SharedCounters(segments, index), "backend", ("torchscript", "onnx"))

    assert decisions(0).choice("vae") is None
    run_in_child(lambda: decisions(1).record_choice("vae", "onnx"))
    assert decisions(0).choice("vae") == "onnx"
    assert decisions(0).choice("ae") is None


def test_segment_returns_the_same_array_if_a_key_is_requested_again() -> None:
    segment = Segment()
    for length in range(20):
        segment.array(("x" * length,), length + 1)[length] = length
    for length in range(20):
        assert list(segment.array(("x" * length,), length + 1)) == [0.0] * length + [float(length)]


def test_process_warns_once_and_keeps_counting_when_its_segment_is_full(caplog: pytest.LogCaptureFixture) -> None:
    segments = [Segment(1024), Segment(1024)]

    def count() -> None:
        counters = SharedCounters(segments, 1)
        for number in range(40):
            counters.local.array(("n", str(number)), 1)[0] += 1
        exit_unless(len(counters.sums("n")) == 40)
        exit_unless([record.levelname for record in caplog.records] == ["WARNING"])

    run_in_child(count)
    assert 10 < len(SharedCounters(segments, 0).sums("n")) < 40


def test_freed_memory_is_used_again_so_that_new_keys_never_fill_a_segment(caplog: pytest.LogCaptureFixture) -> None:
    segment = Segment(16_384)
    for version in range(5000):
        array = segment.array(("rows", "hosts", str(version)), 16)
        assert list(array) == [0.0] * 16
        array[15] = version
        if version >= 10:
            segment.free([("rows", "hosts", str(version - 10))])
    assert caplog.records == []
    kept = {("rows", "hosts", str(version)): float(version) for version in range(4990, 5000)}
    assert {key: entry.values[15] for key, entry in segment.entries().items()} == kept


def test_freeing_a_key_that_is_absent_changes_nothing() -> None:
    segment = Segment(1024)
    segment.array(("a",), 1)[0] = 1
    segment.free([("b",)])
    assert {key: list(entry.values) for key, entry in segment.entries().items()} == {("a",): [1.0]}


def test_other_processes_no_longer_see_an_array_after_it_is_freed_or_replaced() -> None:
    segments = [Segment(), Segment()]
    reader = SharedCounters(segments, 0)

    def change(*steps: Callable[[Segment], object]) -> None:
        def run_steps() -> None:
            for step in steps:
                step(segments[1])

        run_in_child(run_steps)

    def write(key: str, value: float) -> Callable[[Segment], object]:
        return lambda segment: segment.array(("n", key), 1).__setitem__(0, value)

    change(write("1", 1), write("2", 2))
    assert reader.sums("n") == {("1",): [1.0], ("2",): [2.0]}
    change(lambda segment: segment.free([("n", "1")]))
    assert reader.sums("n") == {("2",): [2.0]}
    change(write("3", 3))
    assert reader.sums("n") == {("2",): [2.0], ("3",): [3.0]}
    change(lambda segment: exit_unless(list(segment.entries()) == [("n", "3"), ("n", "2")]))


@pytest.mark.slow
def test_value_never_falls_when_a_process_is_killed_while_it_replaces_other_arrays() -> None:
    segments = [Segment(65_536), Segment(65_536)]
    reader, rng = SharedCounters(segments, 0), random.Random(0)
    last = 0.0
    for _ in range(30):
        pid = os.fork()
        if not pid:
            replace_forever(segments[1])
        try:
            wait_until(lambda before=last: reader.sums("lasting").get((), [0.0])[0] > before)  # type: ignore[misc]
            for _ in range(rng.randrange(20, 200)):
                lasting = reader.sums("lasting").get((), [0.0])[0]
                assert lasting >= last
                last = lasting
                for number, padding in reader.sums("n"):
                    assert padding == "x" * (int(number) % 3 * 40), "parts of two keys"
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        segments[1].reset_transient()
        numbers = {int(key[1]): entry.values[0] for key, entry in segments[1].entries().items() if key[0] == "n"}
        assert len(numbers) <= 22
        assert all(value in (0.0, number) for number, value in numbers.items())
    assert last >= 30


def replace_forever(segment: Segment) -> NoReturn:
    """Replace one array after another in `segment`. Each array contains the number in its key."""
    lasting = segment.array(("lasting",), 1)
    number = max((int(key[1]) for key in segment.entries() if key[0] == "n"), default=0)
    while True:
        number += 1
        lasting[0] += 1
        kept = [key for key in segment.entries() if key[0] == "n"]
        segment.free(kept[:-20])
        segment.array(("n", str(number), "x" * (number % 3 * 40)), 2)[0] = number


def test_lease_is_as_old_as_its_last_renewal_in_any_process() -> None:
    segments = [Segment(), Segment()]
    first, second = (SharedCounters(segments, index).leases for index in range(2))
    first.renew([("hosts", "1")])
    second.renew([("hosts", "2")])
    before = first.ages()
    second.renew([("hosts", "1")])
    after = first.ages()
    assert set(before) == set(after) == {("hosts", "1"), ("hosts", "2")}
    assert after["hosts", "1"] <= before["hosts", "1"]
    assert after["hosts", "1"] < after["hosts", "2"]


def test_threads_that_create_arrays_at_once_get_an_array_for_each_key() -> None:
    segment = Segment()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            for array in threads.map(lambda number: segment.array(("n", str(number)), 1), range(500)):
                array[0] += 1
    finally:
        sys.setswitchinterval(interval)
    expected = {("n", str(number)): [1.0] for number in range(500)}
    assert {key: list(entry.values) for key, entry in segment.entries().items()} == expected
