"""Requests to models with columns of text: PCA with times and groups, and a VAE without."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
from scipy import stats

from models.artifact import load
from models.manifest import read_manifest
from service.app import create_app
from service.settings import Settings
from tests.conftest import made_once
from tests.mixed_tables import KNOWN, SHARES, mixed_frame
from tests.service.running import post, running
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.readers import InMemory
from training.data.table import read_table
from training.train import train

pytestmark = pytest.mark.slow
UNSEEN = KNOWN | {"protocol": "gopher"}
START = 1_700_000_000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with the models timed (PCA) and vae."""

    def make(folder: Path) -> None:
        frame = mixed_frame(1200)
        times = frame.with_columns(time=START + 60 * pl.int_range(1200), host=pl.lit("a"))
        timed = TrainConfig(model="pca", name="timed", time="time", group="host")
        table = read_table(InMemory(times), time="time", group="host")
        train(timed, table, folder, RecordingReporter())
        vae = TrainConfig(model="vae", name="vae", epochs=40, latents=4, hidden=(32,))
        train(vae, read_table(InMemory(frame)), folder, RecordingReporter())

    return made_once("artifacts-with-categories", make, tmp_path_factory)


@pytest.fixture(scope="module")
def client(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    state = tmp_path_factory.mktemp("state")
    options = Settings(artifacts=root, default_model="vae", log_level="warning", backend="torchscript", state=state)
    with running(create_app(options)) as client:
        yield client


def inputs(frame: pl.DataFrame) -> list[list[float]]:
    """Return the rows of `mixed_frame` as the features of the model."""
    numbers = frame.select(pl.col("cpu", "mem", "secure", "count").cast(pl.Float64))
    levels = [("protocol", ["icmp", "tcp", "udp"]), ("zone", ["Zürich=a", "b c", "日本"])]
    one_hot = [(frame[name] == level).cast(pl.Float64).alias(level) for name, names in levels for level in names]
    return [list(row) for row in numbers.with_columns(one_hot).rows()]


def as_csv(records: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


@pytest.mark.parametrize("model", ["timed", "vae"])
def test_unseen_level_is_named_and_anomalous_in_json_csv_ndjson_and_streams(client: httpx.Client, model: str) -> None:
    path, records = f"/anomaly?model={model}&explain=1&observe=false", [KNOWN, UNSEEN]
    lines = "\n".join(map(json.dumps, records))
    ndjson = {"content-type": "application/x-ndjson"}

    answers = [
        client.post(f"/anomaly?model={model}", json={"records": records, "explain": 1, "observe": False}).json(),
        client.post(path, content=as_csv(records), headers={"content-type": "text/csv"}).json(),
        client.post(path, content=lines, headers=ndjson | {"accept": "application/json"}).json(),
    ]
    streamed = client.post(path, content=lines, headers=ndjson | {"accept": "application/x-ndjson"}).text.splitlines()

    floor = read_floor(client, model)
    for usual, unseen in [answer["results"] for answer in answers] + [list(map(json.loads, streamed[:2]))]:
        assert usual["is_anomaly"] is False
        assert "unseen_levels" not in usual
        assert unseen["is_anomaly"] is True
        assert unseen["p_value"] == pytest.approx(floor)
        known = {"feature": "protocol", "got": "gopher", "known": ["icmp", "tcp", "udp"]}
        assert unseen["unseen_levels"] == [known]
        assert (unseen["features"][0]["name"], unseen["features"][0]["value"]) == ("protocol", "gopher")
        assert unseen["features"][0]["expected"] == "tcp"


def read_floor(client: httpx.Client, model: str) -> float:
    return float(client.get(f"/models/{model}").json()["calibration"]["floor"])


def test_level_that_contradicts_the_numbers_is_anomalous_and_named(client: httpx.Client) -> None:
    body = {"records": [KNOWN | {"protocol": "icmp"}], "explain": 2}
    answer = post(client, "/anomaly?model=timed", body)

    (result,) = answer["results"]
    assert result["is_anomaly"]
    assert {"name": "protocol", "value": "icmp", "expected": "tcp"}.items() <= next(
        feature.items() for feature in result["features"] if feature["name"] == "protocol"
    )


@pytest.mark.parametrize("model", ["timed", "vae"])
def test_false_alarms_of_rows_of_the_training_distribution_are_about_alpha(client: httpx.Client, model: str) -> None:
    fresh = inputs(mixed_frame(2000, seed=1))

    answer = post(
        client, f"/anomaly?model={model}", {"inputs": fresh, "alpha": 0.1, "detail": "none", "observe": False}
    )

    # The rate of a calibration on n rows is Beta-distributed (Vovk 2012): here its standard deviation is at most 0.02.
    assert answer["rows"] == 2000
    assert 0.1 - 0.06 < answer["anomalies"] / 2000 < 0.1 + 0.06


@pytest.mark.parametrize("path", ["/encode", "/reconstruct", "/anomaly"])
def test_records_give_the_same_numbers_as_rows_of_features(client: httpx.Client, path: str) -> None:
    frame = mixed_frame(3, seed=2)

    by_record = post(client, path, {"records": frame.to_dicts()})
    by_feature = post(client, path, {"inputs": inputs(frame)})

    assert by_record == by_feature


def test_reconstruction_answers_records_with_levels(client: httpx.Client) -> None:
    answer = post(client, "/reconstruct", {"records": [KNOWN]})

    (record,) = answer["records"]
    assert set(record) == set(KNOWN)
    assert record["protocol"] == "tcp"
    assert sum(answer["outputs"][0][4:7]) == pytest.approx(1.0, abs=1e-5)  # the probabilities of the protocols


@pytest.mark.parametrize("model", ["timed", "vae"])
def test_samples_have_one_level_per_column_whole_numbers_and_the_range_of_the_training_rows(
    client: httpx.Client, model: str
) -> None:
    answer = post(client, f"/sample?model={model}", {"n": 1000, "seed": 1})

    rows, features = np.array(answer["outputs"], np.float32), client.get(f"/models/{model}").json()["features"]
    assert (rows[:, 4:7].sum(axis=1) == 1).all()
    assert (rows[:, 7:].sum(axis=1) == 1).all()
    assert (rows[:, 2:4] == np.rint(rows[:, 2:4])).all()
    low, high = (np.array([feature[end] for feature in features], np.float32) for end in ("minimum", "maximum"))
    assert ((rows >= low) & (rows <= high)).all()
    assert all(type(record["count"]) is int for record in answer["records"])
    shares = {level: np.mean([record["protocol"] == level for record in answer["records"]]) for level in SHARES}
    assert shares == pytest.approx(SHARES, abs=0.12)
    assert post(client, f"/sample?model={model}", {"n": 1000, "seed": 1}) == answer


def test_samples_with_a_given_level_have_the_numbers_of_this_level(client: httpx.Client) -> None:
    answer = post(client, "/sample", {"n": 200, "seed": 1, "given": {"protocol": "udp"}})

    assert {record["protocol"] for record in answer["records"]} == {"udp"}
    assert np.median(np.array(answer["outputs"])[:, 0]) == pytest.approx(50.0, abs=6.0)  # the mean of cpu, given udp


def test_imputed_level_is_the_most_probable_one_by_bayes_theorem(client: httpx.Client) -> None:
    answer = post(client, "/impute", {"records": [KNOWN | {"protocol": None, "cpu": 50.0, "mem": 25.0}]})

    found = answer["probabilities"][0]["protocol"]
    means = (20.0, 50.0, 80.0)
    density = [share * stats.norm.pdf(50.0, mean, 3.0) for share, mean in zip(SHARES.values(), means, strict=True)]
    assert list(SHARES)[int(np.argmax(density))] == "udp"
    assert found["udp"] > 0.5
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-5)
    assert answer["records"][0]["protocol"] == "udp"
    assert answer["imputed"] == 1


def test_row_without_a_level_is_scored_if_the_request_allows_it(client: httpx.Client) -> None:
    without = {name: value for name, value in KNOWN.items() if name != "protocol"}

    allowed = post(client, "/anomaly", {"records": [without], "impute": True})
    refused = client.post("/anomaly", json={"records": [without], "impute": False})

    assert allowed["results"][0]["imputed"] == ["protocol"]
    assert allowed["results"][0]["is_anomaly"] is False
    assert refused.status_code == 422
    assert refused.json()["detail"] == "the record has no value for protocol"


@pytest.mark.parametrize(
    ("change", "pointer", "detail"),
    [
        ({"protocol": ["tcp"]}, "/records/0/protocol", "expected a level of protocol, got a list of 1"),
        ({"protocol": {"a": 1}}, "/records/0/protocol", "expected a level of protocol, got an object"),
        ({"cpu": "80"}, "/records/0/cpu", 'expected a number, got "80"'),
        ({"cpu": "tcp"}, "/records/0/cpu", 'expected a number, got "tcp"'),
        ({"count": True}, "/records/0/count", "expected a number, got true"),
    ],
)
def test_invalid_value_of_a_record_is_refused_with_its_place(
    client: httpx.Client, change: dict[str, Any], pointer: str, detail: str
) -> None:
    response = client.post("/anomaly", json={"records": [KNOWN | change]})

    assert response.status_code == 422
    assert response.json()["pointer"] == pointer
    assert response.json()["detail"] == detail


@pytest.mark.parametrize(
    ("path", "body", "pointer"),
    [
        ("/encode", {"records": [UNSEEN]}, "/records/0/protocol"),
        ("/reconstruct", {"records": [UNSEEN]}, "/records/0/protocol"),
        ("/impute", {"records": [UNSEEN]}, "/records/0/protocol"),
        ("/sample", {"given": {"protocol": "gopher"}}, "/given/protocol"),
    ],
)
def test_unseen_level_is_refused_where_no_verdict_is_asked_for(
    client: httpx.Client, path: str, body: dict[str, Any], pointer: str
) -> None:
    response = client.post(path, json=body)

    assert response.status_code == 422
    problem = response.json()
    assert problem["detail"] == "the model does not know the level 'gopher' of protocol"
    assert (problem["pointer"], problem["expected"]) == (pointer, "'icmp', 'tcp', 'udp'")


@pytest.mark.parametrize("path", ["/encode", "/reconstruct"])
@pytest.mark.parametrize("body", [{}, {"inputs": [[0.0] * 10], "records": [KNOWN]}])
def test_request_without_exactly_one_field_of_rows_is_refused(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    response = client.post(path, json=body)

    assert response.status_code == 422
    assert response.json()["expected"] == "inputs or records"


def test_true_and_false_are_accepted_for_a_column_of_booleans(client: httpx.Client) -> None:
    by_word = post(client, "/anomaly", {"records": [KNOWN, KNOWN | {"secure": False}]})
    by_number = post(client, "/anomaly", {"records": [KNOWN | {"secure": 1}, KNOWN | {"secure": 0}]})

    assert by_word == by_number


def test_feedback_takes_records_with_levels(client: httpx.Client) -> None:
    times = [START + 60 * (5000 + minute) for minute in range(2)]
    records = [record | {"time": time, "host": "a"} for record, time in zip((KNOWN, UNSEEN), times, strict=True)]

    answer = post(client, "/feedback?model=timed", {"records": records, "verdict": "normal"})

    assert (answer["unused"], answer["errors"]) == (0, [])
    assert answer["groups"][0]["rows"] == 2


def test_model_lists_its_categories_and_its_artifact_keeps_its_golden_answers(client: httpx.Client, root: Path) -> None:
    for model in ("timed", "vae"):
        summary = client.get(f"/models/{model}").json()
        assert summary["categories"] == {"protocol": ["icmp", "tcp", "udp"], "zone": ["Zürich=a", "b c", "日本"]}
        artifact = load(root / model / "1" / "model.pt")  # verifies the golden answers
        assert artifact.twin is not None
        assert read_manifest(artifact.path).column_names == ["cpu", "mem", "secure", "count", "protocol", "zone"]
