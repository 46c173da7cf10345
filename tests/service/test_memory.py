"""Batches and memory: limits in bytes, a device that has too little, models that are no longer served."""

import asyncio
import gc
import shutil
import socket
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import torch
import uvicorn

from models.artifact import Artifact
from service.app import create_app
from service.http.protocol import Protocol
from service.inference.backend_selection import select_backend
from service.inference.backends import TorchScriptBackend
from service.inference.batcher import Batcher
from service.inference.calibration import TorchScriptCalibration
from service.inference.model_loader import ModelLoader
from service.inference.operations import Operation, reconstruct
from service.inference.registry import ModelRegistry
from service.settings import Settings
from tests.service.batching import BareModel, Batches, random_rows, reconstruction, running_batcher


def small_memory(error: type[RuntimeError], text: str, most: int) -> tuple[Operation, list[int]]:
    """A reconstruction for which more than `most` rows are too many, as a GPU would say it; and what was tried."""
    tried: list[int] = []

    def run(module: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        tried.append(len(x))
        if len(x) > most:
            raise error(text)
        return (module(x),)

    return Operation("reconstruct", run), tried


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (RuntimeError, "The following operation failed in the TorchScript interpreter. CUDA out of memory"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_what_does_not_fit_runs_in_halves_and_is_not_tried_again(
    vae: Artifact, error: type[RuntimeError], text: str
) -> None:
    model = BareModel(select_backend(vae, requested="torchscript").backend)
    operation, tried = small_memory(error, text, most=7)

    async def scenario(batcher: Batcher) -> None:
        answers = await asyncio.gather(*[batcher.run(model, operation, random_rows(n, seed=n)) for n in (5, 20, 3)])
        for n, ran in zip((5, 20, 3), answers, strict=True):
            np.testing.assert_allclose(ran.outputs[0], reconstruction(model, random_rows(n, seed=n)), atol=1e-6)
        tried.clear()
        ran = await batcher.run(model, operation, random_rows(40))
        np.testing.assert_allclose(ran.outputs[0], reconstruction(model, random_rows(40)), atol=1e-6)
        assert max(tried) == 7
        assert sum(tried) == 40

    asyncio.run(in_engine(scenario))


async def in_engine(scenario: Any) -> None:
    async with running_batcher() as batcher:
        await scenario(batcher)
        assert batcher.pending_rows == 0


def test_one_row_that_does_not_fit_fails_and_takes_nobody_with_it(vae: Artifact) -> None:
    model = BareModel(select_backend(vae, requested="torchscript").backend)

    def run(module: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        if (x > 5).any():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (module(x),)

    async def scenario(batcher: Batcher) -> None:
        operation = Operation("greedy", run)
        asked = [random_rows(2, seed=1), random_rows(1) + 9, random_rows(3, seed=3)]
        first, second, third = await asyncio.gather(
            *[batcher.run(model, operation, x) for x in asked], return_exceptions=True
        )
        assert isinstance(second, torch.OutOfMemoryError)
        for x, ran in ((asked[0], first), (asked[2], third)):
            assert not isinstance(ran, BaseException)
            np.testing.assert_allclose(ran.outputs[0], reconstruction(model, x), atol=1e-6)

    asyncio.run(in_engine(scenario))


def test_batches_keep_to_their_size_in_bytes(vae: Artifact) -> None:
    model = BareModel(select_backend(vae, requested="torchscript").backend, row_bytes=256)
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches, max_batch_bytes=5 * 256) as batcher:
            operation = reconstruct(gaps=False)
            await asyncio.gather(*[batcher.run(model, operation, random_rows(n)) for n in (2, 2, 2, 12)])

    asyncio.run(scenario())
    assert max(size for _, size in batches) <= 5
    assert sum(size for _, size in batches) == 18


def test_bfloat16_says_how_far_it_is_from_float32(vae: Artifact, digits: np.ndarray) -> None:
    exact, rounded = select_backend(vae, requested="torchscript"), select_backend(vae, precision="bfloat16")
    assert (rounded.backend.name, rounded.backend.precision) == ("torchscript", "bfloat16")
    assert exact.errors == {}
    assert 1e-6 < rounded.errors["forward"] < 0.05
    operation = reconstruct(gaps=False)
    (there, _), (here, _) = (selection.backend.run(operation, (digits[:50],)) for selection in (exact, rounded))
    assert here.dtype == np.float32
    assert 0 < np.abs(here - there).max() < 0.1 * np.abs(there).max()


def test_every_size_of_batch_has_run_before_a_model_serves(artifacts: Path) -> None:
    registry = ModelRegistry(artifacts, ModelLoader(max_batch_rows=300), default_model="vae", keep_versions=1)
    registry.refresh()
    latency = registry.catalogue.find("vae").backend.latency
    for operation in ("encode", "decode", "reconstruct", "anomaly", "sample"):
        for count in (1, 2, 5, 17, 100, 300):
            assert 0 < latency.expected(operation, count) < np.inf


@pytest.mark.parametrize("backend", ["torchscript", "onnx"])
def test_a_model_that_is_replaced_is_freed(artifacts: Path, tmp_path: Path, backend: str) -> None:
    """Without the collector, which leaves alone what was there when the server started."""
    shutil.copytree(artifacts / "vae", tmp_path / "vae")
    registry = ModelRegistry(tmp_path, ModelLoader(backend=backend), default_model="vae", keep_versions=1)
    registry.refresh()
    served = registry.catalogue.find("vae")
    watched: list[weakref.ref[Any]] = [weakref.ref(served), weakref.ref(served.backend)]
    module = served.backend.module
    watched.append(weakref.ref(module))
    del served, module
    gc.disable()
    try:
        shutil.copytree(artifacts / "vae" / "1", tmp_path / "vae" / "2")
        registry.refresh()
        assert registry.catalogue.find("vae").version == 2
        assert [reference() for reference in watched] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("path", ["/reconstruct", "/anomaly", "/encode"])
def test_a_request_leaves_nothing_for_the_collector(artifacts: Path, digits: np.ndarray, path: str) -> None:
    """What goes in circles would stay until Python looks for it: under load, thousands of requests."""
    body = orjson.dumps({"inputs": digits[:1].tolist()})
    statuses = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    async def scenario() -> int:
        app = create_app(Settings(artifacts=artifacts, default_model="vae"))
        async with app.router.lifespan_context(app):
            for turn in range(20):
                if turn == 10:  # by now everything that is kept once is there
                    gc.collect()
                    gc.disable()
                scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
                await app(scope, receive, send)
            return gc.collect()

    try:
        assert asyncio.run(scenario()) < 10  # of ten requests
    finally:
        gc.enable()
    assert statuses.count(200) == 20


def test_a_body_in_one_piece_is_not_copied_on_its_way(artifacts: Path) -> None:
    came, read = [], []

    class Recorded(Protocol):
        def on_body(self, body: bytes) -> None:
            came.append(body)
            super().on_body(body)

    async def app(_: Any, receive: Any, send: Any) -> None:
        read.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    http: Any = partial(Recorded, **create_app(Settings(artifacts=artifacts)).state.protocol.keywords)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=http, lifespan="off", log_config=None, access_log=False))

    async def scenario() -> None:
        serving = asyncio.create_task(server.serve([listener]))
        async with httpx.AsyncClient() as client:
            for _ in range(2):  # the second on the same connection
                port = listener.getsockname()[1]
                assert (await client.post(f"http://127.0.0.1:{port}/", content=b"x" * 5000)).status_code == 204
        server.should_exit = True
        await serving

    asyncio.run(scenario())
    assert [len(body) for body in read] == [5000, 5000]
    assert all(mine is theirs for mine, theirs in zip(read, came, strict=True))


def test_what_a_backend_is_made_from_keeps_its_pace() -> None:
    cpu = torch.device("cpu")
    backend = TorchScriptBackend(None, cpu, TorchScriptCalibration(None, cpu))  # type: ignore[arg-type] # no model runs
    backend.limit_rows(64)
    backend.limit_rows(100)
    assert backend.max_rows == 32
