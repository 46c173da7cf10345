"""The reader of HTTP/1.1 responses: each response is read as h11 reads it, however its bytes arrive."""

import itertools

import h11
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elbo.client.http1 import ResponseReader, request_head

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Request-Id: a b\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nhel\r\n2\r\nlo\r\n0\r\nTrailer: x\r\n\r\n"
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH
CLOSED = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello"
OLD = b"HTTP/1.0 200 OK\r\n\r\nhello"
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"
RESPONSES = [LENGTH, CHUNKED, CONTINUED, CLOSED, OLD, EMPTY]


def read(pieces: list[bytes]) -> tuple[int, bytes, dict[bytes, bytes], bool]:
    """Return the status, the body, the headers and whether the connection may be used again."""
    reader = ResponseReader()
    body = b""
    for piece in [*pieces, b""]:
        if reader.is_complete:
            break
        reader.feed(piece)
        body += reader.take()
    return reader.status, body, reader.headers, reader.keeps_alive


def read_with_h11(data: bytes) -> tuple[int, bytes, dict[bytes, bytes], bool]:
    """Return what `read` returns, as h11 reads `data`."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "elbo"), ("Content-Length", "0")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    connection.receive_data(b"")
    status, body = 0, b""
    headers: dict[bytes, bytes] = {}
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Response):
            status = event.status_code
            for name, value in event.headers:
                headers[bytes(name)] = b", ".join([headers[name], value]) if name in headers else bytes(value)
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
    return status, body, headers, connection.our_state is not h11.MUST_CLOSE


@given(response=st.sampled_from(RESPONSES), cuts=st.sets(st.integers(1, 150)))
def test_response_that_arrives_in_any_pieces_is_read_as_h11_reads_it(response: bytes, cuts: set[int]) -> None:
    places = [0, *sorted(cut for cut in cuts if cut < len(response)), len(response)]
    pieces = [response[start:end] for start, end in itertools.pairwise(places)]
    assert read(pieces) == read_with_h11(response)


def test_connection_with_bytes_after_the_response_is_not_used_again() -> None:
    assert read([LENGTH + b"more"])[3] is False


@pytest.mark.parametrize("response", [LENGTH, CHUNKED])
@given(data=st.data())
def test_response_that_is_cut_off_is_an_error(response: bytes, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(response) - 1))
    with pytest.raises(httpx.RemoteProtocolError, match="the server closed the connection"):
        read([response[:length]] if length else [])


@pytest.mark.parametrize(
    "response",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\nhel\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhello\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**18 + b"\r\n\r\n",
    ],
)
def test_response_that_is_not_valid_http_1_1_is_an_error(response: bytes) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        read([response])


def test_header_with_a_line_break_is_refused_before_anything_is_sent() -> None:
    request = httpx.Request("GET", "http://elbo/", headers=[(b"x", b"a\r\nHost: other")])
    with pytest.raises(httpx.LocalProtocolError, match="line break"):
        request_head(request)
