"""What a request costs in the service's own process, against a plain FastAPI endpoint around the same module.

Both applications are called directly as ASGI, without a socket, one after the other in each round, so that the mood of
the machine hits both. Prints a Markdown table of medians. `--smoke` runs a few rounds only.
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
from training.data import row_store as table_rows
from training.data.table import Table
from training.progress import PlainReporter
from training.train import train

FEATURES = 784
ROWS = (1, 32, 256)


class Rows(BaseModel):
    """The body of the plain endpoint."""

    inputs: list[list[float]]


def plain_app(module: Any) -> FastAPI:
    """What FastAPI's tutorial would have one write."""
    app = FastAPI()

    @app.post("/reconstruct")
    async def reconstruct(rows: Rows) -> dict[str, list[Any]]:
        x = torch.tensor(rows.inputs)
        with torch.inference_mode():
            x_hat = module(x)
        return {"outputs": x_hat.tolist(), "errors": (x_hat - x).square().mean(dim=1).tolist()}

    return app


async def post(app: Any, body: bytes) -> tuple[int, bytes]:
    """One request to /reconstruct: status and body of the answer."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/reconstruct", "raw_path": b"/reconstruct", "root_path": "", "query_string": b"",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    status, parts = 0, []

    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # the client stays
        return messages.pop()

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)


async def compare(elbo: Any, plain: Any, body: bytes, rounds: int) -> tuple[float, float]:
    """Median milliseconds of both, after checking that they answer alike."""
    ours, theirs = [np.array(orjson.loads((await post(app, body))[1])["outputs"]) for app in (elbo, plain)]
    assert np.allclose(ours, theirs, atol=1e-5), "the two applications disagree"
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(rounds):
        for index, app in enumerate((elbo, plain)):
            seconds[index].append(await timed(app, body))
    return 1e3 * statistics.median(seconds[0]), 1e3 * statistics.median(seconds[1])


async def timed(app: Any, body: bytes) -> float:
    """Seconds that one request takes; it must succeed."""
    started = perf_counter()
    status, _ = await post(app, body)
    elapsed = perf_counter() - started
    assert status == 200, status
    return elapsed


async def run(root: Path, rounds: int) -> None:
    """The table."""
    elbo = create_app(Settings(artifacts=root, log_level="error"))
    plain = plain_app(load(resolve(root, "bench")).module)
    print("| rows of 784 | Elbo, ms | plain FastAPI, ms | ratio |\n|---|---|---|---|")
    async with elbo.router.lifespan_context(elbo):
        for rows in ROWS:
            x = np.random.RandomState(0).uniform(size=(rows, FEATURES)).astype(np.float32)
            body = orjson.dumps({"inputs": x}, option=orjson.OPT_SERIALIZE_NUMPY)
            ours, theirs = await compare(elbo, plain, body, max(3, rounds // rows))
            print(f"| {rows} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f}x |", flush=True)


def main() -> None:
    """Train a model to serve, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a few rounds, to see that it works")
    rounds = 30 if parser.parse_args().smoke else 3000
    torch.set_num_threads(1)
    x = np.random.RandomState(1).uniform(size=(500, FEATURES)).astype(np.float32)
    names = [f"x{index}" for index in range(FEATURES)]
    missing = np.zeros(FEATURES, np.int64)
    table = Table(
        table_rows.RowStore(x), (FEATURES,), names, [None] * FEATURES, None, None, "uniform noise", missing=missing
    )
    with tempfile.TemporaryDirectory() as folder:
        train(TrainConfig(model="vae", name="bench", epochs=1), table, Path(folder), PlainReporter())
        asyncio.run(run(Path(folder), rounds))


if __name__ == "__main__":
    main()
