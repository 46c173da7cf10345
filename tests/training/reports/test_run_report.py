"""The report of real runs: history, model card and plots."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from elbo import cli
from models.manifest import Manifest, read_manifest
from tests.commands import in_process, two_factor_rows, write
from tests.data import ROOT
from tests.preloaded import PreloadedProcess
from tests.training.manifests import manifest_of
from tests.training.reporters import RecordingReporter
from training.config import EVERY_KIND, TrainConfig
from training.data.table import read_table
from training.fitting.cross_calibration import with_calibration
from training.reports.describe import KIND_NAMES
from training.reports.model_card import MEASURES, card, command_of
from training.train import train

pytestmark = [pytest.mark.slow, pytest.mark.plots]

SMALL = {"hidden": (16,), "epochs": 6, "latents": 4}
PLOTS = {
    "pca": {"reconstructions", "samples", "latents", "map", "scree"},
    "ae": {"losses", "reconstructions", "samples", "latents", "map", "scree"},
    "vae": {"losses", "reconstructions", "samples", "latents", "map", "scree"},
    "ensemble": {"losses", "reconstructions", "samples", "latents", "map", "scree"},
}


def train_and_report(kind: str, source: str, folder: Path, **options: object) -> tuple[Manifest, Path]:
    """Train a small model. Return its manifest and the folder of its report."""
    config = TrainConfig.model_validate(SMALL | {"model": kind, "name": "m"} | options)
    path = train(config, read_table(source), folder / "artifacts", RecordingReporter(), runs=folder / "runs")
    return read_manifest(path), folder / "runs" / "m" / path.parent.name


def write_table(path: Path) -> str:
    return write(path / "train.csv", two_factor_rows(400, seed=0))


@pytest.mark.parametrize(
    ("data", "kind"), [*(("digits", kind) for kind in EVERY_KIND), ("table", "pca"), ("table", "vae")]
)
def test_run_writes_a_card_with_metrics_and_plots_that_are_not_blank(kind: str, data: str, tmp_path: Path) -> None:
    manifest, folder = train_and_report(kind, data if data == "digits" else write_table(tmp_path), tmp_path)
    assert {path.stem for path in folder.glob("*.png")} == PLOTS[kind]
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) >= 250
        assert pixels[:3].min() == 255  # white at the edge
        assert (pixels < 128).mean() > 0.002
    text = (folder / "card.md").read_text()
    assert {name.removesuffix(".png") for name in re.findall(r"\]\((\S+)\)", text)} == PLOTS[kind]
    for name, value in manifest.metrics.items():
        assert f"| {MEASURES[name][0]} | {value:.6g} |" in text
    assert f"`{manifest.data.fingerprint}`" in text
    assert f"{manifest.calibration.rows:,} rows that were not used for training" in text


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8, 2), (8, 8, 4), (8, 8, 13), (4, 8, 8, 3), (1, 8, 8, 3)])
def test_run_draws_images_with_any_number_of_channels_and_frames(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = np.random.RandomState(0).randint(0, 256, (60, *shape)).astype(np.uint8)
    np.save(tmp_path / "a.npy", x)
    manifest, folder = train_and_report("pca", str(tmp_path / "a.npy"), tmp_path)
    assert manifest.shape == list(shape)
    assert {path.stem for path in folder.glob("*.png")} == PLOTS["pca"]


@pytest.mark.parametrize("kind", ["ae", "vae"])
def test_history_in_the_manifest_equals_the_history_on_disk(kind: str, tmp_path: Path) -> None:
    manifest, folder = train_and_report(kind, "digits", tmp_path)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert manifest.history == lines
    assert [line["epoch"] for line in lines] == list(range(1, 7))
    assert not (folder.parent / "metrics.jsonl").exists()
    assert len(manifest.latent_report) == 4
    if kind == "vae":
        nats = [latent.kl or 0.0 for latent in manifest.latent_report]
        assert sum(nats) == pytest.approx(manifest.metrics["kl"], rel=1e-5)
        assert sum(latent.active for latent in manifest.latent_report) == manifest.metrics["active_latents"]


def test_spectrum_in_the_manifest_sums_to_the_total_variance_of_the_fit_rows(tmp_path: Path) -> None:
    manifest, _ = train_and_report("pca", write_table(tmp_path), tmp_path, latents=2)
    assert len(manifest.spectrum) == 5
    assert manifest.spectrum == sorted(manifest.spectrum, reverse=True)
    assert sum(manifest.spectrum) == pytest.approx(manifest.total_variance)
    assert manifest.total_variance == pytest.approx(
        5 * 280 / 279, rel=1e-4
    )  # the scaling divides by N, the covariance by N - 1


def test_manifest_of_an_earlier_release_loads_with_defaults_for_new_fields() -> None:
    fields = json.loads(manifest_of(read_table("digits")).model_dump_json())
    added = {"history", "latent_report", "spectrum", "total_variance", "log_scale", "comparison", "warnings"}
    old = Manifest.model_validate({name: value for name, value in fields.items() if name not in added})
    assert (old.history, old.spectrum, old.comparison, old.warnings) == ([], [], {}, [])


@pytest.mark.parametrize(
    "options",
    [
        {"model": "pca", "latents": 3},
        {"model": "vae", "hidden": (), "beta": 4.0, "binarise": True, "likelihood": "bernoulli", "seed": 7},
        {
            "model": "ae",
            "hidden": (64, 32),
            "noise": 0.5,
            "drop": ("a b", "c"),
            "label": ("y,z",),
            "variance": 0.1,
            "patience": 3,
        },
    ],
)
def test_command_in_the_card_repeats_the_run_with_the_same_options(
    options: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig.model_validate(options | {"name": "m"})
    digits = read_table("digits")
    manifest = manifest_of(digits).model_copy(update={"training": config.model_dump(mode="json")})
    text = card(manifest, 3, ["a note"], [])
    command_line = text.split("```")[1].strip()
    assert command_line == command_of(manifest)
    trained: list[TrainConfig] = []
    monkeypatch.setattr(cli, "_train", lambda config, *_, **__: trained.append(config))
    monkeypatch.setattr("training.train.read_table", lambda *_, **__: digits)
    words = subprocess.run(["bash", "-c", f'printf "%s\\n" {command_line}'], capture_output=True, text=True, check=True)
    with pytest.raises(SystemExit) as end:
        cli.main(words.stdout.splitlines()[1:])
    assert end.value.code == 0, capsys.readouterr().err
    assert [with_calibration(found, digits) for found in trained] == [config]


def test_card_reports_inactive_latents_and_a_better_pca_if_the_vae_has_collapsed(tmp_path: Path) -> None:
    _, folder = train_and_report("vae", "digits", tmp_path, variance=1.0, beta=4.0)
    text = (folder / "card.md").read_text()
    assert "4 of 4 latents carry no information" in text
    assert "no better than PCA" in text
    assert "? NO, 0." in text


def test_run_publishes_the_model_and_warns_if_the_report_folder_is_unwritable(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    report, config = RecordingReporter(), TrainConfig.model_validate({"model": "pca", "name": "m"})
    path = train(config, read_table("digits"), tmp_path / "artifacts", report, runs=tmp_path / "runs")
    assert path.is_file()
    assert any(
        note.startswith(f"warning: failed to write the model card in {tmp_path}/runs/m/1 (") for note in report.notes
    )


def test_run_writes_the_card_and_warns_about_the_plots_if_matplotlib_is_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "training.reports.plots", raising=False)  # so that it imports matplotlib again
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    code, _, err = in_process(capsys, "train", "digits", "--model", "pca", "--name", "m")
    assert code == 0
    assert "warning: failed to draw some plots" in err
    assert "![" not in (tmp_path / "runs" / "m" / "1" / "card.md").read_text()


def test_run_with_no_plots_writes_the_card_without_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = ["--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    for option, name in ((["--no-plots"], "by-option"), ([], "by-variable"), (["--plots"], "drawn")):
        code, _, _ = in_process(capsys, "train", "digits", "--model", "pca", "--name", name, *folders, *option)
        assert code == 0
        written = {path.name for path in (tmp_path / "runs" / name / "1").iterdir()}
        assert written == {"card.md"} | ({f"{plot}.png" for plot in PLOTS["pca"]} if name == "drawn" else set())
        monkeypatch.setenv("ELBO_PLOTS", "false")


def long_run(folder: Path, *, resume: bool = False) -> None:
    config = TrainConfig(model="ae", name="m", hidden=(16,), latents=4, epochs=40)
    train(
        config,
        read_table("digits"),
        folder / "artifacts",
        RecordingReporter(),
        runs=folder / "runs",
        resume=resume,
        checkpoint_seconds=0.05,
    )


def test_history_has_the_same_epochs_and_losses_if_the_run_is_killed_and_resumed(tmp_path: Path) -> None:
    options = ["--model", "ae", "--name", "m", "--hidden", "16", "--latents", "4", "--epochs", "40"]
    options += ["--checkpoint-seconds", "0.05", "--artifacts", str(tmp_path / "artifacts")]
    command = [sys.executable, "-m", "elbo", "train", "digits", *options, "--runs", str(tmp_path / "runs")]
    path = tmp_path / "runs" / "m" / "metrics.jsonl"
    process = PreloadedProcess(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (path.exists() and path.read_bytes().count(b"\n") >= 5 and path.with_name("checkpoint.pt").exists()):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    long_run(tmp_path, resume=True)
    lines = [json.loads(line) for line in (path.parent / "1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 41))
    assert [line["step"] for line in lines] == [
        10 * epoch for epoch in range(1, 41)
    ]  # 1,258 fit rows in batches of 128
    long_run(tmp_path)
    uninterrupted = [json.loads(line) for line in (path.parent / "2" / "metrics.jsonl").read_text().splitlines()]
    assert [line["held_out_loss"] for line in lines] == [line["held_out_loss"] for line in uninterrupted]


def test_every_kind_of_model_has_a_display_name() -> None:
    assert set(KIND_NAMES) == {*EVERY_KIND, "adopted"}
