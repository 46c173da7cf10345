"""uvicorn's HTTP protocol with admission control, with limits on what it waits for, and without upgrades.

uvicorn limits neither the bytes of a request besides its body, nor the requests that wait on one connection, nor the
time for which the server waits for a client. It loses the body of a request that offers an upgrade. It sends chunks to
HTTP/1.0 clients, which cannot read chunks.
"""

import asyncio
import re
from collections.abc import Callable, Collection
from time import perf_counter
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.codec.response_body import stream_media_type
from service.http.admission import TICKET, AdmissionControl, Refusal, Ticket
from service.http.direct import HELD_SECONDS, DirectHead, DirectHeads, DirectRequest
from service.http.lingering import LingeringTransport
from service.http.open_inference import infer_route
from service.http.refusal import HeadRefusal
from service.http.repeated_refusals import DelayedAnswer
from service.http.turns import Turns
from service.http.unread import SLOW_AFTER_SECONDS, SMALL_RESPONSE

CONNECTION_CLOSE = (b"connection", b"close")  # header of every response once the server is shutting down
MAX_HEAD = 64 * 1024  # bytes of a head, of a trailer, or of a line that begins a chunk, that arrive in several reads
MAX_HEADERS = 256  # headers of one request; each takes far more memory than its bytes
# A request may have this many bytes besides its body, and 1 more for each byte of the body. The rule lets clients send
# one JSON number per chunk, and stops those that send chunk extensions or chunks of one byte without end.
MAX_OVERHEAD = 512 * 1024
# A read has up to 256,000 bytes. A read of more than MAX_PIECE bytes is parsed in pieces of this size, and other
# connections have their turn before the next read, so that no client blocks the event loop for more than a few ms.
MAX_PIECE = 16 * 1024
MAX_PIPELINED = 1024  # requests in one piece; the shortest request has 16 bytes
PIPELINED_BYTES = 4096  # memory of a request that waits for the response to an earlier one
MIN_BYTES_PER_SECOND = 4096  # speed below which a client makes no progress after the request timeout
# What arrives of a request after its response is read and discarded, because many clients read no response before they
# have sent everything. These are the limits: bytes, seconds, and seconds without a byte after the last response.
MAX_DISCARDED_BYTES = 2**30
MAX_DISCARDED_HEAD = 2**20  # bytes of a head that is too large: no client needs to send more of it
MAX_DISCARDING_SECONDS = 30.0
LINGER_SECONDS = 2.0
# A client that ends its side of the connection has closed it, or still waits for its responses: the server cannot tell
# until it writes. A response that does not begin within this time is abandoned, so that the queue keeps no rows of
# clients that have gone.
HALF_CLOSED_SECONDS = 0.25
FIRST_REQUEST_SECONDS = 3.0  # when the server stops, a new connection stays open for this time for its first request
GRACE_SECONDS = 0.05  # time that every client has for its next request before its connection counts as waiting
# The keep-alive timer of a connection whose requests are refused unparsed is renewed if less than this share is left.
KEEP_ALIVE_SHARE = 0.9
UPGRADE_HEADERS = (b"upgrade", b"http2-settings")


class Protocol(HttpToolsProtocol):
    """One HTTP connection.

    The server never upgrades a connection: an offer of an upgrade is ignored (RFC 9110, section 7.8).

    Args:
        admission: decides which requests are accepted.
        head_refusal: writes the responses to refused requests.
        paths: the paths whose POST requests are under admission control.
        turns: runs other work between two reads of a long pass of the event loop.
        direct: answers some requests without a task; None if every request needs one.
        count_closed: counts a connection that the server closes because of its client; its argument is the reason.
        options: uvicorn's own arguments.

    Attributes:
        waiting_since: the time at which the connection began to wait for the rest of a head, or for the next bytes of
            a body whose response is complete, on the `perf_counter` clock; None while the connection waits for neither.
            The task of a request limits the wait for its body, and a timer of uvicorn the wait for the next request.
    """

    # uvicorn declares narrower types: a cycle that is never None, a scope without a ticket, a transport of asyncio, ...
    cycle: Any  # the newest request of the connection, and its response; None before the first
    scope: Any
    server_state: Any  # uvicorn's `ServerState`, or a `_ClosingState`
    transport: Any  # a `LingeringTransport`
    flow: Any  # a `_ReadingControl`
    waiting_since: float | None = None
    _request_since = 0.0  # when the newest request began to arrive
    _is_in_head = True  # whether the next bytes belong to a head, not to a body or its trailer
    # Bytes since the last byte of a body, or since the request began. Negative if that byte was in the newest read: the
    # parser does not tell where in the read it was, so the count starts with the next read.
    _bytes_without_data = 0
    _overhead = 0  # bytes of the current request besides its body, minus 1 for each byte of the body
    _unparsed = b""  # received bytes that are not parsed yet, because what arrived before them has to wait
    _is_deferred = False  # whether the next request starts only when the client has read the last response
    _large_unread = 0  # bytes of the large responses of which the client has not read everything
    _unread_since: float | None = None  # when the newest response began to wait for its client
    _unread_at_first = 0  # bytes that waited at that time
    _memory = 0  # bytes that this connection holds for its client, as of the last count
    _is_receiving = False  # whether a request has begun to arrive and is incomplete
    _is_refused = False  # whether the request whose body arrives now is refused
    _refusals = 0  # requests of this connection that were refused since the last one that was accepted
    _candidate: bytes | None = None  # the newest read, if it may be a whole request that is refused
    _delayed: DelayedAnswer | None = None  # sends `_delayed_answer`
    _delayed_answer = b""  # the response to a refused request
    _offers_upgrade = False  # whether the parser is about to stop at a head that offers an upgrade
    _ticket: Ticket | None = None  # ticket of the request whose body arrives now
    _discards_input = False  # whether all further bytes are discarded
    _discarded = 0  # bytes of the current request that arrived after its response
    _is_head_too_large = False  # whether these bytes belong to a head of more than MAX_HEAD bytes
    _discarding_since = 0.0  # when the first of these bytes arrived
    _lingering_since: float | None = None  # since when nothing arrives, after the last response of the connection
    _unsent = 0, 0.0  # bytes that wait to be sent, and since when their number has not changed
    _held_head: DirectHead | None = None  # head of a request that may become direct, until its body is complete
    _held_body: list[bytes]  # what has arrived of the body of this request
    _held_bytes = 0  # memory that is counted for it, once its body has arrived in part
    _direct_request: DirectRequest | None = None  # the direct request in progress

    def __init__(
        self,
        *,
        admission: AdmissionControl,
        head_refusal: HeadRefusal,
        paths: Collection[str],
        count_closed: Callable[[str], None],
        turns: Turns,
        direct: DirectHeads | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._admission = admission
        self._unread = admission.unread
        self._head_refusal = head_refusal
        self._refused_heads = head_refusal.heads
        self._paths = paths
        self._count_closed = count_closed
        self._turns = turns
        self._direct = direct

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Begin to wait for the first head."""
        # `resume_writing` is called when the client has read everything: until then, a response stays in memory.
        transport.set_write_buffer_limits(high=SMALL_RESPONSE, low=0)
        lingering: Any = LingeringTransport(transport, self, self.loop.call_soon)
        super().connection_made(lingering)
        self.flow = _ReadingControl(lingering)
        self.waiting_since = perf_counter()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        if self._delayed:
            self._head_refusal.delayed.release(self._delayed)
            self._delayed = None
        self.transport.detach()
        self.pipeline.clear()
        self._unread.set(self, 0)
        self._free_held_bytes()
        if self._direct and self._direct_request:
            abandoned, self._direct_request = self._direct_request, None
            abandoned.is_over = True
            self._direct.handler.abandon(abandoned)

    def data_received(self, data: bytes) -> None:
        """Parse `data`, and limit what the client may send besides bodies. Discard `data` that nobody will read."""
        if self._discards_input:
            if self._lingering_since is not None:
                self._lingering_since = perf_counter()
            self._discard(len(data))
            return
        if (self._refusals or self._refused_heads) and self._refuse_repeated(data):
            self._turns.take(self.connections)
            return
        self._unset_keepalive_if_required()
        is_between_requests = not self._is_receiving
        if self._held_head and not self._held_bytes:  # the rest of the body arrives later
            self._hold_body(self._held_head)
        if self._direct and is_between_requests and self._start_direct(data):
            self._turns.take(self.connections)
            return
        in_progress = self._direct_request
        try:
            if len(data) > MAX_PIECE:
                self._parse_in_pieces(data)
            else:
                self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._direct and is_between_requests and self._direct_request not in (None, in_progress):
            self._direct.remember(data, self._direct_request.head)
        self._after_read(len(data))

    def _after_read(self, size: int) -> None:
        """Limit what the client sends besides bodies. If the read was refused, let other work take its turn."""
        if self._is_receiving or self.pipeline or self.waiting_since is not None:
            self._limit_input(size)
        if self._refusals:
            self._turns.take(self.connections)

    def eof_received(self) -> bool:  # type: ignore[override] # as in asyncio
        """Keep the connection open for responses to complete requests, although the client sends nothing more.

        Return whether the connection stays open.
        """
        self._send_delayed()
        if self._is_idle() or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False  # closes the connection after the last response
        self.loop.call_later(HALF_CLOSED_SECONDS, self._close_if_no_response, self.cycle, bool(self.pipeline))
        return True

    def send_400_response(self, msg: str) -> None:
        """Respond to bytes that are not an HTTP request, and parse nothing more on this connection.

        If other responses are due or in progress, only end the connection after them: between their bytes, a client
        would take this response for one of them.
        """
        self._send_delayed()
        self._is_receiving = True
        self._free_held_bytes()
        self._held_head = None
        if self._is_idle() or (self.cycle.more_body and not self.cycle.response_started and not self.pipeline):
            super().send_400_response(msg)
        elif self.cycle.more_body and self.cycle.response_started:
            self.transport.close_now()  # the rest of the body cannot be read
        else:
            self.waiting_since = None
            self._discards_input = True
            self.cycle.keep_alive = False  # closes the connection after the last response

    def on_message_begin(self) -> None:
        """Begin to wait for the end of a head."""
        if len(self.pipeline) > MAX_PIPELINED:
            raise httptools.HttpParserError("too many pipelined requests in one read")
        if self._delayed:
            self._send_delayed()
        self.waiting_since = self._request_since = perf_counter()
        self._is_in_head = True
        self._bytes_without_data = -1
        self._overhead = 0
        self._discarded = 0
        self._is_receiving = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header of the request, and drop a header of the trailer: nobody reads those (RFC 9110, 6.5.1)."""
        if not self._is_in_head:
            return
        name = name.lower()  # the rest is uvicorn's: calling it would take 0.1 µs more per header
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Refuse the request, or start its ASGI task with a ticket in its scope."""
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise httptools.HttpParserError("CONNECT is not supported")
            self._offers_upgrade = True
            return
        if len(self.headers) > MAX_HEADERS:
            raise httptools.HttpParserError("too many headers")
        self.waiting_since = None
        self._is_in_head = False
        self._ticket = None
        if not self.url.startswith(b"/"):
            self._take_host_from_url()
        refusal = self._admission.refusal(rows=1)
        if refusal and self._may_refuse() and self._refuse(refusal):
            return
        if self._refusals:
            self._refusals, self._candidate = 0, None
        self._held_head = self._direct_head()
        if self._held_head:
            self._held_body = []
        else:
            self._start_request()

    def _start_request(self) -> None:
        """Start the ASGI task of the request whose head has arrived."""
        super().on_headers_complete()
        if self.scope["http_version"] != "1.1":
            self.cycle.__class__ = _Http10Cycle  # uvicorn creates the cycle, but its task has not run yet
            self.cycle.waiting_for_100_continue = False
        if self._is_controlled(self.scope["path"]):
            self._ticket = self.scope[TICKET] = self._admission.ticket()

    def _take_host_from_url(self) -> None:
        """If the request line has a whole URL, replace the Host header by the host in it (RFC 9112, section 3.2.2).

        A request of HTTP/1.1 without a Host header, or with several, stays invalid (RFC 9112, section 3.2).
        """
        rest = self.url.partition(b"://")[2]
        host = (b"host", re.split(rb"[/?#]", rest, maxsplit=1)[0].rpartition(b"@")[2])
        places = [place for place, (name, _) in enumerate(self.headers) if name == b"host"]
        if rest and len(places) == 1:
            self.headers[places[0]] = host
        elif rest and not places and self.parser.get_http_version() == "1.0":
            self.headers.append(host)

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body, or discard it if the request already has its response."""
        self._bytes_without_data = -1
        self._overhead -= 2 * len(body)
        if self._is_refused:
            self._discard(len(body))
            return
        if self._held_head:
            self._held_body.append(body)
        else:
            self._keep_body(body)

    def _keep_body(self, body: bytes) -> None:
        """Pass a piece of the body to the task of the request."""
        cycle = self.cycle
        if cycle.response_complete:
            self._discard(len(body))
            return
        if not cycle.body:
            cycle.body = b""  # b"" + body does not copy the body; uvicorn's bytearray would copy the body twice
        elif type(cycle.body) is bytes:
            cycle.body = bytearray(cycle.body)  # appending a piece to bytes would copy all previous pieces
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Acquire the ticket of the complete request. If the request has its response, go on to the next request."""
        if self._offers_upgrade:
            return
        self._is_receiving = False
        if self._is_refused:
            self._is_refused = False
            if not self.parser.should_keep_alive() or self._is_draining():
                self._send_delayed()
                self.transport.close()
            self.on_response_complete()
            return
        if self._held_head:
            self.waiting_since = None
            self._free_held_bytes()
            if self._hand_over(self._held_head, b"".join(self._held_body), self._request_since):
                self._held_head = None
                return
            self._release_held_request()
        if self.cycle.response_complete:
            self._wait_for_next_request()
            return
        super().on_message_complete()
        if self._ticket and not self.pipeline:  # a pipelined request acquires its ticket when its task starts
            self._ticket.acquire()

    def _start_direct(self, data: bytes) -> bool:
        """Start a direct request if `data` is one whole request with a known head. Return whether it is."""
        if self.pipeline or not self._is_idle() or self._is_flow_stopped():
            return False
        assert self._direct
        known = self._direct.find(data)
        if known is None or not self._hand_over(known.head, data[known.size :], perf_counter()):
            return False
        self.waiting_since = None
        self._ticket = None
        return True

    def _direct_head(self) -> DirectHead | None:
        """Return the head of the request if the request may be direct."""
        if (
            self._direct is None
            or self.pipeline
            or not self._is_idle()
            or self._is_flow_stopped()
            or self.expect_100_continue
            or self.parser.get_http_version() != "1.1"
            or not self.parser.should_keep_alive()
            or self.parser.get_method() != b"POST"
        ):
            return None
        return self._direct.read(self.url, self.headers)

    def _hand_over(self, head: DirectHead, body: bytes, arrived: float) -> bool:
        """Let the direct handler answer a request. Return false if the request needs a task.

        Args:
            head: the head of the request.
            body: the whole body.
            arrived: when the head arrived, on the `perf_counter` clock.
        """
        assert self._direct
        request = DirectRequest(self, head, body, arrived)
        self._direct_request = request  # `start` may respond at once
        previous, self.cycle = self.cycle, request
        if not self._direct.handler.start(request):
            self._direct_request, self.cycle = None, previous
            return False
        self._refusals, self._candidate = 0, None
        self._request_since = arrived
        return True

    def _hold_body(self, head: DirectHead) -> None:
        """Hold a request until its whole body has arrived, if there is memory for the body."""
        size = head.length
        if self._admission.refusal(body_bytes=size):
            self._release_held_request()
        else:
            self._held_bytes = size
            self._admission.hold_bytes(size)

    def _free_held_bytes(self) -> None:
        if self._held_bytes:
            self._admission.release_bytes(self._held_bytes)
            self._held_bytes = 0

    def _release_held_request(self) -> None:
        """Start the task of the request that was held, because it is not direct."""
        self._held_head = self.waiting_since = None
        self._free_held_bytes()
        self._start_request()
        for body in self._held_body:
            self._keep_body(body)
        self._held_body = []

    def on_direct_response(self) -> None:
        """Go on after the response to a direct request."""
        self._direct_request = None
        self.on_response_complete()

    def start_task(self, request: DirectRequest) -> None:
        """Answer a direct request by a task after all."""
        self._direct_request = None
        request.detach()
        if self.transport.is_closing():
            return
        head = request.head
        path, _, query = head.url.partition(b"?")
        length = b"%d" % len(request.sent)
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": self.root_path,
            "path": head.path,
            "raw_path": path,
            "query_string": query,
            "headers": [(name, length if name == b"content-length" else value) for name, value in head.headers],
            "state": self.app_state.copy(),
        }
        ticket = self._admission.ticket()
        scope[TICKET] = ticket
        cycle = RequestResponseCycle(
            scope=scope,  # type: ignore[arg-type] # a dict
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=request.keep_alive,
            on_response=self.on_response_complete,
        )
        cycle.body = request.sent  # type: ignore[assignment] # see `_keep_body`
        cycle.more_body = False
        cycle.message_event.set()
        if self.cycle is request:
            self.cycle = cycle
        ticket.acquire()
        super()._start_asgi_task(cycle, self.app)

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection, because the client has not sent another request in time."""
        self._send_delayed()
        super().timeout_keep_alive_handler()

    def shutdown(self) -> None:
        """Close the connection after its last response: the server is shutting down.

        A request that has begun to arrive is still served, and so is the first request of a new connection. Its
        response has the header `Connection: close`. Call this method again later for the connections that stay open.
        """
        self._send_delayed()
        is_new = (
            self.cycle is None and self.waiting_since and perf_counter() - self.waiting_since < FIRST_REQUEST_SECONDS
        )
        if not self._is_idle() or not (self._is_receiving or is_new):
            super().shutdown()

    def announce_close(self) -> None:
        """Add the header `Connection: close` to the response in progress, unless its head has been sent."""
        self._send_delayed()
        if self.cycle and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def close_after_response(self) -> None:
        """Close the connection after its next response, which tells the client to open another connection."""
        self.announce_close()
        if not self._is_draining():
            self.server_state = _ClosingState(self.server_state)

    def waits_for_client(self, now: float) -> list[tuple[int, float]]:
        """Return how long this connection has waited for its client, as [(rank, seconds)], or [] if it does not wait.

        If the server has to close connections, it begins with the lowest rank and, within a rank, the longest wait. A
        connection that has just been opened, or has just got its response, does not count as waiting.
        """
        if self._lingering_since is not None:
            return [(0, now - self._lingering_since)]
        if self._delayed:
            return []
        if self.cycle is None:
            rank, seconds, grace = 1, now - (self.waiting_since or now), GRACE_SECONDS
        elif self._is_idle():
            timer: Any = self.timeout_keep_alive_task
            idle_seconds = self.timeout_keep_alive - (timer.when() - self.loop.time()) if timer else 0.0
            rank, seconds, grace = 2, max(idle_seconds, now - (self.waiting_since or now)), GRACE_SECONDS
        elif self._unread_since is not None:
            rank, seconds, grace = 3, now - self._unread_since, SLOW_AFTER_SECONDS
        elif self.cycle.more_body:
            rank, seconds, grace = 4, now - self._request_since, SLOW_AFTER_SECONDS
        else:
            return []
        return [(rank, seconds)] if seconds > grace else []

    def close_if_slow(self, now: float, seconds: float) -> None:
        """Close the connection if the client has made no progress for more than `seconds`.

        Args:
            now: the time on the `perf_counter` clock.
            seconds: the longest wait for the end of a head, for the next bytes of a body whose response is complete,
                and for the client to read the next bytes of a response.
        """
        if self._memory:
            self._count_memory()
        if self._held_head and now - self._request_since > HELD_SECONDS:
            self._release_held_request()
        if self._is_reading_slowly(now, seconds):
            self.drop("unread_response")
        elif self._lingering_since is not None:
            if now - self._lingering_since > LINGER_SECONDS or self._is_sending_slowly(now, seconds):
                self.transport.close_now()
        elif self._is_receiving and self._is_sending_slowly(now, seconds):
            self._count_closed("slow_request")
            self.transport.close_now()
        elif self.waiting_since is None:
            if self._waits_for_bytes():
                self.waiting_since = now
        elif now - self.waiting_since > seconds:
            self._count_closed("slow_request")
            self.transport.close_now()

    def drop(self, reason: str) -> None:
        """Close the connection at once, without the rest of a response, and count it under `reason`."""
        self._count_closed(reason)
        self.connections.discard(self)  # at once, so that another connection has room
        self.transport.abort()

    def pause_writing(self) -> None:
        """Begin to count what the client does not read."""
        super().pause_writing()
        if self._unread_since is None:
            self.begin_unread()

    def resume_writing(self) -> None:
        """Send the rest of a large response. When the client has read everything, go on with the next request."""
        if self.transport.write_rest():
            return
        super().resume_writing()
        self._forget_unread()
        if self._is_deferred:
            self._is_deferred = False
            if self.pipeline and not self.transport.is_closing():
                self._start_asgi_task(*self.pipeline.pop())

    def bytes_read_per_second(self, now: float) -> float:
        """Return how fast the client reads; infinity if no response has been unread for SLOW_AFTER_SECONDS."""
        if self._unread_since is None or now - self._unread_since < SLOW_AFTER_SECONDS:
            return float("inf")
        bytes_read: int = self._unread_at_first - self.transport.get_write_buffer_size()
        return bytes_read / (now - self._unread_since)

    def count_large_write(self, size: int) -> None:
        """Count `size` bytes of a response as unread unless the kernel has taken all of them."""
        if self.transport.get_write_buffer_size():
            self._large_unread += size
            self.begin_unread()

    def begin_unread(self) -> None:
        """Begin to measure how fast the client reads."""
        self._unread_since = perf_counter()
        self._unread_at_first = self.transport.get_write_buffer_size()
        self._count_memory()

    def _forget_unread(self) -> None:
        self._unread_since = None
        self._large_unread = 0
        self._count_memory()

    def _is_reading_slowly(self, now: float, seconds: float) -> bool:
        """Return whether the client has read nothing for `seconds`, or very little during a longer time."""
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent[0]:
            self._unsent = unsent, now
            if not unsent and self._unread_since is not None:
                self._forget_unread()
        elif unsent and now - self._unsent[1] > seconds:
            return True
        if self._unread_since is None or now - self._unread_since <= seconds:
            return False
        return self.bytes_read_per_second(now) < MIN_BYTES_PER_SECOND

    def _is_sending_slowly(self, now: float, seconds: float) -> bool:
        """Return whether the server has discarded input for more than `seconds`, and the client has sent it slowly."""
        age = now - self._discarding_since
        return self._discarded > 0 and age > seconds and self._discarded < MIN_BYTES_PER_SECOND * age

    def _count_memory(self) -> None:
        """Record the memory that this connection holds for its client."""
        size = len(self._unparsed)
        if self._unread_since is not None:
            size += max(self._large_unread, self._unread_at_first)
        if self.pipeline:
            size += PIPELINED_BYTES * len(self.pipeline) + len(self.cycle.body)
        if self._is_receiving and self._bytes_without_data > 0:
            size += self._bytes_without_data
        self._memory = size
        self._unread.set(self, size)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Start a request, or let it wait until the client has read the last response."""
        if self.flow.write_paused:
            self._is_deferred = True
            self.pipeline.append((cycle, app))
            self.flow.block()
            return
        super()._start_asgi_task(cycle, app)
        if self.flow.blocked and not self.pipeline:
            self.loop.call_soon(self.continue_reading)

    def continue_reading(self) -> None:
        """Parse the bytes that had to wait, then read on."""
        if self.pipeline or self.transport.is_closing():
            return
        self.flow.unblock()
        if self._unparsed:
            data, self._unparsed = self._unparsed, b""
            self.data_received(data)
            self._count_memory()

    def _limit_input(self, size: int) -> None:
        """Limit what the client sends besides bodies, after a read of `size` bytes that leaves something incomplete."""
        if self._bytes_without_data < 0:
            self._bytes_without_data = 0  # some of this read belongs to a body or to an earlier request
        else:
            self._bytes_without_data += size
        if size <= MAX_PIECE:
            self._overhead = max(0, self._overhead + size)
        if self.transport.is_closing():
            return
        has_many_headers = self._is_in_head and self._is_receiving and len(self.headers) > MAX_HEADERS
        if self._bytes_without_data > MAX_HEAD or self._overhead > MAX_OVERHEAD or has_many_headers:
            self._count_closed("large_head")
            self._is_head_too_large = True
            self.send_400_response(
                "The head of the request is too large."
                if self._is_in_head
                else "The request has too many bytes besides its body."
            )
            return
        if self.pipeline:
            self.flow.block()
        if self.pipeline or self._bytes_without_data:
            self._count_memory()
            if not self._unread.has_room():
                self.drop("no_memory")
                return
        if size > MAX_PIECE and not self.flow.read_paused:
            self.flow.block()
            self._admission.large_reads.put(self)

    def _waits_for_bytes(self) -> bool:
        """Return whether only bytes of the client can continue this connection, and no timer limits that wait.

        This is so in the middle of a request that already has its response, and after an empty line between requests.
        """
        return (self._is_receiving or self.timeout_keep_alive_task is None) and self._is_idle()

    def _is_idle(self) -> bool:
        """Return whether no request waits for its response."""
        return self.cycle is None or self.cycle.response_complete

    def _is_flow_stopped(self) -> bool:
        """Return whether the client has not read the last response, or the connection does not read."""
        return self.flow.write_paused or self.flow.read_paused or bool(self._unparsed)

    def _close_if_no_response(self, cycle: Any, was_waiting: bool) -> None:
        """Close the connection if the response to its last request has not begun.

        Args:
            cycle: the last request.
            was_waiting: whether, a moment ago, the request still waited for the responses to earlier ones.
        """
        if cycle.response_started or self.transport.is_closing():
            return
        if was_waiting:
            self.loop.call_later(HALF_CLOSED_SECONDS, self._close_if_no_response, cycle, bool(self.pipeline))
        else:
            self.transport.close()

    def _is_draining(self) -> bool:
        return CONNECTION_CLOSE in self.server_state.default_headers

    def _wait_for_next_request(self) -> None:
        """Start the keep-alive timer after the end of a body that arrived after its response."""
        self.waiting_since = None
        self._unset_keepalive_if_required()
        if self._is_draining():
            self.transport.close()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def linger_if_receiving(self) -> bool:
        """Begin to discard what arrives if the client may still be sending a request. Return whether it may."""
        if not self._is_receiving:
            return False
        self._lingering_since = perf_counter()
        self._discards_input = True
        self.flow.unblock()
        return True

    def _discard(self, size: int) -> None:
        """Count `size` bytes that arrived after the response, and close the connection at the limits."""
        now = perf_counter()
        self.waiting_since = None
        if not self._discarded:
            self._discarding_since = now
        self._discarded += size
        limit = MAX_DISCARDED_HEAD if self._is_head_too_large else MAX_DISCARDED_BYTES
        if self._discarded > limit or now - self._discarding_since > MAX_DISCARDING_SECONDS:
            self.transport.close_now()

    def _parse_in_pieces(self, data: bytes) -> None:
        """Parse `data` up to the first request that has to wait for its turn, and keep the rest.

        A piece of a body with many short chunks also has to wait, because parsing it takes long.
        """
        rest = memoryview(data)
        while rest and not self.transport.is_closing():
            is_body = self._is_receiving and not self._is_in_head
            size = MAX_PIECE if not is_body or self._overhead > 0 else len(rest)
            self._parse(rest[:size])
            self._overhead = max(0, self._overhead + min(size, len(rest)))
            rest = rest[size:]
            if rest and (self.pipeline or (is_body and self._overhead > 0)):
                self._unparsed = bytes(rest)
                return

    def _parse(self, data: bytes | memoryview) -> None:
        """Feed `data` to the parser. If the parser stops at a head that offers an upgrade, go on without the offer."""
        rest = data
        while True:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = memoryview(rest)[upgrade.args[0] :]
                head = self._head_without_upgrade()
                self._offers_upgrade = False
                # The parser has skipped the body of this request. Only a new parser can read it.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn
                self.parser.feed_data(head)

    def _head_without_upgrade(self) -> bytes:
        """Return the head of the current request as bytes, without the headers that offer an upgrade."""
        request_line = self.parser.get_method(), self.url, self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % request_line]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                kept = [option for option in options if option.lower() not in UPGRADE_HEADERS]
                lines.append(b"connection: %b\r\n" % b", ".join(kept))
            elif name not in UPGRADE_HEADERS:
                lines.append(b"%b: %b\r\n" % (name, value))
        return b"".join([*lines, b"\r\n"])

    def _is_controlled(self, path: str) -> bool:
        return (path in self._paths or infer_route(path) in self._paths) and self.parser.get_method() == b"POST"

    def _may_refuse(self) -> bool:
        """Return whether the request is under admission control and the refusal can be written now.

        A request that streams rows is not refused, because the server reads its rows only as fast as the queue permits.
        A request from a web page is refused later, so that the response has the headers for cross-origin requests.
        """
        if (self.cycle and not self.cycle.response_complete) or self.expect_100_continue or self.flow.write_paused:
            return False
        is_from_page = any(name == b"origin" for name, _ in self.headers)
        return self._is_controlled(self._path()) and not is_from_page and not self._is_stream()

    def _is_stream(self) -> bool:
        """Return whether the request streams rows and asks for a stream of verdicts."""
        accept = b", ".join(value for name, value in self.headers if name == b"accept")
        content_type = next((value for name, value in self.headers if name == b"content-type"), b"")
        return stream_media_type(content_type.decode("latin-1"), accept.decode("latin-1")) is not None

    def _refuse(self, refusal: Refusal) -> bool:
        """Write the response to a refused request. Return false if its API key does not permit the request."""
        self.scope["method"] = "POST"
        self.scope["path"] = self._path()
        response = self._head_refusal.response(self.scope, refusal, self.server_state.default_headers)
        if response is None:
            return False
        if self._candidate is not None:
            self._head_refusal.remember(self._candidate, self.scope["path"], self.headers)
            self._candidate = None
        self._is_refused = True
        self._answer_refused(response)
        return True

    def _refuse_repeated(self, data: bytes) -> bool:
        """Refuse the request in `data` without parsing it if its head is that of a request that was refused before.

        Return false if the request is accepted, or has to be parsed.
        """
        if self._delayed:
            self._send_delayed()
        refusal = self._admission.refusal(rows=1)
        if refusal is None or self._is_receiving or self.pipeline or not self._is_idle() or self._unparsed:
            return False
        if self.flow.write_paused or self.transport.is_closing() or self._is_draining():
            return False
        head = self._refused_heads.find(data)
        default_headers = self.server_state.default_headers
        response = None
        if head is not None:
            response = self._head_refusal.repeat(head, self.client, refusal, default_headers)
        if response is None:
            self._candidate = data if self._refusals and len(data) <= MAX_HEAD else None
            return False
        self._answer_refused(response)
        self.server_state.total_requests += 1
        timer: Any = self.timeout_keep_alive_task
        if timer is None or timer.when() - self.loop.time() < KEEP_ALIVE_SHARE * self.timeout_keep_alive:
            self._wait_for_next_request()
        return True

    def _answer_refused(self, response: bytes) -> None:
        """Write the response to a refused request, or delay it if earlier requests of this connection were refused."""
        self._delayed = self._head_refusal.delayed.delay(self._refusals, self._send_delayed)
        self._refusals += 1
        if self._delayed:
            self._delayed_answer = response
        else:
            self.transport.write(response)

    def _send_delayed(self) -> None:
        """Write the response that is delayed, if there is one."""
        if self._delayed is None:
            return
        self._head_refusal.delayed.release(self._delayed)
        self._delayed = None
        response, self._delayed_answer = self._delayed_answer, b""
        if not self.transport.is_closing():
            self.transport.write(response)

    def _path(self) -> str:
        return self.url.partition(b"?")[0].decode("latin-1")


def close_slow(connections: Collection[Any], seconds: float) -> None:
    """Close the connections whose clients have made no progress for more than `seconds`."""
    now = perf_counter()
    for connection in list(connections):
        connection.close_if_slow(now, seconds)


class _ClosingState:
    """uvicorn's server state for one connection that closes after its next response."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self.total_requests = 0

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that every response of this connection gets."""
        headers: list[tuple[bytes, bytes]] = self._state.default_headers
        return headers if CONNECTION_CLOSE in headers else [*headers, CONNECTION_CLOSE]


class _ReadingControl(FlowControl):
    """uvicorn's flow control. While `blocked` is set, nothing is read, although a request waits for its body."""

    blocked = False

    def block(self) -> None:
        """Stop reading."""
        self.blocked = True
        self.pause_reading()
        self.resume_reading = _do_nothing  # type: ignore[method-assign] # no cost for requests never blocked

    def unblock(self) -> None:
        """Continue to read."""
        if self.blocked:
            self.blocked = False
            del self.resume_reading
        self.resume_reading()


def _do_nothing() -> None:
    """Do nothing."""


class _Http10Cycle(RequestResponseCycle):
    """A request from an HTTP/1.0 client, and its response, which ends with the connection if its length is unknown.

    HTTP/1.0 has neither chunks nor 100 Continue (RFC 9112, section 6.1; RFC 9110, section 10.1.1).
    """

    _has_length = True  # whether the response has the header Content-Length

    async def send(self, message: Any) -> None:
        """Send a message of the response."""
        if message["type"] == "http.response.start":
            self._has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not self._has_length:
                self.chunked_encoding = False
        elif not self._has_length:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)
