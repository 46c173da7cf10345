"""Serve the model with PyTriton: `python -m benchmarks.serving.peers.pytriton_server MODEL PORT`.

PyTriton is NVIDIA Triton's server with models in Python.

Triton's dynamic batcher makes batches of up to 1,024 rows that are already waiting. The batcher does not delay requests
to fill a batch, because this gives the highest rate here. There are two instances of the model, one per core. Triton
supports the Open Inference Protocol in JSON and with the binary extension. PyTriton's wheel contains only Triton's
Python backend. Triton's PyTorch backend, which runs models without Python, is available only in NVIDIA's container.
"""

import sys
from typing import Any

import numpy as np
import torch
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.serving.peers.torchscript_module import free_port, load, reconstruct

FEATURES = 784


def create_instance(path: str) -> Any:
    """Return the function that one model instance runs in its own process. The first call loads the model."""
    loaded: list[Any] = []

    @batch  # type: ignore[untyped-decorator] # PyTriton has no types
    def infer(x: np.ndarray) -> list[np.ndarray]:
        if not loaded:
            loaded.append(load(path))
        return [reconstruct(loaded[0], torch.from_numpy(x)).numpy()]

    return infer


def main() -> None:
    """Serve until the process is stopped."""
    path, port = sys.argv[1], int(sys.argv[2])
    config = TritonConfig(
        http_address="127.0.0.1", http_port=port, grpc_address="127.0.0.1", grpc_port=free_port(),
        metrics_port=free_port(),
    )  # fmt: skip
    with Triton(config=config) as triton:
        triton.bind(
            model_name="vae",
            infer_func=[create_instance(path), create_instance(path)],
            inputs=[Tensor(name="x", dtype=np.float32, shape=(FEATURES,))],
            outputs=[Tensor(name="x_hat", dtype=np.float32, shape=(FEATURES,))],
            config=ModelConfig(max_batch_size=1024, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()


if __name__ == "__main__":
    main()
