"""Serve the model with Ray Serve: `python -m benchmarks.serving.peers.ray_server MODEL PORT`.

`@serve.batch` makes a batch of up to 64 requests that are already waiting, and does not wait for more requests. There
are two replicas, one per core. Each replica accepts up to 100 concurrent requests, because the default of 5 would keep
batches small. Throughput mode (RAY_SERVE_THROUGHPUT_OPTIMIZED) is on, as Ray's documentation recommends for high
throughput. The dashboard and the access log are off. Ray Serve has no binary protocol.
"""

import logging
import os
import sys
import time
from typing import Any

os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"  # Ray reads this variable when it is imported

import ray
import torch
from ray import serve
from starlette.requests import Request

from benchmarks.serving.peers.torchscript_module import load, reconstruct


@serve.deployment(
    num_replicas=2,
    max_ongoing_requests=100,
    ray_actor_options={"num_cpus": 1},
    logging_config={"enable_access_log": False, "log_level": "WARNING"},
)
class Vae:
    """The Ray deployment. Each replica creates one object of this class."""

    def __init__(self, path: str) -> None:
        self.module: Any = load(path)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0)  # type: ignore[untyped-decorator] # Ray has no types
    async def reconstruct(self, requests: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the reconstructions of several requests, one tensor per request. Each request is a tensor [B, D]."""
        outputs = reconstruct(self.module, torch.cat(requests))
        return list(outputs.split([len(x) for x in requests]))

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Return the response to one request."""
        rows = torch.tensor((await request.json())["inputs"])
        return {"outputs": (await self.reconstruct(rows)).tolist()}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.WARNING, object_store_memory=200 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Vae.bind(sys.argv[1]))  # type: ignore[attr-defined]  # the decorator makes Vae a deployment
    while True:
        time.sleep(3600)
