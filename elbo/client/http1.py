"""HTTP/1.1 without input and output: format the head of a request, and parse a response from bytes."""

from typing import NamedTuple

import httpx

Headers = dict[bytes, bytes]  # names in lower case; the values of repeated headers are joined with ", "
MAX_HEAD_BYTES = 2**17
MAX_LINE_BYTES = 2**14  # of a chunk size with its extensions, or of a trailer
_NO_BODY = (204, 304)  # statuses whose responses have no body


class Received(NamedTuple):
    """A whole response."""

    status: int
    reason: str
    headers: Headers
    content: bytes

    def header(self, name: bytes) -> str:
        """Return the value of a header; "" if it is absent."""
        return self.headers.get(name, b"").decode("latin-1")


def request_head(request: httpx.Request) -> bytes:
    """Return the head of `request`, with the blank line that ends it. Raises LocalProtocolError."""
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    lines += [b"%b: %b" % header for header in request.headers.raw]
    head = b"\r\n".join(lines)
    if head.count(b"\r") != len(lines) - 1 or head.count(b"\n") != len(lines) - 1 or b"\0" in head:
        raise httpx.LocalProtocolError("a header contains a line break or a NUL", request=request)
    return head + b"\r\n\r\n"


class ResponseReader:
    """Parses one response.

    Call `feed` with the bytes that arrive, and with b"" at the end of the connection, until `is_complete`. `take` then
    returns the bytes of the body that have arrived since the last `take`. Informational responses (1xx) are skipped.
    Responses to HEAD are not supported.
    """

    def __init__(self) -> None:
        self.status = 0
        self.reason = b""
        self.headers: Headers = {}
        self.is_complete = False
        self.keeps_alive = False
        self._buffer = b""
        self._body: list[bytes] = []
        self._left: int | None = 0  # bytes of the body or of the chunk; None: until the connection ends
        self._is_chunked = False
        self._in_trailer = False
        self._after_chunk = False

    def take(self) -> bytes:
        """Return the bytes of the body that have arrived and were not taken yet."""
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        return body

    def received(self) -> Received:
        """Return the whole response. Call it when `is_complete`, and instead of `take`."""
        return Received(self.status, self.reason.decode("latin-1"), self.headers, self.take())

    def feed(self, data: bytes) -> None:
        """Read `data`; b"" is the end of the connection.

        Raises:
            httpx.RemoteProtocolError: the response is not valid HTTP/1.1, or it is cut off.
        """
        if not data:
            self._end()
            return
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        while data and not self.is_complete:
            if not self.status:
                data = self._read_head(data)
            elif self._is_chunked:
                data = self._read_chunked(data)
            else:
                data = self._read_body(data)
        if self.is_complete and data:
            self.keeps_alive = False  # bytes after the response, which no request has asked for

    def _end(self) -> None:
        self.keeps_alive = False
        if self.status and self._left is None:
            self.is_complete = True
            return
        what = "in the middle of the response" if self.status or self._buffer else "without a response"
        raise httpx.RemoteProtocolError(f"the server closed the connection {what}")

    def _read_head(self, data: bytes) -> bytes:
        """Read the head at the start of `data`, and return the rest; keep `data` if the head is not complete."""
        head, end, rest = data.partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD_BYTES:
            raise httpx.RemoteProtocolError(f"the head of the response has more than {MAX_HEAD_BYTES} bytes")
        if not end:
            self._buffer = data
            return b""
        first, *lines = head.split(b"\r\n")
        version, _, tail = first.partition(b" ")
        status, _, reason = tail.partition(b" ")
        if version not in (b"HTTP/1.1", b"HTTP/1.0") or len(status) != 3 or not status.isdigit():
            raise httpx.RemoteProtocolError(f"expected a status line of HTTP/1.1, got {first[:60]!r}")
        headers: Headers = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            name = name.lower()
            if not colon or not name or name != name.strip():
                raise httpx.RemoteProtocolError(f"expected a header, got {line[:60]!r}")
            value = value.strip(b" \t")
            headers[name] = value if name not in headers else b"%b, %b" % (headers[name], value)
        if status == b"101":
            raise httpx.RemoteProtocolError("the server switched to another protocol, which the client did not ask for")
        if status[:1] != b"1":
            self.status, self.reason, self.headers = int(status), reason, headers
            self._start_body(version == b"HTTP/1.1")
        return rest

    def _start_body(self, is_1_1: bool) -> None:
        """Find out from the headers how the body ends (RFC 9112, section 6.3)."""
        length = self.headers.get(b"content-length")
        coding = self.headers.get(b"transfer-encoding")
        options = self.headers.get(b"connection", b"").lower()
        self.keeps_alive = b"close" not in options if is_1_1 else b"keep-alive" in options
        if self.status in _NO_BODY:
            self.is_complete = True
        elif coding is not None:
            if coding.lower() != b"chunked":
                raise httpx.RemoteProtocolError(f"expected the transfer encoding chunked, got {coding!r}")
            self._is_chunked = True
        elif length is not None:
            self._left = _length(length)
            self.is_complete = self._left == 0
        else:
            self._left = None

    def _read_body(self, data: bytes) -> bytes:
        if self._left is None:
            self._body.append(data)
            return b""
        piece = data if len(data) <= self._left else data[: self._left]
        self._body.append(piece)
        self._left -= len(piece)
        self.is_complete = self._left == 0
        return data[len(piece) :]

    def _read_chunked(self, data: bytes) -> bytes:
        if self._left:
            piece = data[: self._left]
            self._body.append(piece)
            self._left -= len(piece)
            self._after_chunk = self._left == 0
            return data[len(piece) :]
        line, end, rest = data.partition(b"\r\n")
        if not end:
            if len(line) > MAX_LINE_BYTES:
                raise httpx.RemoteProtocolError(f"a line between chunks has more than {MAX_LINE_BYTES} bytes")
            self._buffer = data
            return b""
        if self._in_trailer:
            self.is_complete = not line
        elif self._after_chunk:
            if line:
                raise httpx.RemoteProtocolError(f"expected the end of a chunk, got {line[:60]!r}")
            self._after_chunk = False
        else:
            self._left = _chunk_size(line)
            self._in_trailer = self._left == 0
        return rest


def _length(value: bytes) -> int:
    """Return the length in a Content-Length, which may be repeated if all lengths are equal (RFC 9112, section 6.3)."""
    length = value if value.isdigit() else value.partition(b", ")[0]
    if not length.isdigit() or set(value.split(b", ")) != {length}:
        raise httpx.RemoteProtocolError(f"expected one Content-Length, got {value!r}")
    return int(length)


def _chunk_size(line: bytes) -> int:
    size = line.partition(b";")[0].strip()
    if not 0 < len(size) <= 15 or not all(byte in b"0123456789abcdefABCDEF" for byte in size):
        raise httpx.RemoteProtocolError(f"expected the size of a chunk, got {line[:60]!r}")
    return int(size, 16)
