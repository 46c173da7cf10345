"""Compare the kinds of Elbo with one-hot + kNN on three generated tables with columns of text.

Run with: python -m benchmarks.anomaly.mixed_tables [--smoke]

Each table is drawn from a known rule. Half of the anomalies have another level, which contradicts the other columns,
and half have a number that is usual on its own, but not for the levels of the row. kNN is the mean distance to the 5
nearest fit rows, on one-hot levels and standardised numbers. All models are trained on the same normal rows.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors

from models.artifact import score
from training.config import EVERY_KIND, TrainConfig
from training.data.readers import InMemory
from training.data.table import read_table
from training.progress import SilentReporter
from training.train import fit_model

NEIGHBOURS = 5
Array = npt.NDArray[Any]
LEVELS = {"network": ["protocol", "port"], "machines": ["type", "mode", "shift"], "orders": ["country", "method"]}


def network(rows: int, random: np.random.RandomState) -> pl.DataFrame:
    """Return traffic: the port depends on the protocol, and the numbers depend on both."""
    protocol = random.choice(["tcp", "udp", "icmp"], rows, p=[0.6, 0.3, 0.1])
    ports = {"tcp": ["http", "https", "ssh"], "udp": ["dns", "ntp"], "icmp": ["echo"]}
    port = np.array([random.choice(ports[each]) for each in protocol])
    level = np.array([hash_free(each) for each in port])
    size = 2.0 * level + random.randn(rows)
    return pl.DataFrame(
        {"protocol": protocol, "port": port, "size": size, "time": 0.5 * size - level + 0.5 * random.randn(rows),
         "packets": random.poisson(3 + np.abs(level)), "load": random.randn(rows)}
    )  # fmt: skip


def machines(rows: int, random: np.random.RandomState) -> pl.DataFrame:
    """Return machines: the relation of three sensors depends on the mode, and the mode on the type."""
    kind = random.choice(["press", "lathe", "mill"], rows)
    modes = {"press": ["idle", "run"], "lathe": ["idle", "run", "fast"], "mill": ["run", "fast"]}
    mode = np.array([random.choice(modes[each]) for each in kind])
    speed = np.select([mode == "idle", mode == "run"], [0.0, 5.0], 10.0) + random.randn(rows)
    slope = np.select([kind == "press", kind == "lathe"], [1.0, -1.0], 0.5)
    return pl.DataFrame(
        {"type": kind, "mode": mode, "shift": random.choice(["early", "late", "night"], rows), "speed": speed,
         "power": slope * speed + 0.5 * random.randn(rows), "heat": 0.3 * speed + random.randn(rows)}
    )  # fmt: skip


def orders(rows: int, random: np.random.RandomState) -> pl.DataFrame:
    """Return orders: twelve countries with rates of their own, and a method that depends on the amount."""
    countries = [f"C{index}" for index in range(12)]
    country = random.choice(countries, rows, p=np.arange(1, 13) / 78)
    rate = np.array([countries.index(each) for each in country]) / 2.0
    amount = np.exp(random.randn(rows))
    method = np.where(amount > 2.0, random.choice(["invoice", "wire"], rows), random.choice(["card", "cash"], rows))
    return pl.DataFrame(
        {"country": country, "method": method, "amount": amount, "tax": rate + 0.3 * random.randn(rows),
         "items": random.poisson(2 * amount) + 1}
    )  # fmt: skip


def hash_free(text: str) -> float:
    """Return a number from -2 to 2 that depends only on `text`."""
    return sum(map(ord, text)) % 41 / 10.0 - 2.0


TABLES: dict[str, Callable[[int, np.random.RandomState], pl.DataFrame]] = {
    "network": network, "machines": machines, "orders": orders,
}  # fmt: skip


def with_anomalies(frame: pl.DataFrame, levels: list[str], random: np.random.RandomState) -> pl.DataFrame:
    """Return rows of which each has one value of another row: a level in the first half, a number in the second."""
    rows, changed = frame.height, {}
    numbers = [name for name in frame.columns if name not in levels]
    is_level = np.arange(rows) < rows // 2
    chosen = np.where(is_level, random.choice(levels, rows), random.choice(numbers, rows))
    for name in frame.columns:
        other = frame[name].to_numpy()[random.permutation(rows)]
        changed[name] = np.where(chosen == name, other, frame[name].to_numpy())
    differs = np.any([changed[name] != frame[name].to_numpy() for name in frame.columns], axis=0)
    return pl.DataFrame(changed).filter(pl.Series(differs))  # some rows got the value that they had


def neighbours(fit: Array, rows: Array, numbers: int) -> Array:
    """Return the mean distances from `rows` to their nearest rows in `fit`."""
    mean, deviation = fit[:, :numbers].mean(axis=0), fit[:, :numbers].std(axis=0)
    scaled = [np.column_stack(((x[:, :numbers] - mean) / deviation, x[:, numbers:])) for x in (fit, rows)]
    distances: Array = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(scaled[0]).kneighbors(scaled[1])[0]
    return np.asarray(distances.mean(axis=1))


def main() -> None:
    """Print the AUROC and the average precision of each kind on each table, in percent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few rows and epochs: only checks that the script runs")
    smoke = parser.parse_args().smoke
    rows = 600 if smoke else 3000
    print(f"{'table':<10}" + "".join(f"{name:>16}" for name in (*EVERY_KIND, "one-hot + kNN")))
    for name, draw in TABLES.items():
        random = np.random.RandomState(1)
        fit, normal, broken = draw(rows, random), draw(rows, random), draw(rows // 5, random)
        table = read_table(InMemory(fit))
        known = table.categories
        tests = pl.concat([normal, with_anomalies(broken, LEVELS[name], random)])
        codes = [(tests[each.name] == level).cast(pl.Float32) for each in known for level in each.levels]
        numbers = [tests[column].cast(pl.Float32) for column in table.names[: known[0].first]]
        x = np.column_stack([each.to_numpy() for each in (*numbers, *codes)]).astype(np.float32)
        truth = np.arange(len(x)) >= rows
        found = []
        for kind in EVERY_KIND:
            config = TrainConfig(model=kind, name=kind, epochs=2 if smoke else None)
            model = fit_model(config, table, SilentReporter()).model
            with torch.no_grad():
                found.append(score(model, torch.from_numpy(x))[0].numpy())
        found.append(neighbours(table.x.read_range(0, rows), x, known[0].first))
        figures = [
            f"{100 * roc_auc_score(truth, scores):.1f} / {100 * average_precision_score(truth, scores):.1f}"
            for scores in found
        ]
        print(f"{name:<10}" + "".join(f"{figure:>16}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
