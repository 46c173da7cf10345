"""Call every method of KServe's REST client, and print what they return as JSON. See triton_sync.py."""

import asyncio
import json
import sys
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


async def main(server: str, rows: str) -> None:
    """Print the results of all calls as one JSON object."""
    x = np.array(json.loads(rows), np.float32)
    url = f"http://{server}"
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        found: dict[str, Any] = {
            "live": await client.is_server_live(url),
            "ready": await client.is_server_ready(url),
            "model_ready": [await client.is_model_ready(url, name) for name in ("vae", "vae", "no")],
        }
        for name, is_binary in (("binary", True), ("json", False)):
            tensor = InferInput("x", list(x.shape), "FP32")
            tensor.set_data_from_numpy(x, binary_data=is_binary)
            wanted = [RequestedOutput(each, {"binary_data": is_binary}) for each in ("mean", "score", "is_anomaly")]
            request = InferRequest(
                "vae", [tensor], "7", parameters={"observe": False}, request_outputs=wanted, model_version="1"
            )
            result = await client.infer(url, request, "vae")
            found[name] = {each.name: each.as_numpy().tolist() for each in result.outputs}
            found[name]["id"] = result.id
        latents = InferInput("z", [1, 16], "FP32", data=[[0.0] * 16])
        decoded = await client.infer(url, InferRequest("vae:decode", [latents]), "vae:decode")
        found["decode"] = decoded.outputs[0].as_numpy().tolist()
        drawn = InferRequest("vae:sample", [], parameters={"seed": 5, "n": 2})
        found["sample"] = (await client.infer(url, drawn, "vae:sample")).outputs[0].as_numpy().tolist()
        latents = InferInput("z", [2, 2], "FP32", data=[[0.0] * 2] * 2)
        one = InferRequest("kinds:decode", [latents], parameters={"condition": '{"b": "1"}'})
        answer = await client.infer(url, one, "kinds:decode")
        found["conditions"] = {"parameter": answer.outputs[0].as_numpy().tolist()}
        for form, is_binary in (("binary", True), ("json", False)):
            levels = InferInput("b", [2, 1], "BYTES")
            levels.set_data_from_numpy(np.array([["0"], ["1"]], object), binary_data=is_binary)
            latents = InferInput("z", [2, 2], "FP32")
            latents.set_data_from_numpy(np.zeros((2, 2), np.float32), binary_data=is_binary)
            answer = await client.infer(url, InferRequest("kinds:decode", [latents, levels]), "kinds:decode")
            found["conditions"][form] = answer.outputs[0].as_numpy().tolist()
        try:
            await client.infer(url, InferRequest("vae", [latents]), "vae")
        except httpx.HTTPStatusError as error:
            found["error"] = [str(error.response.status_code), str(error)]
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
