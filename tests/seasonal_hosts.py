"""Two models of the simulated hosts, `seasonal` and `plain`, and later rows to judge."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch

from tests.conftest import made_once
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.readers.simulated_hosts import METRICS, ZONE, simulate
from training.data.table import read_table
from training.train import train

FEW = "few-rows"  # a host with enough rows for a baseline, but with few calibration rows
NEW = "new"  # a host that first appears among the calibration rows
HISTORY_WEEKS = 5


@dataclass(frozen=True)
class Rows:
    x: torch.Tensor  # [B, D]
    time: npt.NDArray[np.float64]  # [B] Unix seconds
    group: list[str]  # [B]

    @property
    def hour(self) -> npt.NDArray[np.int64]:
        """The hour on a clock in ZONE, [B]; the later weeks lie in summer time."""
        return ((self.time + 7200) // 3600 % 24).astype(int)


def rows_of(frame: pl.DataFrame) -> Rows:
    x = torch.from_numpy(frame.select(METRICS).to_numpy().astype(np.float32))
    return Rows(x, frame["time"].dt.epoch("s").to_numpy().astype(float), frame["host"].to_list())


def history() -> pl.DataFrame:
    """Return five weeks of rows of ten hosts, and of two hosts with few rows."""
    frame = simulate(0, 5)
    own = frame.filter(pl.col("host") == "web-1")
    few = own.head(2000).with_columns(host=pl.lit(FEW))  # they end before the calibration rows
    few = pl.concat([few, own.tail(50).with_columns(host=pl.lit(FEW))])
    new = own.tail(300).with_columns(host=pl.lit(NEW))
    return pl.concat([frame, few, new])


def seasonal_artifacts(folders: pytest.TempPathFactory) -> Path:
    """Return a folder with the models seasonal and plain. Both have groups, and seasonal has seasons."""

    def make(root: Path) -> None:
        source = root.parent / "history.parquet"
        history().write_parquet(source)
        table = read_table(str(source), time="time", group="host")
        for name in ("seasonal", "plain"):
            season: dict[str, Any] = {"season": ("day", "week"), "time_zone": ZONE} if name == "seasonal" else {}
            config = TrainConfig(model="pca", name=name, time="time", group="host", **season)
            train(config, table, root, RecordingReporter())

    return made_once("seasonal-hosts", make, folders)
