"""Decide whether a request is repeated, and after which time.

A safe request computes something and changes nothing. It may be repeated whenever it fails for a reason that may pass.
An unsafe request changes what the server knows: rows of /anomaly that count towards alerts, and feedback. It is
repeated only if no byte of it was sent, because the connection could not be opened. Not even 429 proves that an unsafe
request had no effect: the server also refuses with 429 if it has no room for the response to rows that it has already
judged.
"""

import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NoReturn

import httpx

from elbo.client.errors import ConnectionFailed, ConnectTimedOut, ElboHTTPError, NotReady, TimedOut, TooManyRequests

_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_MAY_PASS = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout, httpx.PoolTimeout)


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and how fast requests are repeated.

    Args:
        attempts: most attempts of a request, the first included; 1 never repeats.
        first_seconds: longest wait before the second attempt. It doubles with each attempt, and the actual wait is
            drawn uniformly from its upper half, so that clients do not return together.
        most_seconds: longest wait before an attempt. If the server asks for a time with Retry-After, the client waits
            for that time first.
    """

    attempts: int = 4
    first_seconds: float = 0.1
    most_seconds: float = 5.0

    def wait(self, attempt: int, retry_after: float | None) -> float:
        """Return the seconds to wait after attempt number `attempt`, from 1: `retry_after` and a random time."""
        longest = min(self.most_seconds, self.first_seconds * 2.0 ** (attempt - 1))
        seconds = longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads clients; nothing secret
        return seconds if retry_after is None else retry_after + seconds


def parse_retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, as seconds or as a date; None if it is not readable."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


class Attempts:
    """The attempts of one request, until the deadline.

    Args:
        retries: how often and how fast to repeat.
        is_safe: whether the request may be repeated although the server may have received it.
        seconds: the time for all attempts and the waits between them; None for no limit.
        address: the address of the server, for messages.
        deadline: the time of `time.monotonic` by which the call must end, of which the request is a part; by default,
            the request is the whole call.
    """

    def __init__(
        self, retries: Retries, is_safe: bool, seconds: float | None, address: str, deadline: float | None = None
    ) -> None:
        self._retries = retries
        self._is_safe = is_safe
        self._seconds = seconds
        self._address = address
        self._count = 0
        self.deadline = deadline
        if deadline is None and seconds is not None:
            self.deadline = time.monotonic() + seconds

    def seconds_left(self) -> float | None:
        """Return the seconds until the deadline; None for no limit."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def seconds_for_request(self) -> float | None:
        """Return the seconds until the deadline; None for no limit.

        Raises:
            TimedOut: earlier requests of the same call have used all of the time.
        """
        left = self.seconds_left()
        if left is not None and left <= 0:
            raise TimedOut(
                f"the call to {self._address} took longer than {self._seconds:g} s, before all of its requests were "
                "sent; raise timeout=, or pass fewer rows",
                sent=False,
            )
        return left

    def wait_after_failure(self, error: httpx.TransportError) -> float:
        """Return the seconds to wait before the next attempt, after `error` instead of a response.

        Raises:
            ConnectionFailed, TimedOut: the request is not repeated.
        """
        sent = not isinstance(error, (*_NOT_SENT, httpx.UnsupportedProtocol, httpx.LocalProtocolError))
        may_repeat = isinstance(error, _MAY_PASS) and (self._is_safe or not sent)
        wait = self._next(None) if may_repeat else None
        if wait is None:
            self._give_up(error, sent)
        return wait

    def _give_up(self, error: httpx.TransportError, sent: bool) -> NoReturn:
        reason = str(error) or type(error).__name__
        tries = f" (attempt {self._count})" if self._count > 1 else ""
        advice = "is the server running, and is this its address?"
        if isinstance(error, httpx.ConnectTimeout):  # after CONNECT_SECONDS, which `timeout` cannot raise
            raise ConnectTimedOut(f"no connection to {self._address}: {reason}{tries}; {advice}") from error
        if isinstance(error, httpx.TimeoutException):
            limit = "" if self._seconds is None else f" within {self._seconds:g} s"
            cure = "max_connections=" if isinstance(error, httpx.PoolTimeout) else "timeout=, or send fewer rows"
            message = f"no response from {self._address}{limit}: {reason}{tries}; raise {cure}"
            raise TimedOut(message, sent=sent) from error
        if sent and not self._is_safe:
            advice = "the server may have received the request, so it was not sent again"
        elif sent:
            advice = "the server's log may say why"
        raise ConnectionFailed(f"no response from {self._address}: {reason}{tries}; {advice}", sent=sent) from error

    def wait_after_refusal(self, error: ElboHTTPError) -> float:
        """Return the seconds to wait before the next attempt, after a refusal. Raises `error` if no attempt follows."""
        may_pass = isinstance(error, TooManyRequests | NotReady) or error.status == 502
        wait = self._next(error.retry_after) if may_pass and self._is_safe else None
        if wait is None:
            raise error
        return wait

    def _next(self, retry_after: float | None) -> float | None:
        """Count an attempt. Return the seconds to wait before the next; None if no attempt or no time is left."""
        self._count += 1
        wait = self._retries.wait(self._count, retry_after)
        left = self.seconds_left()
        is_over = self._count >= self._retries.attempts or (left is not None and wait >= left)
        return None if is_over else wait
