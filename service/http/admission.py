"""Admission control: decide which requests the server accepts. Refused requests get status 429.

`protocol.py` checks a request as soon as its head is complete. If the request is refused at that point, `refusal.py`
writes the response.
"""

import asyncio
import math
from functools import lru_cache
from threading import Lock
from time import perf_counter
from typing import NamedTuple

from service.codec.budget import Budget
from service.errors import DeadlineExceeded, Overloaded
from service.http.large_reads import LargeReads
from service.http.unread import SLOW_AFTER_SECONDS, SMALL_RESPONSE, UnreadResponses
from service.inference.backlog import Backlog
from service.inference.batcher import Batcher
from service.shared_memory import SharedNumber

LARGE_REQUESTS = 16  # beside this many large requests, another one is refused if its expected wait is too long
WORK_SLOTS = 64  # maximum number of requests processed at once, so that a pass of the event loop takes a few ms
MAX_RETRY_AFTER = 60  # seconds
ROOM_SECONDS = 0.02  # interval between two checks for room for a large response
TICKET = "elbo.ticket"  # key of a request's ticket in its ASGI scope


class Refusal(NamedTuple):
    """The reason why a request is refused, and the number of seconds after which the client should send it again.

    Refusals for the same reason differ only in these seconds, so `HeadRefusal` can cache the responses.
    """

    detail: str
    expected: str
    retry_after: int

    def error(self) -> Overloaded:
        """Return the error that the client receives."""
        return Overloaded(
            self.detail,
            expected=self.expected,
            hint=f"try again in {self.retry_after} s",
            headers={"Retry-After": str(self.retry_after)},
        )


class AdmissionControl:
    """The admission control of one process.

    A request is refused in these cases:

    - Its rows would raise the number of pending rows above `max_rows`. A request of more rows than one batch leaves a
      quarter of `max_rows` free for smaller requests, unless it needs more than three quarters itself.
    - Its body would raise the size of all request bodies in memory above `max_held_bytes`.
    - Its expected wait is longer than `max_wait` seconds.
    - Its response would raise the size of all responses that clients have not read above a quarter of `max_held_bytes`.

    The expected wait is estimated twice: from the requests ahead, and from the rows ahead. The longer estimate is used,
    because either parsing JSON or running the model may be slower. Both estimates use recently measured rates.

    A large request is one whose rows fill more than one batch, or whose body is read in another thread. Large requests
    need no work slot and have an expected wait of their own, so that they do not delay small requests. Those with the
    rows of more than one batch take turns, because each may take 150 MB of memory until its response is written. A turn
    begins when clients have read so much of the responses before it that the next response fits.

    Args:
        batcher: reports the pending rows and how long they are expected to take.
        max_rows: maximum number of pending rows (ELBO_QUEUE_ROWS).
        max_wait: maximum expected wait in seconds (ELBO_QUEUE_SECONDS).
        max_held_bytes: maximum number of bytes of request bodies in memory (ELBO_HELD_BYTES).
        exported_bytes: array for the metrics; its element 0 holds the bytes of request bodies in memory.
        exported_unread: array for the metrics; its element 0 holds the bytes of responses that clients have not read.

    Attributes:
        requests: the requests that hold a place in the queue, including those with a work slot.
        large_requests: the large requests that are being processed.
        max_small_rows: maximum number of rows of a request that is not large.
        body_bytes: the bytes of request bodies in memory.
        unread: the responses that clients have not read. They take part of `max_held_bytes`.
        large_reads: the connections that wait for their turn to read on.
        work_slots: semaphore of WORK_SLOTS; a request holds one slot while it is processed.
        turn: lock that a request with the rows of more than one batch holds from its computation until its response
            is written.
    """

    def __init__(
        self,
        batcher: Batcher,
        *,
        max_rows: int,
        max_wait: float,
        max_held_bytes: int,
        exported_bytes: SharedNumber | None = None,
        exported_unread: SharedNumber | None = None,
    ) -> None:
        self.max_held_bytes = max_held_bytes
        self.requests = Backlog()
        self.large_requests = Backlog()
        self.max_small_rows = batcher.max_batch_rows
        self.body_bytes = Backlog()
        self.large_reads = LargeReads()
        self.unread = UnreadResponses(max_held_bytes / 4, exported_unread)
        self.work_slots = asyncio.Semaphore(WORK_SLOTS)
        self.turn = asyncio.Lock()
        self._rows_ahead = 0  # rows of large requests that are accepted, but not yet in the batcher
        self._exported_bytes: SharedNumber = [0.0] if exported_bytes is None else exported_bytes
        self._batcher = batcher
        self._max_rows = max_rows
        self._max_rows_of_large = max_rows - max_rows // 4
        self._max_wait = max_wait
        self._bytes_lock = Lock()  # readers in threads draw memory from the budgets of their requests

    def ticket(self) -> "Ticket":
        """Return the ticket of a new request."""
        return Ticket(self)

    def refusal(self, *, rows: int = 0, body_bytes: int = 0, is_queued: bool = False) -> Refusal | None:
        """Return why the server refuses `rows` more rows or `body_bytes` more bytes, or None if it accepts them.

        Args:
            rows: rows to be queued; 0 if only the body is to be checked.
            body_bytes: bytes of a body to be held in memory.
            is_queued: whether the request already holds a place in the queue. If so, only the rows ahead
                of the request determine the expected wait.
        """
        if rows:
            limit = self._max_rows
            if self.max_small_rows < rows <= self._max_rows_of_large:
                limit = self._max_rows_of_large
            excess = self._batcher.pending_rows + self._rows_ahead + rows - limit
            if excess > 0:
                seconds = self._batcher.backlog.seconds_for(excess)
                expected = f"at most {limit} pending rows"
                return Refusal("too many rows are pending", expected, retry_after(seconds))
            wait = self._batcher.expected_wait
            if not is_queued and self.requests.amount >= WORK_SLOTS:
                wait = max(wait, self.requests.expected_wait)
            if wait > self._max_wait:
                return self._too_long(wait)
        if body_bytes and self.body_bytes.amount + self.unread.amount + body_bytes > self.max_held_bytes:
            if self.body_bytes.amount + self.unread.counted + body_bytes <= self.max_held_bytes:
                return None
            seconds = self.body_bytes.seconds_for(body_bytes)
            expected = f"at most {self.max_held_bytes} bytes of request bodies in memory"
            return Refusal("request bodies take too much memory", expected, retry_after(seconds))
        return None

    def _too_long(self, wait: float) -> Refusal:
        return _too_long(self._max_wait, retry_after(wait - self._max_wait))

    def check_large(self) -> None:
        """Raise Overloaded if the expected wait of another large request is too long."""
        wait = self.large_requests.expected_wait
        if self.large_requests.amount >= LARGE_REQUESTS and wait > self._max_wait:
            raise self._too_long(wait).error()

    async def acquire_turn(self, rows: int, deadline: float, response_bytes: int = 0) -> None:
        """Acquire `turn` for a request of `rows` rows. They count as pending until `leave_to_batcher` is called.

        The turn begins when there is room for a response of about `response_bytes` bytes. Without this wait, the server
        would compute a response beside a large one that a client still reads, and hold the memory of both.

        Raises:
            Overloaded: the server refuses `rows` more rows, or clients that read their responses fast enough still
                leave no room for the response.
            DeadlineExceeded: the turn did not come before `deadline`.
        """
        self.check(rows=rows, is_queued=True)
        self._rows_ahead += rows
        try:
            async with asyncio.timeout(max(0.0, deadline - perf_counter())):
                await self.turn.acquire()
                try:
                    await self._wait_for_room(response_bytes)
                except BaseException:
                    self.turn.release()
                    raise
        except BaseException as error:
            self._rows_ahead -= rows
            if isinstance(error, TimeoutError):
                raise timed_out() from None
            raise

    def leave_to_batcher(self, rows: int) -> None:
        """Count `rows` rows of a request that has the turn no longer: from now on, the batcher counts them."""
        self._rows_ahead -= rows

    async def _wait_for_room(self, size: int) -> None:
        """Wait until a response of `size` bytes fits, at most until every client that reads slowly counts as slow."""
        end = perf_counter() + SLOW_AFTER_SECONDS + 2 * ROOM_SECONDS
        while size > SMALL_RESPONSE and not self.unread.has_room(size):
            if perf_counter() > end:
                self.check_response(size)
                return
            await asyncio.sleep(ROOM_SECONDS)

    def check(self, *, rows: int, is_queued: bool) -> None:
        """Raise Overloaded if the server refuses `rows` more rows."""
        refusal = self.refusal(rows=rows, is_queued=is_queued)
        if refusal:
            raise refusal.error()

    def check_response(self, size: int) -> None:
        """Raise Overloaded if the responses that clients have not read leave no room for another of `size` bytes."""
        if not self.unread.has_room(size):
            raise Refusal(
                "responses that clients do not read take too much memory",
                f"at most {self.unread.max_bytes:.0f} bytes of responses that wait for their clients",
                1,
            ).error()

    def hold_bytes(self, size: int) -> None:
        """Count `size` bytes of a request body as held in memory. Raises Overloaded if there is no room for them."""
        with self._bytes_lock:
            refusal = self.refusal(body_bytes=size)
            if refusal:
                raise refusal.error()
            self.body_bytes.add(size)
            self._exported_bytes[0] = self.body_bytes.amount

    def release_bytes(self, size: int) -> None:
        """Count `size` bytes of a request body as freed."""
        with self._bytes_lock:
            self.body_bytes.finish(size)
            self._exported_bytes[0] = self.body_bytes.amount


class Ticket:
    """The resources of one request: a place in the queue, a work slot, and the memory of its body.

    A request holds a place in the queue from the arrival of its last byte until its response is ready. Slow uploads and
    downloads therefore delay no other request.
    """

    __slots__ = (
        "_admission", "_has_slot", "_has_turn", "_is_large", "_is_released", "_rows_ahead", "held_bytes", "is_queued",
    )  # fmt: skip

    def __init__(self, admission: AdmissionControl) -> None:
        self._admission = admission
        self._has_slot = False
        self._has_turn = False
        self._is_large = False
        self._is_released = False
        self._rows_ahead = 0  # rows that count as pending although the batcher does not have them
        self.is_queued = False
        self.held_bytes = 0

    def acquire(self) -> None:
        """Take a place in the queue. Does nothing if the ticket already has a place or has been released."""
        if not self.is_queued and not self._is_released:
            self.is_queued = True
            self._admission.requests.add(1)

    async def start(self, deadline: float) -> None:
        """Wait for a work slot.

        Args:
            deadline: the time at which the request times out, on the `perf_counter` clock.

        Raises:
            DeadlineExceeded: no slot became free in time.
        """
        slots = self._admission.work_slots
        if not slots.locked():
            await slots.acquire()  # returns at once
        else:
            try:
                async with asyncio.timeout(max(0.0, deadline - perf_counter())):
                    await slots.acquire()
            except TimeoutError:
                raise timed_out() from None
        self._has_slot = True

    async def take_turn(self, rows: int, deadline: float, response_bytes: int = 0) -> None:
        """Go on as a large request, and wait for the turn to compute `rows` rows. A second call does nothing.

        The turn begins when there is room for a response of about `response_bytes` bytes.

        Raises:
            Overloaded: the server refuses the rows, the expected wait of large requests is too long, or responses that
                clients still read leave no room for the response.
            DeadlineExceeded: the turn did not come before `deadline`.
        """
        if self._has_turn or self._is_released:
            return
        self.mark_large()
        await self._admission.acquire_turn(rows, deadline, response_bytes)
        self._has_turn = True
        self._rows_ahead = rows
        if self._is_released:  # meanwhile
            self.release()

    def check(self, rows: int) -> None:
        """Raise Overloaded if the server refuses to run `rows` rows of this request now. The batcher gets them next.

        The other rows of a request that runs in parts still count as pending, until their part is checked.

        A request that has the turn is not refused: the rows that wait behind it would count against it. Clients that
        always try again would then fill the queue, and no large request would ever get a response.
        """
        if self._has_turn:
            self._leave_to_batcher(rows)
        else:
            self._admission.check(rows=rows, is_queued=True)

    def _leave_to_batcher(self, rows: int) -> None:
        left = min(rows, self._rows_ahead)
        self._admission.leave_to_batcher(left)
        self._rows_ahead -= left

    def release(self) -> None:
        """Give up the place in the queue, the work slot and the turn. A second call does nothing."""
        self._is_released = True
        if self._has_turn:
            self._has_turn = False
            self._leave_to_batcher(self._rows_ahead)
            self._admission.turn.release()
        if self._is_large:
            self._is_large = False
            self._admission.large_requests.finish(1)
        if self.is_queued or self._has_slot:
            self._leave_queue()

    def mark_large(self) -> None:
        """Go on as a large request: free the place in the queue and the work slot for small requests.

        Raises Overloaded if the expected wait of large requests is too long.
        """
        if self._is_large or self._is_released:
            return
        self._admission.check_large()
        self._is_large = True
        self._admission.large_requests.add(1)
        self._leave_queue()

    def _leave_queue(self) -> None:
        if self.is_queued:
            self.is_queued = False
            self._admission.requests.finish(1)
        if self._has_slot:
            self._has_slot = False
            self._admission.work_slots.release()

    def check_response(self, size: int) -> None:
        """Raise Overloaded if there is no room for a response of `size` bytes."""
        self._admission.check_response(size)

    def hold(self, size: int) -> None:
        """Count `size` more bytes of the body as held in memory. Raises Overloaded if there is no room for them."""
        self._admission.hold_bytes(size)
        self.held_bytes += size

    def budget(self, *, max_bytes: int, max_rows: int, width: int, deadline: float) -> Budget:
        """Return a budget for reading the body; the arguments are those of `Budget`."""
        admission = self._admission
        return Budget(
            max_bytes=max_bytes,
            max_rows=max_rows,
            width=width,
            deadline=deadline,
            hold=admission.hold_bytes,
            release=admission.release_bytes,
        )

    def release_bytes(self) -> None:
        """Count the bytes of the body as freed."""
        self._admission.release_bytes(self.held_bytes)
        self.held_bytes = 0


def timed_out() -> DeadlineExceeded:
    """Return the error of a request whose deadline passed before its work began."""
    return DeadlineExceeded(
        "the request timed out while it waited in the queue", hint="try again later, or allow more time"
    )


@lru_cache(maxsize=256)
def _too_long(max_wait: float, seconds: int) -> Refusal:
    """Return the refusal for an expected wait above `max_wait`. Cached, because an overloaded server refuses most."""
    return Refusal("the queue is too long", f"an expected wait of at most {max_wait:g} s", seconds)


def retry_after(seconds: float) -> int:
    """Return the Retry-After value for an expected wait: whole seconds from 1 to MAX_RETRY_AFTER."""
    return min(MAX_RETRY_AFTER, max(1, math.ceil(seconds)))
