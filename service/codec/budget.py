"""The budget of one request: what reading its body may cost in memory, rows and time.

A body of a few bytes can describe gigabytes of objects, and hours of work. Every reader therefore draws from the budget
of its request while it reads, not afterwards:

- before it creates objects or unpacks bytes: `take_bytes`;
- for each row, valid or not: `take_next_rows` or `take_rows`;
- at least once per millisecond of work: `check_time`. A call of a C library that holds the interpreter lock must end
  within 20 ms: give the library at most PIECE_BYTES at once.

The bytes count against ELBO_HELD_BYTES until the request ends.
"""

import math
import sys
from collections.abc import Callable
from threading import Lock
from time import perf_counter, thread_time

from service.codec.long_work import SLICE_SECONDS, pause_if_due
from service.errors import BodyTooLarge, ClientGone, DeadlineExceeded, TooManyRows

PIECE_BYTES = 64 * 1024  # orjson keeps the interpreter lock while it parses a piece, such as one of empty lists
ROW_BYTES = 1024  # memory for what the server keeps about a row: its error, or its position, time and group
TURN_SECONDS = 0.004  # longest processor time for which one request may block the event loop
MAX_CPU_SECONDS = 20.0  # processor time; several times what the largest body of the default settings needs
MAX_ROW_BYTES = 2**20  # longest row as text, for models of few features
MAX_NUMBER_BYTES = 32  # space for a number, its comma and its name
NEXT_ROWS = 16  # rows that are counted together, because counting each alone would slow down the reading of short rows
MAX_NEXT_BYTES = 64 * 1024  # most memory for the numbers of these rows; a row that needs more is counted alone
_HOLD_STEP = 64 * 1024  # bytes; fewer per call of `hold` would take its lock too often


class TurnOver(Exception):
    """Reading has blocked the event loop for too long: read the body again, in a thread."""


class Budget:
    """What reading the body of one request may cost.

    Args:
        max_bytes: the maximum memory beyond the body itself, for unpacked bytes and for objects.
        max_rows: the maximum number of rows (ELBO_MAX_ROWS).
        width: the number of values per row, which determines how long the text of a row may be.
        deadline: when the request times out, on the `perf_counter` clock.
        hold: counts bytes against ELBO_HELD_BYTES; raises Overloaded if there is no room. Any thread may call it.
        release: counts bytes as freed.

    Attributes:
        width: the number of values per row.
        max_row_bytes: the maximum length of one row as text: JSON, CSV or NDJSON.
        rows: the number of rows read so far.
        held_bytes: the bytes counted against ELBO_HELD_BYTES.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        max_rows: int,
        width: int = 0,
        deadline: float,
        hold: Callable[[int], None],
        release: Callable[[int], None],
    ) -> None:
        self.max_rows = max_rows
        self.width = width
        self.max_row_bytes = max_row_bytes(width)
        self.rows = 0
        self.held_bytes = 0
        self._max_bytes = max_bytes
        self._bytes = 0
        self._deadline = deadline
        self._hold = hold
        self._release = release
        self._lock = Lock()  # for the two attributes below: the request may end while a thread still reads its body
        self._is_reading = False
        self._is_closed = False
        self._turn_end = 0.0  # when reading must stop blocking the event loop; 0 in a thread
        self._cpu_end = math.inf  # on the `thread_time` clock; in the event loop, the end of the turn
        self._next_check = 0.0

    def take_bytes(self, size: int) -> None:
        """Count `size` bytes of memory, before the memory is used.

        Raises:
            BodyTooLarge: the request would need more memory than a request may use.
            Overloaded: the requests in memory leave no room.
        """
        self._bytes += size
        if self._bytes <= self.held_bytes:
            return
        if self._bytes > self._max_bytes:
            raise BodyTooLarge(
                f"reading the body takes more than {self._max_bytes} bytes of memory",
                expected=f"at most {self._max_bytes} bytes",
                got="more",
                hint="send fewer rows per request, or send them as application/x-npy",
            )
        step = min(max(self._bytes - self.held_bytes, _HOLD_STEP), self._max_bytes - self.held_bytes)
        self._hold(step)
        self.held_bytes += step

    def give_back_bytes(self, size: int) -> None:
        """Count `size` bytes as free again. They stay held until the request ends, for the next `take_bytes`."""
        self._bytes -= size

    @property
    def usage(self) -> tuple[int, int]:
        """The numbers of rows and bytes that have been counted so far. `restore_usage` can restore them."""
        return self.rows, self._bytes

    def restore_usage(self, usage: tuple[int, int]) -> None:
        """Restore numbers that `usage` has returned, so that another reader can begin again with the same text."""
        self.rows, self._bytes = usage

    def take_next_rows(self, size: int) -> int:
        """Count the next rows, valid or not, and `size` bytes for the numbers of each. Return how many rows these are.

        Readers of text call `check_time` too, for every PIECE_BYTES, because these rows may be long.

        Raises:
            TooManyRows: the request has more rows than `max_rows`.
            BodyTooLarge, Overloaded, DeadlineExceeded, TurnOver: see `take_bytes` and `check_time`.
        """
        count = NEXT_ROWS if NEXT_ROWS * size <= MAX_NEXT_BYTES else 1
        count = min(count, max(1, self.max_rows - self.rows))
        self.take_rows(count)
        self.take_bytes(count * size)
        self.check_time()
        return count

    def take_rows(self, count: int) -> None:
        """Count `count` more rows, valid or not, and their memory. Raises TooManyRows, BodyTooLarge, Overloaded."""
        self.rows += count
        if self.rows > self.max_rows:
            raise TooManyRows(
                f"a request may have at most {self.max_rows} rows (ELBO_MAX_ROWS), got more",
                expected=f"at most {self.max_rows} rows",
                got="more",
                hint="split the rows over several requests",
            )
        self.take_bytes(count * ROW_BYTES)

    def check_time(self) -> None:
        """Check that there is time left, and let other threads run.

        Raises:
            DeadlineExceeded: the request timed out.
            BodyTooLarge: reading took more than MAX_CPU_SECONDS of processor time.
            ClientGone: nobody waits for the response any more.
            TurnOver: reading has blocked the event loop for too long.
        """
        if perf_counter() >= self._next_check:
            self._check_time()

    def _check_time(self) -> None:
        now = perf_counter()
        if self._is_closed:
            raise ClientGone("the client disconnected while its body was read")
        if now > self._deadline:
            raise DeadlineExceeded(
                "the request timed out while its body was read", hint="send fewer rows, or allow more time"
            )
        if self._turn_end:
            if now > self._turn_end:
                # Another program may have had the processor meanwhile. Reading again in a thread would only add work.
                left = self._cpu_end - thread_time()
                if left <= 0:
                    raise TurnOver
                self._turn_end = now + left
            self._next_check = min(self._turn_end, self._deadline)
            return
        if thread_time() > self._cpu_end:
            raise BodyTooLarge(
                f"reading the body takes more than {MAX_CPU_SECONDS:g} s of processor time",
                expected=f"a body that is read within {MAX_CPU_SECONDS:g} s",
                got="more",
                hint="send fewer rows per request, or send them as application/x-npy",
            )
        pause_if_due()
        self._next_check = perf_counter() + SLICE_SECONDS

    def start(self, *, in_event_loop: bool) -> None:
        """Begin to read, or begin again: the counts of bytes and rows start at 0. Call this in the thread that reads.

        Raises:
            ClientGone: the request has ended.
        """
        with self._lock:
            if self._is_closed:
                raise ClientGone("the client disconnected before its body was read")
            self._is_reading = True
        self._bytes = self.rows = 0
        self._turn_end = perf_counter() + TURN_SECONDS if in_event_loop else 0.0
        self._cpu_end = thread_time() + (TURN_SECONDS if in_event_loop else MAX_CPU_SECONDS)
        self._next_check = 0.0

    def stop(self) -> None:
        """End reading. If the request has ended meanwhile, free its memory."""
        with self._lock:
            self._is_reading = False
            if self._is_closed:
                self._free()

    def close(self) -> None:
        """End the request. Its memory is freed now, or as soon as the thread that reads its body has ended."""
        with self._lock:
            self._is_closed = True
            self._next_check = 0.0  # makes the thread end at its next check
            if not self._is_reading:
                self._free()

    def _free(self) -> None:
        self._release(self.held_bytes)
        self.held_bytes = 0


class NoLimit(Budget):
    """A budget without limits on memory, rows and time.

    It serves bodies so small that reading them costs less than drawing from a budget, and streams, whose rows are
    dropped after a moment.
    """

    def __init__(self, width: int = 0, max_row_bytes: int = sys.maxsize) -> None:
        super().__init__(
            max_bytes=0, max_rows=sys.maxsize, width=width, deadline=math.inf, hold=_ignore, release=_ignore
        )
        self.max_row_bytes = max_row_bytes

    def take_bytes(self, size: int) -> None:
        """Do nothing."""

    def give_back_bytes(self, size: int) -> None:
        """Do nothing."""

    def take_next_rows(self, size: int) -> int:  # noqa: ARG002
        """Return a number of rows that no request has."""
        return sys.maxsize

    def take_rows(self, count: int) -> None:
        """Do nothing."""

    def check_time(self) -> None:
        """Do nothing."""


def max_row_bytes(width: int) -> int:
    """Return the maximum length of a row of `width` values as text, in bytes."""
    return max(MAX_ROW_BYTES, MAX_NUMBER_BYTES * width)


def _ignore(size: int) -> None:
    """Do nothing."""


NO_LIMIT = NoLimit()
