"""Count the mutants that the tests kill (`make mutants`).

A mutant is the code with one small change, after which a test should fail.

    python -m tests.mutation --count 30 --seed 0             a sample from every file of TESTS
    python -m tests.mutation service/codec/budget.py         a sample from one file

mutmut makes the mutants. Its own runner is not used: it puts all mutants of a function into one module, behind a
function that selects one, and torch cannot compile such a module to TorchScript. This runner writes one mutant after
another into a copy of the repository. It changes no strings, because most strings are the texts of messages.
"""

import argparse
import ast
import difflib
import importlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORES = [f"tests/models/test_{name}.py" for name in ("pca", "autoencoder")]
BATCHING = [f"tests/service/inference/test_{name}.py" for name in ("batch", "batcher")]
OPTIONS = ["-xq", "-pno:cacheprovider", "-pno:schemathesis", "-Wignore::pytest.PytestAssertRewriteWarning"]
# Libraries that the tests import. The runner imports them once, because importing them for every mutant would take
# half of the time.
LIBRARIES = [
    "fastapi", "httpx", "hypothesis", "onnxruntime", "orjson", "prometheus_client", "pydantic_settings", "scipy.stats",
    "simdjson", "sklearn.datasets", "torch", "typer",
]  # fmt: skip
SECONDS = itertools.count(1_000_000_000)  # the times of the mutants, see `write`
TESTS = {  # the mutated files, each with the tests of its code
    "models/calibration.py": ["tests/models/test_calibration.py", "tests/service/inference/test_calibration.py"],
    "models/whitening.py": CORES,
    "models/likelihood.py": ["tests/models/test_likelihood.py", "tests/models/test_vae.py"],
    "models/explanation.py": ["tests/training/fitting/test_explanation.py"],
    "models/autoencoder.py": ["tests/models/test_autoencoder.py", "tests/models/test_log_weight.py"],
    "models/ensemble.py": ["tests/models/test_ensemble.py"],
    "models/vae.py": ["tests/models/test_vae.py", "tests/models/test_log_weight.py"],
    "models/pca.py": ["tests/models/test_pca.py", "tests/models/test_log_weight.py"],
    "service/inference/batch.py": BATCHING,
    "service/inference/batch_queue.py": BATCHING,
    "service/inference/batcher.py": BATCHING,
    "service/codec/budget.py": ["tests/service/codec/test_budget.py"],
    "service/anomaly/verdicts.py": [
        "tests/service/anomaly/test_verdicts.py",
        "tests/service/endpoints/test_missing_values.py",
        "tests/service/endpoints/test_anomaly.py",
        "tests/service/anomaly/test_smoothing.py",
    ],
    "service/inference/calibration.py": ["tests/service/inference/test_calibration.py"],
}


class TrainedModels:
    """A pytest plugin that trains the models of the fixture `artifacts` only once, and leaves slow tests out.

    Args:
        folder: where the models are kept. The first run of the tests creates it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fixture: pytest.FixtureDef[Any] | None = None

    @pytest.hookimpl(tryfirst=True)  # before tests/conftest.py marks the tests that need trained models as slow
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out the tests that are marked as slow."""
        items[:] = [item for item in items if not item.get_closest_marker("slow")]

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any], request: Any) -> Path | None:
        """Return the models of an earlier run as the value of the fixture `artifacts`, or None if it must be set up."""
        if fixturedef.argname != "artifacts":
            return None
        if not self._folder.exists():
            self._fixture = fixturedef
            return None
        fixturedef.cached_result = (self._folder, fixturedef.cache_key(request), None)
        return self._folder

    def pytest_sessionfinish(self) -> None:
        """Keep the models that this run has trained."""
        if self._fixture and self._fixture.cached_result:
            shutil.copytree(str(self._fixture.cached_result[0]), self._folder)


def mutants(source: str) -> list[str]:
    """Return every mutant of `source`, in the order of their places, except mutants of strings."""
    import libcst
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    visitor = MutationVisitor(mutation_operators, IgnoredCode(set(), set(), set()))
    module = libcst.MetadataWrapper(libcst.parse_module(source)).visit(visitor)
    changed = [
        module.deep_replace(mutation.original_node, mutation.mutated_node).code
        for mutation in visitor.mutations
        if mutation.contained_by_top_level_function and not isinstance(mutation.original_node, libcst.BaseString)
    ]
    return [code for code in dict.fromkeys(changed) if _runs_differently(source, code)]


def _runs_differently(source: str, mutant: str) -> bool:
    return ast.dump(ast.parse(source)) != ast.dump(ast.parse(mutant))


def run_tests(tests: list[str], log: Path, seconds: float) -> bool:
    """Return whether the tests pass within `seconds` in a child process, which has the libraries imported already."""
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status: int = 70
        try:
            status = pytest.main([*OPTIONS, *tests], [TrainedModels(log.with_name("trained"))])
        except Exception:  # noqa: BLE001 - the parent process reads the log
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def write(path: Path, source: str) -> None:
    """Write `source` to `path`, with a time that no other mutant has.

    Python uses the old bytecode of a file if its size and its time, in whole seconds, are the same.
    """
    path.write_text(source)
    second = next(SECONDS)
    os.utime(path, (second, second))


def copy_repository(folder: Path) -> None:
    """Copy the files that git knows into `folder`."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def sample(name: str, count: int, seed: int, log: Path) -> tuple[int, int]:
    """Try `count` mutants of the file `name`, print the survivors, and return how many were killed and tried."""
    path = Path(name)
    source = path.read_text()
    started = time.monotonic()
    if not run_tests(TESTS[name], log, 600):
        sys.exit(f"the tests of {name} fail without a mutant:\n{log.read_text()}")
    limit = 3 * (time.monotonic() - started) + 20
    everything = mutants(source)
    chosen = Random(seed).sample(everything, min(count, len(everything)))
    killed = 0
    for mutant in chosen:
        write(path, mutant)
        if run_tests(TESTS[name], log, limit):
            lines = difflib.unified_diff(source.splitlines(), mutant.splitlines(), name, "survivor", lineterm="", n=1)
            print("\n".join(lines), flush=True)
        else:
            killed += 1
    write(path, source)
    print(f"{name}: {killed} of {len(chosen)} killed ({len(everything)} mutants in all)", flush=True)
    return killed, len(chosen)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description="Count the mutants that tests kill.")
    parser.add_argument("files", nargs="*", help=f"of {', '.join(TESTS)}; by default all")
    parser.add_argument("--count", type=int, default=30, help="mutants per file")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    options = parser.parse_args()
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(Path(folder))
        os.chdir(folder)
        for module in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[module]
        sys.path[:] = [folder, *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        os.environ["ELBO_DATA"] = os.environ.get("ELBO_DATA", str(ROOT.parent / "shared" / "data"))
        results = [
            sample(name, options.count, options.seed, Path(folder, "log")) for name in options.files or list(TESTS)
        ]
    killed, tried = (sum(column) for column in zip(*results, strict=True))
    print(f"{killed} of {tried} mutants killed, {killed / tried:.1%}")


if __name__ == "__main__":
    main()
