"""Fixtures: small models, a server of them, and each way to call it."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from elbo.client import AsyncClient, Client
from service.app import create_app
from service.settings import Settings
from tests.conftest import made_once
from tests.data import values
from tests.service.groups import train_group_models
from tests.service.hosts import host_table
from tests.service.running import running
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.table import read_table
from training.train import train

Call = Callable[..., Any]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with PCAs: digits (with labels), hosts (a table), rows and windows (groups in time)."""

    def make(root: Path) -> None:
        train_group_models(root)
        for name, table in (("digits", read_table("digits")), ("hosts", host_table())):
            config = TrainConfig(model="pca", name=name, latents=3)
            train(config, table, root / "artifacts", RecordingReporter())

    return made_once("artifacts-of-clients", make, tmp_path_factory) / "artifacts"


@pytest.fixture(scope="session")
def digits() -> np.ndarray:
    """Return the digits, float32 [1797, 64] in [0, 1]."""
    return values(read_table("digits"))


@pytest.fixture(scope="module")
def plain(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a plain HTTP client of a running server, whose default model is digits."""
    options = Settings(
        artifacts=models,
        default_model="digits",
        state=tmp_path_factory.mktemp("state"),
        log_level="warning",
        backend="torchscript",
    )
    app = create_app(options)
    with running(app, app.state.protocol) as client:
        yield client


@pytest.fixture(scope="module")
def address(plain: httpx.Client) -> str:
    """Return the address of the server of `plain`."""
    return str(plain.base_url)


@pytest.fixture(params=["sync", "async", "sync over httpx", "async over httpx"])
def call(request: pytest.FixtureRequest, address: str) -> Call:
    """Return a function that calls a method of a client: `call("encode", rows, model="digits")`.

    The clients are the sync and the async one, each with its own transport and with that of httpx.
    """
    over_httpx = request.param.endswith("over httpx")

    def call_sync(method: str, /, *arguments: Any, **options: Any) -> Any:
        with Client(address, transport=httpx.HTTPTransport() if over_httpx else None) as client:
            return getattr(client, method)(*arguments, **options)

    async def call_async(method: str, /, *arguments: Any, **options: Any) -> Any:
        async with AsyncClient(address, transport=httpx.AsyncHTTPTransport() if over_httpx else None) as client:
            return await getattr(client, method)(*arguments, **options)

    def run(method: str, /, *arguments: Any, **options: Any) -> Any:
        return asyncio.run(call_async(method, *arguments, **options))

    return call_sync if request.param.startswith("sync") else run
