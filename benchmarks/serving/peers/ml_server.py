"""MLServer. `python -m benchmarks.serving.peers.ml_server MODEL PORT`.

Adaptive batching, up to 64 requests or 2 ms: it is off by default, and its documentation asks to choose both by trial.
No parallel workers: the pool that they run in costs a queue between processes, and batching and HTTP stay in one
process anyway. It speaks the same protocol as Triton in JSON; its HTTP server lacks the binary extension.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.serving.peers.module import free_port, load, reconstruct


class Vae(MLModel):  # type: ignore[misc] # MLServer has no types
    """MLServer's runtime: it loads once and answers whole batches."""

    async def load(self) -> bool:
        """Load."""
        self.module: Any = load(os.environ["PEER_MODEL"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """x [B, D] to x_hat [B, D]."""
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32, copy=False)
        x_hat = reconstruct(self.module, torch.from_numpy(x)).numpy()
        outputs = [NumpyCodec.encode_output("x_hat", x_hat)]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)


def main() -> None:
    """Write its configuration beside the folder of artifacts, and become it."""
    os.environ["PEER_MODEL"] = sys.argv[1]
    folder = Path(tempfile.mkdtemp(prefix="mlserver-", dir=Path(sys.argv[1]).parents[3]))
    server = {
        "host": "127.0.0.1", "http_port": int(sys.argv[2]), "grpc_port": free_port(), "metrics_port": free_port(),
        "parallel_workers": 0, "debug": False, "load_models_at_startup": True,
    }  # fmt: skip
    model = {
        "name": "vae", "implementation": "benchmarks.serving.peers.ml_server.Vae",
        "max_batch_size": 64, "max_batch_time": 0.002,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))
    program = "from mlserver.cli import main; main()"
    os.execv(sys.executable, [sys.executable, "-c", program, "start", str(folder)])


if __name__ == "__main__":
    main()
