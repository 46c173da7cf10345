"""`elbo score`: a faulty row costs only itself, rows are streamed, and times and groups are passed on."""

import csv
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from service.app import create_app
from service.settings import Settings
from tests.commands import HEADER, in_process, train_hosts, two_factor_rows, write
from tests.data import ROOT
from tests.service.running import running

pytestmark = pytest.mark.slow

Score = Callable[..., tuple[int, str, str]]
NAMES = [title.partition(" [")[0] for title in HEADER.split(",")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with hosts@1, a PCA with two latents."""
    return train_hosts(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture
def score(root: Path, capsys: pytest.CaptureFixture[str]) -> Score:
    """Return a function that runs `elbo score hosts` with the given arguments."""
    return lambda *arguments: in_process(capsys, "score", "hosts", *arguments, "--artifacts", str(root))


def save_csv(path: Path, rows: np.ndarray) -> str:
    return write(path.with_suffix(".csv"), rows)


def save_npy(path: Path, rows: np.ndarray) -> str:
    np.save(path.with_suffix(".npy"), rows)
    return str(path.with_suffix(".npy"))


def save_parquet(path: Path, rows: np.ndarray) -> str:
    pl.DataFrame(rows, schema=NAMES).write_parquet(path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


@pytest.mark.parametrize("save", [save_csv, save_npy, save_parquet])
@pytest.mark.parametrize(
    ("value", "detail", "has_score"),
    [
        (1e20, "the score overflows float32: it is given as the largest float32", True),
        (3e38, "the row is so far from the training data that the model's output for it overflows float32", False),
        (-1e39, "column 'disk' has the value -1e+39, beyond the range of float32 (3.4e38)", False),
        (np.inf, "column 'disk' has the value inf: expected a finite number", False),
    ],
)
def test_faulty_cell_costs_only_its_row(
    save: Callable[[Path, np.ndarray], str], value: float, detail: str, has_score: bool, tmp_path: Path, score: Score
) -> None:
    intact = two_factor_rows(2500, seed=1)
    rows = intact.copy()
    rows[1500, 2] = value
    _, expected, _ = score(save(tmp_path / "intact", intact))
    data = save(tmp_path / "faulty", rows)
    code, out, err = score(data)
    assert code == 2
    lines, intact_lines = out.splitlines(), expected.splitlines()
    faulty = json.loads(lines[1500])
    assert faulty["row"] == 1500
    assert faulty["detail"].startswith(detail)
    assert (faulty.get("is_anomaly") is True) == has_score
    assert err.startswith(f"elbo: error: {data}: 1 of 2,500 rows is faulty (the first is row 1500: {detail}")
    assert err.count("\n") == 1
    del lines[1500], intact_lines[1500]
    assert lines == intact_lines


def test_missing_value_in_an_array_is_a_fault_if_none_was_missing_in_training(tmp_path: Path, score: Score) -> None:
    rows = two_factor_rows(30, seed=1)
    rows[7, 2] = np.nan
    code, out, err = score(save_npy(tmp_path / "a", rows))
    detail = "column 'disk' has no value: the model was trained without missing values in this column"
    assert [json.loads(line).get("detail") for line in out.splitlines()] == [None] * 7 + [detail] + [None] * 22
    assert (code, f"1 of 30 rows is faulty (the first is row 7: {detail})" in err) == (2, True)


@pytest.mark.parametrize("save", [save_csv, save_parquet])
def test_row_of_a_file_with_a_header_may_lack_as_many_values_as_a_row_of_a_request(
    save: Callable[[Path, np.ndarray], str], root: Path, tmp_path: Path, score: Score
) -> None:
    rows = two_factor_rows(40, seed=1)
    rows[3, 2] = rows[5, [0, 4]] = rows[8, [0, 1, 4]] = rows[9, 1:] = np.nan  # a row may lack 2 of 5 values
    code, out, _ = score(save(tmp_path / "a", rows), "--explain", "5")
    results = [json.loads(line) for line in out.splitlines()]
    with running(create_app(Settings(artifacts=root, backend="torchscript", log_level="error"))) as client:
        text = Path(save_csv(tmp_path / "b", rows)).read_text().replace("nan", "")
        url = "/anomaly?model=hosts&explain=5"
        response = client.post(url, content=text, headers={"content-type": "text/csv"}).json()
    scored = [result for result in results if "score" in result]
    assert code == 2
    assert [result["row"] for result in results if "score" not in result] == [8, 9]
    assert [error["row"] for error in response["errors"]] == [8, 9]
    assert results[8]["detail"].startswith(
        "the row has no value for cpu, memory, errors: expected numbers in at least 3"
    )
    assert [result.get("imputed") for result in scored] == [answer.get("imputed") for answer in response["results"]]
    assert scored[3]["imputed"] == ["disk"]
    for result, answer in zip(scored, response["results"], strict=True):
        assert (result["row"], result["is_anomaly"]) == (answer["row"], answer["is_anomaly"])
        assert result["score"] == pytest.approx(answer["score"], rel=1e-4)
        seen, answered = ({each["name"]: each["value"] for each in one["features"]} for one in (result, answer))
        assert [name for name, value in seen.items() if value is None] == [
            name for name, value in answered.items() if value is None
        ]
        assert {name for name, value in seen.items() if value is None} == set(result.get("imputed", []))


FAULTY_LINES = [
    ("1,2,x,4,5", "column 'disk': expected a number, got 'x'"),
    ("1,2,true,4,5", "column 'disk': expected a number, got 'true'"),
    ("1,2,3,4", "the line has 4 values, but the header has 5"),
    ("1,2,3,4,5,6", "the line has 6 values, but the header has 5"),
    ("1,,,,5", "the row has no value for memory, disk, network: expected numbers in at least 3 of the 5 columns"),
    (",,,,", "the row has no value in any column"),
    (
        '1,2,"3,5",4,5',
        "column 'disk': expected a number, got '3,5': write a decimal point instead of the decimal comma",
    ),
    ('1,"2"3,3,4,5', "line {line} opens a quotation that does not end where a cell ends"),
    ('1,"2,3,4,5', "line {line} opens a quotation that does not end"),
    ('"a,b",2,3,4,5', "column 'cpu': expected a number, got 'a,b'"),
]


@pytest.mark.parametrize(("place", "format_"), [(0, "ndjson"), (1, "ndjson"), (3, "ndjson"), (1, "csv")])
def test_faulty_line_of_a_csv_file_costs_only_itself(place: int, format_: str, tmp_path: Path, score: Score) -> None:
    good = [",".join(map(repr, row)) for row in two_factor_rows(3, seed=1).tolist()]
    for line, detail in FAULTY_LINES:
        lines = [*good[:place], line, *good[place:]]
        if line == ",,,," and place == 3:
            continue  # empty rows at the end of a file are not rows
        (tmp_path / "a.csv").write_text("\n".join([HEADER, *lines]) + "\n")
        code, out, err = score(str(tmp_path / "a.csv"), "--format", format_, "--explain", "1")
        assert code == 2
        fault = detail.format(line=place + 2)
        assert f"1 of 4 rows is faulty (the first is row {place}: {fault}" in err
        results: list[dict[str, Any]]
        if format_ == "csv":
            results = list(csv.DictReader(out.splitlines()))
        else:
            results = [json.loads(text) for text in out.splitlines()]
        assert [int(result["row"]) for result in results] == [0, 1, 2, 3]
        assert [number for number, result in enumerate(results) if not result.get("score")] == [place]
        assert [number for number, result in enumerate(results) if result.get("detail")] == [place]
        assert results[place]["detail"].startswith(fault)


def test_quotation_that_swallows_lines_makes_only_its_first_and_last_line_faulty(tmp_path: Path, score: Score) -> None:
    lines = [",".join(map(repr, row)) for row in two_factor_rows(3000, seed=1).tolist()]
    lines[1000], lines[2900] = '1,"2,3,4,5', '1,2",3,4,5'
    (tmp_path / "a.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    code, out, err = score(str(tmp_path / "a.csv"))
    results = [json.loads(text) for text in out.splitlines()]
    assert [result["row"] for result in results] == list(range(3000))
    assert [result["row"] for result in results if "score" not in result] == [1000, 2900]
    assert (code, "2 of 3,000 rows are faulty" in err) == (2, True)


def test_text_that_is_not_utf_8_makes_a_row_faulty_only_if_it_is_in_a_feature(tmp_path: Path, score: Score) -> None:
    lines = [",".join(map(repr, row)) + ",x" for row in two_factor_rows(100, seed=1).tolist()]
    lines[10], lines[20] = lines[10][:-1] + "caf\xe9", "\xb5,2,3,4,5,x"
    (tmp_path / "a.csv").write_bytes("\n".join([f"{HEADER},host", *lines]).encode("latin-1"))
    code, out, _ = score(str(tmp_path / "a.csv"))
    results = [json.loads(text) for text in out.splitlines()]
    assert [result["row"] for result in results if "score" not in result] == [20]
    assert (code, len(results)) == (2, 100)


def test_message_does_not_say_that_other_rows_are_scored_if_all_rows_are_faulty(tmp_path: Path, score: Score) -> None:
    (tmp_path / "a.csv").write_text(f"{HEADER}\nx,1,2,3,4\ny,1,2,3,4\n")
    code, out, err = score(str(tmp_path / "a.csv"))
    assert (code, out.count("\n")) == (2, 2)
    assert err.endswith("; no row is scored\n")


def test_row_without_any_value_has_no_score_although_the_model_accepts_missing_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = two_factor_rows(500, seed=0)
    rows[np.arange(5) * 7, np.arange(5)] = np.nan
    np.save(tmp_path / "train.npy", rows)
    folders = ["--artifacts", str(tmp_path / "artifacts"), "--runs", str(tmp_path / "runs")]
    assert in_process(capsys, "train", str(tmp_path / "train.npy"), "--model", "pca", "--name", "m", *folders)[0] == 0
    rows[3] = np.nan
    np.save(tmp_path / "new.npy", rows[:10])
    code, out, err = in_process(capsys, "score", "m", str(tmp_path / "new.npy"), *folders[:2])
    assert [json.loads(line)["row"] for line in out.splitlines() if "score" not in json.loads(line)] == [3]
    assert (code, "row 3: the row has no value in any column" in err) == (2, True)


def test_pipe_as_data_is_refused_at_once(tmp_path: Path, score: Score) -> None:
    os.mkfifo(tmp_path / "rows.csv")
    code, out, err = score(str(tmp_path / "rows.csv"))
    assert (code, out) == (2, "")
    assert "rows.csv is a pipe or a device, and Elbo reads data twice: write the rows to a file first" in err


@pytest.mark.parametrize(("closed", "output"), [("1", ""), ("2", '{"row":0,')])
def test_score_with_a_closed_standard_stream_ends_without_a_traceback(
    closed: str, output: str, root: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "a.csv", two_factor_rows(50, seed=1))
    call = shlex.join([sys.executable, "-m", "elbo", "score", "hosts", data, "--artifacts", str(root)])
    run = subprocess.run(f"{call} {closed}>&-", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(output)
    assert run.stdout.count("\n") == (50 if output else 0)


@pytest.mark.parametrize("kept_bytes", [0, 20, 60])
def test_damaged_picture_costs_only_itself(
    kept_bytes: int, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (100, 6, 5)).astype(np.uint8)
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number:03}.png")
    if not (root / "pictures").exists():
        folders = ["--artifacts", str(root), "--runs", str(tmp_path / "runs")]
        options = ["--model", "pca", "--name", "pictures", *folders]
        assert in_process(capsys, "train", str(tmp_path / "pictures"), *options)[0] == 0
    damaged = tmp_path / "pictures" / "070.png"
    damaged.write_bytes(damaged.read_bytes()[:kept_bytes])
    code, out, err = in_process(capsys, "score", "pictures", str(tmp_path / "pictures"), "--artifacts", str(root))
    assert code == 2
    assert f"1 of 100 rows is faulty (the first is row 70: {damaged} is damaged or not an image" in err
    results = [json.loads(line) for line in out.splitlines()]
    assert [result["row"] for result in results] == list(range(100))
    assert [result["row"] for result in results if "score" not in result] == [70]


def test_first_rows_are_printed_before_the_end_of_the_file_is_read(tmp_path: Path, score: Score) -> None:
    text = Path(write(tmp_path / "a.csv", two_factor_rows(90_000, seed=1))).read_text()
    assert len(text) > 4 << 20  # more than one piece of the reader
    (tmp_path / "a.csv").write_text(text + 'a quotation that does not end: "",1,"2\n')
    code, out, err = score(str(tmp_path / "a.csv"), "--explain", "0")
    assert code == 2
    assert json.loads(out.splitlines()[0])["row"] == 0
    assert len(out.splitlines()) > 30_000
    assert "line 90002" in err


def test_times_and_groups_are_those_of_the_service(root: Path, tmp_path: Path, score: Score) -> None:
    times = ["2026-01-01T00:00:00Z", "1767225615", "1767225630000", "2026-01-01 00:00:45+00:00", ""]
    hosts = ["web-1", "web-2", "web-1", "", "7"]
    rows = two_factor_rows(5, seed=1).tolist()
    lines = [f"{time},{host},{','.join(map(repr, row))}" for time, host, row in zip(times, hosts, rows, strict=True)]
    body = "\n".join([f"timestamp,host,{HEADER}", *lines]) + "\n"
    (tmp_path / "a.csv").write_text(body)
    code, out, _ = score(str(tmp_path / "a.csv"))
    assert code == 0
    results = [json.loads(line) for line in out.splitlines()]
    assert [result.get("time") for result in results] == [1767225600, 1767225615, 1767225630, 1767225645, None]
    assert [result.get("group") for result in results] == ["web-1", "web-2", "web-1", None, "7"]
    with running(create_app(Settings(artifacts=root, log_level="warning", backend="torchscript"))) as client:
        response = client.post("/anomaly?explain=3", content=body, headers={"Content-Type": "text/csv"})
    assert response.status_code == 200, response.text
    for ours, theirs in zip(results, response.json()["results"], strict=True):
        assert {name: ours.get(name) for name in ("row", "time", "is_anomaly")} == {
            name: theirs.get(name) for name in ("row", "time", "is_anomaly")
        }
        assert ours.get("group") == (theirs.get("group") or None)
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-4)


def test_csv_output_ends_with_the_times_and_groups(tmp_path: Path, score: Score) -> None:
    rows = two_factor_rows(2, seed=1).tolist()
    lines = [f"{','.join(map(repr, row))},{when},db" for row, when in zip(rows, ("noon", "1767225600"), strict=True)]
    (tmp_path / "a.csv").write_text("\n".join([f"{HEADER},when,name", *lines]) + "\n")
    options = ["--format", "csv", "--explain", "0", "--time", "when", "--group", "name"]
    code, out, _ = score(str(tmp_path / "a.csv"), *options)
    assert code == 0
    table = list(csv.reader(out.splitlines()))
    assert table[0] == ["row", "score", "p_value", "severity", "is_anomaly", "time", "group", "detail"]
    assert [line[-3:] for line in table[1:]] == [["noon", "db", ""], ["1767225600.0", "db", ""]]


def test_times_of_a_parquet_file_are_passed_on(tmp_path: Path, score: Score) -> None:
    frame = pl.DataFrame(two_factor_rows(2, seed=1), schema=NAMES)
    moments = pl.Series("timestamp", ["2026-01-01T00:00:00", "2026-01-01T00:00:15"]).str.to_datetime()
    frame.with_columns(moments, host=pl.Series(["a", "b"])).write_parquet(tmp_path / "a.parquet")
    code, out, _ = score(str(tmp_path / "a.parquet"))
    assert code == 0
    results = [json.loads(line) for line in out.splitlines()]
    assert [(result["time"], result["group"]) for result in results] == [(1767225600, "a"), (1767225615, "b")]


def test_missing_column_of_times_is_refused(tmp_path: Path, score: Score) -> None:
    data = write(tmp_path / "a.csv", two_factor_rows(2, seed=1))
    code, out, err = score(data, "--time", "when")
    assert (code, out) == (2, "")
    assert err.startswith(f"elbo: error: {data} has no column 'when' besides the features: correct --time")
