"""Long work in threads: one thread works at a time, and large responses are joined."""

import threading
from itertools import pairwise
from time import perf_counter

import numpy as np
import pytest

from service.codec.long_work import COPIED_BYTES, LargeContent, join, long_work, pause_if_due


def test_only_one_of_several_threads_works_at_a_time() -> None:
    working: list[int] = []
    overlaps: list[list[int]] = []
    order: list[int] = []

    def work(number: int) -> None:
        nonlocal overlaps
        with long_work():
            ended = perf_counter() + 0.05
            while perf_counter() < ended:
                working.append(number)
                order.append(number)
                for _ in range(1000):  # long enough for another thread to interrupt this one
                    overlaps += [list(working)] * (len(working) > 1)
                working.remove(number)
                pause_if_due()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps
    changes = sum(a != b for a, b in pairwise(order))
    assert set(order) == {0, 1, 2}
    assert changes > 2  # the threads took turns


def test_thread_without_long_work_does_not_wait_for_a_thread_with_long_work() -> None:
    with long_work():
        thread = threading.Thread(target=pause_if_due)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.parametrize("size", [0, 10, COPIED_BYTES, COPIED_BYTES + 1])
def test_joined_parts_are_the_bytes_of_all_parts(size: int) -> None:
    array = np.arange(size, dtype=np.float32)
    assert bytes(join((b"head", array.data))) == b"head" + array.tobytes()


def test_large_content_keeps_all_bytes_if_it_grows_beyond_the_reserved_size() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.bytes(int(size)) for size in rng.integers(0, 50_000, 40)]
    content = LargeContent()
    content.reserve(1000)
    for part in parts:
        content.write(part)
    assert bytes(content.view()) == b"".join(parts)
