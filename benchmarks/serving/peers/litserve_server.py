"""Serve the model with LitServe: `python -m benchmarks.serving.peers.litserve_server MODEL PORT`.

LitServe closes a batch when it has 16 requests, or after 2 ms. With batches of 16, two workers share the 32 connections
of the benchmark. With the default of 0 ms, workers would poll their queue continuously, and two workers would use both
cores. There are two workers and two HTTP processes, because workers and HTTP processes convert numbers in Python.
Requests pass through a ZeroMQ queue (`fast_queue`), which LitServe's documentation recommends for high request rates.
LitServe has no binary protocol.
"""

import sys
from typing import Any

import litserve
import torch

from benchmarks.serving.peers.torchscript_module import load, reconstruct


class Vae(litserve.LitAPI):  # type: ignore[misc] # LitServe has no types
    """A LitServe API that concatenates the rows of several requests to a batch."""

    def setup(self, _: str) -> None:
        """Load the model, once per worker."""
        self.module = load(sys.argv[1])

    def decode_request(self, request: dict[str, Any]) -> torch.Tensor:
        """Return the rows [B, D] of a request."""
        return torch.tensor(request["inputs"])

    def batch(self, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
        """Return the rows of all requests, and the number of rows per request."""
        return torch.cat(inputs), [len(x) for x in inputs]

    def predict(self, batch: tuple[torch.Tensor, list[int]]) -> tuple[torch.Tensor, ...]:
        """Return the reconstructions, one tensor per request."""
        x, sizes = batch
        return tuple(reconstruct(self.module, x).split(sizes))

    def unbatch(self, output: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Return the tensors as a list."""
        return list(output)

    def encode_response(self, output: torch.Tensor) -> dict[str, Any]:
        """Return the response body."""
        return {"outputs": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        Vae(max_batch_size=16, batch_timeout=0.002), accelerator="cpu", workers_per_device=2, fast_queue=True
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), num_api_servers=2, generate_client_file=False, log_level="warning",
        access_log=False,
    )  # fmt: skip
