"""Names of features in requests: titles with units, unknown names, and times, in every format that has names."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from typer.testing import CliRunner

from elbo.cli import app as command
from service.app import create_app
from service.codec import remote_write
from service.codec.row_schema import RowSchema
from service.settings import Settings
from tests.service.hosts import JSON, NDJSON, Message
from tests.service.running import running
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.table import read_table
from training.train import train

CSV = "text/csv"
TITLES = ["cpu", "latency", "errors", "temp [°C]"]
NORMAL = {"cpu": 50.0, "latency": 200.0, "errors": 3.0}
HOT = 9999.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the table `train.csv`, and the artifacts of the model `web`, which was trained on it."""
    folder = tmp_path_factory.mktemp("names")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4)) * [5, 20, 1, 2] + [50, 200, 3, 40]
    lines = [",".join(TITLES), *(",".join(map(repr, row)) for row in x.tolist())]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    config = TrainConfig(model="pca", name="web", latents=2)
    train(config, read_table(str(folder / "train.csv")), folder / "artifacts", RecordingReporter())
    return folder


@pytest.fixture(scope="module")
def web(root: Path) -> Iterator[httpx.Client]:
    settings = Settings(artifacts=root / "artifacts", log_level="warning", backend="torchscript")
    with running(create_app(settings)) as client:
        yield client


def as_records(record: dict[str, Any]) -> Message:
    return json.dumps({"records": [record]}).encode(), JSON


def as_line(record: dict[str, Any]) -> Message:
    return json.dumps(record, ensure_ascii=False).encode(), NDJSON


def as_csv(record: dict[str, Any]) -> Message:
    return "\n".join([",".join(record), ",".join(map(str, record.values()))]).encode(), CSV


def as_metrics(record: dict[str, Any]) -> Message:
    metric = {"name": "room", "tags": {}, "fields": record, "timestamp": 1_700_000_000}
    return json.dumps({"metrics": [metric]}).encode(), JSON


FORMATS: list[Callable[[dict[str, Any]], Message]] = [as_records, as_line, as_csv]


def post(client: httpx.Client, message: Message, query: str = "") -> httpx.Response:
    body, media_type = message
    return client.post(f"/anomaly?explain=1{query}", content=body, headers={"content-type": media_type})


def stream(client: httpx.Client, record: dict[str, Any]) -> list[dict[str, Any]]:
    headers = {"content-type": NDJSON, "accept": NDJSON}
    response = client.post("/anomaly?explain=1", content=as_line(record)[0], headers=headers)
    assert response.status_code == 200
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.mark.slow
def test_csv_that_trained_the_model_gets_the_same_verdicts_over_http_and_from_elbo_score(
    root: Path, web: httpx.Client, tmp_path: Path
) -> None:
    content = (root / "train.csv").read_text() + f"50,200,3,{HOT}\n"
    (tmp_path / "rows.csv").write_text(content)
    scored = CliRunner().invoke(
        command, ["score", "web", str(tmp_path / "rows.csv"), "--artifacts", str(root / "artifacts")]
    )
    expected = [json.loads(line) for line in scored.stdout.splitlines()]
    results = post(web, (content.encode(), CSV)).json()["results"]
    assert len(results) == 301
    assert [result["severity"] for result in results] == pytest.approx([row["severity"] for row in expected], rel=1e-4)
    assert [result["is_anomaly"] for result in results] == [row["is_anomaly"] for row in expected]
    assert results[-1]["severity"] > 1e5
    assert results[-1]["features"][0]["name"] == "temp"


TITLES_OF_TEMP = [
    "temp", "temp [°C]", " temp ", "temp  [ °C ]", "temp\t[°C]", "\u00a0temp [°C]", "temp [\u2103]", "temp [℃]",
]  # fmt: skip


@pytest.mark.parametrize("encode", [*FORMATS, as_metrics])
@pytest.mark.parametrize("title", TITLES_OF_TEMP)
def test_title_with_or_without_its_unit_names_the_feature(
    web: httpx.Client, title: str, encode: Callable[[dict[str, Any]], Message]
) -> None:
    response = post(web, encode(NORMAL | {title: HOT}))
    assert response.status_code == 200, response.text
    content = response.json()
    (result,) = content["results"]
    assert (result["is_anomaly"], "imputed" in result, content["unknown_fields"]) == (True, False, 0)
    assert (result["features"][0]["name"], result["features"][0]["value"]) == ("temp", HOT)


@pytest.mark.parametrize("title", TITLES_OF_TEMP)
def test_stream_reads_titles_like_other_formats(web: httpx.Client, title: str) -> None:
    line, last = stream(web, NORMAL | {title: HOT})
    assert line["is_anomaly"]
    assert "imputed" not in line
    assert last["unknown_fields"] == 0


@pytest.mark.parametrize("encode", FORMATS)
@pytest.mark.parametrize(
    ("name", "similar"), [("temperature", True), ("Temp", True), ("TEMP [°C]", True), ("tmep", True), ("rack", False)]
)
def test_record_that_lacks_a_feature_and_has_an_unknown_name_is_refused_with_both_names(
    web: httpx.Client, name: str, similar: bool, encode: Callable[[dict[str, Any]], Message]
) -> None:
    message = encode(NORMAL | {name: HOT})
    for query in ("", "&impute=false"):
        response = post(web, message, query)
        problem = response.json()
        assert (response.status_code, problem["code"]) == (422, "invalid_rows")
        words = problem["detail"] + problem["hint"]
        assert "temp" in words
        assert repr(name) in words
        assert ("did you mean 'temp'?" in words) is similar
    allowed = post(web, message, "&impute=true").json()
    assert allowed["results"][0]["imputed"] == ["temp"]
    assert allowed["unknown_fields"] == 1


def test_line_of_a_stream_that_lacks_a_feature_and_has_an_unknown_name_is_an_error(web: httpx.Client) -> None:
    line, last = stream(web, NORMAL | {"temperature": HOT})
    assert line["detail"] == (
        "the record has no value for temp, and 'temperature' is not a feature of the model; did you mean 'temp'?"
    )
    assert (last["rows"], last["failed"], last["unknown_fields"]) == (1, 1, 1)


@pytest.mark.parametrize("encode", FORMATS)
def test_unknown_names_are_ignored_and_counted_if_no_feature_is_absent(
    web: httpx.Client, encode: Callable[[dict[str, Any]], Message]
) -> None:
    for temp in (40.0, None) if encode is not as_csv else (40.0, ""):
        content = post(web, encode(NORMAL | {"temp": temp, "rack": 7, "Temp": 1.0})).json()
        assert (content["failed"], content["unknown_fields"]) == (0, 2)
        assert content["results"][0].get("imputed") == (["temp"] if temp != 40.0 else None)


@pytest.mark.parametrize("encode", FORMATS)
def test_record_that_only_lacks_a_feature_is_still_imputed(
    web: httpx.Client, encode: Callable[[dict[str, Any]], Message]
) -> None:
    known = {"host": "web-1", "timestamp": 1_700_000_000}
    assert post(web, encode(NORMAL | known)).json()["results"][0]["imputed"] == ["temp"]


@pytest.mark.parametrize("encode", [*FORMATS, as_metrics])
@pytest.mark.parametrize("query", ["", "&impute=true"])
def test_value_in_another_unit_is_refused(
    web: httpx.Client, query: str, encode: Callable[[dict[str, Any]], Message]
) -> None:
    response = post(web, encode(NORMAL | {"temp [°F]": 104.0}), query)
    assert response.status_code == 422
    assert response.json()["detail"] == "'temp [°F]' is in °F, but the model takes temp in °C: convert the values"
    assert response.json()["hint"] == "GET /models/{name} lists the features and their units"


@pytest.mark.parametrize("encode", FORMATS)
@pytest.mark.parametrize("others", [("temp", "temp [°C]"), ("temp [°C]", "temp  [°C]")])
def test_two_names_of_one_feature_are_refused(
    web: httpx.Client, others: tuple[str, str], encode: Callable[[dict[str, Any]], Message]
) -> None:
    response = post(web, encode(NORMAL | dict.fromkeys(others, 40.0)))
    assert response.status_code == 422
    assert "both name temp" in response.json()["detail"]


def test_bad_names_in_one_record_do_not_affect_the_other_records(web: httpx.Client) -> None:
    good = NORMAL | {"temp [°C]": 40.0}
    records = [good, NORMAL | {"temperature": 40.0}, good, NORMAL | {"temp [K]": 313.0}, good]
    content = post(web, (json.dumps({"records": records}).encode(), JSON)).json()
    assert [result["row"] for result in content["results"]] == [0, 2, 4]
    assert [(error["row"], error["pointer"]) for error in content["errors"]] == [
        (1, "/records/1"), (3, "/records/3/temp [K]")
    ]  # fmt: skip


CELLS = ["", " ", "NA", "n/a", "null", "-", "?", "None", "1e1", "+5", ".5", "7"]


@pytest.mark.slow
def test_words_in_cells_have_the_same_meaning_over_http_and_for_elbo_score(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lines = ["load,fan,temp [°C]"]
    for index, load in enumerate(rng.normal(size=120).tolist()):
        fan = ("yes", "no", "TRUE", "1", "False", "0")[index % 6]
        lines.append(f"{load!r},{fan},{CELLS[index % len(CELLS)] if index % 2 else index % 7}")
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n")
    train(TrainConfig(model="pca", name="t", latents=2), read_table(str(path)), tmp_path / "a", RecordingReporter())
    scored = CliRunner().invoke(command, ["score", "t", str(path), "--artifacts", str(tmp_path / "a")])
    expected = [json.loads(line) for line in scored.stdout.splitlines()]
    with running(create_app(Settings(artifacts=tmp_path / "a", backend="torchscript"))) as client:
        content = post(client, (path.read_bytes(), CSV)).json()
        mixed = post(client, (b"load,fan,temp\nyes,1,1\n3,1,1\nno,1,1\n", CSV)).json()
        of_fan = post(client, (b"load,fan,temp\n0,yes,1\n0,3,1\n0,no,1\n", CSV)).json()
    assert (content["rows"], content["failed"]) == (120, 0)
    assert [r["score"] for r in content["results"]] == pytest.approx([r["score"] for r in expected], rel=1e-4, abs=1e-4)
    assert of_fan["failed"] == 0  # fan was 0 and 1 in training, so its words are numbers
    assert [error["detail"] for error in mixed["errors"]] == [
        "expected a number, got true",
        "expected a number, got false",
    ]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_csv_header_in_another_encoding_is_refused_with_the_encoding_to_use(web: httpx.Client, encoding: str) -> None:
    response = post(web, ("cpu,latency,errors,temp [°C]\n50,200,3,40\n".encode(encoding), CSV))
    assert (response.status_code, response.json()["code"]) == (422, "invalid_csv")
    assert "not UTF-8" in response.json()["detail"]


def logged_names(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if "are not features" in record.message]  # type: ignore[attr-defined] # set by `extra`


def test_telegraf_metrics_that_are_no_features_are_counted_and_each_name_is_logged_once(
    web: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "elbo.receiver")
    message = as_metrics(NORMAL | {"temperature": 40.0, "uptime": 5, "os": "linux"})
    for _ in range(3):
        content = post(web, message).json()
        assert (content["failed"], content["unknown_fields"]) == (0, 3)
        assert content["results"][0]["imputed"] == ["temp"]
    (fields,) = logged_names(caplog)
    assert (fields["model"], fields["names"]) == ("web", ["room_temperature", "room_uptime", "room_os"])
    assert fields["similar_features"] == {"room_temperature": "temp"}


def test_remote_write_metrics_that_are_no_features_are_counted_and_each_name_is_logged_once(
    web: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "elbo.receiver")
    names = ["cpu", "latency", "errors", "node_temp_celsius", "up"]
    headers = {"content-type": remote_write.MEDIA_TYPE, "content-encoding": remote_write.ENCODING}
    for second in range(3):
        samples = [(1_700_000_000_000 + 1000 * second, 1.0)]
        body = remote_write.dumps([((("__name__", name), ("instance", "a")), samples) for name in names])
        assert web.post("/api/v1/write", content=body, headers=headers).status_code == 204
    (fields,) = logged_names(caplog)
    assert fields["names"] == ["node_temp_celsius", "up"]
    assert 'outcome="unknown",version="1"} 6.0' in web.get("/metrics").text


def test_series_mapping_may_name_features_with_their_units_and_other_names_in_it_are_logged(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "map.toml").write_text(
        '[web.features]\n"temp [°C]" = "node_temp"\nlatncy = "node_latency"\n"cpu [%]" = "node_cpu"\n'
    )
    settings = Settings(artifacts=root / "artifacts", remote_write=tmp_path / "map.toml", log_level="warning")
    headers = {"content-type": remote_write.MEDIA_TYPE, "content-encoding": remote_write.ENCODING}
    names = ["node_temp", "node_cpu", "latency", "errors"]
    samples = [(1_700_000_000_000, 1.0)]
    body = remote_write.dumps([((("__name__", name), ("instance", "a")), samples) for name in names])
    with running(create_app(settings)) as client:
        assert client.post("/api/v1/write", content=body, headers=headers).status_code == 204
        assert 'outcome="used",version="1"} 4.0' in client.get("/metrics").text
    (record,) = [record for record in caplog.records if "series mapping" in record.message]
    fields = record.fields  # type: ignore[attr-defined] # set by `extra`
    assert (fields["name"], fields["similar_feature"]) == ("latncy", "latency")


def test_feature_whose_name_contains_brackets_is_found_by_its_exact_name() -> None:
    titles = RowSchema([3], ["rate", "rate [x]", "pixel[0,1]"], units=["s", None, None]).titles
    assert [titles.find(name) for name in ("rate", "rate [x]", "rate [s]", "pixel[0,1]", "pixel[0,2]")] == [
        "rate", "rate [x]", "rate", "pixel[0,1]", None
    ]  # fmt: skip


# Times

UNREADABLE = [
    "1" * 400, "-" + "9" * 400, "1" * 310, "1" * 25, '"' + "1" * 400 + '"', '"yesterday"', '""', '"2026-13-01"',
    "true", "[]", "{}", "1e999", "NaN", '"nan"', '"1_000"', "[" * 990 + "]" * 990,
]  # fmt: skip


def with_time(time: str) -> str:
    return orjson.dumps(NORMAL | {"temp": 40.0}).decode()[:-1] + f', "timestamp": {time}}}'


@pytest.mark.parametrize("time", UNREADABLE, ids=range(len(UNREADABLE)))
def test_unreadable_timestamp_is_the_error_of_its_row(web: httpx.Client, time: str) -> None:
    bad, good = with_time(time), with_time("1700000000")
    metric = '{{"name": "m", "fields": {0}, "timestamp": {1}}}'
    fields = orjson.dumps(NORMAL | {"temp": 40.0}).decode()
    metrics = ", ".join(metric.format(fields, moment) for moment in (time, "1700000000"))
    for body, media_type, pointer in (
        (f'{{"records": [{bad}, {good}]}}', JSON, "/records/0/timestamp"),
        (f"{bad}\n{good}\n", NDJSON, "/records/0/timestamp"),
        (f'{{"metrics": [{metrics}]}}', JSON, "/metrics/0/timestamp"),
    ):
        response = post(web, (body.encode(), media_type))
        assert response.status_code == 200, response.text
        content = response.json()
        assert [error["pointer"] for error in content["errors"]] == [pointer]
        assert "timestamp is not a timestamp: expected Unix time" in content["errors"][0]["detail"]
        assert [result["time"] for result in content["results"]] == [1_700_000_000]
    headers = {"content-type": NDJSON, "accept": NDJSON}
    response = web.post("/anomaly?explain=0", content=f"{bad}\n{good}\n", headers=headers)
    first, second, last = map(json.loads, response.text.splitlines())
    assert (first["row"], first["pointer"], second["row"]) == (0, "/0/timestamp", 1)
    assert (last["rows"], last["failed"]) == (2, 1)


def test_titles_of_time_and_group_may_have_units(web: httpx.Client) -> None:
    content = post(web, (b"cpu,latency,errors,temp,timestamp [s],host [name]\n50,200,3,40,1700000000,a\n", CSV)).json()
    assert (content["results"][0]["time"], content["results"][0]["group"]) == (1_700_000_000, "a")
    assert content["unknown_fields"] == 0


def test_csv_row_has_no_time_if_the_cell_is_empty_and_is_an_error_if_the_cell_is_unreadable(web: httpx.Client) -> None:
    times = ["1700000000", "", "NA", "yesterday", "9" * 400, "2023-11-14T22:13:20Z"]
    lines = ["cpu,latency,errors,temp,timestamp", *(f"50,200,3,40,{time}" for time in times)]
    content = post(web, ("\n".join(lines).encode(), CSV)).json()
    assert [(result["row"], result.get("time")) for result in content["results"]] == [
        (0, 1_700_000_000), (1, None), (2, None), (5, 1_700_000_000)
    ]  # fmt: skip
    assert [error["pointer"] for error in content["errors"]] == ["/records/3/timestamp", "/records/4/timestamp"]
