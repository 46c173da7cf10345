"""What no server can do without, measured alone on one core: the network, JSON, and HTTP as the echo has it."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import orjson
import simdjson
import torch

from benchmarks.serving.load import Sample
from benchmarks.serving.measures import Column, Results
from benchmarks.serving.stage import ROWS, Array, Stage
from service.inference.operations import reconstruct

TORCHSCRIPT, TWIN, JSON = "TorchScript", "its ONNX twin", "JSON, read by simdjson and written by orjson"


def rates(stage: Stage, rows: int, seconds: float) -> dict[str, float]:
    """Rows a second, `rows` at a time, of each work in this process."""
    x, answer = stage.rows[rows], stage.answers[rows]
    tensor = torch.from_numpy(x)
    body = orjson.dumps({"inputs": x}, option=orjson.OPT_SERIALIZE_NUMPY)
    works: dict[str, Callable[[], object]] = {
        TORCHSCRIPT: torch.inference_mode()(lambda: stage.module(tensor)),
        TWIN: lambda: stage.twin.run(reconstruct(False), (x,)),
        JSON: lambda: (_read(body), orjson.dumps({"outputs": answer}, option=orjson.OPT_SERIALIZE_NUMPY)),
    }
    return {name: rows * _rate(work, seconds) for name, work in works.items()}


def least(column: Column, results: Results) -> dict[str, float]:
    """Milliseconds of one core that an answer takes at least, by what takes them; empty where the echo is missing.

    Requests that come together are computed together, as many rows as the benchmark measures.
    """
    echo: list[Sample] = results.samples.get("echo", {}).get(column, [])
    if not echo or not results.limits:
        return {}
    together = max(size for size in ROWS if size <= column.connections * column.rows)
    networks = [median(results.limits[name, together]) for name in (TORCHSCRIPT, TWIN)]
    found = {"the network, by the faster of the two": 1e3 * column.rows / max(networks)}
    found["JSON"] = 0.0 if column.binary else 1e3 * column.rows / median(results.limits[JSON, column.rows])
    found["HTTP, as the echo"] = 1e3 * median(sample.cost for sample in echo)
    return found


def _read(body: bytes) -> Array:
    document: Any = simdjson.Parser().parse(body)
    rows = document["inputs"]
    return np.frombuffer(rows.as_buffer(of_type="d"), np.float64).astype(np.float32)


def _rate(work: Callable[[], object], seconds: float) -> float:
    for _ in range(3):  # TorchScript optimises on its second and third call
        work()
    done, started = 0, perf_counter()
    while perf_counter() < started + seconds:
        work()
        done += 1
    return done / (perf_counter() - started)
