"""`elbo train --sweep`: all combinations are trained, and the best is published only if it is better."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.artifact import load
from models.manifest import read_manifest
from tests.commands import in_process, two_factor_rows, write
from training import sweep
from training.config import TrainConfig
from training.errors import FitError
from training.evaluation.model_selection import Measures, significant_wins, wins_minus_losses
from training.sweep import Trial, TrialResult, _best, parse_sweep, run_sweep, train_locally

pytestmark = pytest.mark.slow


def test_combinations_are_in_order_and_values_in_quotation_marks_may_have_commas() -> None:
    assert parse_sweep(["latents=2, 4", "--learning-rate=0.1", 'hidden="8,4",16']) == [
        {"latents": latents, "learning_rate": "0.1", "hidden": hidden}
        for latents in ("2", "4")
        for hidden in ("8,4", "16")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name=a,b", "'name' cannot be varied: expected one of activation, batch-size"),
        ("window=5", "'window' cannot be varied"),
        ("latents", "expected an option and its values"),
        ("latents=", "expected an option and its values"),
        ("latents=1,,2", "expected an option and its values"),
        (f"seed={','.join(map(str, range(1001)))}", "1,001 combinations are too many"),
    ],
)
def test_sweep_that_is_not_valid_is_refused(text: str, message: str) -> None:
    with pytest.raises(FitError, match=re.escape(message)):
        parse_sweep([text])
    with pytest.raises(FitError, match="once"):
        parse_sweep(["latents=1", "latents=2"])


def test_best_model_is_published_once_and_a_worse_one_never(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "train.csv", two_factor_rows(600, seed=0))
    folders = ["--artifacts", str(tmp_path / "artifacts"), "--runs", str(tmp_path / "runs")]
    options = ["train", data, "--model", "pca", "--name", "hosts", *folders]
    code, out, err = in_process(capsys, *options, "--sweep", "latents=1,2,9", "--sweep", "seed=0,1")
    assert code == 0, err
    path = tmp_path / "artifacts" / "hosts" / "1" / "model.pt"
    manifest = read_manifest(path)
    # Two loads drive the five metrics, so one latent is too few, and nine are more than there are metrics.
    assert (manifest.name, manifest.latents, manifest.training["seed"]) == ("hosts", 2, 0)
    assert "the best is latents=2 seed=0, published as hosts@1: there is no served version" in out
    lines = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    assert lines[0] == ["latents", "seed", "reconstruction_error", "log_likelihood", "detection", "seconds"]
    table = {tuple(line[:2]): line for line in lines[1:7]}
    assert list(table) == [(latents, seed) for latents in "129" for seed in "01"]
    errors = {key: float(line[2]) for key, line in table.items() if key[0] != "9"}
    assert errors["2", "0"] == errors["2", "1"] < errors["1", "0"] / 10  # a PCA does not depend on the seed
    assert "latents" in table["9", "0"][-1]
    page = (tmp_path / "runs" / "hosts" / "sweep.html").read_text()
    assert page.count("<tr") == 7
    assert re.search(r"<tr class=best><td>2</td><td>0</td>", page)
    code, out, err = in_process(capsys, *options, "--sweep", "latents=1")
    assert code == 0, err
    assert "which was not published: it is not significantly better than the served version" in out
    served = next(line for line in out.splitlines() if line.strip().startswith("served"))
    assert float(served.split()[1]) == pytest.approx(errors["2", "0"], rel=1e-3)
    assert [path.name for path in (tmp_path / "artifacts" / "hosts").iterdir()] == ["1"]
    code, out, err = in_process(capsys, *options, "--sweep", "latents=1", "--force")
    assert (code, "published as hosts@2: --force was given, although it is not" in out) == (0, True), err
    code, out, err = in_process(capsys, *options, "--sweep", "latents=1,2")
    assert "the best is latents=2, published as hosts@3: it beats the served version" in out
    assert sorted(path.name for path in (tmp_path / "runs" / "hosts").iterdir()) == ["sweep.html"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "latents=1", "--resume"], "--resume is not for --sweep"),
        (["--engine", "ray"], "--engine is for --sweep"),
        (["--sweep", "latents=many"], "--latents"),
        (["--sweep", "latents=9"], "no model of the sweep could be trained"),
    ],
)
def test_options_that_are_not_for_a_sweep_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "train.npy", two_factor_rows(100, seed=0))
    folders = ["--artifacts", str(tmp_path / "artifacts"), "--runs", str(tmp_path / "runs")]
    command = ["train", str(tmp_path / "train.npy"), "--model", "pca", "--name", "hosts", *folders, *options]
    code, _, err = in_process(capsys, *command)
    assert code != 0
    assert message in err
    assert list((tmp_path / "artifacts").glob("hosts/*")) == []


def results(count: int, seed: int) -> list[TrialResult]:
    """Return trials whose measures on 40 rows differ by chance, and by a quality of each trial."""
    random = torch.Generator().manual_seed(seed)
    config = TrainConfig(model="pca", name="hosts")
    found = []
    for index in range(count):
        names = ("reconstruction_error", "detection") if index % 5 else ("reconstruction_error",)
        values = {name: torch.randn(40, generator=random) + torch.randn((), generator=random) for name in names}
        found.append(TrialResult(Trial(index, {"seed": str(index)}, config), measures=values))
    return found


def test_best_of_many_trials_is_that_of_all_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        trained = results(60, seed)
        wins = significant_wins({each.trial.label: each.measures for each in trained})
        assert _best(trained) is max(trained, key=lambda each: wins_minus_losses(wins, each.trial.label))
    compared = []

    def record_count(found: Mapping[str, Measures]) -> list[tuple[str, str, str]]:
        compared.append(len(found))
        return []

    monkeypatch.setattr(sweep, "significant_wins", record_count)
    _best(results(1000, 9))
    assert compared[0] <= 40  # instead of a thousand


def test_served_model_that_cannot_be_compared_is_found_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "train.csv", two_factor_rows(200, seed=0))
    artifacts = tmp_path / "artifacts"
    options = ["train", data, "--model", "pca", "--name", "hosts", "--artifacts", str(artifacts)]
    assert in_process(capsys, *options, "--runs", str(tmp_path / "runs"))[0] == 0
    artifact = load(artifacts / "hosts" / "1" / "model.pt")
    without_score = replace(artifact, module=torch.jit.script(torch.nn.Identity()))
    monkeypatch.setattr(sweep, "load", lambda _path: without_score)
    trials = [Trial(0, {"latents": "1"}, TrainConfig(model="pca", name="hosts", latents=1))]
    found = run_sweep(trials, data, artifacts, tmp_path, train_locally)
    assert found.reason == "the served version was not compared, because it cannot be loaded or takes other inputs"
    assert (artifacts / "hosts" / "2" / "model.pt").exists()
