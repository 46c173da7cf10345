"""Fixtures: small trained models, and the application that serves them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI

from models.artifact import Artifact, load
from service.app import create_app
from service.settings import Settings
from tests.conftest import made_once
from tests.data import values
from tests.service.groups import train_group_models
from tests.service.hosts import host_table
from tests.service.running import running
from tests.training.reporters import RecordingReporter
from training.config import AUTO_KINDS, TrainConfig
from training.data.table import read_table
from training.train import train


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with four models.

    pca, ae and vae are trained briefly on digits. hosts is a PCA of a table.
    """

    def make(root: Path) -> None:
        digits = read_table("digits")
        for kind in AUTO_KINDS:
            train(TrainConfig(model=kind, name=kind, epochs=15, hidden=(48,)), digits, root, RecordingReporter())
        train(TrainConfig(model="pca", name="hosts", latents=2), host_table(), root, RecordingReporter())

    return made_once("artifacts-of-service", make, tmp_path_factory)


@pytest.fixture(scope="session")
def pca_only(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with the model pca of `artifacts`. A server loads it faster than four models."""
    root = tmp_path_factory.mktemp("pca-only")
    shutil.copytree(artifacts / "pca", root / "pca")
    return root


@pytest.fixture(scope="session")
def vae_only(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with the model vae of `artifacts`."""
    root = tmp_path_factory.mktemp("vae-only")
    shutil.copytree(artifacts / "vae", root / "vae")
    return root


@pytest.fixture(scope="session")
def group_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with the models of `train_group_models`."""
    return made_once("artifacts-of-groups", train_group_models, tmp_path_factory) / "artifacts"


@pytest.fixture(scope="session")
def digits() -> np.ndarray:
    """Return the digits, float32 [1797, 64] in [0, 1]."""
    return values(read_table("digits"))


@pytest.fixture(scope="session")
def vae(artifacts: Path) -> Artifact:
    """Return the VAE, loaded outside the service to compute the expected values of responses."""
    torch.set_num_threads(1)
    return load(artifacts / "vae" / "1" / "model.pt")


@pytest.fixture(scope="session")
def app(artifacts: Path) -> FastAPI:
    """Return an application that serves the models of `artifacts` and scans the folder only at start-up."""
    return create_app(
        Settings(
            artifacts=artifacts,
            max_rows=300,
            max_body_bytes=2**20,
            poll_seconds=3600,
            log_level="warning",
            backend="torchscript",
        )
    )


@pytest.fixture(scope="module")
def hosts(artifacts: Path) -> Iterator[httpx.Client]:
    """Yield a client whose default model is `hosts`."""
    options = Settings(artifacts=artifacts, default_model="hosts", log_level="warning", backend="torchscript")
    with running(create_app(options)) as client:
        yield client


@pytest.fixture(scope="session")
def client(app: FastAPI) -> Iterator[httpx.Client]:
    """Return a client of the running application."""
    with running(app) as client:
        yield client
