"""Serve an autoencoder with plain FastAPI, as people do.

    python -m benchmarks.serving.peers.adopted_fastapi MODEL PORT

`model.pth`, a pickled scaler of scikit-learn and `threshold.txt` are in the folder of MODEL. As is typical, pydantic
validates lists of numbers, and the endpoint calls the scaler and the network directly. There are two uvicorn workers,
one per core, because of the global interpreter lock. They use uvloop and httptools, and write no access log. Requests
are not batched, because FastAPI does not support batching.
"""

import os
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.serving.peers.adopted_network import load_network


class Rows(BaseModel):
    """The request body."""

    inputs: list[list[float]]


def create() -> FastAPI:
    """Return the application of one worker."""
    folder = Path(os.environ["PEER_FOLDER"])
    network, scaler = load_network(folder), joblib.load(folder / "scaler.joblib")
    threshold = float((folder / "threshold.txt").read_text())
    app = FastAPI()

    @app.post("/reconstruct")
    async def reconstruct(rows: Rows) -> dict[str, Any]:
        x = np.array(rows.inputs)
        with torch.inference_mode():
            units = network(torch.tensor(scaler.transform(x), dtype=torch.float32)).numpy()
        outputs = scaler.inverse_transform(units)
        errors = ((outputs - x) ** 2).mean(axis=1)
        return {"outputs": outputs.tolist(), "errors": errors.tolist(), "anomalies": (errors > threshold).tolist()}

    return app


if __name__ == "__main__":
    os.environ["PEER_FOLDER"] = str(Path(sys.argv[1]).parent)
    uvicorn.run(
        "benchmarks.serving.peers.adopted_fastapi:create", factory=True, port=int(sys.argv[2]), workers=2,
        loop="uvloop", http="httptools", access_log=False,
        timeout_worker_healthcheck=60,  # seconds; with the default of 5, uvicorn may kill a worker that imports torch
    )  # fmt: skip
