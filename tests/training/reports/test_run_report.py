"""What real runs leave: the record, the card, the pictures."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import elbo
from models.manifest import Manifest, read_manifest
from tests.commands import two_factor_rows, write
from tests.data import ROOT
from tests.training.manifests import manifest_of
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.table import read_table
from training.reports.model_card import MEASURES, card, command_of
from training.train import train

SMALL = {"hidden": (16,), "epochs": 6, "latents": 4}
PLOTS = {
    "pca": {"reconstructions", "samples", "latents", "map", "scree"},
    "ae": {"losses", "reconstructions", "samples", "latents", "map", "scree"},
    "vae": {"losses", "reconstructions", "samples", "latents", "map", "scree"},
    "ensemble": {"losses", "reconstructions", "samples", "latents", "map", "scree"},
}


def run(kind: str, source: str, folder: Path, **options: object) -> tuple[Manifest, Path]:
    """A real run; gives its manifest and the folder that it leaves."""
    config = TrainConfig.model_validate(SMALL | {"model": kind, "name": "m"} | options)
    path = train(config, read_table(source), folder / "artifacts", RecordingReporter(), folder / "runs")
    return read_manifest(path), folder / "runs" / "m" / path.parent.name


def table(path: Path) -> str:
    return write(path / "train.csv", two_factor_rows(400, seed=0))


@pytest.mark.parametrize("kind", ["pca", "ae", "vae", "ensemble"])
@pytest.mark.parametrize("data", ["digits", "table"])
def test_a_run_leaves_a_card_and_pictures_that_show_something(kind: str, data: str, tmp_path: Path) -> None:
    manifest, folder = run(kind, data if data == "digits" else table(tmp_path), tmp_path)
    assert {path.stem for path in folder.glob("*.png")} == PLOTS[kind]
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert min(pixels.shape) >= 250
        assert pixels[:3].min() == 255  # a light background to its edge
        assert (pixels < 128).mean() > 0.002
    text = (folder / "card.md").read_text()
    assert {name.removesuffix(".png") for name in re.findall(r"\]\((\S+)\)", text)} == PLOTS[kind]
    for name, value in manifest.metrics.items():
        assert f"| {MEASURES[name][0]} | {value:.6g} |" in text
    assert f"`{manifest.data.fingerprint}`" in text
    assert f"{manifest.calibration.rows:,} rows that trained nothing calibrated it" in text


@pytest.mark.parametrize("kind", ["ae", "vae"])
def test_the_manifest_carries_the_history_that_is_on_disk(kind: str, tmp_path: Path) -> None:
    manifest, folder = run(kind, "digits", tmp_path)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert manifest.history == lines
    assert [line["epoch"] for line in lines] == list(range(1, 7))
    assert not (folder.parent / "metrics.jsonl").exists()
    assert len(manifest.latent_report) == 4
    if kind == "vae":
        nats = [latent.kl or 0.0 for latent in manifest.latent_report]
        assert sum(nats) == pytest.approx(manifest.metrics["kl"], rel=1e-5)
        assert sum(latent.active for latent in manifest.latent_report) == manifest.metrics["active_latents"]


def test_the_spectrum_is_that_of_the_fitted_rows_in_model_units(tmp_path: Path) -> None:
    manifest, _ = run("pca", table(tmp_path), tmp_path, latents=2)
    assert len(manifest.spectrum) == 5
    assert manifest.spectrum == sorted(manifest.spectrum, reverse=True)
    assert sum(manifest.spectrum) == pytest.approx(manifest.total_variance)
    assert manifest.total_variance == pytest.approx(5 * 280 / 279, rel=1e-4)  # standardised by N, covariance by N - 1


def test_an_older_manifest_still_loads() -> None:
    fields = json.loads(manifest_of(read_table("digits")).model_dump_json())
    new = {"history", "latent_report", "spectrum", "total_variance", "log_scale", "comparison"}
    old = Manifest.model_validate({name: value for name, value in fields.items() if name not in new})
    assert (old.history, old.spectrum, old.comparison) == ([], [], {})


@pytest.mark.parametrize(
    "options",
    [
        {"model": "pca", "latents": 3},
        {"model": "vae", "hidden": (), "beta": 4.0, "binarise": True, "likelihood": "bernoulli", "seed": 7},
        {"model": "ae", "hidden": (64, 32), "noise": 0.5, "drop": ("a b", "c"), "variance": 0.1, "patience": 3},
    ],
)
def test_the_command_in_the_card_is_the_run(
    options: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig.model_validate(options | {"name": "m"})
    manifest = manifest_of(read_table("digits")).model_copy(update={"training": config.model_dump(mode="json")})
    text = card(manifest, 3, ["a note"], [])
    line = text.split("```")[1].strip()
    assert line == command_of(manifest)
    asked: list[TrainConfig] = []
    monkeypatch.setattr(elbo, "_train", lambda config, *_: asked.append(config))
    monkeypatch.setattr("training.data.table.read_table", lambda *_, **__: None)
    words = subprocess.run(["bash", "-c", f'printf "%s\\n" {line}'], capture_output=True, text=True, check=True)
    with pytest.raises(SystemExit) as end:
        elbo.main(words.stdout.splitlines()[1:])
    assert end.value.code == 0, capsys.readouterr().err
    assert asked == [config]


def test_the_card_warns_of_what_is_wrong_with_this_model(tmp_path: Path) -> None:
    _, folder = run("vae", "digits", tmp_path, variance=1.0, beta=4.0)
    text = (folder / "card.md").read_text()
    assert "4 of 4 latents carry nothing" in text
    assert "no better than PCA" in text
    assert "? NO, 0." in text


def test_a_report_that_cannot_be_written_costs_no_model(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    report, config = RecordingReporter(), TrainConfig.model_validate({"model": "pca", "name": "m"})
    path = train(config, read_table("digits"), tmp_path / "artifacts", report, tmp_path / "runs")
    assert path.is_file()
    assert any(note.startswith(f"warning: no card in {tmp_path}/runs/m/1 (") for note in report.notes)


def test_where_matplotlib_is_missing_there_is_a_card_and_a_note(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; import elbo\n"
        "elbo.main(['train', 'digits', '--model', 'pca', '--name', 'm'])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "warning: not all pictures of the run could be drawn" in done.stderr
    assert "![" not in (tmp_path / "runs" / "m" / "1" / "card.md").read_text()


LONG = """
import sys
from pathlib import Path
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.table import read_table
from training.train import train
config = TrainConfig(model="ae", name="m", hidden=(16,), latents=4, epochs=40)
folder, resume = Path(sys.argv[1]), "resume" in sys.argv
train(config, read_table("digits"), folder / "artifacts", RecordingReporter(), folder / "runs", resume, 0.05)
"""


def test_a_run_that_was_killed_has_each_epoch_in_its_record_exactly_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LONG, str(tmp_path)]
    path = tmp_path / "runs" / "m" / "metrics.jsonl"
    process, deadline = subprocess.Popen(command, cwd=ROOT), time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= 5 and path.with_name("checkpoint.pt").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "resume"], cwd=ROOT, check=True)
    lines = [json.loads(line) for line in (path.parent / "1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 41))
    assert [line["step"] for line in lines] == [10 * epoch for epoch in range(1, 41)]  # 1,258 rows by 128
    subprocess.run([*command, "again"], cwd=ROOT, check=True)
    whole = [json.loads(line) for line in (path.parent / "2" / "metrics.jsonl").read_text().splitlines()]
    assert [line["held_out_loss"] for line in lines] == [line["held_out_loss"] for line in whole]
