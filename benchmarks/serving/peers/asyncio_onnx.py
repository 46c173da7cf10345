"""Serve the model with a bare `asyncio.Protocol`: `python -m benchmarks.serving.peers.asyncio_onnx MODEL PORT`.

This is the least that a Python server on ONNX Runtime can do: two processes on one port (SO_REUSEPORT), uvloop, orjson,
and 20 lines that read HTTP/1.1. It accepts only what the load generators send, and has no errors, limits, batches,
metrics or logs. A real server cannot do without these, so this one shows what they cost.
"""

import asyncio
import os
import socket
import sys
from typing import cast

import uvloop

from benchmarks.serving.peers import onnx_session

WORKERS = 2
RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b"


class Connection(asyncio.Protocol):
    """One keep-alive connection. A request begins when the response to the one before it was sent."""

    def __init__(self, answer: onnx_session.Handler) -> None:
        self._answer = answer
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Respond if the request is complete."""
        received = self._received = self._received + data if self._received else data
        head, end, body = received.partition(b"\r\n\r\n")
        if not end:
            return
        headers = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
        if len(body) < int(headers.get(b"content-length", 0)):
            return
        self._received = b""
        content_type, answer = self._answer(headers.get(b"content-type", b""), body)
        self._transport.write(RESPONSE % (content_type, len(answer), answer))


async def serve(model: str, port: int) -> None:
    """Serve until the process is stopped."""
    answer = onnx_session.load(model)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.bind(("127.0.0.1", port))
    server = await asyncio.get_running_loop().create_server(lambda: Connection(answer), sock=listener)
    await server.serve_forever()


def main() -> None:
    """Fork the second process, and serve in both."""
    for _ in range(WORKERS - 1):
        if os.fork() == 0:
            break
    uvloop.run(serve(sys.argv[1], int(sys.argv[2])))


if __name__ == "__main__":
    main()
