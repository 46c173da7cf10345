"""Who is let in: requests that compute stand in one line, and what would wait too long in it is turned away.

A request is in the line from the end of its body until its answer is made: one that comes slowly, or whose answer is
taken slowly, is in nobody's way. TOGETHER are at work at once, the others wait as they came. So the event loop comes
round every few milliseconds however many there are, and whoever is turned away hears of it at once. That costs a
fraction of an answer: `service.http.protocol` writes it when it has read the head, before there is a task.
"""

import asyncio
from collections.abc import Collection, Mapping
from functools import lru_cache
from time import perf_counter
from typing import Any

import orjson

from service.errors import PROBLEM_JSON, DeadlineExceeded, Overloaded
from service.http.request import Header, RequestContext, record_of
from service.inference.batcher import Batcher
from service.inference.drain_rate import DrainRate
from service.monitoring.logs import AccessLog
from service.monitoring.metrics import Metrics

TOGETHER = 64  # requests at work at once; so many are never too many
_KEY = "elbo.in_line"  # in a scope: true while it is in the line, false from then on
_HEAD = b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: %b\r\nretry-after: %d\r\n"


class AdmissionControl:
    """The line of one process.

    `paths` are those whose POST requests stand in it; `waiting` is how many do.

    Args:
        seconds: longest that those in it may be expected to take, at the speed measured last.
        batcher: which may be full itself.
        metrics, access: count and log who is turned away.
    """

    def __init__(self, seconds: float, batcher: Batcher, metrics: Metrics, access: AccessLog) -> None:
        self.paths: Collection[str] = ()
        self.waiting = 0
        self._seconds = seconds
        self._engine = batcher
        self._telemetry = metrics
        self._access = access
        self._drain = DrainRate()
        self._places = asyncio.Semaphore(TOGETHER)

    def leads_to(self, method: bytes, path: str) -> bool:
        """Whether a request for `path` stands in the line."""
        return method == b"POST" and path in self.paths

    @property
    def full(self) -> bool:
        """Whether whoever comes now is turned away."""
        slow = self.waiting >= TOGETHER and self._drain.wait(self.waiting) > self._seconds
        return slow or self._engine.full

    def came(self, scope: Any) -> None:
        """The request of `scope` is whole. It is in the line until `left`, unless it has been answered already."""
        if _KEY not in scope:
            scope[_KEY] = True
            if not self.waiting:
                self._drain.began()
            self.waiting += 1

    def left(self, request: RequestContext) -> None:
        """Its answer is made, or its client has gone."""
        scope = request.scope
        if scope.get(_KEY):
            self.waiting -= 1
            self._drain.left(1, self.waiting)
        scope[_KEY] = False
        if request.at_work:
            request.at_work = False
            self._places.release()

    async def enter(self, request: RequestContext, deadline: float) -> None:
        """Wait for a place at work, which `left` gives back. Raises DeadlineExceeded.

        deadline: by `perf_counter`.
        """
        if not self._places.locked():
            await self._places.acquire()  # at once
        else:
            try:
                async with asyncio.timeout(max(0.0, deadline - perf_counter())):
                    await self._places.acquire()
            except TimeoutError:
                raise DeadlineExceeded("its turn had not come", hint="come back later, or allow more time") from None
        request.at_work = True

    def refusal(self, scope: Any, fixed: list[Header]) -> bytes:
        """The whole answer for the request of `scope`, whose method and path are known; with the headers `fixed`."""
        headers: Mapping[bytes, bytes] = dict(reversed(scope["headers"]))
        record = record_of(scope, headers)
        record.endpoint = scope["path"]
        record.status, record.problem = Overloaded.status, Overloaded.code
        too_many = self.waiting - int(self.waiting * self._seconds / (self._drain.wait(self.waiting) or self._seconds))
        head, before, after = _refusal(self._drain.seconds(max(1, too_many)), self._seconds)
        request_id = orjson.dumps(record.request_id)
        lines = [b"%b: %b\r\n" % header for header in fixed]
        own = b"x-request-id: %b\r\ncontent-length: %d\r\n\r\n"
        length = len(before) + len(request_id) + len(after)
        record.total = record.elapsed
        self._telemetry.count(record)
        self._access.log(record)
        return b"".join([head, *lines, own % (record.request_id.encode(), length), before, request_id, after])


@lru_cache(maxsize=64)
def _refusal(wait: int, seconds: float) -> tuple[bytes, bytes, bytes]:
    """The head, and the body before and after the request's id."""
    error = Overloaded(
        "too many requests are waiting", expected=f"a wait of at most {seconds:g} s", hint=f"try again in {wait} s"
    )
    before, after = orjson.dumps(error.problem("<id>")).split(b'"<id>"')
    return _HEAD % (PROBLEM_JSON.encode(), wait), before, after
