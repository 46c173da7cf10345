"""Fixtures: models that `elbo.fit` has fitted and saved, and a server of them."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

import elbo
from elbo.errors import ElboWarning
from elbo.model import Model
from service.app import create_app
from service.settings import Settings
from tests.data import values
from tests.service.running import running
from training.data.table import read_table

NAMES = ["cpu [%]", "latency [ms]", "errors"]
WINDOW = 5


def metric_rows(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return rows [count, 3] of correlated metrics, in float32."""
    random = np.random.RandomState(seed)
    load = random.standard_normal(count)
    rows = np.column_stack(
        (50 + 10 * load, 200 + 30 * load + 5 * random.standard_normal(count), random.normal(3, 1, count))
    )
    return rows.astype(np.float32)


def series(count: int, seed: int = 0) -> pl.DataFrame:
    """Return rows of two hosts, a row a minute each, in the order of the times."""
    rows = metric_rows(2 * count, seed)
    minutes = np.repeat(np.arange(count), 2)
    return pl.DataFrame(rows, schema=["cpu", "latency", "errors"]).with_columns(
        time=pl.Series(1_700_000_000 + 60 * minutes), host=pl.Series(["a", "b"] * count)
    )


@dataclass(frozen=True)
class Site:
    """An artifact folder, with the models as they were fitted."""

    artifacts: Path
    fitted: dict[str, Model]
    digits: npt.NDArray[np.float32]  # [1797, 8, 8]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Return an artifact folder with four models.

    web is a PCA of three metrics, of which errors is sometimes missing; vae has images; conditional knows the digit of
    an image; hosts judges windows of WINDOW rows.
    """
    root = tmp_path_factory.mktemp("artifacts")
    table = read_table("digits")
    digits = values(table).reshape(-1, 8, 8)
    metrics = metric_rows(600)
    metrics[::7, 2] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ElboWarning)  # few epochs make poor models
        fitted = {
            "web": elbo.fit(metrics, "pca", name="web", feature_names=NAMES, latents=1),
            "vae": elbo.fit(digits, "vae", name="vae", epochs=6, hidden=[32], latents=4, variance=0.05),
            "conditional": elbo.fit(
                digits,
                "ae",
                name="conditional",
                labels=table.labels,
                condition="label",
                epochs=3,
                hidden=[32],
                latents=4,
            ),
            "hosts": elbo.fit(
                series(400), "pca", name="hosts", time="time", group="host", window=WINDOW, drop=["errors"], latents=2
            ),
        }
    for model in fitted.values():
        model.save(root)
    return Site(root, fitted, digits)


@pytest.fixture(scope="session")
def client(site: Site) -> Iterator[httpx.Client]:
    """Yield a client of a server of the models, which runs them on TorchScript."""
    settings = Settings(artifacts=site.artifacts, log_level="warning", backend="torchscript", default_model="web")
    with running(create_app(settings)) as http:
        yield http
