"""What every test may use: the rule for things that a machine may lack."""

import os
from pathlib import Path

import pytest


def require(condition: object, reason: str) -> None:
    """Skip the calling test unless `condition` holds; in CI, where a skip would hide a failure, fail it."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"in CI nothing may be missing: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact folder with the models that `elbo demo` trains, on the digits."""
    from tests.training.reporters import RecordingReporter
    from training.config import DEMONSTRATION
    from training.data.table import read_table
    from training.train import train

    root = tmp_path_factory.mktemp("artifacts")
    for config in DEMONSTRATION:
        train(config, read_table("digits"), root, RecordingReporter())
    return root
