"""Long work in threads: of all threads that do long work, only one works at a time.

Whenever the event loop waits for the network, it gives up Python's interpreter lock, and needs it again for its next
step. If several other threads want it at that time, all of them may get it before the event loop. This module lets
only one of them compete with the event loop.

A thread works for about SLICE_SECONDS, and then another thread may work. The event loop gets the interpreter lock
after SWITCH_INTERVAL, which is set in service/server/worker.py, or when the current call of a C library ends, if that
is later. Calls of C libraries should therefore not hold the interpreter lock for more than a few milliseconds.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

SLICE_SECONDS = 0.01  # shorter slices would cost much on a busy machine, where the next thread waits for a processor
COPIED_BYTES = 512 * 1024  # maximum number of bytes to copy while holding the interpreter lock
FIRST_BYTES = 16 * 1024  # first size of a large response


class _WorkLock:
    """A lock that threads get in the order in which they ask for it. `threading.Lock` keeps no such order."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._is_held = False
        self._gates: deque[threading.Lock] = deque()  # one for each thread that waits

    @property
    def is_wanted(self) -> bool:
        """Whether a thread waits for the lock."""
        return bool(self._gates)

    def acquire(self) -> None:
        """Wait until this thread has the lock."""
        with self._mutex:
            if not self._is_held:
                self._is_held = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._gates.append(gate)
        gate.acquire()

    def release(self) -> None:
        """Hand the lock to the thread that has waited longest."""
        with self._mutex:
            if self._gates:
                self._gates.popleft().release()
            else:
                self._is_held = False


_lock = _WorkLock()


class _Thread(threading.local):
    """The end of this thread's time slice on the `perf_counter` clock; infinity if the thread does no long work."""

    slice_end = float("inf")


_this_thread = _Thread()


@contextmanager
def long_work() -> Iterator[None]:
    """Wait until this thread may work. Until the end of the block, other threads work only during `pause_if_due`."""
    _lock.acquire()
    _this_thread.slice_end = perf_counter() + SLICE_SECONDS
    try:
        yield
    finally:
        _this_thread.slice_end = float("inf")
        _lock.release()


def pause_if_due() -> None:
    """Let other threads work if the time slice of this thread is over. Do nothing if the thread does no long work."""
    if perf_counter() < _this_thread.slice_end:
        return
    if _lock.is_wanted:  # the event loop needs no pause: Python makes this thread give up the interpreter lock
        _lock.release()
        _lock.acquire()
    _this_thread.slice_end = perf_counter() + SLICE_SECONDS


class LargeContent:
    """The content of a large response, which grows while it is written.

    It is kept in a NumPy array, because NumPy frees the interpreter lock while it copies. `bytes.join` and `BytesIO`
    would hold the lock for the whole copy, and so would freeing many MB of `bytes`.
    """

    def __init__(self) -> None:
        self._array = np.empty(FIRST_BYTES, np.uint8)
        self._size = 0

    def reserve(self, size: int) -> None:
        """Make room for `size` more bytes, so that writing them copies nothing that is already written."""
        needed = self._size + size
        if needed > len(self._array):
            grown = np.empty(needed, np.uint8)
            grown[: self._size] = self._array[: self._size]
            self._array = grown

    def write(self, data: Any) -> None:
        """Append `data`, which is bytes or a buffer."""
        size = len(data) if type(data) is bytes else memoryview(data).nbytes
        if not size:
            return
        end = self._size + size
        if end > len(self._array):
            self.reserve(max(size, len(self._array) // 2))
        self._array[self._size : end] = np.frombuffer(data, np.uint8)
        self._size = end

    def view(self) -> memoryview:
        """Return all bytes, without a copy."""
        return self._array[: self._size].data


def join(parts: Sequence[bytes | memoryview]) -> bytes | memoryview:
    """Return the bytes of all `parts`, joined. Each part is contiguous, in C order."""
    if sum(memoryview(part).nbytes for part in parts) <= COPIED_BYTES:
        return b"".join(parts)
    content = LargeContent()
    content.reserve(sum(memoryview(part).nbytes for part in parts))
    for part in parts:
        content.write(part)
    return content.view()
