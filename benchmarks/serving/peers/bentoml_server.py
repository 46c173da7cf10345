"""Serve the model with BentoML: `python -m benchmarks.serving.peers.bentoml_server MODEL PORT`.

BentoML batches up to 1,024 rows, as its documentation recommends for models that accept batches. BentoML itself adapts
how long a request waits for a batch. There are two workers, one per core, because BentoML converts numbers in Python.
Inputs and outputs are NumPy arrays, BentoML's type for tensors. The only binary format is pickle, which is not
measured, because it is unsafe for untrusted input.
"""

import os
import sys
from typing import Annotated, Any

import bentoml
import numpy as np
import torch
from bentoml.validators import DType

from benchmarks.serving.peers.torchscript_module import load, reconstruct


@bentoml.service(workers=2, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Vae:
    """The BentoML service. Each worker creates one object of this class."""

    def __init__(self) -> None:
        self.module: Any = load(os.environ["PEER_MODEL"])

    @bentoml.api(batchable=True, max_batch_size=1024, max_latency_ms=10_000)  # type: ignore[untyped-decorator] # BentoML has no types
    def reconstruct(self, inputs: Annotated[np.ndarray, DType("float32")]) -> np.ndarray:
        """Return the reconstructions [B, D] of inputs [B, D]."""
        return reconstruct(self.module, torch.from_numpy(np.ascontiguousarray(inputs))).numpy()


if __name__ == "__main__":
    os.environ |= {"PEER_MODEL": sys.argv[1], "BENTOML_DO_NOT_TRACK": "true"}
    command = [sys.executable, "-m", "bentoml", "serve", "benchmarks.serving.peers.bentoml_server:Vae"]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", sys.argv[2]])
