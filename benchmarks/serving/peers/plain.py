"""Plain FastAPI: what people write first, lists in pydantic and a call of the module. `python -m ... MODEL PORT`.

Two uvicorn workers, one a core, because Python's lock lets one use one core only; uvloop and httptools, without access
log. Nothing is batched: there is nothing in FastAPI that would.
"""

import os
import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.serving.peers.module import load, reconstruct


class Rows(BaseModel):
    """The body."""

    inputs: list[list[float]]


def create() -> FastAPI:
    """The application of one worker."""
    app, module = FastAPI(), load(os.environ["PEER_MODEL"])

    @app.post("/reconstruct")
    async def answer(rows: Rows) -> dict[str, Any]:
        return {"outputs": reconstruct(module, torch.tensor(rows.inputs)).tolist()}

    return app


if __name__ == "__main__":
    os.environ["PEER_MODEL"] = sys.argv[1]
    uvicorn.run(
        "benchmarks.serving.peers.plain:create", factory=True, port=int(sys.argv[2]), workers=2, loop="uvloop",
        http="httptools", access_log=False,
        timeout_worker_healthcheck=60,  # seconds; after the default of 5 a worker that imports torch may be killed
    )  # fmt: skip
