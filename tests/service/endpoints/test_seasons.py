"""The service judges the rows of a host by what is usual for the host and the hour, in requests and in backtests."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.backtest.history import sort_history
from service.backtest.replay import Options, replay
from service.inference.model_loader import ModelLoader
from service.settings import Settings
from tests.seasonal_hosts import FEW, HISTORY_WEEKS, Rows, rows_of, seasonal_artifacts
from tests.service.running import running
from training.data.readers.simulated_hosts import HOSTS, METRICS, simulate

pytestmark = pytest.mark.slow

NAMES = [metric.partition(" [")[0] for metric in METRICS]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seasonal_artifacts(tmp_path_factory)


@pytest.fixture(scope="module")
def client(artifacts: Path) -> Iterator[httpx.Client]:
    options = Settings(artifacts=artifacts, default_model="seasonal", log_level="warning", backend="torchscript")
    with running(create_app(options)) as client:
        yield client


def rates_by_hour(artifacts: Path, model: str, rows: Rows) -> np.ndarray:
    """Return the share of anomalous rows at alpha 0.05 in each hour of the day, [24], in a backtest."""
    served = ModelLoader(backend="torchscript").load(artifacts / model / "1/model.pt", model, 1)
    history = sort_history(rows.x.numpy(), rows.time, rows.group, np.arange(len(rows.group)))
    found = replay(served, history, Options(alphas=(0.05,)))
    alarm = np.empty(len(rows.group), bool)
    alarm[history.source_rows] = found.is_anomaly[0]
    return np.array([alarm[rows.hour == hour].mean() for hour in range(24)])


def test_backtest_raises_as_many_false_alarms_in_every_hour_only_with_seasons(artifacts: Path) -> None:
    rows = rows_of(simulate(HISTORY_WEEKS, 4))
    np.testing.assert_allclose(rates_by_hour(artifacts, "seasonal", rows), 0.05, atol=0.04)
    plain = rates_by_hour(artifacts, "plain", rows)
    assert plain.min() < 0.01
    assert plain.max() > 0.12


def test_answer_says_whether_the_calibration_is_that_of_the_group_or_of_the_pool(client: httpx.Client) -> None:
    rows = rows_of(simulate(HISTORY_WEEKS, 1))
    records = [
        {"time": rows.time[0], "host": host, **dict(zip(NAMES, rows.x[0].tolist(), strict=True))}
        for host in ("web-0", FEW, "never seen")
    ]
    response = client.post("/anomaly", json={"records": records, "time": "time", "group": "host"})
    assert response.status_code == 200, response.text
    assert [result["calibration"] for result in response.json()["results"]] == ["group", "pool", "pool"]


def test_one_score_at_night_and_at_noon_has_different_p_values(client: httpx.Client) -> None:
    rows = rows_of(simulate(HISTORY_WEEKS, 1))
    busiest = int(np.argmax(rows.x[::HOSTS, 0].numpy())) * HOSTS
    values = dict(zip(NAMES, rows.x[busiest].tolist(), strict=True))
    midnight = rows.time[0] - (rows.time[0] + 3600) % 86_400
    records = [{"time": midnight + 3600 * hour, "host": "web-0", **values} for hour in (3, 15)]
    body = {"records": records, "time": "time", "group": "host", "observe": False}
    night, noon = client.post("/anomaly", json=body).json()["results"]
    assert night["score"] == pytest.approx(noon["score"], rel=1e-4)
    assert night["severity"] > noon["severity"]


def test_models_lists_the_number_of_groups_and_the_season(client: httpx.Client) -> None:
    models = {model["name"]: model for model in client.get("/models").json()["models"]}
    assert models["seasonal"]["groups"] == models["plain"]["groups"] == HOSTS + 1
    assert models["seasonal"]["season"] == {"periods": ["day", "week"], "time_zone": "Europe/Berlin"}
    assert "season" not in models["plain"]
