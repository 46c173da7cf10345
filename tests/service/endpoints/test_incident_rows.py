"""`--incident-rows`: the number of rows after which an incident counts as a change.

The service, a backtest and a new calibration obey it."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from elbo import cli
from models.artifact import load
from service.anomaly.online_calibration import MIN_INCIDENT_ROWS, SET_ROWS
from service.app import create_app
from service.backtest.history import sort_history
from service.backtest.replay import Options, replay
from service.inference.model_loader import ModelLoader
from tests.service.groups import FEATURES, send, settings_of
from tests.service.running import running
from tests.training.series import host_metrics, save

pytestmark = pytest.mark.slow
INCIDENT_AT, ROWS = 60, 160


def stream() -> pl.DataFrame:
    """Return rows of a host that become strange at row INCIDENT_AT, and stay so."""
    frame = host_metrics(ROWS, 1, seed=9)
    strange = (np.arange(ROWS) >= INCIDENT_AT) * 8.0
    return frame.with_columns(pl.col("ts").dt.epoch("s"), pl.col("cpu") + strange)


def served_states(artifacts: Path, state: Path) -> list[str]:
    with running(create_app(settings_of(artifacts, state, default_model="web"))) as client:
        return [result["state"] for result in send(client, stream().to_dicts(), "web")]


def replayed_states(path: Path, incident_rows: int | None = None) -> Sequence[str] | None:
    frame = stream()
    history = sort_history(
        frame.select(FEATURES).to_numpy().astype(np.float32),
        frame["ts"].to_numpy().astype(float),
        frame["host"].to_list(),
        np.arange(ROWS),
    )
    served = ModelLoader().load(path, "web", 1)
    return replay(served, history, Options(incident_rows=incident_rows)).states


def test_service_and_backtest_count_an_incident_as_a_change_after_the_chosen_number_of_rows(tmp_path: Path) -> None:
    table, artifacts = save(tmp_path / "metrics.csv", host_metrics(400)), tmp_path / "artifacts"

    def run(*arguments: str) -> str:
        runs = [] if arguments[0] == "inspect" else ["--runs", str(tmp_path)]
        result = CliRunner().invoke(cli.app, [*arguments, "--artifacts", str(artifacts), *runs])
        assert result.exit_code == 0, result.output
        return result.output

    run("train", table, "--model", "pca", "--name", "web", "--time", "ts", "--group", "host", "--incident-rows", "40")
    path = artifacts / "web" / "1" / "model.pt"
    assert load(path).manifest.incident_rows == 40
    for text in (run("inspect", "web"), " ".join(load(path).exhibits["card.md"].decode().split())):
        assert re.search(r"an incident of a group that lasts 40 rows counts as a change", text, re.IGNORECASE)
    with running(create_app(settings_of(artifacts, tmp_path / "unused", default_model="web"))) as client:
        assert client.get("/models/web").json()["incident_rows"] == 40
    served = served_states(artifacts, tmp_path / "state")
    changed = served.index("changed")
    assert changed == served.index("incident") - 21 + 40 - 1  # the state is "incident" from the 22nd alarm on
    assert changed == INCIDENT_AT + 39
    assert replayed_states(path) == served
    assert list(replayed_states(path, 90) or ()).index("changed") == INCIDENT_AT + 89

    newer = save(tmp_path / "newer.csv", host_metrics(200, seed=5))
    run("calibrate", "web", newer, "--incident-rows", "70")
    assert load(artifacts / "web" / "2" / "model.pt").manifest.incident_rows == 70
    assert served_states(artifacts, tmp_path / "state").index("changed") == INCIDENT_AT + 69


@pytest.mark.parametrize("rows", [MIN_INCIDENT_ROWS - 1, SET_ROWS + 1])
def test_incident_rows_out_of_range_are_refused(rows: int) -> None:
    arguments = ["train", "digits", "--model", "pca", "--name", "x", "--time", "ts", "--incident-rows", str(rows)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code != 0
    assert "incident-rows" in result.output + str(result.exception)


def test_incident_rows_without_times_are_refused() -> None:
    result = CliRunner().invoke(cli.app, ["train", "digits", "--model", "pca", "--name", "x", "--incident-rows", "50"])
    assert result.exit_code != 0
    assert "--time" in result.output + str(result.exception)
