"""Which heads of direct requests are remembered."""

from typing import Any

import pytest

from service.http.direct import DirectHeads, DirectRequest


class Answering:
    """A handler that answers every request directly."""

    def route(self, path: str, query: bytes, headers: Any) -> str:  # noqa: ARG002
        return path

    def max_body(self, route: str) -> int:  # noqa: ARG002
        return 1000

    def start(self, request: DirectRequest) -> bool:  # noqa: ARG002
        return True

    def abandon(self, request: DirectRequest) -> None:
        """Nothing is kept of a request."""


def request_with(*more: tuple[bytes, bytes]) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return a request and its headers."""
    headers = [(b"host", b"a"), (b"content-length", b"2"), *more]
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    return b"POST /anomaly HTTP/1.1\r\n%b\r\n{}" % lines, headers


@pytest.mark.parametrize(
    ("header", "is_remembered"),
    [
        ((b"accept", b"*/*"), True),
        ((b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), False),
        ((b"x-request-id", b"7f3c"), False),
    ],
)
def test_head_with_a_header_that_differs_in_each_request_is_not_remembered(
    header: tuple[bytes, bytes], is_remembered: bool
) -> None:
    heads = DirectHeads(Answering(), max_body_bytes=1000)
    data, headers = request_with(header)
    head = heads.read(b"/anomaly", headers)
    assert head is not None
    heads.remember(data, head)
    assert (heads.find(data) is not None) == is_remembered
