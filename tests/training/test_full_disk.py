"""`elbo train` when the artifact folder or the folder of runs is full or not writable."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.artifact import load
from tests.commands import in_process, succeed, two_factor_rows, write
from tests.data import ROOT
from tests.preloaded import PreloadedProcess, run_preloaded

pytestmark = pytest.mark.slow


def without_privileges(*arguments: str) -> list[str]:
    """Return a command that runs without root's right to write everywhere."""
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    return [*prefix, *arguments]


def start(
    *arguments: str, max_file_bytes: int | None = None, temporary: Path | None = None, as_root: bool = True
) -> subprocess.Popen[str]:
    """Start `elbo`. A write beyond `max_file_bytes` fails, as on a full disk."""
    limit = [] if max_file_bytes is None else ["prlimit", f"--fsize={max_file_bytes}"]
    command = [*limit, sys.executable, "-m", "elbo", *arguments]
    return PreloadedProcess(
        command if as_root else without_privileges(*command),
        cwd=ROOT,
        env=dict(os.environ) | ({} if temporary is None else {"TMPDIR": str(temporary)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def folders(tmp_path: Path) -> list[str]:
    return ["--artifacts", str(tmp_path / "artifacts"), "--runs", str(tmp_path / "runs")]


def replace_model_folder_by_file(process: subprocess.Popen[str], folder: Path) -> None:
    """Make publication fail: wait until the training has begun, and put a file in the place of the model's folder."""
    assert process.stderr is not None
    while not process.stderr.readline().startswith("training "):
        assert process.poll() is None
    while list(folder.iterdir()):  # the check before the training
        time.sleep(0.01)
    folder.rmdir()
    folder.touch()


def put_file(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize(
    ("artifacts", "reason"),
    [
        (lambda tmp_path: put_file(tmp_path / "artifacts"), "Not a directory"),
        (lambda tmp_path: put_file(tmp_path / "hosts").parent, "File exists"),
        (lambda _: Path("/sys/elbo"), ""),
    ],
    ids=["file-as-folder", "file-as-model-folder", "system-folder"],
)
@pytest.mark.parametrize("kind", ["pca", "ae"])
def test_training_into_an_unwritable_folder_fails_before_the_training(
    artifacts: Callable[[Path], Path], reason: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = artifacts(tmp_path)
    options = ["--model", kind, "--name", "hosts", "--artifacts", str(folder), "--runs", str(tmp_path / "runs")]
    code, out, err = in_process(capsys, "train", "digits", *options)
    assert (code, out) == (1, "")
    assert err.startswith(f"elbo: error: cannot write to the artifact folder {folder}/hosts ({reason}")
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_training_into_a_read_only_folder_fails_before_the_training(tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir(mode=0o555)
    options = ["--model", "pca", "--name", "a", "--artifacts", str(artifacts)]
    arguments = without_privileges(sys.executable, "-m", "elbo", "train", "digits", *options)
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"elbo: error: cannot write to the artifact folder {artifacts}/a (Permission denied")
    assert run.stderr.count("\n") == 1


@contextmanager
def full_disk(max_file_bytes: int) -> Iterator[None]:
    """Until the block ends, make each write of this process fail that goes beyond `max_file_bytes` of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["pca", "vae"])
def test_training_with_a_full_artifact_folder_fails_before_the_training(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", kind, "--name", "a", *folders(tmp_path)]
    with full_disk(200_000):
        code, out, err = in_process(capsys, "train", "digits", *options)
    assert (code, out) == (1, "")
    assert err.startswith(f"elbo: error: cannot write to the artifact folder {tmp_path}/artifacts/a (File too large")
    assert err.count("\n") == 1
    assert list((tmp_path / "artifacts" / "a").iterdir()) == []


def test_run_can_be_resumed_if_its_publication_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "ae", "--name", "a", "--epochs", "60", *folders(tmp_path)]
    process = start("train", "digits", *options)
    replace_model_folder_by_file(process, tmp_path / "artifacts" / "a")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in err
    message = err.splitlines()[-1]
    assert message.startswith(f"elbo: error: cannot write to the artifact folder {tmp_path}/artifacts/a (File exists")
    assert message.endswith("The trained networks are kept: repeat elbo train with --resume to publish them")
    (tmp_path / "artifacts" / "a").unlink()
    code, out, err = in_process(capsys, "train", "digits", *options, "--resume")
    assert code == 0, err
    step, total = err.partition("resumed at step ")[2].split()[:3:2]
    assert step == total
    assert out.startswith("published a@1")


def test_model_without_a_checkpoint_is_kept_if_its_publication_fails(tmp_path: Path) -> None:
    data = write(tmp_path / "train.csv", two_factor_rows(1000, seed=0))
    (tmp_path / "temporary").mkdir()
    options = ["--model", "pca", "--name", "hosts", *folders(tmp_path)]
    process = start("train", data, *options, temporary=tmp_path / "temporary")
    replace_model_folder_by_file(process, tmp_path / "artifacts" / "hosts")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in err
    commands = err.rstrip("\n").partition("The trained model is kept: publish it with ")[2]
    (tmp_path / "artifacts" / "hosts").unlink()
    subprocess.run(commands, shell=True, check=True)
    assert load(tmp_path / "artifacts" / "hosts" / "1" / "model.pt").manifest.name == "hosts"


def test_model_is_kept_if_its_last_checkpoint_and_its_publication_fail(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    options = ["--model", "ae", "--name", "a", "--epochs", "100", "--batch-size", "629"]
    options += ["--checkpoint-seconds", "0", *folders(tmp_path)]
    process = start("train", "digits", *options, temporary=tmp_path / "temporary", as_root=False)
    checkpoint = tmp_path / "runs" / "a" / "checkpoint.pt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    for folder in (tmp_path / "runs" / "a", tmp_path / "artifacts" / "a"):
        folder.chmod(0o555)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "no checkpoint was written" in err
    commands = err.rstrip("\n").partition("The trained model is kept: publish it with ")[2]
    (tmp_path / "artifacts" / "a").chmod(0o755)
    subprocess.run(commands, shell=True, check=True)
    assert load(tmp_path / "artifacts" / "a" / "1" / "model.pt").manifest.history[-1]["epoch"] == 100


def test_full_disk_costs_the_checkpoint_but_not_the_run(tmp_path: Path) -> None:
    options = ["--model", "ae", "--name", "a", "--epochs", "10", "--checkpoint-seconds", "0", *folders(tmp_path)]
    process = start("train", "digits", *options, max_file_bytes=1_200_000)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("published a@1")
    assert f"warning: no checkpoint was written to {tmp_path}/runs/a (File too large)" in err
    assert list((tmp_path / "runs" / "a").glob("checkpoint*")) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train.csv and with the model `hosts` in artifacts/."""
    folder = tmp_path_factory.mktemp("trained")
    data = write(folder / "train.csv", two_factor_rows(1000, seed=0))
    succeed("train", data, "--model", "pca", "--name", "hosts", *folders(folder))
    return folder


def test_calibration_into_an_unwritable_folder_prints_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copy(trained / "artifacts" / "hosts" / "1" / "model.pt", tmp_path / "model.pt")
    new = write(tmp_path / "new.csv", two_factor_rows(100, seed=1))
    code, out, err = in_process(capsys, "calibrate", str(model), new, "--artifacts", "/sys/elbo")
    assert (code, out) == (1, "")
    assert err.startswith("elbo: error: cannot write to the artifact folder /sys/elbo/hosts (")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", ["score hosts DATA", "evaluate hosts DATA", "inspect hosts"])
def test_command_whose_output_goes_to_a_full_disk_prints_one_line(arguments: str, trained: Path) -> None:
    words = [str(trained / "train.csv") if word == "DATA" else word for word in arguments.split()]
    with Path("/dev/full").open("w") as full:
        run = run_preloaded(
            [sys.executable, "-m", "elbo", *words, "--artifacts", str(trained / "artifacts")],
            cwd=ROOT,
            stdout=full,
            text=True,
        )
    assert run.returncode == 1
    assert run.stderr == (
        "elbo: error: cannot read or write the output (No space left on device): check the disk and the permissions\n"
    )
