"""Serve the model with plain FastAPI: `python -m benchmarks.serving.peers.plain_fastapi MODEL PORT`.

As is typical of a first version, pydantic validates lists of numbers, and the endpoint calls the module directly. There
are two uvicorn workers, one per core, because of the global interpreter lock. They use uvloop and httptools, and write
no access log. Requests are not batched, because FastAPI does not support batching.
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
        timeout_worker_healthcheck=60,  # seconds; with the default of 5, uvicorn may kill a worker that imports torch
    )  # fmt: skip
