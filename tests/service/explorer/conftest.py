"""Fixtures: a service with the session's models and two more models, and the explorer in a browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from models.manifest import names
from service.app import create_app
from service.settings import Settings
from tests.service.explorer.browser import ExplorerPage, chromium
from tests.service.hosts import host_table
from tests.service.running import running
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.table import read_table
from training.train import train


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Yield headless Chromium, started once per module.

    The browser closes after each module, because its event loop occupies the thread that other modules need.
    """
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def site_url(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a service with the session's models, a linear autoencoder and a private model."""
    root = tmp_path_factory.mktemp("explorer")
    for name in names(artifacts):  # not `.versions`, which the new models would change
        (root / name).symlink_to(artifacts / name)
    train(TrainConfig(model="ae", name="linear", hidden=(), epochs=15), read_table("digits"), root, RecordingReporter())
    train(
        TrainConfig(model="ae", name="secret", latents=2, epochs=2, private=True),
        host_table(),
        root,
        RecordingReporter(),
    )
    with running(create_app(Settings(artifacts=root, log_level="error", backend="torchscript"))) as client:
        yield str(client.base_url)


@pytest.fixture
def explorer(browser: Browser, site_url: str) -> Iterator[ExplorerPage]:
    """Yield the explorer in a new browser context. The test fails on any error or warning in the console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    explorer = ExplorerPage(context.new_page(), site_url)
    yield explorer
    context.close()
    assert explorer.errors == []
