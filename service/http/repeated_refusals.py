"""Refuse requests with known heads without parsing them, and delay the answers to clients that do not slow down.

While the server is overloaded, it refuses most requests, and their cost decides how many others it can serve. Clients
repeat the heads of their requests. If a read has exactly one request, and its head is that of a refused request, the
server refuses it without parsing it.

Some clients send the next request as soon as one is refused. The server therefore delays its answers to a connection
that is refused again and again, each twice as long as the one before it.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter

from service.access.control import GrantedKey

MAX_HEADS = 1024  # a new head replaces the oldest one
MAX_HEAD_BYTES = 2048  # longer heads are always parsed
MAX_DELAYED = 10_000  # answers that are delayed at once; each has less than 1 KiB
DELAY_SECONDS = (0.001, 0.064)  # the delay of the second answer, and the longest delay
TICK_SECONDS = 0.001  # between two looks for answers that are due
END_OF_HEAD = b"\r\n\r\n"
# A head with one of these headers is always parsed, because the answer, the trace or the connection depends on it.
SPECIAL_HEADERS = frozenset({
    b"connection", b"transfer-encoding", b"upgrade", b"expect", b"traceparent", b"x-request-id",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class RefusedHead:
    """The head of a request that was refused.

    Args:
        path: the path of the request.
        endpoint: the path without the root path.
        body_bytes: the value of its Content-Length.
        key: the API key in it; None if the server has no keys.
    """

    path: str
    endpoint: str
    body_bytes: int
    key: GrantedKey | None = None


class RefusedHeads(dict[bytes, RefusedHead]):
    """The heads of requests that were refused, by their bytes. All connections of a server share them."""

    def find(self, data: bytes) -> RefusedHead | None:
        """Return the head in `data` if `data` is one whole request and its head is known; otherwise None."""
        end = data.find(END_OF_HEAD, 0, MAX_HEAD_BYTES) + len(END_OF_HEAD)
        head = self.get(data[:end])
        return head if head is not None and len(data) == end + head.body_bytes else None

    def remember(
        self,
        data: bytes,
        path: str,
        endpoint: str,
        headers: list[tuple[bytes, bytes]],
        key: GrantedKey | None = None,
    ) -> None:
        """Remember the head in `data` if `data` is one whole request without SPECIAL_HEADERS.

        Args:
            data: the read with which the request began.
            path: the path of the request.
            endpoint: the path without the root path.
            headers: the headers of the request, with names in lower case.
            key: the API key in the headers; None if the server has no keys.
        """
        end = data.find(END_OF_HEAD, 0, MAX_HEAD_BYTES) + len(END_OF_HEAD)
        head = data[:end]
        lengths = [value for name, value in headers if name == b"content-length"]
        if len(lengths) != 1 or not lengths[0].isdigit() or any(name in SPECIAL_HEADERS for name, _ in headers):
            return
        # A line that ends with \n alone might end the head for the parser.
        is_plain = head.startswith(b"POST ") and head.count(b"\n") == head.count(b"\r\n")
        body_bytes = int(lengths[0])
        if is_plain and len(data) == end + body_bytes:
            if len(self) >= MAX_HEADS:
                del self[next(iter(self))]
            self[head] = RefusedHead(path, endpoint, body_bytes, key)


class DelayedAnswer:
    """An answer that is sent later.

    Args:
        due: when it is sent, on the `perf_counter` clock.
        send: sends it. None if it is sent or cancelled.
    """

    __slots__ = ("due", "send")

    def __init__(self, due: float, send: Callable[[], None]) -> None:
        self.due = due
        self.send: Callable[[], None] | None = send


class DelayedAnswers:
    """The answers of all connections that are delayed, at most MAX_DELAYED.

    One timer sends them, within TICK_SECONDS after they are due. A timer for each answer takes three times as long.
    """

    def __init__(self) -> None:
        self._number = 0
        self._queues: dict[float, deque[DelayedAnswer]] = {}  # by delay; each queue is in the order of `due`
        self._has_timer = False

    def delay(self, number: int, send: Callable[[], None]) -> DelayedAnswer | None:
        """Call `send` after `delay_of(number)`. It calls `release` with the answer that this method returns.

        Return None if the answer has to be sent at once. `send` is then not called.
        """
        if number == 0 or self._number >= MAX_DELAYED:
            return None
        self._number += 1
        seconds = delay_of(number)
        queue = self._queues.get(seconds)
        if queue is None:
            queue = self._queues[seconds] = deque()
        answer = DelayedAnswer(perf_counter() + seconds, send)
        queue.append(answer)
        if not self._has_timer:
            self._start_timer()
        return answer

    def release(self, answer: DelayedAnswer) -> None:
        """Count a delayed answer as sent or abandoned."""
        answer.send = None
        self._number -= 1

    def send_due(self) -> None:
        """Send the answers that are due."""
        now = perf_counter()
        for queue in self._queues.values():
            while queue and queue[0].due <= now:
                send = queue.popleft().send
                if send:
                    send()

    def _start_timer(self) -> None:
        self._has_timer = True
        asyncio.get_running_loop().call_later(TICK_SECONDS, self._on_timer)

    def _on_timer(self) -> None:
        self._has_timer = False
        self.send_due()
        if any(self._queues.values()):
            self._start_timer()


@lru_cache(maxsize=128)
def delay_of(number: int) -> float:
    """Return the delay in seconds of the answer to refusal `number` of a connection. The first, number 0, has none."""
    first, longest = DELAY_SECONDS
    return 0.0 if number == 0 else min(longest, first * 2.0 ** min(number - 1, 16))
