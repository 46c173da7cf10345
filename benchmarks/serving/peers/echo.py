"""What no server on uvicorn can beat: the body comes back as it went. `python -m ... WORKERS PORT`.

`/` is a bare ASGI application, `/fastapi` the same through FastAPI's routing.
"""

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response

fastapi = FastAPI()


@fastapi.post("/fastapi")
async def echo(request: Request) -> Response:
    """The body."""
    return Response(await request.body(), media_type="application/json")


async def app(scope: Any, receive: Any, send: Any) -> None:
    """ASGI: the body, or FastAPI."""
    if scope["type"] != "http" or scope["path"] != "/":
        return await fastapi(scope, receive, send)
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"".join(parts)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    return None


if __name__ == "__main__":
    uvicorn.run(
        "benchmarks.serving.peers.echo:app", port=int(sys.argv[2]), workers=int(sys.argv[1]), loop="uvloop",
        http="httptools", access_log=False, timeout_worker_healthcheck=60,
    )  # fmt: skip
