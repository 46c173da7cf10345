"""Serve the model with Ray Serve: `python -m benchmarks.serving.peers.ray_server MODEL PORT`.

`@serve.batch` batches the waiting requests, up to 64, without a timeout. Two replicas, one per core, with up to 100
concurrent requests each: with the default of 5, batches would be small. Throughput mode
(RAY_SERVE_THROUGHPUT_OPTIMIZED), which its documentation recommends for such loads. No dashboard and no access log. It
has no binary protocol.
"""

import logging
import os
import sys
import time
from typing import Any

os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"  # read at import

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
    """The deployment; each replica has one object."""

    def __init__(self, path: str) -> None:
        self.module: Any = load(path)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0)  # type: ignore[untyped-decorator] # Ray has no types
    async def reconstruct(self, requests: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the reconstructions of several requests, given their rows [B, D]."""
        outputs = reconstruct(self.module, torch.cat(requests))
        return list(outputs.split([len(x) for x in requests]))

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Answer one request."""
        rows = torch.tensor((await request.json())["inputs"])
        return {"outputs": (await self.reconstruct(rows)).tolist()}


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.WARNING, object_store_memory=200 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Vae.bind(sys.argv[1]))  # type: ignore[attr-defined]  # the decorator makes it a deployment
    while True:
        time.sleep(3600)
