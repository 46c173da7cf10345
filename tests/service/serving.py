"""The service on a socket in the test's own event loop, and requests as bytes."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import uvicorn

from service.app import create_app
from service.endpoints.context import ServiceContext
from service.settings import Settings

ROWS = np.full((1, 64), 0.5, np.float32)
BODY = json.dumps({"inputs": ROWS.tolist()}).encode()
HEAD = b"POST /encode HTTP/1.1\r\nHost: elbo\r\nContent-Type: application/json\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[tuple[ServiceContext, int]]:
    """Serve an application with `settings`; yield its service context and its port."""
    app = create_app(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # not set by asyncio; saves 40 ms per response
    config = uvicorn.Config(app, http=app.state.protocol, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve([listener]))
    await until(lambda: server.started)
    try:
        yield app.state.service, listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition()` holds, at most 20 s."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)
