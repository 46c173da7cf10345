"""`elbo train --scale-by-group`: incidents on hosts that differ much, and rows whose group is unknown."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch

from models.artifact import load, read_trained_rows
from models.policy_rules import FeatureRule, Policy, Silence
from service.anomaly.group_memory import rules_of
from service.app import create_app
from service.backtest.history import History, sort_history
from service.backtest.replay import Options, Replay, replay
from service.inference.model_loader import ModelLoader
from service.settings import Settings
from tests.conftest import made_once
from tests.service.running import post, running
from training.config import TrainConfig
from training.data.readers.simulated_hosts import HOSTS, LEAK, MEMORY, METRICS, NORMAL, ZONE, simulate
from training.data.table import read_table
from training.errors import FitError
from training.progress import SilentReporter
from training.publishing.recalibrate import recalibrate
from training.reports.describe import describe
from training.train import train

pytestmark = pytest.mark.slow

GROUPS: dict[str, Any] = {"model": "pca", "time": "time", "group": "host"}
OPTIONS: dict[str, Any] = {**GROUPS, "season": ("day", "week"), "time_zone": ZONE}


def differ(frame: pl.DataFrame) -> pl.DataFrame:
    """Return `frame` with the memory of each host raised by up to 200 GB, and its other metrics scaled at random."""
    random = np.random.RandomState(2)
    factors, level = np.exp(random.standard_normal((HOSTS, len(METRICS)))), random.uniform(0, 200, HOSTS)
    factors[:, MEMORY] = 1
    host = frame["host"].str.slice(len("web-")).cast(pl.Int64).to_numpy()
    x = frame.select(METRICS).to_numpy() * factors[host]
    x[:, MEMORY] += level[host]
    return frame.with_columns([pl.Series(name, x[:, index]) for index, name in enumerate(METRICS)])


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models `plain`, `scaled` and `windows`. The last two are scaled by group."""

    def make(root: Path) -> None:
        source = root.parent / "history.parquet"
        differ(simulate(0, 5)).write_parquet(source)
        table = read_table(str(source), time="time", group="host")
        for name, more in (("plain", {}), ("scaled", {"scale_by_group": True})):
            train(TrainConfig(name=name, **OPTIONS, **more), table, root, SilentReporter())
        config = TrainConfig(name="windows", **OPTIONS, scale_by_group=True, window=10)
        train(config, table, root, SilentReporter())

    return made_once("hosts-that-differ", make, tmp_path_factory)


@pytest.fixture(scope="module")
def later() -> tuple[History, npt.NDArray[np.object_]]:
    """Return the week after the history, with incidents, and the labels of its rows."""
    frame = differ(simulate(5, 1, incidents=True))
    history = sort_history(
        frame.select(METRICS).to_numpy().astype(np.float32),
        frame["time"].dt.epoch("s").to_numpy().astype(float),
        frame["host"].to_list(),
        np.arange(len(frame)),
    )
    return history, frame["label"].to_numpy()[history.source_rows]


def replayed(artifacts: Path, name: str, history: History) -> Replay:
    served = ModelLoader(backend="torchscript").load(artifacts / name / "1" / "model.pt", name, 1)
    return replay(served, history, Options(alphas=(0.05,)))


def test_memory_leak_is_found_on_very_different_hosts_only_if_rows_are_scaled_by_group(
    artifacts: Path, later: tuple[History, npt.NDArray[np.object_]]
) -> None:
    history, labels = later
    found = {}
    for name in ("plain", "scaled", "windows"):
        judged = replayed(artifacts, name, history)
        alarm = judged.is_anomaly[0]
        rates = [alarm[(history.group == host) & (labels == NORMAL)].mean() for host in range(HOSTS)]
        np.testing.assert_allclose(rates, 0.05, atol=0.03)
        found[name] = alarm[labels == LEAK].mean()
        if name == "scaled":
            last = int(np.flatnonzero((labels == LEAK) & alarm)[-1])
            cause = judged.causes_of(last)[0]
            assert cause.name == "memory"
            assert cause.value == history.x[last, MEMORY]
            assert cause.value is not None
            assert cause.expected is not None
            assert cause.value - cause.expected == pytest.approx(6, abs=1)  # GB of this host
    assert found["plain"] < 0.1
    assert min(found["scaled"], found["windows"]) > 0.85


def test_inspect_and_card_say_that_rows_are_scaled_by_group(artifacts: Path) -> None:
    for name, count in (("plain", 0), ("scaled", 1)):
        artifact = load(artifacts / name / "1" / "model.pt")
        card = " ".join(artifact.exhibits["card.md"].decode().split())
        for text in (describe(artifact.manifest, artifact.path), card):
            assert text.lower().count("rows of these groups are converted into common units") == count


@pytest.mark.parametrize("name", ["scaled", "windows"])
def test_false_alarm_rate_of_rows_without_a_group_is_alpha(artifacts: Path, name: str) -> None:
    frame = differ(simulate(7, 1))
    x = torch.from_numpy(frame.sort("host", "time").select(METRICS).to_numpy().astype(np.float32))
    if name == "windows":
        x = x.unfold(0, 10, 1).transpose(1, 2)[::10]
    artifact = load(artifacts / name / "1" / "model.pt")
    with torch.inference_mode():
        alarm = artifact.module.severity(artifact.module.score(x)[0], 0.05) > 1
    assert alarm.float().mean() == pytest.approx(0.05, abs=0.04)


def test_row_of_an_unknown_host_is_judged_by_the_pool_and_the_response_says_so(artifacts: Path) -> None:
    frame = differ(simulate(7, 1)).filter(pl.col("host") == "web-1").head(40)
    records = frame.with_columns(pl.col("time").dt.epoch("s"), host=pl.lit("new")).to_dicts()
    with running(create_app(Settings(artifacts=artifacts, default_model="scaled", log_level="warning"))) as client:
        results = post(client, "/anomaly", {"records": records})["results"]
        known = post(client, "/anomaly", {"records": [{**record, "host": "web-1"} for record in records]})["results"]
        alone = post(client, "/anomaly", {"inputs": [[record[name] for name in METRICS] for record in records]})
    assert {row["calibration"] for row in results} == {"pool"}
    assert {row["calibration"] for row in known} == {"group"}
    assert [row["score"] for row in results] == pytest.approx([row["score"] for row in alone["results"]], rel=1e-3)
    assert [row["score"] for row in known] != pytest.approx([row["score"] for row in results], rel=0.1)
    assert sum(row["is_anomaly"] for row in known) <= 8


def records_of(host: str, memory: float) -> list[dict[str, Any]]:
    """Return 150 new rows of a host in order of time. In the last 20 rows, the memory in GB is raised."""
    frame = differ(simulate(7, 1)).filter(pl.col("host") == host).sort("time").head(150)
    found: list[dict[str, Any]] = frame.with_columns(pl.col("time").dt.epoch("s")).to_dicts()
    for row in found[-20:]:
        row[METRICS[MEMORY]] += memory
    return found


@pytest.fixture(scope="module")
def client(artifacts: Path) -> Iterator[httpx.Client]:
    settings = Settings(artifacts=artifacts, default_model="scaled", log_level="warning", backend="torchscript")
    with running(create_app(settings)) as found:
        yield found


@pytest.mark.parametrize("model", ["scaled", "windows"])
def test_feedback_compares_rows_in_the_units_of_their_group(client: httpx.Client, model: str) -> None:
    rows = records_of("web-3", memory=8.0)
    latest = {"records": rows[-4:]}  # so recent that the server still remembers the rows before them

    def probe() -> dict[str, Any]:
        query = f"/anomaly?model={model}&observe=false"
        found: dict[str, Any] = post(client, query, {"records": records_of("web-3", memory=8.0)[-4:]})["results"][-1]
        return found

    def give(**body: Any) -> dict[str, Any]:
        (group,) = post(client, f"/feedback?model={model}", body)["groups"]
        return dict(group)

    results = post(client, f"/anomaly?model={model}", {"records": rows})["results"]
    assert sum(row["is_anomaly"] for row in results[-20:]) >= 15
    assert {row["calibration"] for row in results} == {"group"}
    before = probe()
    period = {"group_name": "web-3", "since": rows[-20]["time"], "until": rows[-1]["time"]}
    given = give(verdict="normal", **period)
    assert (given["group"], given["rows"], given["added"] > 0) == ("web-3", 20, True)
    after = probe()
    assert after["score"] == before["score"]
    assert not after["is_anomaly"]
    assert after["p_value"] > 3 * before["p_value"]
    assert give(verdict="normal", **latest)["added"] == 0  # the period has added the same scores
    assert give(verdict="incident", **period)["removed"] == 20
    assert give(verdict="normal", **latest)["added"] == 4


@pytest.mark.parametrize("age", [0, 2, 5])
def test_explanation_of_a_scaled_feature_says_when_its_step_began(client: httpx.Client, age: int) -> None:
    host = f"web-{age}"
    rows = records_of(host, memory=30.0)[: -19 + age]
    result = post(client, "/anomaly?model=windows&observe=false&explain=3", {"records": rows})["results"][-1]
    assert result["is_anomaly"]
    assert result["calibration"] == "group"
    cause = result["features"][0]
    assert cause["name"] == "memory"
    assert cause["value"] == pytest.approx(rows[-1][METRICS[MEMORY]], rel=1e-6)
    assert 10 < cause["value"] - cause["expected"] < 40  # GB of this host; the expected value follows the window
    assert cause["lag"] == age
    assert cause["since"] == rows[-1 - age]["time"]


def test_manifest_and_held_out_rows_of_a_scaled_model_are_in_raw_units(artifacts: Path) -> None:
    plain, scaled = (load(artifacts / name / "1" / "model.pt") for name in ("plain", "scaled"))
    assert scaled.manifest.features == plain.manifest.features
    assert scaled.manifest.data == plain.manifest.data
    assert read_trained_rows(scaled) == read_trained_rows(plain)
    served = ModelLoader(backend="torchscript").load(scaled.path, "scaled", 1)
    assert rules_of(served, has_calibration=True).features is not None
    assert rules_of(served, has_calibration=False).features is None


def test_recalibrated_model_compares_the_rows_of_a_group_in_the_units_of_the_pool(
    artifacts: Path, tmp_path: Path
) -> None:
    source = tmp_path / "week.parquet"
    frame = differ(simulate(6, 2))
    frame.write_parquet(source)
    parent = load(artifacts / "scaled" / "1" / "model.pt")
    table = read_table(str(source), time="time", group="host")
    path = recalibrate(parent, table, tmp_path, 0.05).path
    found, former = load(path).baseline, parent.baseline
    assert found is not None
    assert found.features is not None
    assert former is not None
    history = sort_history(
        frame.select(METRICS).to_numpy().astype(np.float32),
        frame["time"].dt.epoch("s").to_numpy().astype(float),
        frame["host"].to_list(),
        np.arange(len(frame)),
    )
    index = np.array([found.find(name) for name in history.groups])[history.group]
    with torch.inference_mode():
        x = found.features.to_pool(history.x, index, history.time)
        score = parent.module.score(torch.from_numpy(x))[0].numpy()
    adjusted = found.adjust(score, index, history.time)
    for host in range(HOSTS):
        start_set, origin = found.start_set(host)
        assert origin == "group"
        quantiles = np.quantile(adjusted[index == host], np.arange(1, 101) / 101)
        np.testing.assert_allclose(start_set[5:95], quantiles[5:95], atol=0.15)
    assert not np.array_equal(found.arrays["start_sets"], former.arrays["start_sets"])


def test_policy_with_rules_for_features_is_refused_with_rows_that_are_scaled_by_group(tmp_path: Path) -> None:
    table = read_table("simulated-hosts", time="time", group="host")
    policy = Policy(features={"memory": FeatureRule(direction="high")})
    config = TrainConfig(name="m", **GROUPS, scale_by_group=True)
    with pytest.raises(FitError, match=r"rules for features in raw units.* without --scale-by-group, or leave"):
        train(config, table, tmp_path, SilentReporter(), policy=policy)


def test_recalibration_with_rules_for_features_is_refused_if_rows_are_scaled_by_group(
    artifacts: Path, tmp_path: Path
) -> None:
    source = tmp_path / "week.parquet"
    differ(simulate(7, 1)).write_parquet(source)
    table, parent = read_table(str(source), time="time", group="host"), load(artifacts / "scaled" / "1" / "model.pt")
    rules = Policy(features={"memory": FeatureRule(direction="high")})
    with pytest.raises(FitError, match=r"rules for features in raw units.* without --scale-by-group, or leave"):
        recalibrate(parent, table, tmp_path, 0.05, policy=rules)
    assert not list(tmp_path.glob("scaled/*/*"))
    silent = Policy(silences=(Silence(start="02:00", end="03:00"),))
    path = recalibrate(parent, table, tmp_path, 0.05, policy=silent).path
    assert load(path).manifest.policy is not None


def test_scaling_by_group_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="expected --group too"):
        TrainConfig(model="pca", name="m", time="time", scale_by_group=True)
