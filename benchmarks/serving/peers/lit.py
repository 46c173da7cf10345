"""LitServe. `python -m benchmarks.serving.peers.lit MODEL PORT`.

Batches of up to 16 requests, so that two workers share 32 connections, or what comes in 2 ms. Without a timeout (its
default) a worker whose model batches asks its queue without pause, and two of them took both cores from the HTTP side.
Two workers and two HTTP processes, because both walk the numbers in Python; the ZeroMQ queue (fast_queue), which its
documentation recommends for many requests a second. It has no binary protocol.
"""

import sys
from typing import Any

import litserve
import torch

from benchmarks.serving.peers.module import load, reconstruct


class Vae(litserve.LitAPI):  # type: ignore[misc] # LitServe has no types
    """Requests of any number of rows, batched by concatenation."""

    def setup(self, _: str) -> None:
        """Load, once in each worker."""
        self.module = load(sys.argv[1])

    def decode_request(self, request: dict[str, Any]) -> torch.Tensor:
        """The rows [B, D] of a request."""
        return torch.tensor(request["inputs"])

    def batch(self, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
        """All rows, and how many are whose."""
        return torch.cat(inputs), [len(x) for x in inputs]

    def predict(self, batch: tuple[torch.Tensor, list[int]]) -> tuple[torch.Tensor, ...]:
        """The reconstructions of each request."""
        x, sizes = batch
        return tuple(reconstruct(self.module, x).split(sizes))

    def unbatch(self, output: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """One for each."""
        return list(output)

    def encode_response(self, output: torch.Tensor) -> dict[str, Any]:
        """The answer."""
        return {"outputs": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        Vae(max_batch_size=16, batch_timeout=0.002), accelerator="cpu", workers_per_device=2, fast_queue=True
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), num_api_servers=2, generate_client_file=False, log_level="warning",
        access_log=False,
    )  # fmt: skip
