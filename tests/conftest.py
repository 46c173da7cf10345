"""Fixtures for all tests, folders that several processes share, and `require`, which skips a test on some machines."""

import fcntl
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
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


slow_files: set[Path] = set()  # files with a test that has the mark slow


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a slow fixture, directly or through another fixture, as slow, and put slow files first.

    The processes of `make test` take one file after another. If a slow file came last, the other processes would wait
    for it.
    """
    for item in items:
        if isinstance(item, pytest.Function) and SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    slow_files.update(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: item.path not in slow_files)  # a stable sort: the tests of a file stay together


def pytest_collection_finish() -> None:
    """Freeze the ten thousand collected tests, which stay until the end, so that the garbage collector skips them."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def plots_only_if_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let training draw no plots, unless the module has the mark `plots`.

    Drawing takes longer than training a small model. Only modules with slow tests train.
    """
    if request.node.get_closest_marker("plots") or request.path not in slow_files:
        yield
        return
    from training.reports import plots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "PLOTS", {})  # for tests that call `train`
        patch.setenv("ELBO_PLOTS", "false")  # for tests that run `elbo train`, in this process or in another
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

    def make(folder: Path, name: str) -> None:
        source, config = next(each for each in DEMONSTRATIONS if each[1].name == name)
        train(config, read_table(source), folder, RecordingReporter())

    names = [*AUTO_KINDS, "linear"]
    if int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 2:
        names.reverse()  # two processes train the models together, from both ends of the list
    parts = [made_once(f"demonstration-{name}", partial(make, name=name), tmp_path_factory) for name in names]

    def gather(folder: Path) -> None:
        for part in parts:
            shutil.copytree(part, folder, dirs_exist_ok=True)

    return made_once("demonstration", gather, tmp_path_factory)


@pytest.fixture(scope="session")
def conditional_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the artifacts of three models, and with table.csv.

    - digits: a VAE of the digits. Its condition is the label of a digit.
    - kinds: an autoencoder of table.csv. Its conditions are the columns kind and shift.
    - plain: a PCA of the digits, without conditions.
    """
    from tests.training.conditions import train_conditional_models

    return made_once("conditional-models", train_conditional_models, tmp_path_factory)
