"""Run a job of `elbo score`: plan or continue it, score its parts, and rename the output to its final path.

A job has a folder `.OUTPUT.partial/HASH` beside the output. HASH is the hash of its options and data. When all parts
are finished, the output appears by one rename. If the process is killed, the folder stays, and the same command
continues with the parts that are not finished. A command with other options or data removes the folder. Tasks of Ray
that outlive their command therefore cannot write into the folder of another job.
"""

import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from models.artifact import Artifact
from models.manifest import read_digest
from training.data.readers import SourcePart
from training.errors import DataError
from training.scoring.frames import output_columns
from training.scoring.job import (
    COMPRESSION,
    FAULTS,
    PARTS,
    REPORTS,
    Job,
    Part,
    Report,
    Show,
    fingerprint_of,
    finished,
    polars_errors_as_data_error,
    score_part,
    written,
)
from training.scoring.plan import default_part_rows, plan, sources_of

FORMATS = ("parquet", "csv", "ndjson")
PLAN = "plan.json"
COPY_BYTES = 1 << 20

Engine = Callable[[Job, Sequence[Part], int | None, Show], None]


@dataclass(frozen=True)
class Outcome:
    """The result of a job."""

    report: Report
    parts: int
    resumed: int  # how many parts an earlier process had finished
    faults: Path | None  # the file of faulty rows; None if there are none


def choose_format(output: str, requested: str | None) -> tuple[str, bool]:
    """Return the format of the output, and whether it is one file: parquet, csv or ndjson by the suffix.

    Without such a suffix, or with a slash at its end, the output is a folder of parts, of the `requested` format or
    Parquet.

    Raises:
        DataError: the suffix and `requested` differ.
    """
    suffix = Path(output).suffix.lower().removeprefix(".")
    if suffix not in FORMATS or output.endswith("/") or Path(output).is_dir():
        return requested or FORMATS[0], False
    if requested not in (None, suffix):
        raise DataError(f"{output} would be a {suffix} file, but --format asks for {requested}: correct one of them")
    return suffix, True


def run_job(
    job: Job,
    artifact: Artifact,
    data: str,
    output: Path,
    *,
    single: bool,
    engine: Engine,
    workers: int | None = None,
    overwrite: bool = False,
    show: Show | None = None,
) -> Outcome:
    """Score all rows of `data`, and write `output` and, beside it, the file of faulty rows.

    Args:
        job: the options; `run_job` sets `folder` and `names_files`, and `part_rows` if it is 0.
        artifact: the model.
        data: a file or a folder of files.
        output: the file or folder to write.
        single: whether `output` is one file.
        engine: scores the parts that are not finished.
        workers: how many parts are scored at the same time; None for the default of the engine.
        overwrite: whether an output that exists is replaced.
        show: called with the number of rows that are scored so far, in all parts.

    Raises:
        DataError: the data cannot be used, the output exists, or another process writes it.
        OSError: the output cannot be written.
    """
    _refuse_existing(output, overwrite)
    if not output.absolute().parent.is_dir():
        raise DataError(f"there is no folder {output.absolute().parent}: create it, or give another output")
    folder = output.absolute().with_name(f".{output.name}.partial")
    sources = sources_of(data, output)
    rows = job.part_rows or default_part_rows(len(artifact.manifest.features))
    job = replace(job, folder=folder, part_rows=rows, names_files=len(sources) > 1)
    with _locked(folder, output):
        try:
            _refuse_existing(output, overwrite)  # another command may have written it before this one had the lock
        except DataError:
            folder.rmdir()
            raise
        job, parts = _open_plan(job, artifact, sources)
        open_parts = [part for part in parts if finished(job, part) is None]
        counter = _Counter(show)
        counter.add(sum(report.rows for part in parts if (report := finished(job, part)) is not None))
        engine(job, open_parts, workers, counter.add)
        total = Report()
        for part in parts:
            report = finished(job, part)
            assert report is not None, "an engine returns when all parts are finished"
            total.add(report)
        faults = _publish(job, total, parts, output, single)
        (job.folder / PLAN).unlink()  # first: if this process is killed here, no job continues with half of the folder
        shutil.rmtree(folder, ignore_errors=True)  # a task of Ray that runs twice may write a file meanwhile
    return Outcome(total, len(parts), len(parts) - len(open_parts), faults)


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise DataError(f"{output} exists: give another name, or add --overwrite to replace it")


def score_locally(artifact: Artifact, job: Job, parts: Sequence[Part], workers: int | None, show: Show) -> None:
    """Score the parts in threads of this process, because reading, scoring and writing mostly release Python's lock.

    After an error or an interruption, each running part ends with its current batch, and no other part starts.
    """
    count = workers or len(os.sched_getaffinity(0)) + 1  # each waits for the disk now and then
    stopped = threading.Event()

    def show_or_stop(rows: int) -> None:
        if stopped.is_set():  # a part may be a whole file, and take hours
            raise CancelledError
        show(rows)

    with ThreadPoolExecutor(min(count, max(1, len(parts)))) as pool:
        futures = [pool.submit(score_part, job, part, artifact, show_or_stop) for part in parts]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def describe_data(job: Job, artifact: Artifact, data: str, output: Path) -> tuple[int | None, list[str]]:
    """Return the number of rows of `data` without `output`, possibly estimated, and notes for the user.

    The number is None if it is unknown.

    Raises:
        DataError: the data cannot be used.
    """
    total: int | None = 0
    notes: dict[str, None] = {}
    for source in sources_of(data, output):
        stream = job.open(artifact, Part(0, source))
        total = None if total is None or stream.total is None else total + stream.total
        notes |= dict.fromkeys(stream.notes)
    return total, list(notes)


class _Counter:
    """Counts the rows that are scored, for several threads at once."""

    def __init__(self, show: Show | None) -> None:
        self._done, self._show, self._lock = 0, show, threading.Lock()

    def add(self, rows: int) -> None:
        with self._lock:
            self._done += rows
            if self._show is not None:
                self._show(self._done)


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Create `folder` and lock it, so that two commands cannot write the same output.

    Raises:
        DataError: another process has locked it.
    """
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another elbo score writes {output}: wait until it ends, or give another output") from None
        except OSError:
            pass  # the file system has no locks
        yield
    finally:
        os.close(descriptor)


def _open_plan(job: Job, artifact: Artifact, sources: Sequence[str]) -> tuple[Job, list[Part]]:
    """Return the job, with its own folder in `job.folder`, and its parts.

    The parts are those of an earlier process, if it had the same options and data. Otherwise, they are new, and all
    other folders in `job.folder` are removed.
    """
    fingerprints = [(source, *fingerprint_of(source)) for source in sources]
    identity = json.dumps({"job": asdict(job), "sources": fingerprints}, default=str)
    shared = job.folder
    job = replace(job, folder=shared / hashlib.sha256(identity.encode()).hexdigest()[:16])
    path = job.folder / PLAN
    if path.exists() and (job.folder / PARTS).is_dir():  # an output that is a folder was PARTS: it has been renamed
        return job, [_part(each) for each in json.loads(path.read_bytes())]
    for entry in shared.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    try:
        parts = plan(job, artifact, sources)
        output_columns(artifact.manifest, job.explain, job.open(artifact, parts[0]).passed_on, job.names_files)
    except BaseException:
        shared.rmdir()
        raise
    for name in (PARTS, REPORTS, FAULTS):
        (job.folder / name).mkdir(parents=True)
    with written(path) as temporary:
        temporary.write_text(json.dumps([asdict(part) for part in parts]))
    return job, parts


def _part(fields: dict[str, Any]) -> Part:
    place, fingerprint = fields.pop("source_part"), tuple(fields.pop("fingerprint"))
    return Part(**fields, source_part=None if place is None else SourcePart(**place), fingerprint=fingerprint)


def _publish(job: Job, total: Report, parts: Sequence[Part], output: Path, single: bool) -> Path | None:
    """Rename the finished parts, or the file into which they are joined, to `output`.

    Return the path of the file of faulty rows; None if there are none.
    """
    faults = output.with_name(f"{output.name}.faults.ndjson")
    if total.faulty:
        collected = job.folder / faults.name
        _join([job.folder / FAULTS / f"{part.index:06}.ndjson" for part in parts], collected)
        collected.replace(faults)
    else:
        faults.unlink(missing_ok=True)
    made = job.folder / PARTS
    for unfinished in {path.name for path in made.iterdir()} - set(total.files):  # files of killed processes
        (made / unfinished).unlink()
    if single:
        files = [made / name for name in total.files]
        made = job.folder / output.name
        with written(made) as path:
            _join_parts(files, path, job.format)
    if output.is_dir() or (output.exists() and not single):  # a rename replaces only a file by a file
        output.rename(job.folder / "replaced")
    made.replace(output)
    return faults if total.faulty else None


def _join_parts(files: Sequence[Path], path: Path, format_: str) -> None:
    """Write the rows of `files` into one file. The memory does not depend on the number of rows."""
    if format_ == "parquet":
        with polars_errors_as_data_error("the parts cannot be joined into one file"):
            pl.scan_parquet(list(files), glob=False).sink_parquet(path, compression=COMPRESSION, row_group_size=100_000)
        return
    _join(files, path, has_header=format_ == "csv")


def _join(files: Sequence[Path], path: Path, has_header: bool = False) -> None:
    """Write the contents of those `files` that exist, one after another, to `path`.

    Args:
        has_header: whether the first line of each file is a header; only that of the first file is kept.
    """
    with path.open("wb") as joined:
        for number, each in enumerate(files):
            if each.exists():
                with each.open("rb") as file:
                    if has_header and number:
                        file.readline()
                    shutil.copyfileobj(file, joined, COPY_BYTES)


def make_job(artifact: Artifact, format_: str, alpha: float, explain: int, **options: Any) -> Job:
    """Return a job for `artifact`. For `options`, see `Job`; `run_job` sets the folder."""
    path = artifact.path.absolute()
    return Job(path, read_digest(path), Path(), format_, alpha, explain, **options)
