"""Simulated metrics of ten hosts, for the demonstration: seasons, differences between hosts, and three incidents.

All metrics follow the load, which has a season of the day and of the week. The noise grows with the load, so the usual
anomaly score has these seasons, too. Seven hosts serve Europe. The other three serve users whose day begins seven hours
later.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.season import Floats, offsets_of_zone, to_local
from training.data.readers.columns import (
    build_raw_table,
    choose_columns,
    choose_condition_columns,
    choose_label_column,
    choose_timeline_columns,
)
from training.data.readers.raw_table import RawTable, ReadOptions

if TYPE_CHECKING:
    import polars as pl

START = datetime(2025, 3, 3, tzinfo=UTC)  # a Monday; summer time begins in week 4
STEP = timedelta(minutes=15)
WEEK_ROWS = timedelta(weeks=1) // STEP
HISTORY_WEEKS, LATER_WEEKS = 5, 1
HOSTS = 10
ZONE = "Europe/Berlin"  # that of the model hosts, see `training.config`
METRICS = (
    "cpu [%]", "memory [GB]", "requests [1/s]", "latency [ms]", "errors [1/min]", "disk [MB/s]", "network [MB/s]",
)  # fmt: skip
CPU, MEMORY, REQUESTS, LATENCY = 0, 1, 2, 3
NORMAL, LEAK, SLOW, RUNAWAY = "normal", "memory leak", "slow database", "runaway job"

SOURCES = {"simulated-hosts": (0, HISTORY_WEEKS), "simulated-hosts-later": (HISTORY_WEEKS, LATER_WEEKS)}


def read_simulated_hosts(source: str, options: ReadOptions) -> RawTable:
    """Return the rows of `source`, one of SOURCES: five normal weeks, or the week after them, with incidents."""
    frame = simulate(*SOURCES[source], incidents=source != "simulated-hosts")
    path = Path(source)
    columns = choose_columns(frame.columns, path, options, typed=True)
    labels = choose_label_column(frame.columns, path, options)
    timeline = choose_timeline_columns(frame.columns, path, options)
    conditions = choose_condition_columns(frame.columns, path, options)
    return build_raw_table(
        iter([frame]), columns, labels, options, path, len(frame), timeline=timeline, conditions=conditions
    )


def simulate(first_week: int, weeks: int, *, incidents: bool = False, seed: int = 0) -> "pl.DataFrame":
    """Return the rows of all hosts, in the order of their times.

    The columns are time, host, METRICS and, with incidents, label: normal, or the kind of the incident.

    Args:
        first_week: the first week, counted from START. Different weeks have independent noise.
        weeks: number of weeks.
        incidents: whether there is an incident of each kind in the first of the weeks.
        seed: determines the noise. The hosts are always the same.
    """
    import polars as pl

    rows = weeks * WEEK_ROWS
    times = [START + STEP * index for index in range(first_week * WEEK_ROWS, first_week * WEEK_ROWS + rows)]
    seconds = np.array([time.timestamp() for time in times])
    local = to_local(seconds, *offsets_of_zone(ZONE))
    values = np.empty((rows, HOSTS, len(METRICS)))
    labels = np.full((rows, HOSTS), NORMAL, object)
    for host in range(HOSTS):
        values[:, host] = _metrics(local, host, np.random.RandomState([seed, first_week, host]))
    if incidents:
        _add_incidents(values, labels, local)
    columns: dict[str, Any] = {
        "time": [time for time in times for _ in range(HOSTS)],
        "host": [f"web-{host}" for host in range(HOSTS)] * rows,
        **{name: values[:, :, index].reshape(-1) for index, name in enumerate(METRICS)},
    }
    if incidents:
        columns["label"] = labels.reshape(-1).tolist()
    return pl.DataFrame(columns, schema_overrides={"time": pl.Datetime("ms", "UTC")})


def _metrics(local: Floats, host: int, random: np.random.RandomState) -> Floats:
    """Return the metrics of a host, [rows, 7].

    Args:
        local: local times in seconds, [rows].
        random: source of the noise.
    """
    own = np.random.RandomState(host)  # what makes this host differ from the others
    size, loudness, baseline = own.uniform(0.5, 2.0), own.uniform(0.6, 1.6), own.uniform(6.0, 8.0)
    load = _load(local - (7 * 3600 if host % 3 == 2 else 0)) + 0.04 * _noise(random, len(local), 0.9)
    busy = loudness * (0.25 + load)
    noise = np.column_stack([busy * _noise(random, len(local), 0.3) for _ in METRICS])
    usual = np.column_stack([
        8 + 55 * load,
        baseline + 3 * load,
        200 * size * load,
        20 + 40 * load**2,
        1 + 4 * load,
        5 + 20 * size * load,
        1 + 12 * size * load,
    ])  # fmt: skip
    deviation = np.array([2.0, 0.15, 8.0 * size, 3.0, 0.8, 1.5, 0.6])
    return np.maximum(usual + deviation * noise, 0.0)


def _load(local: Floats) -> Floats:
    """Return the usual load at local times in seconds, [rows]: from 0.05 at night to about 1, less on weekends."""
    hour, day = local / 3600 % 24, (local // 86_400 + 3) % 7  # day 0 is Monday
    curve = np.clip(0.5 - 0.5 * np.cos(2 * np.pi * (hour - 3) / 24), 0, 1) ** 1.5
    result: Floats = 0.05 + curve * np.where(day >= 5, 0.45, 1.0)
    return result


def _noise(random: np.random.RandomState, rows: int, memory: float) -> Floats:
    """Return noise [rows] with variance 1 and heavy tails, of which each value depends on the one before it."""
    from scipy.signal import lfilter

    steps = random.standard_t(6, rows) * np.sqrt((1 - memory**2) * 4 / 6)
    noise: Floats = lfilter([1.0], [1.0, -memory], steps)  # noise[i] = memory * noise[i - 1] + steps[i]
    return noise


def _add_incidents(values: Floats, labels: "np.ndarray[Any, np.dtype[np.object_]]", local: Floats) -> None:
    """Add one incident of each kind to `values` [rows, hosts, 7] and `labels` [rows, hosts] of a week."""

    def rows(day: int, hour: float, hours: float) -> slice:
        first = int(np.searchsorted(local, local[0] - local[0] % 86_400 + (24 * day + hour) * 3600))
        return slice(first, first + int(hours * 4))

    leak, slow, runaway = rows(1, 8, 10), rows(2, 10, 2), rows(4, 2, 3)
    values[leak, 3, MEMORY] += np.linspace(0.2, 6.0, leak.stop - leak.start)
    values[slow, 4, LATENCY] *= 2.5
    values[slow, 4, REQUESTS] *= 0.6
    values[runaway, 6, CPU] += 35.0
    for label, when, host in ((LEAK, leak, 3), (SLOW, slow, 4), (RUNAWAY, runaway, 6)):
        labels[when, host] = label
