"""A server that records its direct requests, and requests as bytes."""

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.http.direct import Content, DirectRequest
from service.settings import Settings
from tests.service.raw_http import read_response
from tests.service.running import running

JSON_TYPE = "application/json"
NPY_TYPE = "application/x-npy"


class Recorder:
    """The paths of the direct requests that have been answered, and the address and the protocol of the server."""

    def __init__(self) -> None:
        self.answered: list[str] = []
        self.port = 0
        self.protocol: Any
        self.client: httpx.Client

    def send(self, *pieces: bytes) -> bytes:
        """Send a request in `pieces`, with a pause between them, on a new connection. Return the response."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for number, piece in enumerate(pieces):
                if number:
                    self.client.get("/livez")  # the server has read the last piece
                connection.sendall(piece)
            return read_response(connection)


@contextmanager
def recording(settings: Settings) -> Iterator[Recorder]:
    """Yield a running server, and the direct requests that it answers."""
    recorder = Recorder()
    write = DirectRequest.write

    def record(self: DirectRequest, head: bytes, content: Content) -> None:
        recorder.answered.append(self.head.path)
        write(self, head, content)

    app = create_app(settings)
    with pytest.MonkeyPatch.context() as patch, running(app, app.state.protocol) as client:
        patch.setattr(DirectRequest, "write", record)
        recorder.protocol = app.state.protocol
        recorder.port, recorder.client = client.base_url.port or 0, client
        yield recorder


def request(path: str, body: bytes, *headers: str, content_type: str = JSON_TYPE, accept: str = "*/*") -> bytes:
    lines = [
        f"POST {path} HTTP/1.1", "Host: elbo", f"Content-Type: {content_type}", f"Accept: {accept}", *headers,
        f"Content-Length: {len(body)}", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + body


def infer(
    path: str, x: np.ndarray, *outputs: str, name: str = "x", dtype: str = "FP32", shape: Any = None, **fields: Any
) -> bytes:
    """Return a request of the Open Inference Protocol with binary numbers in both directions."""
    shape = x.shape if shape is None else shape
    tensor = {"name": name, "shape": shape, "datatype": dtype, "parameters": {"binary_data_size": x.nbytes}}
    wanted = [{"name": each, "parameters": {"binary_data": True}} for each in outputs]
    head = json.dumps({"inputs": [tensor], "outputs": wanted, **fields}).encode()
    length = f"Inference-Header-Content-Length: {len(head)}"
    return request(f"/v2/models/{path}/infer", head + x.tobytes(), length, content_type="application/octet-stream")


def for_task(whole: bytes) -> bytes:
    """Return a request that differs only in a header that the server does not read, but that no direct request has."""
    return whole.replace(b"Host: elbo", b"Host: elbo\r\nExpect: nothing", 1)


def rows(count: int, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).uniform(size=(count, width)).astype(np.float32)


def as_json(x: np.ndarray, field: str = "inputs") -> bytes:
    return json.dumps({field: x.tolist()}).encode()


def without_times(response: bytes) -> bytes:
    """Return `response` without what differs between equal requests."""
    return re.sub(rb"(x-request-id: |date: )[^\r]*|dur=[0-9.]*", rb"\1", response)
