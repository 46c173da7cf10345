"""The command line: arguments, output and exit status of every command."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.artifact import load
from models.manifest import read_manifest
from tests.commands import HEADER, Rows, command, in_process, two_factor_rows, write
from tests.data import ROOT
from tests.preloaded import PreloadedProcess, run_preloaded
from training.config import AUTO_KINDS, DEMONSTRATIONS, TrainConfig
from training.data.table import split_rows

pytestmark = pytest.mark.slow

NAMES = ("cpu", "memory", "disk", "network", "errors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with hosts@1. `elbo train` made this PCA with two latents from 1,000 rows."""
    folder = tmp_path_factory.mktemp("artifacts")
    data = write(folder / "train.csv", two_factor_rows(1000, seed=0))
    run = command(
        "train", data, "--model", "pca", "--name", "hosts", "--latents", "2", "--seed", "3", "--artifacts", str(folder)
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        f"published hosts@1: {folder}/hosts/1/model.pt",
        f"next: elbo inspect hosts --artifacts {folder}, or elbo serve --artifacts {folder}",
    ]
    assert run.stderr.startswith("training hosts (pca)\n")
    assert run.stderr.splitlines()[-1].startswith("trained in ")
    return folder


@pytest.fixture
def today(tmp_path: Path) -> tuple[str, Rows]:
    """Return the path of a CSV file, and its 300 rows. The first ten rows are anomalous in the fifth metric.

    The file also has a text column, and a label column that is 1 for the anomalous rows.
    """
    rows = two_factor_rows(300, seed=1)
    rows[:10, 4] += 30
    lines = [f"x{i},{','.join(f'{value:.9g}' for value in row)},{int(i < 10)}" for i, row in enumerate(rows)]
    path = tmp_path / "today.csv"
    path.write_text("\n".join([f"host,{HEADER},label", *lines]) + "\n")
    return str(path), rows


# Errors


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ("train gone.csv --model pca --name a", {}, "gone.csv does not exist: expected a file"),
        (
            "train digits --model gan --name a",
            {},
            "--model: input should be 'pca', 'ae', 'vae', 'ensemble' or 'auto', got 'gan'",
        ),
        ("train digits --model ae --name a --hidden 64,x", {}, "--hidden: input should be a valid integer"),
        ("train digits --model ae --name a --learning-rate -1", {}, "--learning-rate: input should be greater than 0"),
        ("train digits --model pca --name ../a", {}, "--name: string should match pattern"),
        ("inspect nobody", {"ELBO_ARTIFACTS": "nowhere"}, "no model 'nobody' in nowhere (available: none); train it"),
        ("inspect gone/model.pt", {}, "gone/model.pt does not exist"),
        ("serve --port 99999", {}, "--port: input should be less than or equal to 65535, got 99999"),
        ("serve", {"ELBO_PORT": "high"}, "ELBO_PORT: input should be a valid integer"),
    ],
)
def test_invalid_argument_prints_one_line_and_exits_with_2(
    arguments: str,
    environment: dict[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, err = in_process(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"elbo: error: {message}")
    assert err.count("\n") == 1


def test_training_on_one_row_reports_how_many_rows_are_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.csv", np.ones((1, 5)))
    code, _, err = in_process(capsys, "train", data, "--model", "pca", "--name", "a")
    assert code == 2
    assert err == "elbo: error: expected at least 10 rows to fit, validate and calibrate a model, got 1: add rows\n"


def test_truncated_artifact_prints_one_line_and_exits_with_1(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes((root / "hosts/1/model.pt").read_bytes()[:-1000])
    code, _, err = in_process(capsys, "inspect", str(path))
    assert code == 1
    assert err.startswith(f"elbo: error: {path} ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        ("demo --artifacts ARTIFACTS", "sklearn"),
        ("train digits --model pca --name a --artifacts ARTIFACTS", "sklearn"),
        ("train TABLE --model pca --name a --artifacts ARTIFACTS", "polars"),
        ("score TABLE_MODEL TABLE", "polars"),
        ("evaluate TABLE_MODEL TABLE", "polars"),
        ("calibrate TABLE_MODEL TABLE --artifacts ARTIFACTS", "polars"),
    ],
)
def test_command_without_the_packages_for_training_prints_one_line(
    arguments: str, package: str, root: Path, tmp_path: Path
) -> None:
    places = {"ARTIFACTS": tmp_path, "TABLE": root / "train.csv", "TABLE_MODEL": root / "hosts/1/model.pt"}
    words = [str(places.get(word, word)) for word in arguments.split()]
    absent = ("polars", "sklearn", "scipy", "threadpoolctl", "matplotlib", "onnx")  # not in the image that serves
    code = (
        f"import sys; absent = {absent}; loaded = [name for name in sys.modules if name.partition('.')[0] in absent]; "
        f"sys.modules.update(dict.fromkeys([*absent, *loaded])); from elbo import cli; cli.main({words})"
    )
    run = run_preloaded([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == (
        f"elbo: error: this command needs the package {package}: install Elbo with pip install 'elbo[train]', "
        "or use the container image that trains\n"
    )


@pytest.mark.parametrize("arguments", ["serve --insecure", "train digits --model pca --name a", "train --help"])
def test_command_without_the_packages_of_an_extra_prints_one_line(arguments: str) -> None:
    absent = ("torch", "pydantic", "pydantic_settings", "fastapi")  # pip install elbo does not install them
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); from elbo import cli; cli.main({arguments.split()})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == (
        "elbo: error: this command needs the package pydantic: install Elbo with pip install 'elbo[serve]', "
        "or with 'elbo[train]' to train models as well\n"
    )


def test_unknown_option_is_a_usage_error() -> None:
    run = command("train", "digits", "--modle", "pca")
    assert run.returncode == 2
    assert "No such option: --modle" in run.stderr


# The commands


def test_inspect_command_describes_the_artifact(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, "inspect", "hosts", "--artifacts", str(root))
    assert code == 0
    facts = {line[:10].strip(): line[10:] for line in out.split("\n\n")[0].splitlines()}
    size = (root / "hosts/1/model.pt").stat().st_size
    assert facts["model"] == "hosts, principal component analysis"
    assert facts["file"].startswith(f"{root}/hosts/1/model.pt, {size / 1e6:.2f} MB, written 20")
    assert facts["seal"].startswith("intact")
    assert facts["row"] == "5 features"
    assert facts["latents"] == "2"
    assert facts["split"] == "700 fit, 100 held out, 200 calibration"
    assert "seed 3" in facts["training"]
    assert facts["held out"].startswith("reconstruction_error 0.0")
    assert facts["p-value"].startswith("at least 0.00498")  # the smallest p-value, 1 / 201
    features = [line.split()[0] for line in out.split("\n\n")[1].splitlines()]
    assert features == ["feature", *NAMES]
    assert "cpu [%] " in out


def test_inspect_command_breaks_long_lists_of_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "train.csv", two_factor_rows(1000, seed=0))
    options = ["--model", "ae", "--hidden", "16", "--epochs", "2", "--batch-size", "64", "--learning-rate", "0.002"]
    options += ["--l2", "1e-6", "--patience", "5", "--noise", "0.5", "--masking", "0.1", "--activation", "relu"]
    folders = ["--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    assert in_process(capsys, "train", data, "--name", "hosts", "--force", *options, *folders)[0] == 0
    _, out, _ = in_process(capsys, "inspect", "hosts", "--artifacts", str(tmp_path))
    lines = out.split("\n\n")[0].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("training "))
    assert lines[first + 1].startswith("           ")
    training = " ".join(line[11:] for line in lines[first : first + 2])
    assert training == (
        "model ae, name hosts, seed 0, hidden [16], activation relu, epochs 2, batch_size 64, "
        "learning_rate 0.002, l2 1e-06, patience 5, noise 0.5, masking 0.1"
    )
    assert max(len(line) for line in lines if not line.startswith(("file", "data"))) <= 100


def test_option_json_of_the_inspect_command_prints_the_manifest(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "hosts/1/model.pt"
    _, out, _ = in_process(capsys, "inspect", str(path), "--json")
    assert json.loads(out) == json.loads(read_manifest(path).model_dump_json())


def test_inspect_command_works_without_torch(root: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from elbo import cli; cli.main(['inspect', 'hosts@1'])"
    environment = dict(os.environ) | {"ELBO_ARTIFACTS": str(root)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("model     hosts")


def score_lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    code, out, _ = in_process(capsys, "score", *arguments)
    assert code == 0
    return [json.loads(line) for line in out.splitlines()]


def test_score_command_flags_and_explains_the_anomalous_rows(
    root: Path, today: tuple[str, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    path, rows = today
    results = score_lines(capsys, "hosts", path, "--artifacts", str(root), "--alpha", "0.01")
    assert [result["row"] for result in results] == list(range(300))
    for result in results:
        assert result["is_anomaly"] == (result["severity"] > 1) == (result["p_value"] <= 0.01)
        assert sum(result["parts"].values()) == pytest.approx(result["score"], rel=1e-5)
        assert len(result["features"]) == 3
        contributions = [feature["contribution"] for feature in result["features"]]
        assert contributions == sorted(contributions, reverse=True)
    assert all(result["is_anomaly"] for result in results[:10])
    for row, result in zip(rows, results[:10], strict=False):
        values = {feature["name"]: feature["value"] for feature in result["features"]}
        assert values == pytest.approx({name: row[NAMES.index(name)] for name in values}, rel=1e-6)
        assert "errors" in values
    # With 290 normal rows, the chance of more than 15 false alarms is below 1e-7.
    assert sum(result["is_anomaly"] for result in results[10:]) <= 15


def test_option_explain_of_the_score_command_limits_the_number_of_features(
    root: Path, today: tuple[str, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    for explain, count in ((0, 0), (1, 1), (99, 5)):
        results = score_lines(capsys, "hosts", today[0], "--artifacts", str(root), "--explain", str(explain))
        assert {len(result["features"]) for result in results} == {count}


def test_score_command_gives_the_same_values_as_csv_and_as_ndjson(
    root: Path, today: tuple[str, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    results = score_lines(capsys, "hosts", today[0], "--artifacts", str(root))
    _, out, _ = in_process(capsys, "score", "hosts", today[0], "--artifacts", str(root), "--format", "csv")
    lines = list(csv.DictReader(out.splitlines()))
    assert len(lines) == len(results)
    for line, result in zip(lines, results, strict=True):
        for name in ("score", "p_value", "severity"):
            assert float(line[name]) == pytest.approx(result[name], rel=1e-6)
        assert line["is_anomaly"] == str(int(result["is_anomaly"]))
        assert [line[f"feature_{k}"] for k in (1, 2, 3)] == [feature["name"] for feature in result["features"]]
        assert float(line["expected_2"]) == pytest.approx(result["features"][1]["expected"], rel=1e-6)


def test_score_of_a_row_does_not_depend_on_the_other_rows_of_the_file(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = two_factor_rows(1030, seed=2)
    long = score_lines(capsys, "hosts", write(tmp_path / "a.csv", rows), "--artifacts", str(root))
    last = score_lines(capsys, "hosts", write(tmp_path / "b.csv", rows[-1:]), "--artifacts", str(root))
    assert [result["row"] for result in long] == list(range(1030))
    assert last[0]["score"] == pytest.approx(long[-1]["score"], rel=1e-4)


def test_score_command_prints_no_error_if_the_output_pipe_is_closed(root: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.csv", two_factor_rows(5000, seed=2))
    process = PreloadedProcess(
        [sys.executable, "-m", "elbo", "score", "hosts", data, "--artifacts", str(root)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["row"] == 0
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


def test_evaluate_command_reports_metrics_that_agree_with_the_scores_and_labels(
    root: Path, today: tuple[str, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    path, rows = today
    _, out, _ = in_process(capsys, "evaluate", "hosts", path, "--json", "--artifacts", str(root))
    report = json.loads(out)
    results = score_lines(capsys, "hosts", path, "--artifacts", str(root), "--explain", "5")
    score, p_value = (np.array([result[name] for result in results]) for name in ("score", "p_value"))
    anomalous = np.arange(300) < 10
    x = torch.from_numpy(rows.astype(np.float32))
    squares = (load(root / "hosts/1/model.pt").module(x) - x).square().numpy()
    medians = [feature.median for feature in read_manifest(root / "hosts/1/model.pt").features]
    wins = (score[anomalous, None] > score[~anomalous]).mean()  # equals the AUROC, because no two scores are equal
    assert (report["model"], report["source"], report["rows"]) == ("hosts@1", path, 300)
    assert report["reconstruction_error"] == pytest.approx(np.mean(squares), rel=1e-3)
    assert report["median_error"] == pytest.approx(np.square(rows - medians).mean(), rel=1e-5)
    means = np.genfromtxt(root / "train.csv", delimiter=",", skip_header=1)[split_rows(1000, 3).fit].mean(axis=0)
    assert report["mean_error"] == pytest.approx(np.square(rows - means).mean(), rel=1e-5)
    assert report["mean_score"] == pytest.approx(score.mean(), rel=1e-5)
    assert report["alarm_rates"] == {
        str(a): pytest.approx((p_value[~anomalous] <= a).mean()) for a in (0.1, 0.05, 0.01)
    }
    assert report["detection_rates"] == {"0.1": 1, "0.05": 1, "0.01": 1}
    assert report["auroc"] == pytest.approx(wins)
    assert report["seen"] is False


def test_evaluate_command_prints_every_metric_as_text_by_default(
    root: Path, today: tuple[str, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = in_process(capsys, "evaluate", "hosts", today[0], "--artifacts", str(root))
    lines = out.splitlines()
    assert lines[0] == f"hosts@1 on {today[0]}: 300 rows"
    assert [line[:21].strip() for line in lines[1:]] == [
        "reconstruction error",
        "predicting the mean",
        "log-likelihood",
        "bits per dimension",
        "mean score",
        "false alarms",
        "anomalies found",
        "AUROC",
        "average precision",
    ]


@pytest.mark.parametrize("kind", ["pca", "ae", "vae"])
def test_evaluate_command_gives_the_metrics_in_the_manifest_for_the_held_out_rows(
    kind: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", kind, "--name", kind, "--latents", "2", *([] if kind == "pca" else ["--epochs", "10"])]
    folders = ["--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    assert in_process(capsys, "train", str(root / "train.csv"), *options, *folders)[0] == 0
    held_out = np.genfromtxt(root / "train.csv", delimiter=",", skip_header=1)[split_rows(1000, 0).held_out]
    data = write(tmp_path / "held.csv", held_out)
    _, out, _ = in_process(capsys, "evaluate", kind, data, "--json", "--artifacts", str(tmp_path))
    report, metrics = json.loads(out), read_manifest(tmp_path / kind / "1" / "model.pt").metrics
    assert report["held_out"] == metrics
    assert report["reconstruction_error"] == pytest.approx(metrics["reconstruction_error"], rel=1e-4)
    for name in ("elbo", "log_likelihood", "log_likelihood_se", "bits_per_dimension", "active_latents"):
        if name in metrics:
            tolerance = 0.15 if name == "elbo" else 1e-3  # training estimated the ELBO with different noise
            assert report[name] == pytest.approx(metrics[name], rel=tolerance)
        elif kind == "ae" or name == "active_latents":
            assert report[name] is None
    assert report["draws"] == {"pca": 1, "ae": None, "vae": 100}[kind]


def test_evaluate_command_reports_whether_the_model_was_trained_on_the_rows(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = in_process(capsys, "evaluate", "hosts", str(root / "train.csv"), "--artifacts", str(root))
    assert out.splitlines()[0].endswith(": 1,000 rows, the rows it was trained on")
    assert "AUROC" not in out


def shifted(root: Path, rows: int) -> Rows:
    """Return normal rows of the model `hosts`, all shifted by three standard deviations of each feature."""
    normal: Rows = np.genfromtxt(root / "train.csv", delimiter=",", skip_header=1)[:rows]
    moved: Rows = normal + 3 * normal.std(axis=0)
    return moved


@pytest.mark.parametrize("labelled", [False, True])
def test_evaluate_command_says_what_to_do_if_far_more_normal_rows_raise_alarms_than_alpha(
    root: Path, tmp_path: Path, labelled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shifted(root, 200)
    header = (root / "train.csv").read_text().splitlines()[0]
    if labelled:
        rows, header = np.column_stack((rows, np.arange(200) < 10)), f"{header},y"
    path = write(tmp_path / "shifted.csv", rows, header)
    _, out, _ = in_process(capsys, "evaluate", "hosts", path, "--artifacts", str(root))
    _, report, _ = in_process(capsys, "evaluate", "hosts", path, "--json", "--artifacts", str(root))
    rate = json.loads(report)["alarm_rates"]["0.05"]
    assert rate > 0.8
    warning = out.splitlines()[-1]
    assert json.loads(report)["comments"] == [warning.removeprefix("warning: ")]
    start = (
        f"warning: {100 * rate:.3g} % of the {'normal ' if labelled else ''}rows of {path} are flagged at alpha 0.05"
    )
    assert warning.startswith(start)
    assert "elbo calibrate hosts DATA" in warning
    assert "train the model again" in warning
    assert ("mark them with 1" in warning) is not labelled


def test_evaluate_command_does_not_comment_on_alarm_rates_that_chance_explains(
    root: Path, today: tuple[str, Rows], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (today[0], str(root / "train.csv")):
        _, out, _ = in_process(capsys, "evaluate", "hosts", path, "--json", "--artifacts", str(root))
        assert json.loads(out)["comments"] == []


def test_score_command_prints_the_row_number_and_exits_with_2_if_a_score_overflows(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.csv", np.vstack([two_factor_rows(3, seed=0), np.full((1, 5), 3e38)]))
    code, out, err = in_process(capsys, "score", "hosts", data, "--artifacts", str(root))
    assert code == 2
    assert len(out.splitlines()) == 4
    assert err.startswith(f"elbo: error: {data}: 1 of 4 rows is faulty (the first is row 3: the score overflows")


def test_repeated_training_publishes_the_next_version_with_the_same_weights(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = load(root / "hosts/1/model.pt").manifest
    arguments = ["--model", "pca", "--name", "hosts", "--latents", "2", "--seed", "3", "--artifacts", str(root)]
    _, out, _ = in_process(capsys, "train", str(root / "train.csv"), *arguments)
    assert out.startswith(f"published hosts@2: {root}/hosts/2/model.pt\n")
    second = load(root / "hosts/2/model.pt").manifest
    assert second.weights_sha256 == first.weights_sha256
    assert second.metrics == first.metrics


def test_demo_trains_only_missing_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _, config in DEMONSTRATIONS[1:]:
        (tmp_path / config.name / "1").mkdir(parents=True)
        (tmp_path / config.name / "1" / "model.pt").touch()
    monkeypatch.setenv("ELBO_ARTIFACTS", str(tmp_path))
    code, out, err = in_process(capsys, "demo")
    assert code == 0, err
    assert out == f"published {AUTO_KINDS[0]}@1: {tmp_path}/{AUTO_KINDS[0]}/1/model.pt\n"
    manifest = load(tmp_path / AUTO_KINDS[0] / "1" / "model.pt").manifest
    assert manifest.training == TrainConfig(model=AUTO_KINDS[0], name=AUTO_KINDS[0]).model_dump(mode="json")
    assert manifest.data.source == "digits"
    again = in_process(capsys, "demo", "--artifacts", str(tmp_path))
    assert again == (0, f"nothing to do: {tmp_path} has pca, ae, vae, linear, map, conditional, hosts\n", "")


def test_demo_trains_the_model_of_hosts_on_times_groups_and_seasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _, config in DEMONSTRATIONS[:-1]:
        (tmp_path / config.name / "1").mkdir(parents=True)
        (tmp_path / config.name / "1" / "model.pt").touch()
    code, out, err = in_process(capsys, "demo", "--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs"))
    assert code == 0, err
    assert out == f"published hosts@1: {tmp_path}/hosts/1/model.pt\n"
    manifest = load(tmp_path / "hosts/1/model.pt").manifest
    assert manifest.groups == [f"web-{host}" for host in range(10)]
    assert manifest.season is not None
    code, out, err = in_process(
        capsys, "evaluate", "hosts", "simulated-hosts-later", "--json", "--artifacts", str(tmp_path)
    )
    assert code == 0, err
    assert json.loads(out)["auroc"] > 0.8  # a leak begins slowly


@pytest.fixture
def long_training(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    folders = ["--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    arguments = ["train", "digits", "--model", "ae", "--name", "a", "--epochs", "100000", *folders]
    code = (  # background jobs of a shell ignore SIGINT, so restore the default handler
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from elbo import cli; cli.main({arguments})"
    )
    process = PreloadedProcess([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def test_sigint_during_training_prints_one_line_and_publishes_nothing(
    long_training: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert long_training.stderr is not None
    while not long_training.stderr.readline().startswith("training a (ae)"):
        pass
    long_training.send_signal(signal.SIGINT)
    _, rest = long_training.communicate(timeout=60)
    assert rest == "the run is saved: to continue it, repeat the command with --resume\nelbo: interrupted\n"
    assert long_training.returncode == 130
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["checkpoint.pt"]
