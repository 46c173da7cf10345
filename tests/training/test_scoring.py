"""`elbo score NAME DATA OUTPUT`: scores do not depend on the parts, and a killed job continues."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from models.artifact import load
from tests.commands import HEADER, in_process, train_hosts, two_factor_rows, write
from tests.data import ROOT
from tests.preloaded import PreloadedProcess
from tests.waiting import wait_until
from training.errors import DataError
from training.scoring.csv_parts import divide_csv
from training.scoring.frames import largest
from training.scoring.job import Job, Part, Show, load_once, score_part
from training.scoring.run import Engine, Outcome, make_job, run_job, score_locally

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
    return lambda *arguments: in_process(capsys, "score", "hosts", *map(str, arguments), "--artifacts", str(root))


def table(rows: int, seed: int = 1) -> pl.DataFrame:
    """Return rows with the columns request and host. One row is faulty: it has an infinite value."""
    x = two_factor_rows(rows, seed)
    x[rows // 3, 2] = np.inf
    frame = pl.DataFrame(x, schema=NAMES).insert_column(0, pl.Series("request", [f"r{i}" for i in range(rows)]))
    return frame.insert_column(3, pl.Series("host", [f"web-{i % 3}" for i in range(rows)]))


def printed(score: Score, data: Path) -> pl.DataFrame:
    """Return the rows with a score that `elbo score` prints as CSV."""
    _, out, _ = score(data, "--format", "csv")
    return pl.read_csv(out.encode()).filter(pl.col("score").is_not_null())


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("output", ["out", "out.parquet", "out.csv", "out.ndjson"])
def test_output_has_the_rows_ids_and_verdicts_that_are_printed_whatever_the_parts(
    suffix: str, output: str, tmp_path: Path, score: Score
) -> None:
    frame, data = table(2500), tmp_path / f"rows.{suffix}"
    frame.write_csv(data) if suffix == "csv" else frame.write_parquet(data)
    expected = printed(score, data)
    code, out, err = score(data, tmp_path / output, "--part-rows", "300", "--id", "request")
    assert (code, "scored 2,500 rows" in out) == (2, True)
    assert "1 of 2,500 rows is faulty (the first is row 833: column 'disk' has the value inf" in err
    files = sorted((tmp_path / output).glob("*")) if output == "out" else [tmp_path / output]
    assert len(files) >= (5 if output == "out" else 1)
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {".csv": pl.read_csv, ".ndjson": pl.read_ndjson}
    read = readers.get(files[0].suffix, pl.read_parquet)
    found = pl.concat([read(file) for file in files])
    assert found["row"].to_list() == expected["row"].to_list() == [i for i in range(2500) if i != 833]
    assert found["request"].to_list() == [f"r{row}" for row in found["row"]]
    assert found["host"].to_list() == expected["group"].to_list()
    assert found["is_anomaly"].cast(pl.Int8).to_list() == expected["is_anomaly"].to_list()
    assert found["feature_1"].cast(pl.String).to_list() == expected["feature_1"].to_list()
    for name in ("score", "p_value", "severity", "value_2", "expected_2", "contribution_2"):
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=2e-4, atol=1e-6)
    faults = [json.loads(line) for line in (tmp_path / f"{output}.faults.ndjson").read_text().splitlines()]
    assert [(fault["row"], fault["request"], fault["host"]) for fault in faults] == [(833, "r833", "web-2")]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


DIRTY: dict[str, Callable[[list[str]], list[str]]] = {
    "a number that is not finite": lambda cells: ["1e400", *cells[1:]],
    "text": lambda cells: ["abc", *cells[1:]],
    "a value too few": lambda cells: cells[:-1],
    "a value too many": lambda cells: [*cells, "5"],
    "a separator at the end": lambda cells: [*cells, ""],
    "a missing value": lambda cells: ["", *cells[1:]],
    "bytes that are not UTF-8": lambda cells: ["\udcff", *cells[1:]],
    "an id that is not UTF-8": lambda cells: [*cells[:-1], "\udcff"],
    "blank": lambda _: [" "],
}


@pytest.mark.parametrize("dirt", DIRTY)
@pytest.mark.parametrize("place", [40, 89])
def test_line_with_a_fault_is_read_in_a_part_as_in_a_whole_file(
    dirt: str, place: int, tmp_path: Path, score: Score
) -> None:
    """The last line, 89, has no line end. The last column is copied, and the others are features."""
    lines = [",".join([*map(str, row), f"é{i}"]) for i, row in enumerate(two_factor_rows(90, 1).tolist())]
    lines[place] = ",".join(DIRTY[dirt](lines[place].split(",")))
    data = tmp_path / "rows.csv"
    data.write_bytes("\n".join([",".join([*NAMES, "request"]), *lines]).encode(errors="surrogateescape"))
    _, out, _ = score(data, "--format", "csv")  # reads the cells as text, and the parts as numbers
    expected = pl.read_csv(out.encode())
    score(data, tmp_path / "out.csv", "--part-rows", "20", "--id", "request")
    found, faults = pl.read_csv(tmp_path / "out.csv"), tmp_path / "out.csv.faults.ndjson"
    scored = expected.filter(pl.col("score").is_not_null())
    assert found["row"].to_list() == scored["row"].to_list()
    np.testing.assert_allclose(found["score"].to_numpy(), scored["score"].to_numpy(), rtol=2e-4, atol=1e-6)
    details = [json.loads(line)["detail"] for line in faults.read_text().splitlines()] if faults.exists() else []
    assert details == expected.filter(pl.col("score").is_null())["detail"].to_list()


def test_folder_of_files_is_one_dataset_whose_rows_name_their_file(tmp_path: Path, score: Score) -> None:
    (tmp_path / "data").mkdir()
    arrays = {name: two_factor_rows(rows, rows) for name, rows in (("a", 40), ("b", 70))}
    for name, x in arrays.items():
        np.save(tmp_path / "data" / f"{name}.npy", x)
    assert score(tmp_path / "data", tmp_path / "out.parquet", "--part-rows", "25")[0] == 0
    found = pl.read_parquet(tmp_path / "out.parquet")
    assert found["file"].to_list() == ["a.npy"] * 40 + ["b.npy"] * 70
    assert found["row"].to_list() == [*range(40), *range(70)]
    for name in arrays:
        expected = printed(score, tmp_path / "data" / f"{name}.npy")
        same = found.filter(pl.col("file") == f"{name}.npy")
        np.testing.assert_allclose(same["score"].to_numpy(), expected["score"].to_numpy(), rtol=2e-4, atol=1e-6)


def test_output_in_the_folder_of_the_data_is_not_scored_by_the_next_run(tmp_path: Path, score: Score) -> None:
    pl.DataFrame(two_factor_rows(30, 1), schema=NAMES).write_parquet(tmp_path / "rows.parquet")
    for _ in range(2):
        assert score(tmp_path, tmp_path / "scores.parquet", "--overwrite")[0] == 0
        assert len(pl.read_parquet(tmp_path / "scores.parquet")) == 30


LINES = ["1,2,3", "", '"4",5,6', "7,8,9\r", '" a, b",2,', "  ", '"say ""x""",1,2', ",,", "5,5,5"]
IRREGULAR = ['"a\nb",2,3', '1,"2,3', 'x "y",2,"3', "1,2\r3,4", '""\n']


@pytest.mark.parametrize("end", ["\n", "", "\n,,\n\n,,\n", "\n\n  \n"])
def test_parts_of_a_csv_file_have_all_its_rows_and_end_where_lines_end(end: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(("a,b,c\n" + "\n".join(LINES * 50) + end).encode())
    rows = 7 * 50  # two lines of nine are blank
    for part_rows in (1, 7, 100, 10_000):
        parts = divide_csv(path, None, part_rows)
        assert parts is not None
        assert [part.first_row for part in parts] == list(np.cumsum([0, *(part.rows for part in parts)])[:-1])
        assert sum(part.rows for part in parts) == rows
        content = path.read_bytes()
        for part in parts:
            lines = content[part.start : part.stop].decode().split("\n")
            assert sum(bool(line.strip()) for line in lines) == part.rows
            assert content[part.start - 1 : part.start] == b"\n"
            assert part.first_line == content[: part.start].count(b"\n") + 1
    assert parts is not None
    assert len(parts) == 1


@pytest.mark.parametrize("line", IRREGULAR)
def test_csv_file_whose_lines_may_not_be_records_is_not_divided_and_keeps_its_rows(
    line: str, tmp_path: Path, score: Score
) -> None:
    path = tmp_path / "a.csv"
    lines = [f"{','.join(map(repr, row))},x" for row in two_factor_rows(200, seed=1).tolist()]
    lines[100] = line + lines[100]
    path.write_bytes("\n".join([f"{HEADER},host", *lines]).encode())
    assert divide_csv(path, None, 10) is None
    expected = printed(score, path)
    score(path, tmp_path / "out", "--part-rows", "50")
    found = pl.concat([pl.read_parquet(file) for file in sorted((tmp_path / "out").iterdir())])
    assert found["row"].to_list() == expected["row"].to_list()


def test_killed_job_continues_with_the_parts_that_are_not_finished(root: Path, tmp_path: Path, score: Score) -> None:
    data = tmp_path / "rows.npy"
    np.save(data, two_factor_rows(25_000, seed=1))
    options = ["--part-rows", "100", "--workers", "1", "--artifacts", str(root)]
    command = [sys.executable, "-m", "elbo", "score", "hosts", str(data), str(tmp_path / "out"), *options]
    hidden = tmp_path / ".out.partial"
    with PreloadedProcess(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: len(list(hidden.glob("*/reports/*.json"))) > 20, seconds=60)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    finished = [path.stem for path in hidden.glob("*/reports/*.json")]
    (parts,) = hidden.glob("*/parts")
    assert 20 < len(finished) < 250
    kept = {f"part-{number}.parquet": (parts / f"part-{number}.parquet").stat().st_mtime_ns for number in finished}
    time.sleep(0.01)
    code, out, _ = score(data, tmp_path / "out", "--part-rows", "100")
    assert (code, f"continued: {len(finished)} of 250 parts were finished before" in out) == (0, True)
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert len(made) == 250
    assert {name for name, changed in made.items() if kept.get(name) == changed} == set(kept)
    rows = pl.concat([pl.read_parquet(tmp_path / "out" / name) for name in sorted(made)])["row"]
    assert rows.to_list() == list(range(25_000))


@pytest.mark.parametrize(("change", "resumed"), [("none", 1), ("alpha", 0), ("data", 0)])
def test_only_a_job_of_the_same_options_and_data_is_continued(
    change: str, resumed: int, root: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.npy"
    np.save(data, two_factor_rows(400, seed=1))
    artifact = load(root / "hosts" / "1" / "model.pt")
    finish = partial(score_locally, artifact)

    def interrupt(job: Job, parts: Sequence[Part], workers: int | None, show: Show) -> None:
        finish(job, parts[:1], workers, show)
        raise KeyboardInterrupt

    def run(alpha: float, engine: Engine) -> Outcome:
        job = make_job(artifact, "parquet", alpha, 1, part_rows=100)
        return run_job(job, artifact, str(data), tmp_path / "out", single=False, engine=engine)

    with pytest.raises(KeyboardInterrupt):
        run(0.05, interrupt)
    if change == "data":
        os.utime(data, ns=(0, 0))
    outcome = run(0.01 if change == "alpha" else 0.05, finish)
    assert (outcome.resumed, outcome.parts, outcome.report.rows) == (resumed, 4, 400)


def test_existing_output_is_replaced_only_on_request(tmp_path: Path, score: Score) -> None:
    data = write(tmp_path / "rows.csv", two_factor_rows(50, seed=1))
    (tmp_path / "out.csv").write_text("precious\n")
    code, _, err = score(data, tmp_path / "out.csv")
    assert (code, (tmp_path / "out.csv").read_text()) == (2, "precious\n")
    assert "out.csv exists: give another name, or add --overwrite to replace it" in err
    assert score(data, tmp_path / "out.csv", "--overwrite")[0] == 0
    assert len(pl.read_csv(tmp_path / "out.csv")) == 50
    (tmp_path / "out").write_text("a file without a suffix\n")
    assert score(data, tmp_path / "out", "--overwrite")[0] == 0
    assert sum(len(pl.read_parquet(file)) for file in (tmp_path / "out").iterdir()) == 50


def test_folder_of_files_with_different_columns_to_copy_is_refused(tmp_path: Path, score: Score) -> None:
    (tmp_path / "data").mkdir()
    table(30).write_csv(tmp_path / "data" / "a.csv")
    table(30).drop("host").write_csv(tmp_path / "data" / "b.csv")
    code, _, err = score(tmp_path / "data", tmp_path / "out.csv")
    assert (code, "b.csv: expected the columns of times and groups of" in err) == (2, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_parquet_file_without_rows_is_refused(tmp_path: Path, score: Score) -> None:
    table(30).head(0).write_parquet(tmp_path / "rows.parquet")
    code, _, err = score(tmp_path / "rows.parquet", tmp_path / "out.parquet")
    assert (code, "has no rows of numbers" in err) == (2, True), err
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--id", "host"], "--id needs OUTPUT"),
        (["--engine", "ray"], "--engine needs OUTPUT"),
        (["--format", "parquet"], "--format parquet needs OUTPUT"),
        (["out.csv", "--format", "ndjson"], "out.csv would be a csv file, but --format asks for ndjson"),
        (["out", "--id", "request"], "has no column 'request' besides the features: correct --id"),
        (["missing/out"], "there is no folder"),
    ],
)
def test_options_that_cannot_work_are_refused_and_write_nothing(
    arguments: list[str], message: str, tmp_path: Path, score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "rows.csv", two_factor_rows(50, seed=1))
    code, _, err = score(data, *arguments)
    assert (code, message in err) == (2, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("columns", [1, 12, 32, 33])
def test_largest_contributions_are_those_of_a_stable_sort(columns: int) -> None:
    random = np.random.RandomState(0)
    contribution = random.randint(0, 4, (200, columns)).astype(np.float32)  # many are equal
    for count in (0, 1, 5, 8, 9, 12, 20):
        expected = np.argsort(-contribution, axis=1, kind="stable")[:, :count]
        np.testing.assert_array_equal(largest(contribution, count), expected)


def test_process_loads_an_artifact_once_and_refuses_another_with_its_path(root: Path) -> None:
    path = root / "hosts" / "1" / "model.pt"
    job = make_job(load(path), "parquet", 0.05, 1)
    assert load_once(job.artifact, job.digest) is load_once(job.artifact, job.digest)
    with pytest.raises(Exception, match="was replaced after the job began"):
        load_once(job.artifact, "0" * 64)


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
def test_data_that_change_after_the_job_began_are_refused_although_they_have_as_many_rows(
    moment: str, root: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.npy"
    np.save(data, two_factor_rows(200, seed=1))
    artifact = load(root / "hosts" / "1" / "model.pt")

    def change(_rows: int = 0) -> None:
        np.save(data, two_factor_rows(200, seed=2))

    def engine(job: Job, parts: Sequence[Part], workers: int | None, show: Show) -> None:
        if moment == "before":
            change()
        score_locally(artifact, job, parts, workers, change if moment == "meanwhile" else show)

    job = make_job(artifact, "parquet", 0.05, 1, part_rows=200)
    with pytest.raises(DataError, match="was changed after the command began"):
        run_job(job, artifact, str(data), tmp_path / "out", single=False, engine=engine)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("added_ns", "is_refused"), [(0, False), (10**9, True)])
def test_data_whose_time_of_change_has_fewer_digits_in_a_worker_are_the_same_data(
    added_ns: int, is_refused: bool, root: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.npy"
    np.save(data, two_factor_rows(200, seed=1))
    os.utime(data, ns=(1_700_000_000_123_456_789,) * 2)
    artifact = load(root / "hosts" / "1" / "model.pt")

    def engine(job: Job, parts: Sequence[Part], workers: int | None, show: Show) -> None:
        os.utime(data, ns=(1_700_000_000_123_456_000 + added_ns,) * 2)  # as another machine sees it over NFS
        score_locally(artifact, job, parts, workers, show)

    job = make_job(artifact, "parquet", 0.05, 1, part_rows=200)
    if is_refused:
        with pytest.raises(DataError, match="was changed after the command began"):
            run_job(job, artifact, str(data), tmp_path / "out", single=False, engine=engine)
    else:
        run_job(job, artifact, str(data), tmp_path / "out", single=False, engine=engine)
    assert (tmp_path / "out").exists() == (not is_refused)


def test_task_of_an_aborted_job_cannot_write_into_the_folder_of_the_next(root: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.npy"
    np.save(data, two_factor_rows(200, seed=1))
    artifact = load(root / "hosts" / "1" / "model.pt")
    late: list[tuple[Job, Part]] = []

    def abort(job: Job, parts: Sequence[Part], workers: int | None, show: Show) -> None:  # noqa: ARG001
        late.append((job, parts[0]))
        raise KeyboardInterrupt

    def engine(job: Job, parts: Sequence[Part], workers: int | None, show: Show) -> None:
        for old_job, old_part in late:
            with pytest.raises(FileNotFoundError):
                score_part(old_job, old_part, artifact)
        score_locally(artifact, job, parts, workers, show)

    def run(explain: int, engine: Engine) -> Outcome:
        job = make_job(artifact, "parquet", 0.05, explain)
        return run_job(job, artifact, str(data), tmp_path / "out", single=False, engine=engine)

    with pytest.raises(KeyboardInterrupt):
        run(1, abort)
    run(2, engine)
    assert "feature_2" in pl.read_parquet(tmp_path / "out").columns
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("columns", "output", "message"),
    [
        ([pl.Series([[1, 2]] * 30)], "out.csv", "the rows cannot be written as csv"),
        ([pl.Series([1] * 30), pl.Series(["x"] * 30)], "out.parquet", "the parts cannot be joined into one file"),
    ],
    ids=["lists in CSV", "two types"],
)
def test_columns_that_the_output_cannot_hold_are_reported(
    columns: list[pl.Series], output: str, message: str, tmp_path: Path, score: Score
) -> None:
    (tmp_path / "data").mkdir()
    for number, column in enumerate(columns):
        table(30).with_columns(request=column).write_parquet(tmp_path / "data" / f"{number}.parquet")
    code, _, err = score(tmp_path / "data", tmp_path / output, "--id", "request")
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / output).exists()


def test_archive_with_the_suffix_of_an_array_is_scored_as_one_part(tmp_path: Path, score: Score) -> None:
    rows = two_factor_rows(300, seed=1)
    with (tmp_path / "rows.npy").open("wb") as file:
        np.savez(file, x=rows)
    assert score(tmp_path / "rows.npy", tmp_path / "out.parquet", "--part-rows", "100")[0] == 0
    assert pl.read_parquet(tmp_path / "out.parquet")["row"].to_list() == list(range(300))


def test_faulty_rows_of_a_part_are_written_batch_by_batch(root: Path, tmp_path: Path) -> None:
    x = two_factor_rows(100_000, seed=1).astype(np.float32)
    x[:, 0] = np.inf
    np.save(tmp_path / "rows.npy", x)
    artifact = load(root / "hosts" / "1" / "model.pt")
    job = replace(make_job(artifact, "parquet", 0.05, 1, part_rows=10_000), folder=tmp_path)
    for name in ("parts", "faults", "reports"):
        (tmp_path / name).mkdir()
    sizes = []

    def show(_rows: int) -> None:
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "faults").iterdir()))

    report = score_part(job, Part(0, str(tmp_path / "rows.npy")), artifact, show)
    (file,) = (tmp_path / "faults").iterdir()
    assert report.faulty == 100_000 == file.read_bytes().count(b"\n")
    assert sizes[len(sizes) // 2] > file.stat().st_size / 3
