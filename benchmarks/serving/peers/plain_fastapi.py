"""Serve the model with plain FastAPI: `python -m benchmarks.serving.peers.plain_fastapi MODEL PORT`.

Lists validated by pydantic, and a call of the module, as a first version is often written. Two uvicorn workers, one per
core, because of the global interpreter lock; uvloop and httptools, without access log. There is no batching, because
FastAPI has none.
"""

import os
import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.serving.peers.torchscript_module import load, reconstruct


class Rows(BaseModel):
    """The request body."""

    inputs: list[list[float]]


def create() -> FastAPI:
    """Return the application of one worker."""
    app, module = FastAPI(), load(os.environ["PEER_MODEL"])

    @app.post("/reconstruct")
    async def reconstruct_rows(rows: Rows) -> dict[str, Any]:
        return {"outputs": reconstruct(module, torch.tensor(rows.inputs)).tolist()}

    return app


if __name__ == "__main__":
    os.environ["PEER_MODEL"] = sys.argv[1]
    uvicorn.run(
        "benchmarks.serving.peers.plain_fastapi:create", factory=True, port=int(sys.argv[2]), workers=2, loop="uvloop",
        http="httptools", access_log=False,
        timeout_worker_healthcheck=60,  # s; with the default of 5, uvicorn can kill a worker that imports torch
    )  # fmt: skip
