"""Return request bodies unchanged. No server that runs on uvicorn can respond at a lower cost than this one.

Run `python -m benchmarks.serving.peers.echo WORKERS PORT`. The path `/` is a bare ASGI application. The path `/fastapi`
is a FastAPI endpoint.
"""

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response

fastapi = FastAPI()


@fastapi.post("/fastapi")
async def echo(request: Request) -> Response:
    """Return the request body."""
    return Response(await request.body(), media_type="application/json")


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Return the request body for the path /, and pass other requests to FastAPI."""
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
