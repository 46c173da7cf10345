"""NVIDIA Triton through PyTriton. `python -m benchmarks.serving.peers.triton MODEL PORT`.

The dynamic batcher without delay, up to 1,024 rows: it takes what waits, the best for throughput here. Two instances of
the model, one a core. Its own protocol in both forms: JSON, and the binary extension. Triton's PyTorch backend, which
needs no Python to run, is in NVIDIA's container alone; the wheel brings the Python backend.
"""

import sys
from typing import Any

import numpy as np
import torch
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.serving.peers.module import free_port, load, reconstruct

FEATURES = 784


def instance(path: str) -> Any:
    """One instance's function: it is called in a process of its own, and loads there at its first call."""
    loaded: list[Any] = []

    @batch  # type: ignore[untyped-decorator] # PyTriton has no types
    def infer(x: np.ndarray) -> list[np.ndarray]:
        if not loaded:
            loaded.append(load(path))
        return [reconstruct(loaded[0], torch.from_numpy(x)).numpy()]

    return infer


def main() -> None:
    """Serve until told to stop."""
    path, port = sys.argv[1], int(sys.argv[2])
    config = TritonConfig(
        http_address="127.0.0.1", http_port=port, grpc_address="127.0.0.1", grpc_port=free_port(),
        metrics_port=free_port(),
    )  # fmt: skip
    with Triton(config=config) as triton:
        triton.bind(
            model_name="vae",
            infer_func=[instance(path), instance(path)],
            inputs=[Tensor(name="x", dtype=np.float32, shape=(FEATURES,))],
            outputs=[Tensor(name="x_hat", dtype=np.float32, shape=(FEATURES,))],
            config=ModelConfig(max_batch_size=1024, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()


if __name__ == "__main__":
    main()
