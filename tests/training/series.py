"""Files with the metrics of several hosts over time, as CSV and Parquet."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

START = datetime(2024, 1, 1, tzinfo=UTC)
STEP = timedelta(minutes=10)


def host_metrics(rows: int = 400, hosts: int = 3, seed: int = 0) -> pl.DataFrame:
    """Return the metrics of `hosts` hosts, in the order of their times: a row of each host every ten minutes."""
    random = np.random.RandomState(seed)
    load = np.sin(np.arange(rows) / 30)[:, None] + 0.1 * random.standard_normal((rows, hosts))  # [rows, hosts]
    return pl.DataFrame(
        {
            "ts": np.repeat([START + STEP * index for index in range(rows)], hosts).tolist(),
            "host": [f"web-{host}" for host in range(hosts)] * rows,
            "cpu": (load + np.arange(hosts)).reshape(-1),
            "mem": (2 * load + 0.1 * random.standard_normal(load.shape)).reshape(-1),
            "disk": random.standard_normal(rows * hosts),
        },
        schema_overrides={"ts": pl.Datetime("ms", "UTC")},
    )


def save(path: Path, frame: pl.DataFrame) -> str:
    """Write `frame` to `path`, as Parquet or CSV by its suffix. Return the path."""
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        has_times = isinstance(frame.schema.get("ts"), pl.Datetime)
        text = pl.col("ts").dt.strftime("%Y-%m-%dT%H:%M:%S%:z")
        (frame.with_columns(text) if has_times else frame).write_csv(path)
    return str(path)


def csv_of_times(path: Path, times: list[Any], hosts: list[str] | None = None) -> str:
    """Write a CSV with a row of measurements for each of `times`. Row i is in line i + 2. Return the path."""
    random = np.random.RandomState(0)
    lines = ["ts,host,cpu,mem" if hosts else "ts,cpu,mem"]
    for index, time in enumerate(times):
        keys = [str(time), hosts[index]] if hosts else [str(time)]
        lines.append(",".join([*keys, *(f"{value:.6f}" for value in random.standard_normal(2))]))
    path.write_text("\n".join(lines) + "\n")
    return str(path)
