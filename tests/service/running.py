"""Run an application under uvicorn in a thread of the test process."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp

from tests.plain_http import NO_AUTHORITIES


@contextmanager
def running(app: ASGIApp, protocol: Any = "auto") -> Iterator[httpx.Client]:
    """Serve `app` until the block ends. Yield an HTTP client of the server.

    Args:
        protocol: the class that reads HTTP: by default uvicorn's, otherwise `app.state.protocol`.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        with httpx.Client(
            verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30
        ) as client:
            client.get("/livez")  # waits until the server has started
            yield client
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def post(client: httpx.Client, path: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    """POST `body`, assert that the request succeeds, and return the JSON response; `options` are passed to httpx."""
    response = client.post(path, json=body, **options)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content
