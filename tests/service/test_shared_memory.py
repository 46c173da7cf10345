"""Shared counters: every process reads the right sums, also after a process has been killed."""

import os
import random
import signal
from collections.abc import Callable
from typing import NoReturn

import pytest

from service.shared_memory import Segment, SharedCounters, SharedDecisions

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
