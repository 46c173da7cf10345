"""RequestMiddleware in an application that is mounted under a path of another application."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from service.app import create_app
from service.http.admission import WORK_SLOTS
from service.settings import Settings
from tests.service.running import running

BODY = {"inputs": [[0.5] * 64]}


@pytest.fixture
def mounted(artifacts: Path) -> Iterator[httpx.Client]:
    """Yield a client of an application that serves Elbo under /elbo."""
    app = create_app(Settings(artifacts=artifacts, log_level="error"))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):
            yield

    parent = Starlette(routes=[Mount("/elbo", app)], lifespan=lifespan)
    with running(parent) as client:
        client.base_url = client.base_url.join("/elbo")
        yield client


def test_mounted_app_responds_on_every_endpoint_and_counts_requests(mounted: httpx.Client) -> None:
    assert mounted.post("/encode", json=BODY).status_code == 200
    assert mounted.get("/models/vae").json()["name"] == "vae"
    assert mounted.head("/livez").status_code == 200
    text = mounted.get("/metrics").text
    for endpoint in ("/encode", "/models/{reference}", "/livez"):
        assert f'elbo_requests_total{{endpoint="{endpoint}",' in text


def test_mounted_app_gives_problems_for_unknown_paths_and_methods(mounted: httpx.Client) -> None:
    assert mounted.post("/nope").json()["code"] == "not_found"
    refused = mounted.get("/encode")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert mounted.get("/models/nobody").json()["code"] == "model_not_found"


def test_mounted_app_releases_the_work_slot_of_every_request(mounted: httpx.Client) -> None:
    statuses = {mounted.post("/encode", json=BODY).status_code for _ in range(WORK_SLOTS + 10)}
    assert statuses == {200}
