"""BentoML. `python -m benchmarks.serving.peers.bento MODEL PORT`.

Adaptive batching over rows, up to 1,024, as its documentation advises for models that take batches; it learns by itself
how long to wait. Two workers, one a core, because the numbers are walked in Python. NumPy arrays in and out, its way
for tensors. Its only binary form is pickle, which no server should take from strangers: none is measured.
"""

import os
import sys
from typing import Annotated, Any

import bentoml
import numpy as np
import torch
from bentoml.validators import DType

from benchmarks.serving.peers.module import load, reconstruct


@bentoml.service(workers=2, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Vae:
    """The service; one object in each worker."""

    def __init__(self) -> None:
        self.module: Any = load(os.environ["PEER_MODEL"])

    @bentoml.api(batchable=True, max_batch_size=1024, max_latency_ms=10_000)  # type: ignore[untyped-decorator] # BentoML has no types
    def reconstruct(self, inputs: Annotated[np.ndarray, DType("float32")]) -> np.ndarray:
        """x [B, D] to its reconstruction [B, D]."""
        return reconstruct(self.module, torch.from_numpy(np.ascontiguousarray(inputs))).numpy()


if __name__ == "__main__":
    os.environ |= {"PEER_MODEL": sys.argv[1], "BENTOML_DO_NOT_TRACK": "true"}
    command = [sys.executable, "-m", "bentoml", "serve", "benchmarks.serving.peers.bento:Vae"]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", sys.argv[2]])
