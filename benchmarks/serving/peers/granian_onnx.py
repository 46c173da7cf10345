"""Serve the model with Granian and ONNX Runtime: `python -m benchmarks.serving.peers.granian_onnx MODEL PORT`.

Granian is an HTTP server in Rust. The application uses Granian's own interface, RSGI, which is faster than ASGI. There
are two workers, one per core, and each computes a request in its event loop, without batching, validation or metrics.
"""

import os
import sys
from typing import Any

from granian import Granian
from granian.constants import Interfaces, Loops

from benchmarks.serving.peers import onnx_session

MODEL = "PEER_MODEL"  # the variable that gives the workers the path of the artifact


class App:
    """The application of one worker."""

    def __init__(self) -> None:
        self._answer = onnx_session.load(os.environ[MODEL])

    async def __call__(self, scope: Any, protocol: Any) -> None:
        """Respond to one request."""
        content_type, body = self._answer(scope.headers.get("content-type", "").encode(), await protocol())
        protocol.response_bytes(200, [("content-type", content_type.decode())], body)


def create_app() -> Any:
    """Return the application as a function, which Granian expects."""
    app = App()

    async def serve(scope: Any, protocol: Any) -> None:
        await app(scope, protocol)

    return serve


def main() -> None:
    """Serve until the process is stopped."""
    os.environ[MODEL] = sys.argv[1]
    Granian(
        "benchmarks.serving.peers.granian_onnx:create_app", address="127.0.0.1", port=int(sys.argv[2]), workers=2,
        interface=Interfaces.RSGI, loop=Loops.uvloop, factory=True, log_access=False,
    ).serve()  # fmt: skip


if __name__ == "__main__":
    main()
