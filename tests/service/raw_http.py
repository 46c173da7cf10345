"""HTTP/1.1 written and read by hand, for requests that an HTTP client would not send."""

import contextlib
import socket


def request_head(path: str, *headers: str) -> bytes:
    """Return the head of a POST request for JSON, with the blank line that ends it."""
    lines = [f"POST {path} HTTP/1.1", "Host: elbo", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode()


def read_response(connection: socket.socket) -> bytes:
    """Return one response, head and body, or as much of it as arrives before the connection closes."""
    response = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            response += chunk
            head, end_of_head, body = response.partition(b"\r\n\r\n")
            if end_of_head and len(body) >= _content_length(head):
                break
    return response


def read_to_end(connection: socket.socket) -> bytes:
    """Return everything that arrives until the server ends the connection."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def _content_length(head: bytes) -> int:
    return next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
