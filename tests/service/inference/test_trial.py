"""Artifacts are tried out in a child process before a server or a command loads them."""

import importlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.artifact import load, load_after_trial
from models.errors import ArtifactError, ArtifactUnsafe
from models.pipeline import Pipeline
from models.trial import TrialLimits, run_trial
from service.inference.model_loader import ModelLoader
from service.inference.trial import KEEPER_PROCESS_NAME, LATE_IMPORTS, TRIAL_PROCESS_NAME, start_trial_process
from tests.models import hostile
from tests.models.builders import CORES
from tests.models.publishing import GAPS, publish_twin
from tests.service.process import ServerProcess, server_starter
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


class ComputesForHours(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        for _ in range(1_000_000_000_000):
            z = z + 1
        return self.scaling.inverse(self.core.decode(z))


class TakesAllMemory(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        for _ in range(40):
            z = torch.cat([z, z])
        return self.scaling.inverse(self.core.decode(z))


class ComputesForASecond(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        for _ in range(500_000):
            z = -z
        return self.scaling.inverse(self.core.decode(z))


HOSTILE: dict[str, type[Pipeline]] = {"time": ComputesForHours, "memory": TakesAllMemory}
REASONS = {"time": "the trial of the model took longer than 2 s", "memory": "can't allocate memory"}
SECONDS = {"time": 2, "memory": 60}


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    with server_starter() as starter:
        yield starter


def publish_beside(root: Path, kind: str) -> None:
    """Publish a harmless model as `other`, and a hostile one as `model`."""
    publish_twin(root, "pca").parents[1].rename(root / "other")
    hostile.publish_code(root, HOSTILE[kind])


@pytest.mark.parametrize("kind", HOSTILE)
def test_artifact_that_needs_hours_or_all_memory_is_refused_by_its_trial(kind: str, tmp_path: Path) -> None:
    path = hostile.publish_code(tmp_path, HOSTILE[kind])
    started = time.monotonic()
    with pytest.raises(ArtifactError, match=REASONS[kind]):
        load_after_trial(path, limits=TrialLimits(SECONDS[kind], memory_bytes=2**30))
    assert time.monotonic() - started < 60


def test_slow_model_may_get_no_batch_larger_than_the_largest_batch_of_its_trial(tmp_path: Path) -> None:
    path = hostile.publish_code(tmp_path, ComputesForASecond)
    loader = ModelLoader(backend="torchscript")
    for module in LATE_IMPORTS:
        importlib.import_module(module)
    verdict = run_trial(path, path.read_bytes, lambda content: loader.try_out(content, path), TrialLimits(60))
    assert verdict["rows"] == 1


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", HOSTILE)
def test_server_still_serves_other_models_if_one_artifact_needs_hours_or_all_memory(
    kind: str, workers: int, start: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    publish_beside(tmp_path, kind)
    server = start(tmp_path, TRIAL_SECONDS=SECONDS[kind], TRIAL_BYTES=2**30, WORKERS=workers)
    with server.client() as client:
        models = client.get("/models").json()
        answer = client.post("/encode?model=other", json={"inputs": [[1, 2, 3, 4, 5]]})
    assert answer.status_code == 200
    (failure,) = models["failures"]
    assert failure["name"] == "model"
    assert re.search(REASONS[kind], failure["detail"])
    assert server.stop() == 0


def test_server_stops_at_once_on_sigterm_while_an_artifact_computes_for_hours(
    start: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    publish_twin(tmp_path, "pca").parents[1].rename(tmp_path / "other")
    server = start(tmp_path, TRIAL_SECONDS=600, POLL_SECONDS=0.1)
    hostile.publish_code(tmp_path, ComputesForHours)
    time.sleep(1)  # the server finds the artifact and tries it out
    with server.client() as client:
        assert client.post("/encode?model=other", json={"inputs": [[1, 2, 3, 4, 5]]}).status_code == 200
    started = time.monotonic()
    assert server.stop(signal.SIGTERM) == 0
    assert time.monotonic() - started < 10


def test_killed_worker_that_waited_for_a_trial_is_replaced_and_new_versions_still_load(
    start: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    other = publish_twin(tmp_path, "pca").parents[1].rename(tmp_path / "other")
    server = start(tmp_path, TRIAL_SECONDS=3, POLL_SECONDS=0.1, WORKERS=2)
    server.wait_for_worker()
    victim = next(line["pid"] for line in server.lines if "is ready" in line["message"])
    hostile.publish_code(tmp_path, ComputesForHours)
    time.sleep(1)  # the workers find the artifact and wait for its trial
    os.kill(victim, signal.SIGKILL)
    server.wait_for_log("is ready")  # the replacement, after the trial that nobody waits for any more
    shutil.copytree(other / "1", tmp_path / ".2")
    (tmp_path / ".2").rename(other / "2")
    for _ in range(2):
        server.wait_for_log("serving other@2")
    assert server.stop() == 0


def trial_processes(server: ServerProcess) -> dict[str, int]:
    """Return the process IDs of the keeper and of the trial process of `server`, by name, without further children.

    A killed process that its parent has not waited for is left out.
    """
    found: dict[str, int] = {}
    parents = {server.popen.pid}
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with suppress(OSError):
            name, _, rest = (process / "stat").read_text().partition("(")[2].rpartition(")")
            state, parent, *_ = rest.split()
            is_wanted = name in (KEEPER_PROCESS_NAME, TRIAL_PROCESS_NAME) and name not in found and state != "Z"
            if int(parent) in parents and is_wanted:
                found[name] = int(process.name)
                parents.add(int(process.name))
    return found


def publish_copy(version: Path, number: int) -> None:
    """Publish a copy of the folder `version` as version `number` of the same model."""
    shutil.copytree(version, version.parents[1] / f".{number}")
    (version.parents[1] / f".{number}").rename(version.parent / str(number))


def serve_first_version(start: Callable[..., ServerProcess], root: Path, workers: int) -> tuple[Path, ServerProcess]:
    """Publish a PCA under `root` and serve it. Return the folder of its version, and the server, fully started."""
    version = publish_twin(root, "pca").parent
    server = start(root, POLL_SECONDS=0.1, WORKERS=workers)
    for _ in range(workers - 1):
        server.wait_for_worker()
    return version, server


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_trial_process_is_started_again_and_new_versions_still_load(
    workers: int, start: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    first, server = serve_first_version(start, tmp_path, workers)
    for number in (2, 3, 4):
        os.kill(trial_processes(server)[TRIAL_PROCESS_NAME], signal.SIGKILL)
        publish_copy(first, number)
        for _ in range(workers):
            server.wait_for_log(f"@{number} with")
    assert server.stop() == 0


def test_artifact_whose_trial_process_is_killed_during_the_trial_is_tried_again(
    start: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    first = publish_twin(tmp_path, "pca").parents[1].rename(tmp_path / "other") / "1"
    server = start(tmp_path, POLL_SECONDS=0.1, TRIAL_SECONDS=8)
    hostile.publish_code(tmp_path, ComputesForHours)
    time.sleep(1)  # the server finds the artifact and tries it out
    os.kill(trial_processes(server)[TRIAL_PROCESS_NAME], signal.SIGKILL)
    server.wait_for_log("was killed during the trial")
    server.wait_for_log("the trial of the model took longer than 8 s")
    publish_copy(first, 2)
    server.wait_for_log("serving other@2")
    assert server.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_trial_process_outlives_a_killed_keeper_but_not_the_server(
    workers: int, start: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    first, server = serve_first_version(start, tmp_path, workers)
    processes = trial_processes(server)
    os.kill(processes[KEEPER_PROCESS_NAME], signal.SIGKILL)
    publish_copy(first, 2)
    for _ in range(workers):
        server.wait_for_log("@2 with")
    assert server.stop() == 0
    wait_until(lambda: not Path(f"/proc/{processes[TRIAL_PROCESS_NAME]}").exists())


@pytest.mark.parametrize("workers", [1, 2])
def test_new_versions_still_load_after_keeper_and_trial_process_are_killed(
    workers: int, start: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    first, server = serve_first_version(start, tmp_path, workers)
    for pid in trial_processes(server).values():  # the keeper first, so that it starts no other trial process
        os.kill(pid, signal.SIGKILL)
    publish_copy(first, 2)
    for _ in range(workers):
        server.wait_for_log("@2 with")
    new = trial_processes(server)
    assert set(new) == ({KEEPER_PROCESS_NAME, TRIAL_PROCESS_NAME} if workers == 1 else set())
    assert server.stop() == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in new.values()))


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_keeper_and_trial_process_end_with_the_server(
    sig: signal.Signals, start: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    publish_twin(tmp_path, "pca")
    server = start(tmp_path)
    processes = trial_processes(server)
    assert set(processes) == {KEEPER_PROCESS_NAME, TRIAL_PROCESS_NAME}
    server.stop(sig)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes.values()))


def test_server_serves_every_kind_of_model_after_its_trial(start: Callable[..., ServerProcess], tmp_path: Path) -> None:
    for kind in CORES:
        publish_twin(tmp_path, kind).parents[1].rename(tmp_path / kind)
        publish_twin(tmp_path, f"{kind}-imputing", gaps=GAPS).parents[1].rename(tmp_path / f"{kind}-imputing")
    with start(tmp_path).client() as client:
        models = client.get("/models").json()
    assert models["failures"] == []
    assert {model["name"] for model in models["models"]} == {*CORES, *(f"{kind}-imputing" for kind in CORES)}


def test_trial_cannot_open_files_or_sockets_and_cannot_write(tmp_path: Path) -> None:
    kept = (tmp_path / "kept").open("wb", buffering=0)

    def attempt(action: Callable[[], object]) -> str:
        try:
            action()
        except OSError as error:
            return type(error).__name__
        return "done"

    def work(_: bytes) -> dict[str, Any]:
        return {
            "read": attempt(lambda: open("/etc/hostname")),  # noqa: PTH123
            "socket": attempt(socket.socket),
            "write": attempt(lambda: os.write(kept.fileno(), b"x")),
            "pipe": attempt(os.pipe),
        }

    verdict = run_trial(tmp_path, lambda: b"", work, TrialLimits(seconds=20))
    kept.close()
    assert verdict == {"read": "OSError", "socket": "OSError", "write": "OSError", "pipe": "OSError"}
    assert (tmp_path / "kept").read_bytes() == b""


def test_result_of_an_early_trial_is_used_but_a_refusal_only_once(tmp_path: Path) -> None:
    good, bad, other = (publish_twin(tmp_path / kind, kind) for kind in ("pca", "ae", "vae-gaussian"))

    def work(_: bytes, path: Path) -> dict[str, Any]:
        if path == bad:
            raise ArtifactUnsafe(f"refused at {time.monotonic_ns()}")
        return {"at": time.monotonic_ns()}

    def start_keeper() -> socket.socket:
        raise OSError

    def refusal() -> int:
        with pytest.raises(ArtifactUnsafe) as caught:
            client.try_out(bad)
        return int(str(caught.value).split()[-1])

    client = start_trial_process(work, TrialLimits(seconds=20), start_keeper)
    with closing(client):
        for path in (bad, good):
            client.begin(path)
        last = client.try_out(other)["at"]
        assert client.try_out(good)["at"] < last
        assert refusal() < last
        assert refusal() > last


def test_trial_that_crashes_is_an_error_that_names_the_signal(tmp_path: Path) -> None:
    def crash(_: bytes) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGSEGV)
        return {}

    with pytest.raises(ArtifactUnsafe, match="signal SIGSEGV"):
        run_trial(tmp_path, lambda: b"", crash, TrialLimits(seconds=20))


def test_load_with_the_digest_of_another_file_is_refused(tmp_path: Path) -> None:
    path = publish_twin(tmp_path, "pca")
    with pytest.raises(ArtifactError, match="was changed while it was loaded"):
        load(path, digest="0" * 64)
