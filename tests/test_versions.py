"""Versions: `elbo list`, `elbo rollback`, `elbo --version`, version numbers, and versions with other features."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from models.manifest import names, versions
from tests.commands import in_process, two_factor_rows, write
from tests.data import ROOT
from tests.models.hostile import edit_manifest, rewrite
from tests.models.publishing import publish


def test_option_version_prints_the_version_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(capsys, "--version") == (0, f"elbo {version('elbo')}\n", "")


@pytest.mark.parametrize(
    ("removed", "root_is_writable"),
    [
        (["model/3"], True),
        (["model/1", "model/2", "model/3"], True),
        (["model"], True),
        (["model/3"], False),
        (["model/1", "model/2", "model/3"], False),
    ],
)
def test_number_of_a_removed_version_is_never_used_again(
    removed: list[str], root_is_writable: bool, tmp_path: Path
) -> None:
    if not root_is_writable:
        (tmp_path / ".versions").touch()  # a file in the place of the folder
    for _ in range(3):
        publish(tmp_path)
    for folder in removed:
        shutil.rmtree(tmp_path / folder)
    assert publish(tmp_path).parent.name == "4"
    shutil.rmtree(tmp_path / "model" / "4")
    assert publish(tmp_path).parent.name == "5"
    assert names(tmp_path) == ["model"]


def test_number_after_versions_of_an_earlier_release_continues_their_numbers(tmp_path: Path) -> None:
    publish(tmp_path)
    (tmp_path / "model" / "1").rename(tmp_path / "model" / "7")
    shutil.rmtree(tmp_path / ".versions")
    assert publish(tmp_path).parent.name == "8"


def test_records_of_models_whose_names_are_similar_are_independent(tmp_path: Path) -> None:
    for _ in range(2):
        publish(tmp_path, name="web")
    assert publish(tmp_path, name="web.2").parent.name == "1"
    assert publish(tmp_path, name="we").parent.name == "1"
    assert publish(tmp_path, name="web").parent.name == "3"
    assert sorted(path.name for path in (tmp_path / ".versions").iterdir()) == ["we@1", "web.2@1", "web@3"]


@pytest.mark.parametrize("arguments", [["list"], ["inspect", "model"]])
def test_report_on_an_artifact_with_control_characters_shows_them_as_escapes(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\x1b]0;title\x07\u202e[/bold]"
    rewrite(publish(tmp_path), edit_manifest(kind=text, created=text, warnings=[text]))
    code, output, _ = in_process(capsys, *arguments, "--artifacts", str(tmp_path))
    assert code == 0
    assert r"\x1b]0;title\x07\u202e[/bold]" in output
    assert output.replace("\n", "").isprintable()


def test_rollback_withdraws_the_newest_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        publish(tmp_path)
    answer = in_process(capsys, "rollback", "model", "--artifacts", str(tmp_path))
    assert answer == (0, "withdrawn: model@3\nthe newest version is model@2\n", "")
    assert versions(tmp_path, "model") == [1, 2]
    assert publish(tmp_path).parent.name == "4"


def test_rollback_to_a_version_withdraws_all_later_ones_and_can_be_undone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        publish(tmp_path)
    _, out, _ = in_process(capsys, "rollback", "model", "1", "--artifacts", str(tmp_path))
    assert out == "withdrawn: model@2, model@3\nthe newest version is model@1\n"
    _, out, _ = in_process(capsys, "rollback", "model", "3", "--artifacts", str(tmp_path))
    assert out == "the newest version is model@3\n"
    assert versions(tmp_path, "model") == [1, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "model 'model' has no earlier version to roll back to (available: 1)"),
        (["model", "9"], "model 'model' has no version 9 (available: 1)"),
        (["nobody"], "no model 'nobody' in "),
        (["../model"], "'../model' is no name of a model"),
    ],
)
def test_impossible_rollback_prints_one_line_and_changes_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path)
    code, out, err = in_process(capsys, "rollback", *arguments, "--artifacts", str(tmp_path))
    assert (code, out) == (2, "")
    assert err.startswith(f"elbo: error: {message}")
    assert err.count("\n") == 1
    assert versions(tmp_path, "model") == [1]


def test_rollback_to_a_damaged_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = publish(tmp_path)
    publish(tmp_path)
    first.write_bytes(first.read_bytes()[:-100])
    code, _, err = in_process(capsys, "rollback", "model", "--artifacts", str(tmp_path))
    assert code == 1
    assert err.startswith(f"elbo: error: {first} is truncated or was altered")
    assert versions(tmp_path, "model") == [1, 2]


def test_list_shows_the_status_of_every_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(4):
        publish(tmp_path)
    publish(tmp_path, "ae", name="other")
    in_process(capsys, "rollback", "model", "--artifacts", str(tmp_path))
    damaged = tmp_path / "model" / "1" / "model.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    code, out, err = in_process(capsys, "list", "--artifacts", str(tmp_path))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "model", "model@4", "model@3", "model@2", "model@1", "other@1", "model@1:",
    ]  # fmt: skip
    assert [line.split()[2] for line in lines[1:6]] == ["withdrawn", "newest", "older", "damaged", "newest"]
    assert "is truncated or was altered" in lines[6]
    _, out, _ = in_process(capsys, "list", "--json", "--artifacts", str(tmp_path))
    found = [(each["name"], each["version"], each["status"], each["kind"]) for each in json.loads(out)]
    assert found == [
        ("model", 4, "withdrawn", "pca"),
        ("model", 3, "newest", "pca"),
        ("model", 2, "older", "pca"),
        ("model", 1, "damaged", None),
        ("other", 1, "newest", "pca"),  # the manifests of `publish` always name this kind
    ]


def test_list_names_a_model_whose_folder_cannot_be_read(tmp_path: Path) -> None:
    for name in ("model", "private"):
        publish(tmp_path, name=name)
    (tmp_path / "private").chmod(0o000)
    arguments = [sys.executable, "-m", "elbo", "list", "--artifacts", str(tmp_path)]
    if os.geteuid() == 0:  # take away root's right to read everything
        arguments = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *arguments]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    (tmp_path / "private").chmod(0o755)
    assert (run.returncode, run.stderr) == (0, "")
    words = [line.split() for line in run.stdout.splitlines()]
    assert [(line[0], line[2]) for line in words[1:3]] == [("model@1", "newest"), ("private", "damaged")]
    assert run.stdout.splitlines()[3].startswith(f"private: cannot read {tmp_path}/private: Permission denied")


def test_list_of_an_empty_folder_says_how_to_train_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = f"no models in {tmp_path}: train one with elbo demo or elbo train\n"
    assert in_process(capsys, "list", "--artifacts", str(tmp_path)) == (0, "", expected)


HEADER = "cpu [%],memory [GB],disk,network,errors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("header", "difference"),
    [
        ("cpu [%],memory [GB],disk,network,faults", "it lacks errors; it adds faults"),
        ("memory [GB],cpu [%],disk,network,errors", "they are in another order: memory, cpu, disk, network, errors"),
        ("cpu [%],memory [MB],disk,network,errors", "memory is in MB instead of GB"),
    ],
)
def test_version_with_other_features_needs_the_option_replace_features(
    header: str, difference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "pca", "--name", "hosts", "--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    first = write(tmp_path / "first.csv", two_factor_rows(100, seed=0))
    assert in_process(capsys, "train", first, *options)[0] == 0
    second = write(tmp_path / "second.csv", two_factor_rows(100, seed=1), header)
    code, out, err = in_process(capsys, "train", second, *options)
    assert (code, out) == (2, "")
    assert err.startswith(f"elbo: error: {second} has other features than hosts@1 ({difference}")
    assert err.rstrip().endswith("choose another --name, or add --replace-features")
    assert err.count("\n") == 1
    assert in_process(capsys, "train", second, *options, "--replace-features")[0] == 0
    assert in_process(capsys, "train", second, *options)[0] == 0  # the features of hosts@2
    assert versions(tmp_path, "hosts") == [1, 2, 3]


@pytest.mark.slow
def test_version_with_rows_of_another_shape_needs_the_option_replace_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "pca", "--name", "a", "--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    assert in_process(capsys, "train", "digits", *options)[0] == 0
    np.save(tmp_path / "flat.npy", np.random.RandomState(0).normal(size=(100, 64)))
    code, _, err = in_process(capsys, "train", str(tmp_path / "flat.npy"), *options)
    assert code == 2
    assert "(rows have the shape [64] instead of [8, 8])" in err
