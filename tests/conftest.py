"""Fixtures for all tests, folders that several processes share, and `require`, which skips a test on some machines."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # the threads of several processes would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("elbo", deadline=None)  # no time limit: a busy machine must not fail a test
settings.load_profile("elbo")


def require(condition: object, reason: str) -> None:
    """Skip the calling test if `condition` is false. In CI, fail the test instead: nobody would notice a skip."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"a test that CI must run cannot run: {reason}")
    pytest.skip(reason)


SLOW_FIXTURES = {
    "artifacts",
    "browser",
    "conditional_models",
    "demonstration",
}  # fixtures that train models or start a browser


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a slow fixture, directly or through another fixture, as slow, and put slow files first.

    The two processes of `make test` take one file after another. If a slow file came last, one process would wait for
    the other.
    """
    for item in items:
        if isinstance(item, pytest.Function) and SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)  # a stable sort: the tests of a file stay together


@pytest.fixture(autouse=True, scope="module")
def plots_only_if_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let `elbo train` in the process of the test draw no plots, unless the module has the mark `plots`.

    Drawing takes longer than training a small model. Only modules with slow tests train.
    """
    items = [item for item in request.session.items if item.path == request.path]
    if request.node.get_closest_marker("plots") or not any(item.get_closest_marker("slow") for item in items):
        yield
        return
    from training.reports import plots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "PLOTS", {})
        yield


def made_once(name: str, make: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder `name`, which the function `make` has filled.

    If several processes run the tests, they share the folder. The first process fills it, and the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # base.parent is the same for all workers
    folder = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = tmp_path_factory.mktemp(f"unfinished-{name}")
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with the models pca, ae, vae and linear of `elbo demo`."""
    from tests.training.reporters import RecordingReporter
    from training.config import AUTO_KINDS, DEMONSTRATIONS
    from training.data.table import read_table
    from training.train import train

    def make(root: Path) -> None:
        for source, config in DEMONSTRATIONS:
            if config.name in (*AUTO_KINDS, "linear"):
                train(config, read_table(source), root, RecordingReporter())

    return made_once("demonstration", make, tmp_path_factory)


@pytest.fixture(scope="session")
def conditional_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the artifacts of three models, and with table.csv.

    - digits: a VAE of the digits. Its condition is the label of a digit.
    - kinds: an autoencoder of table.csv. Its conditions are the columns kind and shift.
    - plain: a PCA of the digits, without conditions.
    """
    from tests.training.conditions import train_conditional_models

    return made_once("conditional-models", train_conditional_models, tmp_path_factory)
