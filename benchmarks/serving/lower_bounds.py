"""Measure the minimum cost of a response.

The cost has three parts: the neural network, JSON and HTTP. The network and JSON are each measured alone on one core.
HTTP is measured with an echo server.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import orjson
import simdjson
import torch

from benchmarks.serving.load_generators import Sample
from benchmarks.serving.measurement import Column, Results
from benchmarks.serving.workload import BATCH_SIZES, Array, Workload
from service.inference.operations import reconstruct

TORCHSCRIPT = "TorchScript"
TWIN = "ONNX twin"
JSON = "JSON, parsed by simdjson and written by orjson"


def measure_rates(workload: Workload, rows: int, seconds: float) -> dict[str, float]:
    """Run each part of the work for `seconds`, with batches of `rows`. Return the rows per second of each part."""
    x, x_hat = workload.rows[rows], workload.outputs[rows]
    tensor = torch.from_numpy(x)
    body = orjson.dumps({"inputs": x}, option=orjson.OPT_SERIALIZE_NUMPY)
    parts: dict[str, Callable[[], object]] = {
        TORCHSCRIPT: torch.inference_mode()(lambda: workload.module(tensor)),
        TWIN: lambda: workload.twin.run(reconstruct(False), (x,)),
        JSON: lambda: (_parse(body), orjson.dumps({"outputs": x_hat}, option=orjson.OPT_SERIALIZE_NUMPY)),
    }
    return {name: rows * _calls_per_second(part, seconds) for name, part in parts.items()}


def least_cost(column: Column, results: Results) -> dict[str, float]:
    """Return the minimum processor time of a response for each part of the work, in ms of one core.

    The result is empty if the echo server was not measured. For the neural network, the batch size is the largest
    measured size that the concurrent requests can fill.
    """
    echo: list[Sample] = results.samples.get("echo", {}).get(column, [])
    if not echo or not results.lower_bounds:
        return {}
    batch_size = max(size for size in BATCH_SIZES if size <= column.connections * column.rows)
    network_rate = max(median(results.lower_bounds[name, batch_size]) for name in (TORCHSCRIPT, TWIN))
    json_seconds = 0.0 if column.binary else column.rows / median(results.lower_bounds[JSON, column.rows])
    return {
        "network, the faster of TorchScript and ONNX": 1e3 * column.rows / network_rate,
        "JSON": 1e3 * json_seconds,
        "HTTP, of the echo server": 1e3 * median(sample.cost for sample in echo),
    }


def _parse(body: bytes) -> Array:
    document: Any = simdjson.Parser().parse(body)
    rows = document["inputs"]
    return np.frombuffer(rows.as_buffer(of_type="d"), np.float64).astype(np.float32)


def _calls_per_second(function: Callable[[], object], seconds: float) -> float:
    for _ in range(3):  # TorchScript optimises a module during the second and third call
        function()
    calls, started = 0, perf_counter()
    while perf_counter() < started + seconds:
        function()
        calls += 1
    return calls / (perf_counter() - started)
