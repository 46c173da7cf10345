"""Measure the time per request of Elbo's application and of a plain FastAPI endpoint with the same model.

    python benchmarks/serving/request_cost.py
    python benchmarks/serving/request_cost.py --smoke    # a few rounds

Both applications are called directly through ASGI, without sockets. In each round, each application is called once, so
that changes in the machine's speed affect both alike. The benchmark prints a Markdown table of medians.
"""

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import orjson
import torch
from fastapi import FastAPI
from pydantic import BaseModel

from models.artifact import load
from models.manifest import resolve
from service.app import create_app
from service.settings import Settings
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table
from training.progress import PlainReporter
from training.train import train

FEATURES = 784
ROWS = (1, 32, 256)


class Rows(BaseModel):
    """The request body of the plain endpoint."""

    inputs: list[list[float]]


def create_plain_app(module: Any) -> FastAPI:
    """Return an application written like those in FastAPI's tutorial."""
    app = FastAPI()

    @app.post("/reconstruct")
    async def reconstruct(rows: Rows) -> dict[str, list[Any]]:
        x = torch.tensor(rows.inputs)
        with torch.inference_mode():
            x_hat = module(x)
        return {"outputs": x_hat.tolist(), "errors": (x_hat - x).square().mean(dim=1).tolist()}

    return app


async def post(app: Any, body: bytes) -> tuple[int, bytes]:
    """Send one request to /reconstruct; return the status and the body of the response."""
    headers = [
        (b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
    ]  # fmt: skip
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/reconstruct", "raw_path": b"/reconstruct", "root_path": "", "query_string": b"",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    status, parts = 0, []

    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # the client does not disconnect
        return messages.pop()

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)


async def compare(elbo: Any, plain: Any, body: bytes, rounds: int) -> tuple[float, float]:
    """Check that both applications agree. Return the median time per request of each, in ms."""
    elbo_outputs, plain_outputs = [
        np.array(orjson.loads((await post(app, body))[1])["outputs"]) for app in (elbo, plain)
    ]
    assert np.allclose(elbo_outputs, plain_outputs, atol=1e-5), "the responses of the two applications differ"
    elbo_seconds, plain_seconds = [], []
    for _ in range(rounds):
        elbo_seconds.append(await measure_request(elbo, body))
        plain_seconds.append(await measure_request(plain, body))
    return 1e3 * statistics.median(elbo_seconds), 1e3 * statistics.median(plain_seconds)


async def measure_request(app: Any, body: bytes) -> float:
    """Return the duration of one request in seconds."""
    started = perf_counter()
    status, _ = await post(app, body)
    elapsed = perf_counter() - started
    assert status == 200, f"status {status}"
    return elapsed


async def print_table(root: Path, rounds: int) -> None:
    """Measure all batch sizes and print the table."""
    elbo = create_app(Settings(artifacts=root, log_level="error"))
    plain = create_plain_app(load(resolve(root, "bench")).module)
    print("| rows of 784 | Elbo, ms | plain FastAPI, ms | ratio |\n|---|---|---|---|")
    async with elbo.router.lifespan_context(elbo):
        for rows in ROWS:
            x = np.random.RandomState(0).uniform(size=(rows, FEATURES)).astype(np.float32)
            body = orjson.dumps({"inputs": x}, option=orjson.OPT_SERIALIZE_NUMPY)
            elbo_ms, plain_ms = await compare(elbo, plain, body, max(3, rounds // rows))
            print(f"| {rows} | {elbo_ms:.2f} | {plain_ms:.2f} | {plain_ms / elbo_ms:.1f}x |", flush=True)


def main() -> None:
    """Train a model, then measure both applications."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few rounds, to check that the benchmark works")
    rounds = 30 if parser.parse_args().smoke else 3000
    torch.set_num_threads(1)
    x = np.random.RandomState(1).uniform(size=(500, FEATURES)).astype(np.float32)
    names = [f"x{index}" for index in range(FEATURES)]
    missing = np.zeros(FEATURES, np.int64)
    table = Table(RowStore(x), (FEATURES,), names, [None] * FEATURES, None, None, "uniform noise", missing=missing)
    with tempfile.TemporaryDirectory() as folder:
        train(TrainConfig(model="vae", name="bench", epochs=1), table, Path(folder), PlainReporter())
        asyncio.run(print_table(Path(folder), rounds))


if __name__ == "__main__":
    main()
