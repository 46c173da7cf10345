"""Call every model method of Triton's asyncio client, and print what they return as JSON. See triton_sync.py."""

import asyncio
import json
import sys
from typing import Any

import numpy as np
import tritonclient.http.aio as triton
from tritonclient.http import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException


async def main(url: str, rows: str) -> None:
    """Print the results of all calls as one JSON object."""
    x = np.array(json.loads(rows), np.float32)
    async with triton.InferenceServerClient(url) as client:
        models = ("vae", ""), ("vae", "1"), ("no", "")
        ready = [await client.is_model_ready(name, version) for name, version in models]
        found: dict[str, Any] = {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model_ready": ready,
            "server": await client.get_server_metadata(),
            "model": await client.get_model_metadata("vae"),
            "version": (await client.get_model_metadata("vae", "1"))["name"],
        }
        for name, is_binary in (("binary", True), ("json", False)):
            tensor = InferInput("x", list(x.shape), "FP32")
            tensor.set_data_from_numpy(x, binary_data=is_binary)
            wanted = [InferRequestedOutput(each, binary_data=is_binary) for each in ("mean", "score", "is_anomaly")]
            result = await client.infer("vae", [tensor], outputs=wanted, request_id="7", model_version="1")
            found[name] = {each.name(): result.as_numpy(each.name()).tolist() for each in wanted}
            found[name]["id"] = result.get_response()["id"]
        latents = InferInput("z", [1, 16], "FP32")
        latents.set_data_from_numpy(np.zeros((1, 16), np.float32))
        found["decode"] = (await client.infer("vae:decode", [latents])).as_numpy("x_hat").tolist()
        sample = await client.infer("vae:sample", [], parameters={"seed": 5, "n": 2})
        found["sample"] = sample.as_numpy("x").tolist()
        latents = InferInput("z", [2, 2], "FP32")
        latents.set_data_from_numpy(np.zeros((2, 2), np.float32))
        levels = InferInput("b", [2, 1], "BYTES")
        found["conditions"] = {
            "parameter": (await client.infer("kinds:decode", [latents], parameters={"condition": '{"b": "1"}'}))
            .as_numpy("x_hat")
            .tolist()
        }
        for form, is_binary in (("binary", True), ("json", False)):
            levels.set_data_from_numpy(np.array([["0"], ["1"]], object), binary_data=is_binary)
            answer = await client.infer("kinds:decode", [latents, levels])
            found["conditions"][form] = answer.as_numpy("x_hat").tolist()
        try:
            await client.infer("vae", [latents])
        except InferenceServerException as error:
            found["error"] = [error.status(), error.message()]
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
