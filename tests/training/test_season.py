"""`elbo train --group --season`: the false-alarm rate of simulated hosts by hour, and the baseline of their groups."""

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch

from models.artifact import Artifact, load
from models.baseline import Baseline
from models.policy_rules import FeatureRule, Policy
from tests.commands import in_process
from tests.seasonal_hosts import FEW, NEW, Rows, rows_of, seasonal_artifacts
from training.data.readers.simulated_hosts import HOSTS, ZONE, simulate
from training.data.table import read_table
from training.data.time_split import TimeSplit, split_table
from training.fitting.policy import apply_to_split

pytestmark = pytest.mark.slow

LATER_WEEKS = 6


@pytest.fixture(scope="module")
def later() -> Rows:
    """Return the normal rows of ten hosts in the six weeks after the training."""
    return rows_of(simulate(5, LATER_WEEKS))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seasonal_artifacts(tmp_path_factory)


@pytest.fixture(scope="module")
def seasonal(artifacts: Path) -> Artifact:
    return load(artifacts / "seasonal/1/model.pt")


def baseline_of(artifact: Artifact) -> Baseline:
    assert artifact.baseline is not None
    return artifact.baseline


def alarms(artifact: Artifact, rows: Rows) -> npt.NDArray[np.bool_]:
    """Return which rows are anomalous at alpha 5/101, [B]: at most 4 scores of the start set are as large."""
    baseline = baseline_of(artifact)
    with torch.inference_mode():
        scores = torch.cat([artifact.module.score(part)[0] for part in rows.x.split(4096)]).numpy()
    index = np.array([baseline.find(name) for name in rows.group])
    thresholds = np.array([baseline.start_set(group)[0][-5] for group in range(baseline.pool + 1)])
    return np.asarray(baseline.adjust(scores, index, rows.time) > thresholds[index])


def rates_by_hour(alarm: npt.NDArray[np.bool_], rows: Rows) -> npt.NDArray[np.float64]:
    return np.array([alarm[rows.hour == hour].mean() for hour in range(24)])


def rates_by_host(alarm: npt.NDArray[np.bool_], rows: Rows) -> npt.NDArray[np.float64]:
    return np.array([alarm[np.array(rows.group) == f"web-{host}"].mean() for host in range(HOSTS)])


def test_false_alarm_rate_of_every_hour_and_host_is_near_alpha_with_seasons_and_groups(
    seasonal: Artifact, later: Rows
) -> None:
    alarm = alarms(seasonal, later)
    assert alarm.mean() == pytest.approx(0.05, abs=0.01)
    np.testing.assert_allclose(rates_by_hour(alarm, later), 0.05, atol=0.04)
    np.testing.assert_allclose(rates_by_host(alarm, later), 0.05, atol=0.03)


def test_false_alarm_rate_of_the_hours_is_far_from_alpha_without_seasons(artifacts: Path, later: Rows) -> None:
    artifact = load(artifacts / "plain/1/model.pt")
    assert artifact.manifest.season is None
    hours = rates_by_hour(alarms(artifact, later), later)
    assert hours.min() < 0.005
    assert hours.max() > 0.12


def test_false_alarm_rate_is_near_alpha_for_the_pool_but_far_from_it_for_single_hosts(
    seasonal: Artifact, later: Rows
) -> None:
    strangers = Rows(later.x, later.time, ["never seen"] * len(later.group))
    alarm = alarms(seasonal, strangers)
    assert alarm.mean() == pytest.approx(0.05, abs=0.02)
    hosts = rates_by_host(alarm, later)
    assert hosts.min() < 0.01
    assert hosts.max() > 0.09


def test_group_with_few_calibration_rows_and_new_group_are_judged_by_the_pool_and_training_says_so(
    seasonal: Artifact,
) -> None:
    baseline = baseline_of(seasonal)
    assert seasonal.manifest.groups == [FEW, *(f"web-{host}" for host in range(HOSTS))]
    assert baseline.start_set(baseline.find("web-3"))[1] == "group"
    assert baseline.start_set(baseline.find(FEW))[1] == "pool"
    assert baseline.find(NEW) == baseline.find("never seen") == baseline.pool
    assert baseline.start_set(baseline.pool)[1] == "pool"
    notes = seasonal.exhibits["card.md"].decode()
    assert "1 of 12 groups have no baseline of their own" in notes
    assert f"all groups together ({NEW}): a baseline needs 50 rows" in notes
    assert "1 of 12 groups have fewer than 100 calibration rows" in notes
    assert f"all groups together is theirs ({FEW})" in notes


def test_card_and_inspect_name_the_groups_and_the_season(
    seasonal: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = in_process(capsys, "inspect", str(seasonal.path))
    assert "11 groups have their own" in out
    assert f"day and week, time zone {ZONE}" in out
    card = seasonal.exhibits["card.md"].decode()
    assert "11 groups have a baseline of their own" in card
    assert f"--season day,week --time-zone {ZONE}" in card


def test_calibrate_replaces_the_start_sets_and_keeps_the_coefficients(
    seasonal: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(seasonal.path.parents[1], tmp_path / "a/seasonal")
    simulate(5, 1).filter(pl.col("host") != "web-9").write_parquet(tmp_path / "week.parquet")
    places = ["--artifacts", str(tmp_path / "a"), "--runs", str(tmp_path / "runs")]
    code, _, err = in_process(capsys, "calibrate", "seasonal", str(tmp_path / "week.parquet"), *places)
    assert code == 0, err
    old, new = baseline_of(seasonal), baseline_of(load(tmp_path / "a/seasonal/2/model.pt"))
    np.testing.assert_array_equal(new.arrays["coefficients"], old.arrays["coefficients"])
    assert not np.array_equal(new.start_set(new.find("web-0"))[0], old.start_set(old.find("web-0"))[0])
    assert [new.start_set(new.find(f"web-{host}"))[1] for host in (0, 9)] == ["group", "pool"]
    simulate(5, 1).drop("time", "host").head(500).write_parquet(tmp_path / "timeless.parquet")
    code, _, err = in_process(capsys, "calibrate", "seasonal", str(tmp_path / "timeless.parquet"), *places)
    assert code == 0, err
    assert "the start sets of the groups stay as they were, because the rows have no times" in err
    newest = baseline_of(load(tmp_path / "a/seasonal/3/model.pt"))
    np.testing.assert_array_equal(newest.arrays["start_sets"], new.arrays["start_sets"])


def test_start_sets_have_no_rows_for_which_the_policy_decides() -> None:
    table = read_table("simulated-hosts", time="time", group="host")
    split = split_table(table, 0)
    policy = Policy(features={"cpu": FeatureRule(maximum=30.0)})
    found, _, _ = apply_to_split(policy, table, split)
    assert isinstance(split, TimeSplit)
    assert isinstance(found, TimeSplit)
    cpu = table.x.take(split.calibration_period)[:, 0]
    np.testing.assert_array_equal(found.calibration_period, split.calibration_period[cpu <= 30.0])
    assert 0 < len(found.calibration_period) < len(split.calibration_period)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("day",), "--season day needs at least 2 d of rows before the calibration rows, got "),
        (("day", "--time-zone", "Mars/Olympus"), "--time-zone: expected a time zone of the IANA database"),
        (("month",), "--season: input should be 'day' or 'week', got 'month'"),
    ],
)
def test_training_with_a_season_that_cannot_be_fitted_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    simulate(0, 1).head(1000).filter(pl.col("host") == "web-0").write_parquet(tmp_path / "day.parquet")
    places = ["--artifacts", str(tmp_path / "a"), "--runs", str(tmp_path / "runs")]
    arguments = [str(tmp_path / "day.parquet"), "--model", "pca", "--name", "m", "--time", "time", "--drop", "host"]
    code, _, err = in_process(capsys, "train", *arguments, *places, "--season", *options)
    assert code in (1, 2)
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "a/m/1").exists()
