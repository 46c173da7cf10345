"""Decide whether CPU work for one request runs in the event loop or in another thread.

While the event loop parses or writes a body, every other request waits. If the body is small, however, it takes longer
to hand the work to a thread than to do the work. Callers therefore estimate how long their work takes, and only work
that takes long runs in another thread.

Many requests may arrive at once. Their work in the event loop is then spread over several passes of the loop, so that
other requests have their turn in between.
"""

import asyncio
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from service.codec.budget import Budget, TurnOver
from service.codec.long_work import long_work

T = TypeVar("T")
# Maximum time for which the tasks of requests may block one pass of the event loop, in nanoseconds. Direct requests may
# add half of it, or one body.
MAX_LOOP_NS = 2_000_000
SHORT_NS = MAX_LOOP_NS // 40  # work of at most this long is not counted: 64 requests at once take at most 3 ms

LOW_PRIORITY_THREADS = 2
ADDED_NICENESS = 5  # of these threads: on a busy core, each gets a third of the event loop's time

SMALL_BODY = 2048  # bytes; reading so small a body takes at most 2 ms, unless it is compressed or a picture
FEW_ROWS = 64  # describing the errors of so few rows takes at most 3 ms

# Estimated times in nanoseconds.
JSON_BYTE = 4  # time to parse one byte of JSON; 512 KiB take about 2 ms
ARRAY_BYTE = JSON_BYTE / 8  # time to copy one byte of npy or safetensors
NUMBER = 10 * JSON_BYTE  # time to write one number, as about 10 characters of JSON or as pixels
NORMAL = 8 * JSON_BYTE  # time to draw one normal random number
VERDICT = 400 * JSON_BYTE  # time to build and write the result of one row
ONSET = 20_000 * JSON_BYTE  # time to find since when the features of an anomalous row deviate
DECISION = 2 * JSON_BYTE  # time to decide a row, per feature
SMOOTHED_ROW = 500 * JSON_BYTE  # time to smooth the severity of a row, if each row has a group of its own
RECORD_BYTE = 8 * JSON_BYTE  # time to read one byte of records or of CSV, or of JSON rows that are not plain numbers
RECORD_VALUE = 8 * JSON_BYTE  # time to assign one value of a record to its feature
SNAPPY_BYTE = 16 * JSON_BYTE  # time to decompress and parse one byte of a remote-write body
PICTURE_BYTE = math.inf  # a picture, too, may be far larger than its body
GZIP_BODY = math.inf  # a gzip body counts as infinitely long work, because its decompressed size is unknown


class _LoopPass(threading.local):
    """The estimated work of requests in the current pass of this thread's event loop.

    Tasks whose work does not fit into it wait in a queue, and only those that have their turn are woken. If all of them
    looked in each pass whether there is time, new tasks would often go first.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None  # the loop whose pass it is; None before its first work
        self._ns = 0.0
        self._direct_ns = 0.0  # the part of `_ns` that direct requests took
        self._waiting: deque[tuple[asyncio.Future[None], float]] = deque()  # with the estimated time of the work

    async def wait(self, estimated_ns: float) -> None:
        """Wait for a pass of the event loop in which there is time for the work, and count the work."""
        loop = asyncio.get_running_loop()
        self._begin(loop)
        if self._waiting or self._ns + estimated_ns > MAX_LOOP_NS:
            turn = loop.create_future()
            self._waiting.append((turn, estimated_ns))
            await turn
        else:
            self._ns += estimated_ns

    def take(self, loop: asyncio.AbstractEventLoop, estimated_ns: float) -> bool:
        """Count the work if there is time for it in the current pass of `loop`. Return whether there is.

        In each pass, the first caller gets its time, and all callers together half of the pass, even if waiting tasks
        need all of it or the work is longer than MAX_LOOP_NS. Otherwise such work would never have its turn.
        """
        self._begin(loop)
        is_reserved = not self._direct_ns or self._direct_ns + estimated_ns <= MAX_LOOP_NS / 2
        if self._ns + estimated_ns > MAX_LOOP_NS and not is_reserved:
            return False
        self._ns += estimated_ns
        self._direct_ns += estimated_ns
        return True

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to count if nothing was counted in the current pass of `loop`."""
        if self._loop is not loop:
            self._loop = loop
            self._ns = self._direct_ns = 0.0
            self._waiting.clear()  # of an earlier loop of this thread, which has ended
            loop.call_soon(self._end)

    def _end(self) -> None:
        """Let the next tasks go on, in the next pass, in which their work counts."""
        loop, self._loop = self._loop, None
        waiting = self._waiting
        while waiting and waiting[0][0].done():  # cancelled
            waiting.popleft()
        if not waiting or loop is None:
            return
        self._loop = loop
        self._ns = self._direct_ns = 0.0
        while waiting and (waiting[0][0].done() or self._ns + waiting[0][1] <= MAX_LOOP_NS):
            turn, estimated_ns = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._ns += estimated_ns
        loop.call_soon(self._end)


_loop_pass = _LoopPass()


def _lower_priority() -> None:
    """Let this thread wait for a core while another thread needs it. A sandbox may refuse this."""
    if sys.platform == "linux":  # elsewhere, the priority is that of the whole process
        thread = threading.get_native_id()
        with suppress(OSError):  # an error here would break the pool for all requests
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + ADDED_NICENESS)


# For work that frees the interpreter lock. Work that holds the lock keeps its priority: while such a thread waited for
# a core, the event loop would wait for the lock, for 50 to 110 ms when this was tried.
_low_priority_threads = ThreadPoolExecutor(LOW_PRIORITY_THREADS, "low-priority", _lower_priority)


def take_loop_time(loop: asyncio.AbstractEventLoop, estimated_ns: float) -> bool:
    """Return whether there is time for short work in the current pass of `loop`. The time then counts as taken."""
    return estimated_ns <= SHORT_NS or _loop_pass.take(loop, estimated_ns)


async def run_in_thread_if_long(work: Callable[[], T], estimated_ns: float, *, frees_lock: bool = False) -> T:
    """Return the result of `work`, which runs in another thread if `estimated_ns` is above MAX_LOOP_NS.

    Otherwise `work` runs in the event loop, in a pass of the loop in which there is time for it.

    Args:
        work: a function without arguments. If it takes more than a few milliseconds, it calls `pause_if_due`.
        estimated_ns: the estimated time, in nanoseconds.
        frees_lock: whether `work` spends almost all of its time in calls that free the interpreter lock. Such work
            does not wait for other long work, and on Linux its thread has a low priority.
    """
    if estimated_ns > MAX_LOOP_NS:
        if frees_lock:
            return await asyncio.get_running_loop().run_in_executor(_low_priority_threads, work)
        return await asyncio.to_thread(_run_as_long_work, work)
    if estimated_ns > SHORT_NS:
        await _loop_pass.wait(estimated_ns)
    return work()


def _run_as_long_work(work: Callable[[], T]) -> T:
    with long_work():
        return work()


async def read_within_budget(
    readers: ThreadPoolExecutor,
    read: Callable[[], T],
    budget: Budget,
    estimated_ns: float,
    on_long: Callable[[], None] = lambda: None,
) -> T:
    """Return the result of `read`, which draws from `budget`.

    `read` runs in a thread of `readers` if `estimated_ns` is above MAX_LOOP_NS. Otherwise it runs in the event loop.
    If it blocks the event loop for too long, it stops and is called again in a thread. `on_long` is called before
    `read` is called in a thread.
    """
    if estimated_ns <= MAX_LOOP_NS:
        if estimated_ns > SHORT_NS:
            await _loop_pass.wait(estimated_ns)
        budget.start(in_event_loop=True)
        try:
            return read()
        except TurnOver:
            pass
        finally:
            budget.stop()

    on_long()

    def read_in_thread() -> T:
        with long_work():
            budget.start(in_event_loop=False)
            try:
                return read()
            finally:
                budget.stop()

    return await asyncio.get_running_loop().run_in_executor(readers, read_in_thread)
