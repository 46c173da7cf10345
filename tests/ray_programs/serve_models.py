"""Serve the models of a folder on Ray Serve with two replicas, and send requests. Print JSON.

.venv-ray/bin/python -m tests.ray_programs.serve_models ARTIFACTS ROWS.npy
"""

import io
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np

from tests.ports import free_port

NPY = {"content-type": "application/x-npy", "accept": "application/x-npy"}


def main(artifacts: str, rows: np.ndarray) -> None:
    """Print parts of the responses, the states of the replicas, and what `ReplicaCount` returns for three loads."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "ELBO_ARTIFACTS": artifacts, "ELBO_LOG_LEVEL": "error"}
    import ray
    from ray import serve

    from service.scaleout import Options, ReplicaCount, ScaleoutError, app

    port = free_port()
    ray.init("local", num_cpus=3, include_dashboard=False, logging_level="error", object_store_memory=100 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app(Options(min_replicas=2, max_replicas=2)))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        body = io.BytesIO()
        np.save(body, rows)
        npy = client.post("/encode", content=body.getvalue(), headers=NPY)
        found: dict[str, Any] = {
            "ready": client.get("/readyz").status_code,
            "models": [model["name"] for model in client.get("/models").json()["models"]],
            "json": client.post("/encode", json={"inputs": rows.tolist()}).json()["latents"],
            "npy": np.load(io.BytesIO(npy.content)).tolist(),
            "anomaly": [
                each["score"] for each in client.post("/anomaly", json={"inputs": rows.tolist()}).json()["results"]
            ],
            "error": client.post("/encode", json={"inputs": [[1.0]]}).json()["code"],
        }
    replicas = serve.status().applications["default"].deployments["elbo"].replica_states
    found["replicas"] = {str(state): count for state, count in replicas.items()}
    count = ReplicaCount(queue_seconds=0.1, requests_per_replica=16)
    for name, waits, requests in (("idle", [], 0), ("waiting", [0.3, 0.5], 10), ("busy", [0.0, 0.05], 70)):
        context = SimpleNamespace(
            current_num_replicas=2,
            aggregated_metrics={"queue_seconds": dict(enumerate(waits))},
            total_num_requests=requests,
        )
        found[name] = count(context)[0]
    found["refused"] = []
    for name, value in (("ELBO_ARTIFACTS", "artifacts"), ("ELBO_STATE", "state")):
        os.environ |= {"ELBO_ARTIFACTS": artifacts, name: value}
        try:
            app(Options())
        except ScaleoutError as error:
            found["refused"].append(str(error).split()[0])
    serve.shutdown()
    ray.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], np.load(sys.argv[2]))
