"""Memory: batches that are too large for the device, and objects that must be freed without the garbage collector."""

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
from tests.plain_http import NO_AUTHORITIES
from tests.service.batching import BareModel, random_rows, reconstruction, running_batcher

pytestmark = pytest.mark.slow


def reconstruction_with_small_memory(
    error: type[RuntimeError], message: str, max_rows: int
) -> tuple[Operation, list[int]]:
    """Return a reconstruction that runs out of memory above `max_rows` rows, and the list of its batch sizes."""
    tried: list[int] = []

    def run(module: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        tried.append(len(x))
        if len(x) > max_rows:
            raise error(message)
        return (module(x),)

    return Operation("reconstruct", run), tried


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (RuntimeError, "The following operation failed in the TorchScript interpreter. CUDA out of memory"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_batch_that_exceeds_device_memory_is_halved_and_limits_the_size_of_later_batches(
    vae: Artifact, error: type[RuntimeError], message: str
) -> None:
    model = BareModel(select_backend(vae, requested="torchscript").backend)
    operation, tried = reconstruction_with_small_memory(error, message, max_rows=7)

    async def scenario(batcher: Batcher) -> None:
        results = await asyncio.gather(*[batcher.run(model, operation, random_rows(n, seed=n)) for n in (5, 20, 3)])
        for n, result in zip((5, 20, 3), results, strict=True):
            np.testing.assert_allclose(result.outputs[0], reconstruction(model, random_rows(n, seed=n)), atol=1e-6)
        tried.clear()
        result = await batcher.run(model, operation, random_rows(40))
        np.testing.assert_allclose(result.outputs[0], reconstruction(model, random_rows(40)), atol=1e-6)
        assert max(tried) == 7
        assert sum(tried) == 40

    asyncio.run(with_batcher(scenario))


async def with_batcher(scenario: Any) -> None:
    async with running_batcher() as batcher:
        await scenario(batcher)
        assert batcher.pending_rows == 0


def test_row_that_exceeds_device_memory_does_not_make_other_requests_fail(vae: Artifact) -> None:
    model = BareModel(select_backend(vae, requested="torchscript").backend)

    def run(module: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        if (x > 5).any():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (module(x),)

    async def scenario(batcher: Batcher) -> None:
        operation = Operation("greedy", run)
        inputs = [random_rows(2, seed=1), random_rows(1) + 9, random_rows(3, seed=3)]
        first, second, third = await asyncio.gather(
            *[batcher.run(model, operation, x) for x in inputs], return_exceptions=True
        )
        assert isinstance(second, torch.OutOfMemoryError)
        for x, result in ((inputs[0], first), (inputs[2], third)):
            assert not isinstance(result, BaseException)
            np.testing.assert_allclose(result.outputs[0], reconstruction(model, x), atol=1e-6)

    asyncio.run(with_batcher(scenario))


def test_bfloat16_backend_reports_how_far_its_outputs_differ_from_float32(vae: Artifact, digits: np.ndarray) -> None:
    exact, rounded = select_backend(vae, requested="torchscript"), select_backend(vae, precision="bfloat16")
    assert (rounded.backend.name, rounded.backend.precision) == ("torchscript", "bfloat16")
    assert exact.errors == {}
    assert 1e-6 < rounded.errors["forward"] < 0.05
    operation = reconstruct(gaps=False)
    (expected, _), (outputs, _) = (selection.backend.run(operation, (digits[:50],)) for selection in (exact, rounded))
    assert outputs.dtype == np.float32
    assert 0 < np.abs(outputs - expected).max() < 0.1 * np.abs(expected).max()


def test_warm_up_measures_the_latency_of_every_batch_size(artifacts: Path) -> None:
    registry = ModelRegistry(artifacts, ModelLoader(max_batch_rows=300), default_model="vae", keep_versions=1)
    registry.refresh()
    latency = registry.catalogue.find("vae").backend.latency
    for operation in ("encode", "decode", "reconstruct", "anomaly", "sample"):
        for count in (1, 2, 5, 17, 100, 300):
            assert 0 < latency.expected(operation, count) < np.inf


@pytest.mark.parametrize("backend", ["torchscript", "onnx"])
def test_replaced_model_is_freed_without_the_garbage_collector(artifacts: Path, tmp_path: Path, backend: str) -> None:
    """The server calls gc.freeze at start-up, and the garbage collector never frees frozen objects."""
    shutil.copytree(artifacts / "vae", tmp_path / "vae")
    registry = ModelRegistry(tmp_path, ModelLoader(backend=backend), default_model="vae", keep_versions=1)
    registry.refresh()
    served = registry.catalogue.find("vae")
    references: list[weakref.ref[Any]] = [weakref.ref(served), weakref.ref(served.backend)]
    module = served.backend.module
    references.append(weakref.ref(module))
    del served, module
    gc.disable()
    try:
        shutil.copytree(artifacts / "vae" / "1", tmp_path / "vae" / "2")
        registry.refresh()
        assert registry.catalogue.find("vae").version == 2
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("path", ["/reconstruct", "/anomaly", "/encode"])
def test_request_leaves_no_reference_cycles(artifacts: Path, digits: np.ndarray, path: str) -> None:
    """Reference cycles of thousands of requests would stay in memory until the garbage collector runs."""
    body = orjson.dumps({"inputs": digits[:1].tolist()})
    statuses = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    async def scenario() -> int:
        app = create_app(Settings(artifacts=artifacts, default_model="vae"))
        async with app.router.lifespan_context(app):
            for number in range(20):
                if number == 10:  # by now, caches and other lasting objects exist
                    gc.collect()
                    gc.disable()
                headers = [(b"host", b"elbo"), (b"content-type", b"application/json")]
                scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
                await app(scope, receive, send)
            return gc.collect()

    try:
        assert asyncio.run(scenario()) < 10  # unreachable objects after ten requests
    finally:
        gc.enable()
    assert statuses.count(200) == 20


def test_body_is_not_copied_if_it_arrives_in_one_piece(artifacts: Path) -> None:
    parsed: list[bytes] = []  # bodies that the protocol parsed
    received: list[bytes] = []  # bodies that the app received

    class RecordingProtocol(Protocol):
        def on_body(self, body: bytes) -> None:
            parsed.append(body)
            super().on_body(body)

    async def app(_: Any, receive: Any, send: Any) -> None:
        received.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    http: Any = partial(RecordingProtocol, **create_app(Settings(artifacts=artifacts)).state.protocol.keywords)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=http, lifespan="off", log_config=None, access_log=False))

    async def scenario() -> None:
        serving = asyncio.create_task(server.serve([listener]))
        async with httpx.AsyncClient(verify=NO_AUTHORITIES) as client:
            for _ in range(2):  # the second request uses the same connection
                port = listener.getsockname()[1]
                assert (await client.post(f"http://127.0.0.1:{port}/", content=b"x" * 5000)).status_code == 204
        server.should_exit = True
        await serving

    asyncio.run(scenario())
    assert [len(body) for body in received] == [5000, 5000]
    assert all(body is parsed_body for body, parsed_body in zip(received, parsed, strict=True))


def test_backend_remembers_the_smallest_batch_that_exceeded_memory() -> None:
    cpu = torch.device("cpu")
    backend = TorchScriptBackend(None, cpu, TorchScriptCalibration(None, cpu, 0.01))  # type: ignore[arg-type] # no model runs
    backend.limit_rows(64)
    backend.limit_rows(100)
    assert backend.max_rows == 32
