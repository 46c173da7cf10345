"""Responses that clients do not read: how much memory they take, and which of them the server drops to make room."""

from time import perf_counter
from typing import Protocol

from service.shared_memory import SharedNumber

# The kernel accepts a response of up to this size at once, even if the client does not read it. Larger responses count.
SMALL_RESPONSE = 16 * 1024
# If there is no room for a response, the server drops slow clients, the slowest first. A client is slow if it has read
# less than this many bytes per second for at least this many seconds.
SLOW_BYTES_PER_SECOND = 64 * 1024
SLOW_AFTER_SECONDS = 1.0


class Reader(Protocol):
    """A connection whose client has not read all of a response."""

    def bytes_read_per_second(self, now: float) -> float:
        """Return how fast the client reads; infinity if it has had less than SLOW_AFTER_SECONDS to do so."""

    def drop(self, reason: str) -> None:
        """End the connection at once, and count it under `reason`."""


class UnreadResponses:
    """The memory that the connections of one process hold for clients that do not read.

    It consists of the unread parts of responses, of requests that wait behind them on the same connection, and of heads
    that are incomplete.

    Args:
        max_bytes: limit on this memory.
        exported: array for the metrics; its element 0 holds the bytes.
    """

    def __init__(self, max_bytes: float, exported: SharedNumber | None = None) -> None:
        self.max_bytes = max_bytes
        self.amount = 0
        self._exported: SharedNumber = [0.0] if exported is None else exported
        self._sizes: dict[Reader, int] = {}

    def set(self, connection: Reader, size: int) -> None:
        """Record that `connection` holds `size` bytes. A size of 0 removes the connection."""
        self.amount += size - self._sizes.get(connection, 0)
        self._exported[0] = self.amount
        if size:
            self._sizes[connection] = size
        else:
            self._sizes.pop(connection, None)

    @property
    def counted(self) -> float:
        """How many bytes reduce the room for request bodies: at most the limit, even if a single response is larger."""
        return min(self.amount, self.max_bytes)

    def has_room(self, size: int = 0) -> bool:
        """Return whether `size` more bytes fit, if necessary after the server has dropped the slowest readers.

        A response that is larger than the limit fits if it is the only one.
        """
        if self.amount + size > self.max_bytes:
            self._drop_slowest(self.amount + size - self.max_bytes)
        return self.amount + size <= self.max_bytes or not self.amount

    def _drop_slowest(self, excess: float) -> None:
        """Drop slow readers until `excess` bytes are free, and a tenth of the limit in addition.

        With the additional room, the readers are sorted less often.
        """
        now = perf_counter()
        rates = [(reader.bytes_read_per_second(now), number, reader) for number, reader in enumerate(self._sizes)]
        target = self.amount - excess - self.max_bytes / 10
        for rate, _, reader in sorted(rates):
            if self.amount <= target or rate >= SLOW_BYTES_PER_SECOND:
                return
            self.set(reader, 0)
            reader.drop("unread_response")
