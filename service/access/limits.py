"""The limits of one API key: requests per second, rows per second, and requests at once.

Each worker process counts in shared memory, and applies the limits to the sum of all counts, so a limit holds for the
whole server. A worker reads the sum at each request of the key, and if there are several workers also every
REFRESH_SECONDS. No locks are used, so a limit may be exceeded:

- by one request per worker, if requests reach several workers at the same moment;
- by the requests of REFRESH_SECONDS, if the requests of a key move to another worker;
- by one burst, if a worker has just started.
"""

import math
from time import perf_counter

from service.access.key_file import ApiKey
from service.errors import RateLimited
from service.shared_memory import SharedCounters

REFRESH_SECONDS = 0.1
_REQUESTS, _ROWS = range(2)  # elements of the array of counts
Header = tuple[bytes, bytes]
Headers = tuple[Header, ...]


class Bucket:
    """A token bucket: `rate` tokens per second flow into it, it holds at most `burst`, and each use takes tokens out.

    The number of tokens may become negative, because the rows of a request are counted after it was admitted.

    Args:
        rate: tokens per second.
        burst: largest number of tokens in the bucket, which is full at first.
        used: number of tokens that all processes have taken out so far.
        now: the time on the `perf_counter` clock.
    """

    __slots__ = ("_level", "_now", "_used", "burst", "rate")

    def __init__(self, rate: float, burst: float, used: float, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._used = used
        self._now = now

    def level(self, used: float, now: float) -> float:
        """Update and return the number of tokens at the time `now`, when all processes have taken out `used` so far."""
        level = self._level + (now - self._now) * self.rate - (used - self._used)
        self._level, self._used, self._now = min(self.burst, level), used, now
        return self._level

    def take(self, tokens: int) -> None:
        """Take out `tokens`; put them back if negative. Call this after their use was counted in shared memory."""
        self._level -= tokens
        self._used += tokens

    def seconds_until(self, level: float) -> int:
        """Return after how many seconds the bucket will hold `level` tokens: at least 1."""
        missing = level - self._level
        return 1 if missing <= self.rate else math.ceil(missing / self.rate)

    @property
    def last_level(self) -> float:
        """The number of tokens after the last call of `level` or `take`."""
        return self._level


class KeyLimits:
    """The limits of one key in one worker process.

    Args:
        name: the name of the key.
        key: its limits.
        counters: the counters of all processes.
    """

    def __init__(self, name: str, key: ApiKey, counters: SharedCounters) -> None:
        self.key = key
        self._counters = counters
        self._counts_key = "key_usage", name
        self._running_key = "key_running_requests", name
        self._own_counts = counters.local.array(self._counts_key, length=2)
        self._own_running = counters.local.array(self._running_key, length=1, transient=True)
        self._find_arrays()
        rate, now = key.requests_per_second, perf_counter()
        self._requests = (
            Bucket(rate, key.burst or max(1, math.ceil(rate)), self._used(_REQUESTS), now) if rate else None
        )
        rows = key.rows_per_second
        self._rows = Bucket(rows, rows, self._used(_ROWS), now) if rows else None
        self._most_running = key.concurrent_requests
        self._policy = self._describe_policy()

    def enter(self) -> None:
        """Count a request. Raises RateLimited if the key has reached a limit."""
        if self._most_running and self._running() >= self._most_running:
            self._refuse("concurrent_requests", f"{self._most_running} requests at once", 1)
        if self._requests and self._requests.level(self._used(_REQUESTS), perf_counter()) < 1:
            limit = f"{self._requests.rate:g} requests per second"
            self._refuse("requests_per_second", limit, self._requests.seconds_until(1))
        if self._rows and not self.may_send_rows():
            self._refuse("rows_per_second", f"{self._rows.rate:g} rows per second", self._rows.seconds_until(0))
        self._count(1)

    def undo_enter(self) -> None:
        """Forget a request that `enter` has counted."""
        self._count(-1)

    def exit(self) -> None:
        """Count the end of a request that `enter` has counted."""
        self._own_running[0] -= 1

    def count_rows(self, rows: int) -> None:
        """Count the rows of a request."""
        self._own_counts[_ROWS] += rows

    def may_send_rows(self) -> bool:
        """Return whether the limit lets the key send rows now: its bucket has a token left, or there is no limit."""
        return self._rows is None or self._rows.level(self._used(_ROWS), perf_counter()) > 0

    def refresh(self) -> None:
        """Update the buckets with the counts of all processes."""
        self._find_arrays()
        now = perf_counter()
        for index, bucket in ((_REQUESTS, self._requests), (_ROWS, self._rows)):
            if bucket:
                bucket.level(self._used(index), now)

    def headers(self) -> Headers:
        """Return RateLimit-Policy and RateLimit as in draft-ietf-httpapi-ratelimit-headers-11, after a call of `enter`.

        `r` is the number of requests that are left, and `t` the seconds until it grows by one. The limit on rows is not
        described, because the draft has no unit for rows.
        """
        if self._requests:
            level = max(0, int(self._requests.last_level))
            left = b'"requests";r=%d;t=%d' % (level, self._requests.seconds_until(level + 1))
            if self._most_running:
                left += b', "concurrent";r=%d' % max(0, self._most_running - self._running())
        elif self._most_running:
            left = b'"concurrent";r=%d' % max(0, self._most_running - self._running())
        else:
            return ()
        return self._policy, (b"ratelimit", left)

    def _count(self, requests: int) -> None:
        self._own_counts[_REQUESTS] += requests
        self._own_running[0] += requests
        if self._requests:
            self._requests.take(requests)

    def _describe_policy(self) -> Header:
        policies = []
        if self._requests:
            window = max(1, math.ceil(self._requests.burst / self._requests.rate))
            policies.append(f'"requests";q={self._requests.burst};w={window}')
        if self._most_running:
            policies.append(f'"concurrent";q={self._most_running};qu="concurrent-requests"')
        return b"ratelimit-policy", ", ".join(policies).encode()

    def _refuse(self, setting: str, limit: str, seconds: int) -> None:
        headers = {name.decode(): value.decode() for name, value in self.headers()}
        raise RateLimited(
            f"the API key has reached its limit of {limit} ({setting})",
            expected=f"at most {limit}",
            hint=f"try again in {seconds} s",
            headers={**headers, "retry-after": str(seconds)},
        )

    def _find_arrays(self) -> None:
        self._counts = self._counters.arrays_at(self._counts_key)
        self._all_running = self._counters.arrays_at(self._running_key)

    def _used(self, index: int) -> float:
        counts = self._counts
        return counts[0][index] if len(counts) == 1 else sum([one[index] for one in counts])

    def _running(self) -> float:
        running = self._all_running
        return running[0][0] if len(running) == 1 else sum([one[0] for one in running])
