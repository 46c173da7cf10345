"""GET /models/NAME/peers: hosts that differ from their peers at one moment, although they had such rows before."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped] # installed with check-jsonschema, has no types
import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from models.artifact import load
from service.app import create_app
from service.schemas import PeerFeatureReport, PeerReport, PeersAnswer
from service.settings import Settings
from tests.conftest import made_once
from tests.service.access.keys import one_key_per_scope
from tests.service.groups import Record, send, settings_of
from tests.service.running import running
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.table import read_table
from training.train import train

pytestmark = pytest.mark.slow
START = datetime(2025, 3, 3, tzinfo=UTC)
STEP = timedelta(minutes=30)
DAY_ROWS = timedelta(days=1) // STEP
HOSTS, DAYS = 12, 8
FEATURES = ["cpu", "memory", "requests", "latency", "network"]
BUSY, NEW = "web-3", "web-new"
MODELS = pytest.mark.parametrize("model", ["scaled", "windows"])


def metrics(model: str, first_day: int, rows: int, busy: str | None = None) -> pl.DataFrame:
    """Return rows of all hosts in order of time. All hosts are busy by day and idle at night.

    The host `busy` stays busy after noon of the first day. The metrics and their noise grow with the load. The hosts of
    the model `scaled` have very different sizes.
    """
    random = np.random.default_rng(first_day)
    hours = np.arange(rows) / DAY_ROWS * 24 % 24
    load = 0.15 + 0.85 * np.square(np.sin(hours / 24 * np.pi))  # least at midnight
    loads = np.tile(load[:, None], HOSTS)  # [rows, hosts]
    if busy is not None:
        host = int(busy.removeprefix("web-"))
        loads[DAY_ROWS // 2 :, host] = np.maximum(loads[DAY_ROWS // 2 :, host], 0.8)
    difference = 1.0 if model == "scaled" else 0.05
    sizes = np.exp(difference * np.random.default_rng(1).normal(size=(HOSTS, len(FEATURES))))
    noise = random.normal(size=(rows, HOSTS, len(FEATURES)))
    x = sizes * loads[:, :, None] * (10.0 + noise)  # [rows, hosts, D]
    times = [START + timedelta(days=first_day) + STEP * index for index in range(rows)]
    return pl.DataFrame(
        {
            "ts": [time for time in times for _ in range(HOSTS)],
            "host": [f"web-{host}" for host in range(HOSTS)] * rows,
            **{name: x[:, :, index].reshape(-1) for index, name in enumerate(FEATURES)},
        },
        schema_overrides={"ts": pl.Datetime("ms", "UTC")},
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two models of the hosts, both trained without --season."""

    def make(root: Path) -> None:
        more: dict[str, dict[str, Any]] = {"scaled": {"scale_by_group": True}, "windows": {"window": 4}}
        for name, options in more.items():
            source = root / f"{name}.parquet"
            metrics(name, 0, DAYS * DAY_ROWS).write_parquet(source)
            table = read_table(str(source), time="ts", group="host")
            config = TrainConfig(model="pca", name=name, time="ts", group="host", latents=2, **options)
            train(config, table, root / "artifacts", RecordingReporter())

    return made_once("artifacts-of-peers", make, tmp_path_factory) / "artifacts"


def records(frame: pl.DataFrame) -> list[Record]:
    return frame.with_columns(pl.col("ts").dt.epoch("s")).to_dicts()


def night(model: str, busy: str | None = BUSY) -> list[Record]:
    """Return the rows of a day, and of the first two hours of the next day, when it is night."""
    return records(metrics(model, DAYS, DAY_ROWS + 4, busy))


def peers(client: httpx.Client, model: str, **query: Any) -> Record:
    """Return the answer of the endpoint, and check that its fields are those of its schema."""
    response = client.get(f"/models/{model}/peers", params=query)
    assert response.status_code == 200, response.text
    answer: Record = response.json()
    assert set(answer) == set(PeersAnswer.model_fields)
    for group in answer["groups"]:
        assert set(group) == set(PeerReport.model_fields)
        assert all(set(feature) == set(PeerFeatureReport.model_fields) for feature in group["features"])
    return answer


@pytest.fixture(scope="module")
def idle_client(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a client of a server to which no test sends rows of hosts."""
    state = tmp_path_factory.mktemp("idle") / "state"
    with running(create_app(settings_of(models, state, default_model="scaled"))) as found:
        yield found


@pytest.fixture
def client(models: Path, tmp_path: Path) -> Iterator[httpx.Client]:
    with running(create_app(settings_of(models, tmp_path / "state", default_model="scaled"))) as found:
        yield found


def expected_deviations(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the deviations of numbers [G], as a person would compute them."""
    centred: npt.NDArray[np.float64] = numbers - np.median(numbers)
    deviations: npt.NDArray[np.float64] = centred / max(1.4826 * np.median(np.abs(centred)), 0.25)
    return deviations


@MODELS
def test_host_that_is_as_busy_at_night_as_by_day_is_usual_for_its_own_past_but_not_for_its_peers(
    client: httpx.Client, models: Path, model: str
) -> None:
    results = send(client, night(model), model)
    newest = {result["group"]: result for result in results[-HOSTS:]}
    assert newest[BUSY]["p_value"] > 0.05
    answer = peers(client, model, n=HOSTS)
    found = {group["group"]: group for group in answer["groups"]}
    assert found[BUSY]["rank"] == 1
    assert {name for name, group in found.items() if group["is_different"]} == {BUSY}
    assert (answer["compared"], answer["others"], len(found)) == (HOSTS, 0, HOSTS)
    assert answer["scaled_by_group"] == (model == "scaled")
    # The same deviations, computed from the scores of /anomaly and the baseline in the artifact.
    baseline = load(models / model / "1" / "model.pt").baseline
    assert baseline is not None
    scores = np.array([result["score"] for result in newest.values()], np.float32)
    index = np.array([baseline.find(name) for name in newest])
    adjusted = baseline.adjust(scores, index, np.full(HOSTS, np.nan)).astype(float)
    for name, score, deviation in zip(newest, adjusted, expected_deviations(adjusted), strict=True):
        group = found[name]
        assert (group["time"], group["p_value"]) == (answer["time"], pytest.approx(newest[name]["p_value"]))
        assert group["score"] == pytest.approx(score, rel=1e-4, abs=1e-4)
        assert group["score_deviation"] == pytest.approx(deviation, rel=1e-3, abs=1e-3)
        largest = max(group["score_deviation"], -1e9 if model != "scaled" else group["feature_deviation"])
        assert group["deviation"] == largest
        assert group["has_baseline"]


@MODELS
def test_description_of_a_model_names_the_columns_of_its_groups_and_says_whether_rows_are_scaled(
    idle_client: httpx.Client, model: str
) -> None:
    described = idle_client.get(f"/models/{model}").json()
    schema = idle_client.get("/openapi.json").json()
    jsonschema.validate(
        described,
        {"$ref": "#/components/schemas/ModelDetail", "components": schema["components"]},
        jsonschema.Draft202012Validator,
    )
    assert described["timeline"]["time_column"] == "ts"
    assert described["timeline"]["group_column"] == "host"
    assert described["timeline"]["usual_step_seconds"] == STEP.total_seconds()
    assert described["scaled_by_group"] == (model == "scaled")
    assert described["incident_rows"] == 120  # the default


@MODELS
def test_features_that_differ_have_the_value_of_the_host_and_the_value_that_is_usual_among_its_peers(
    client: httpx.Client, model: str
) -> None:
    rows = night(model)
    send(client, rows, model)
    (busy,) = peers(client, model, n=1, explain=len(FEATURES))["groups"]
    newest = {row["host"]: row for row in rows[-HOSTS:]}
    assert busy["group"] == BUSY
    assert busy["features"][0]["deviation"] > (4 if model == "scaled" else 1)
    assert [abs(feature["deviation"]) for feature in busy["features"]] == sorted(
        (abs(feature["deviation"]) for feature in busy["features"]), reverse=True
    )
    for feature in busy["features"]:
        name = feature["name"]
        assert feature["value"] == pytest.approx(newest[BUSY][name], rel=1e-5)
        if model == "windows":
            usual = np.median([row[name] for row in newest.values()])
            assert feature["peers"] == pytest.approx(usual, rel=1e-5)
        else:  # in raw units of this host: its own load is 0.8 or more, the load of its peers is 0.15 to 0.2
            assert feature["peers"] == pytest.approx(feature["value"] * 0.18 / 0.8, rel=0.6)
    assert peers(client, model, n=2, explain=0)["groups"][0] == {**busy, "features": []}


def test_nobody_differs_if_all_hosts_are_idle_at_night(client: httpx.Client) -> None:
    send(client, night("windows", busy=None), "windows")
    assert not any(group["is_different"] for group in peers(client, "windows", n=HOSTS)["groups"])


def test_comparison_is_the_same_in_each_process_and_after_a_restart(models: Path, tmp_path: Path) -> None:
    settings = settings_of(models, tmp_path, default_model="scaled")
    rows = night("windows")
    with running(create_app(settings)) as one, running(create_app(settings)) as other:  # as two workers
        for start in range(0, len(rows), HOSTS):
            half = HOSTS // 2
            send(one, rows[start : start + half], "windows")
            send(other, rows[start + half : start + HOSTS], "windows")
        answers = [peers(client, "windows", n=HOSTS) for client in (one, other)]
    with running(create_app(settings)) as later:
        answers.append(peers(later, "windows", n=HOSTS))
    assert answers[0]["compared"] == HOSTS
    assert answers[0] == answers[1] == answers[2]
    with running(create_app(settings_of(models, tmp_path / "uninterrupted", default_model="scaled"))) as client:
        send(client, rows, "windows")
        uninterrupted = peers(client, "windows", n=HOSTS)
    assert [(group["group"], group["rank"]) for group in uninterrupted["groups"]] == [
        (group["group"], group["rank"]) for group in answers[0]["groups"]
    ]


def test_host_that_the_model_does_not_know_is_compared_by_what_is_usual_for_all_hosts(client: httpx.Client) -> None:
    rows = night("windows", busy=None)
    send(client, rows + [{**row, "host": NEW} for row in rows if row["host"] == "web-0"], "windows")
    found = {group["group"]: group for group in peers(client, "windows", n=50)["groups"]}
    assert len(found) == HOSTS + 1
    assert [name for name, group in found.items() if not group["has_baseline"]] == [NEW]


def test_only_live_new_rows_with_a_time_change_the_comparison(client: httpx.Client) -> None:
    rows = night("windows")
    send(client, rows, "windows")
    before = peers(client, "windows", n=HOSTS)
    extreme = {**rows[-1], **dict.fromkeys(FEATURES, 1e4)}
    send(client, [{**extreme, "ts": extreme["ts"] + 60}], "windows", observe="false")
    send(client, [extreme], "windows")  # repeated
    send(client, [{**extreme, "ts": extreme["ts"] - 60}], "windows")  # late
    send(client, [{name: value for name, value in extreme.items() if name != "ts"}], "windows")
    assert peers(client, "windows", n=HOSTS) == before
    send(client, [{**extreme, "ts": extreme["ts"] + 60}], "windows")
    after = peers(client, "windows", n=HOSTS)
    assert after["time"] == extreme["ts"] + 60
    assert (after["groups"][0]["group"], after["groups"][0]["is_different"]) == (extreme["host"], True)


def test_feature_whose_value_is_missing_is_not_among_those_that_differ(client: httpx.Client) -> None:
    rows = night("scaled")
    incomplete = [{name: value for name, value in row.items() if name != "cpu"} for row in rows[-HOSTS:]]
    send(client, rows[:-HOSTS] + incomplete[:4] + rows[-HOSTS + 4 :], "scaled", impute="true")
    answer = peers(client, "scaled", n=HOSTS, explain=len(FEATURES))
    for group in answer["groups"]:
        names = {feature["name"] for feature in group["features"]}
        assert names == {*FEATURES} - ({"cpu"} if group["group"] in {row["host"] for row in incomplete[:4]} else set())


def test_host_that_has_stopped_is_not_compared(client: httpx.Client) -> None:
    rows = night("windows")
    stopped_at = rows[-1]["ts"] - 4 * STEP.total_seconds()
    send(client, [row for row in rows if row["host"] != BUSY or row["ts"] <= stopped_at], "windows")
    answer = peers(client, "windows", n=50)
    assert (answer["compared"], answer["others"]) == (HOSTS - 1, 1)
    assert BUSY not in {group["group"] for group in answer["groups"]}


def test_comparison_of_too_few_hosts_is_refused_with_the_number_of_hosts(client: httpx.Client) -> None:
    send(client, [row for row in night("windows") if row["host"] in ("web-0", "web-1", "web-2")], "windows")
    answer = client.get("/models/windows/peers")
    assert (answer.status_code, answer.json()["code"]) == (409, "too_few_peers")
    assert (answer.json()["expected"], answer.json()["got"]) == ("5 groups", "3")
    answer = client.get("/models/scaled/peers")
    assert (answer.status_code, answer.json()["got"]) == (409, "0")


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ("n=0", "n should be"),
        ("n=1001", "n should be"),
        ("n=two", "n should be"),
        ("explain=21", "explain should be"),
        ("n=2&n=3", "n is given twice"),
        ("top=3", "no field top"),
    ],
)
def test_invalid_option_is_refused(idle_client: httpx.Client, query: str, part: str) -> None:
    answer = idle_client.get(f"/models/scaled/peers?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_field")
    assert part in answer.json()["detail"]


def test_model_without_groups_or_without_online_calibration_is_refused(
    artifacts: Path, models: Path, tmp_path: Path
) -> None:
    with running(create_app(Settings(artifacts=artifacts, log_level="warning", default_model="hosts"))) as client:
        answer = client.get("/models/hosts/peers")
        assert (answer.status_code, answer.json()["code"]) == (409, "not_supported")
        assert "--group" in answer.json()["hint"]
        assert client.get("/models/none/peers").json()["code"] == "model_not_found"
    settings = settings_of(models, tmp_path, default_model="scaled", online_calibration=False)
    with running(create_app(settings)) as client:
        answer = client.get("/models/scaled/peers")
    assert (answer.status_code, answer.json()["code"]) == (409, "no_online_calibration")


def test_comparison_needs_a_key_with_the_scope_metrics(models: Path, tmp_path: Path) -> None:
    keys = one_key_per_scope(tmp_path / "keys.toml")
    settings = settings_of(models, tmp_path / "state", default_model="scaled", api_keys_file=keys.path)
    with running(create_app(settings)) as client:
        codes = {
            name: client.get("/models/scaled/peers", headers=keys.headers(name)).status_code
            for name in ("infer", "write", "metrics", "admin")
        }
    assert codes == {"infer": 403, "write": 403, "metrics": 409, "admin": 409}  # 409: no row is remembered yet


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/impute", {"records": [{"cpu": 1.0}]}),
        ("/sample", {"given": {"cpu": 1.0}}),
        ("/neighbours", {"latents": [[0.0, 0.0]]}),
        ("/edit", {"latent": [0.0, 0.0], "direction": "a"}),
    ],
)
def test_model_scaled_by_group_refuses_requests_about_rows_without_a_group(
    idle_client: httpx.Client, path: str, body: Record
) -> None:
    response = idle_client.post(path, json=body, params={"model": "scaled"})
    assert (response.status_code, response.json()["code"]) == (409, "not_supported"), response.text
    assert "without" in response.json()["hint"]
    assert "--scale-by-group" in response.json()["hint"]
