"""A real server on a real socket, in a thread of the test's process."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp


@contextmanager
def running(app: ASGIApp) -> Iterator[httpx.Client]:
    """A client of `app`, which is served until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as client:
            client.get("/livez")  # waits in the backlog until the server has started
            yield client
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def post(client: httpx.Client, path: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The answer in JSON to `body`, which must be right; `options` as httpx has them."""
    response = client.post(path, json=body, **options)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer
