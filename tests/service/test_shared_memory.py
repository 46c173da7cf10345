"""Counting in several processes: the sum is right, whoever is asked, and outlives whoever is killed."""

import os
import random
import signal
from collections.abc import Callable
from typing import NoReturn

import pytest

from service.shared_memory import Segment, SharedCounters, SharedDecisions

# The children that are forked here count and end: they need none of the threads of libraries that others have loaded.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def in_a_child(work: Callable[[], None], end: int | None = None) -> None:
    """`work()` in a process of its own, which then ends, or is killed by the signal `end`."""
    pid = os.fork()
    if not pid:
        try:
            work()
            if end is not None:
                os.kill(os.getpid(), end)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (-end if end else 0)


def test_every_process_reads_what_all_have_counted() -> None:
    parts = [Segment(), Segment(), Segment()]

    def count(index: int) -> None:
        mine = SharedCounters(parts, index).mine.numbers(("requests", "/encode", 'vae "β"'), 1)
        for _ in range(index + 1):
            mine[0] += 1

    for index in range(3):
        in_a_child(lambda index=index: count(index))  # type: ignore[misc] # a default binds the loop variable
    expected = {("/encode", 'vae "β"'): [6.0]}
    assert SharedCounters(parts, 0).sums("requests") == expected
    in_a_child(lambda: exit_unless(SharedCounters(parts, 2).sums("requests") == expected))


def exit_unless(condition: bool) -> None:
    if not condition:
        os._exit(3)


def test_a_killed_process_takes_along_what_passes_and_no_count() -> None:
    parts = [Segment(), Segment()]

    def serve(rows: float) -> None:
        counts = SharedCounters(parts, 1)
        counts.mine.numbers(("rows",), 1)[0] += rows
        counts.mine.numbers(("pending",), 1, passing=True)[0] += rows

    in_a_child(lambda: serve(5), signal.SIGKILL)
    reader = SharedCounters(parts, 0)
    assert (reader.sums("rows"), reader.sums("pending")) == ({(): [5.0]}, {(): [5.0]})
    parts[1].forget_passing()
    assert (reader.sums("rows"), reader.sums("pending")) == ({(): [5.0]}, {(): [0.0]})
    in_a_child(lambda: serve(2))  # who takes its place
    assert (reader.sums("rows"), reader.sums("pending")) == ({(): [7.0]}, {(): [2.0]})


def test_sums_only_grow_while_writers_are_killed_at_any_moment() -> None:
    parts = [Segment(), Segment()]
    reader, rng = SharedCounters(parts, 0), random.Random(0)

    def total() -> float:
        return sum(values[2] for values in reader.sums("n").values())

    for _ in range(20):
        before = seen = total()
        pid = os.fork()
        if not pid:
            count_for_ever(SharedCounters(parts, 1))
        enough = before + rng.randrange(1, 5000)
        while (now := total()) < enough:
            assert now >= seen
            seen = now
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert total() >= seen
    assert len(reader.sums("n")) == 50


def count_for_ever(counts: SharedCounters) -> NoReturn:
    number = 0
    while True:
        counts.mine.numbers(("n", str(number % 50)), 3)[2] += 1
        number += 1


def test_who_decides_later_follows() -> None:
    parts = [Segment(), Segment(), Segment()]

    def votes(index: int) -> SharedDecisions:
        return SharedDecisions(SharedCounters(parts, index), "backend", ("torchscript", "onnx"))

    assert votes(0).decided("vae") is None
    in_a_child(lambda: votes(1).vote("vae", "onnx"))
    assert votes(0).decided("vae") == "onnx"
    assert votes(0).decided("ae") is None


def test_numbers_are_found_again_whatever_the_length_of_their_names() -> None:
    part = Segment()
    for length in range(20):
        part.numbers(("x" * length,), length + 1)[length] = length
    for length in range(20):
        assert list(part.numbers(("x" * length,), length + 1)) == [0.0] * length + [float(length)]


def test_a_full_part_goes_on_counting_for_itself_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    parts = [Segment(1024), Segment(1024)]

    def count() -> None:
        mine = SharedCounters(parts, 1)
        for number in range(40):
            mine.mine.numbers(("n", str(number)), 1)[0] += 1
        exit_unless(len(mine.sums("n")) == 40)
        exit_unless([record.levelname for record in caplog.records] == ["WARNING"])

    in_a_child(count)
    assert 10 < len(SharedCounters(parts, 0).sums("n")) < 40
