"""Two models of the metrics of three hosts, rows of these hosts, and requests with them."""

from pathlib import Path
from typing import Any

import httpx
import polars as pl

from service.settings import Settings
from tests.training.reporters import RecordingReporter
from tests.training.series import host_metrics, save
from training.config import TrainConfig
from training.data.table import read_table
from training.train import train

FEATURES = ["cpu", "mem", "disk"]
Record = dict[str, Any]


def train_group_models(root: Path) -> None:
    """Train two models in the folder `artifacts` of `root`: `rows`, and `windows` with a window of six rows."""
    table = read_table(save(root / "metrics.csv", host_metrics(400)), time="ts", group="host")
    for name, window in (("rows", None), ("windows", 6)):
        config = TrainConfig(model="pca", name=name, time="ts", group="host", window=window, latents=2)
        train(config, table, root / "artifacts", RecordingReporter())


def records(rows: int = 40, hosts: int = 3) -> list[Record]:
    """Return new rows of the hosts in order of time, with an incident in the middle."""
    frame = host_metrics(rows, hosts, seed=9).with_columns(pl.col("ts").dt.epoch("s"))
    found: list[Record] = frame.to_dicts()
    for row in found[len(found) // 2 : len(found) // 2 + 12]:
        row["cpu"] += 8.0
    return found


def settings_of(models: Path, state: Path, **more: Any) -> Settings:
    """Return the settings of a server of `models` that keeps the memory of groups in `state`."""
    values = {"artifacts": models, "state": state, "log_level": "warning", "default_model": "windows", **more}
    return Settings(**values)


def send(client: httpx.Client, rows: list[Record], model: str, **query: Any) -> list[Record]:
    """Send rows in one request, and return the results."""
    response = client.post("/anomaly", params={"model": model, **query}, json={"records": rows})
    assert response.status_code == 200, response.text
    results: list[Record] = response.json()["results"]
    return results
