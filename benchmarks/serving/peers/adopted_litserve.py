"""Serve an autoencoder with LitServe: `python -m benchmarks.serving.peers.adopted_litserve MODEL PORT`.

The network, the scaler and the threshold are in the folder of MODEL. See `litserve_server.py` for the configuration:
batches of 16 requests or 2 ms, two workers, two HTTP processes, and ZeroMQ queues.
"""

import sys
from pathlib import Path
from typing import Any

import litserve
import torch
from torch import Tensor

from benchmarks.serving.peers.adopted_network import load_network


class Anomalies(litserve.LitAPI):  # type: ignore[misc] # LitServe has no types
    """A LitServe API that concatenates the rows of several requests to a batch."""

    def setup(self, _: str) -> None:
        """Load the network, the scaler and the threshold, once per worker."""
        folder = Path(sys.argv[1]).parent
        self.network = load_network(folder)
        scaler = torch.load(folder / "scaler.pt", weights_only=True)
        self.mean, self.scale = scaler["mean"], scaler["scale"]
        self.threshold = float((folder / "threshold.txt").read_text())

    def decode_request(self, request: dict[str, Any]) -> Tensor:
        """Return the rows [B, D] of a request."""
        return torch.tensor(request["inputs"])

    def batch(self, inputs: list[Tensor]) -> tuple[Tensor, list[int]]:
        """Return the rows of all requests, and the number of rows per request."""
        return torch.cat(inputs), [len(x) for x in inputs]

    def predict(self, batch: tuple[Tensor, list[int]]) -> list[tuple[Tensor, Tensor]]:
        """Return the reconstructions and their errors, one pair of arrays per request."""
        x, sizes = batch
        with torch.inference_mode():
            outputs = self.network((x - self.mean) / self.scale) * self.scale + self.mean
            errors = (outputs - x).square().mean(dim=1)
        return list(zip(outputs.split(sizes), errors.split(sizes), strict=True))

    def unbatch(self, output: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Return the results of the requests as a list."""
        return output

    def encode_response(self, output: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Return the response body."""
        outputs, errors = output
        anomalies = (errors > self.threshold).tolist()
        return {"outputs": outputs.tolist(), "errors": errors.tolist(), "anomalies": anomalies}


if __name__ == "__main__":
    server = litserve.LitServer(
        Anomalies(max_batch_size=16, batch_timeout=0.002), accelerator="cpu", workers_per_device=2, fast_queue=True
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), num_api_servers=2, generate_client_file=False, log_level="warning",
        access_log=False,
    )  # fmt: skip
