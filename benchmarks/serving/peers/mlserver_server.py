"""Serve the model with MLServer: `python -m benchmarks.serving.peers.mlserver_server MODEL PORT`.

MLServer closes a batch when it has 64 requests, or after 2 ms. Batching is off by default. MLServer's documentation
recommends finding the batch size and the waiting time by experiment. There are no parallel workers: a pool of workers
would add a queue between processes, but batching and HTTP would still run in one process. MLServer uses the same JSON
protocol as Triton. The HTTP server of MLServer does not support the binary extension.
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

from benchmarks.serving.peers.torchscript_module import free_port, load, reconstruct


class Vae(MLModel):  # type: ignore[misc] # MLServer has no types
    """The MLServer runtime of the model."""

    async def load(self) -> bool:
        """Load the model."""
        self.module: Any = load(os.environ["PEER_MODEL"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Return the reconstructions of a batch of rows."""
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32, copy=False)
        x_hat = reconstruct(self.module, torch.from_numpy(x)).numpy()
        outputs = [NumpyCodec.encode_output("x_hat", x_hat)]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)


def main() -> None:
    """Write the configuration next to the artifact folder, and replace this process with MLServer."""
    os.environ["PEER_MODEL"] = sys.argv[1]
    folder = Path(tempfile.mkdtemp(prefix="mlserver-", dir=Path(sys.argv[1]).parents[3]))
    server = {
        "host": "127.0.0.1", "http_port": int(sys.argv[2]), "grpc_port": free_port(), "metrics_port": free_port(),
        "parallel_workers": 0, "debug": False, "load_models_at_startup": True,
    }  # fmt: skip
    model = {
        "name": "vae", "implementation": "benchmarks.serving.peers.mlserver_server.Vae",
        "max_batch_size": 64, "max_batch_time": 0.002,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(model))
    program = "from mlserver.cli import main; main()"
    os.execv(sys.executable, [sys.executable, "-c", program, "start", str(folder)])


if __name__ == "__main__":
    main()
