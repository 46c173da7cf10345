"""Call every model method of Triton's HTTP client, and print what they return as JSON. Arguments: the server, the rows.

This program runs in the environment .venv-clients, so it imports nothing of this project.
"""

import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException


def main(url: str, rows: str) -> None:
    """Print the results of all calls as one JSON object."""
    x = np.array(json.loads(rows), np.float32)
    client = triton.InferenceServerClient(url, concurrency=2)
    found: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": [client.is_model_ready("vae"), client.is_model_ready("vae", "1"), client.is_model_ready("no")],
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata("vae"),
        "version": client.get_model_metadata("vae", "1")["name"],
    }
    for name, is_binary in (("binary", True), ("json", False)):
        tensor = triton.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x, binary_data=is_binary)
        wanted = [triton.InferRequestedOutput(each, binary_data=is_binary) for each in ("mean", "score", "is_anomaly")]
        options: dict[str, Any] = {"request_id": "7", "parameters": {"observe": False}, "model_version": "1"}
        compressed = {"request_compression_algorithm": "gzip"} if is_binary else {}
        result = client.infer("vae", [tensor], outputs=wanted, **options, **compressed)
        found[name] = {each.name(): result.as_numpy(each.name()).tolist() for each in wanted}
        found[name]["id"] = result.get_response()["id"]
        late = client.async_infer("vae", [tensor], outputs=wanted).get_result()
        found[f"{name}_async"] = late.as_numpy("mean").tolist()
        everything = client.infer("vae", [tensor]).get_response()["outputs"]
        found[f"{name}_outputs"] = [each["name"] for each in everything]
    latents = triton.InferInput("z", [1, 16], "FP32")
    latents.set_data_from_numpy(np.zeros((1, 16), np.float32))
    found["decode"] = client.infer("vae:decode", [latents]).as_numpy("x_hat").tolist()
    found["sample"] = client.infer("vae:sample", [], parameters={"seed": 5, "n": 2}).as_numpy("x").tolist()
    latents = triton.InferInput("z", [2, 2], "FP32")
    latents.set_data_from_numpy(np.zeros((2, 2), np.float32))
    levels = triton.InferInput("b", [2, 1], "BYTES")
    found["conditions"] = {
        "parameter": (client.infer("kinds:decode", [latents], parameters={"condition": '{"b": "1"}'}))
        .as_numpy("x_hat")
        .tolist()
    }
    for form, is_binary in (("binary", True), ("json", False)):
        levels.set_data_from_numpy(np.array([["0"], ["1"]], object), binary_data=is_binary)
        answer = client.infer("kinds:decode", [latents, levels])
        found["conditions"][form] = answer.as_numpy("x_hat").tolist()
    try:
        client.infer("vae", [latents])
    except InferenceServerException as error:
        found["error"] = [error.status(), error.message()]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
