"""One job of `elbo score`: its options and its parts, and how one part is scored and written.

Local scoring and Ray call the same function, `score_part`. It writes each file under a temporary name, syncs it and
renames it, and writes the report on the part last. A part with a report is finished, so a job that was interrupted
continues with the parts without one.
"""

import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson
import polars as pl
import torch

from models.artifact import Artifact, load
from models.errors import ArtifactCorrupt, printable
from models.manifest import read_digest
from training.data.readers import SourcePart
from training.data.row_stream import RowStream, stream_for_model
from training.errors import DataError
from training.scoring.frames import FaultyRow, ScoredBatch, score_batches

BATCH_ROWS = 16_384  # rows per call of the model; larger batches are no faster
TIME_UNITS = (1, 100, 10**3, 10**6, 10**9)  # ns, in which file systems give the time of the last change
COMPRESSION: Literal["snappy"] = "snappy"  # takes a third of the time of zstd, and the files are 14 % larger
REPORTS, FAULTS, PARTS = "reports", "faults", "parts"  # the folders of a job

Show = Callable[[int], None]


@dataclass(frozen=True)
class Part:
    """Rows of one source that are scored together, by one worker."""

    index: int
    source: str
    source_part: SourcePart | None = None  # the place in the source; None for the whole source
    first_row: int = 0  # number of the first row in the source
    rows: int | None = None  # number of rows; None if unknown
    fingerprint: tuple[int, int] | None = None  # of the source, when the job began; None: not compared


@dataclass(frozen=True)
class Job:
    """What all parts of a job have in common. It is small, because every task of Ray gets a copy."""

    artifact: Path
    digest: str  # the SHA-256 hash at the end of the artifact: a worker refuses an artifact with another
    folder: Path  # where the parts, the faulty rows and the reports are written
    format: str  # parquet, csv or ndjson
    alpha: float
    explain: int
    extrapolated: bool = False
    time: str | None = None
    group: str | None = None
    escape: str | None = None
    ids: tuple[str, ...] = ()
    part_rows: int = 0  # rows per part; 0: `run_job` chooses
    names_files: bool = False  # whether the output has a column with the name of each row's file

    def open(self, artifact: Artifact, part: Part) -> RowStream:
        """Open the rows of a part. Raise DataError if the source cannot be read or the model cannot take its rows."""
        stream = stream_for_model(
            part.source,
            artifact.manifest,
            time=self.time,
            group=self.group,
            escape=self.escape,
            keeps_gaps=hasattr(artifact.module, "score_gaps"),
            ids=self.ids,
            part=part.source_part,
        )
        passed_on = dict.fromkeys(name for name in (stream.time, stream.group, *self.ids) if name is not None)
        stream = replace(stream, passed_on=tuple(passed_on), batch_rows=BATCH_ROWS)
        if _needs_times(artifact):
            return stream
        return replace(stream, time=None, group=None)  # parsing times takes longer than scoring

    def report_path(self, part: Part) -> Path:
        """Return the path of the report on a finished part."""
        return self.folder / REPORTS / f"{part.index:06}.json"


@dataclass
class Report:
    """Counts of the rows of a part, or of all parts, and the files of their output."""

    rows: int = 0
    anomalies: int = 0
    faulty: int = 0
    first_fault: str | None = None  # describes the first faulty row
    pixel_warning: str | None = None  # models of images: the rows are in another pixel range
    files: list[str] = field(default_factory=list)  # names of the files in the folder PARTS, in order

    def refuse_faulty(self, source: str, faults: Path | None) -> None:
        """Raise DataError if there are faulty rows. `faults` is the file that lists them."""
        if self.faulty:
            verb = "rows is" if self.faulty == 1 else "rows are"
            others = "no row is scored" if self.faulty == self.rows else "the other rows are scored"
            raise DataError(
                f"{source}: {self.faulty:,} of {self.rows:,} {verb} faulty (the first is {self.first_fault}); "
                f"{faults} lists them, and {others}"
            )

    def count(self, batch: ScoredBatch) -> None:
        """Add the counts of the next rows."""
        self.rows += batch.rows
        self.anomalies += batch.anomalies
        self.faulty += len(batch.faulty)
        if batch.faulty and self.first_fault is None:
            self.first_fault = f"row {batch.faulty[0].row}: {batch.faulty[0].detail}"
        self.pixel_warning = self.pixel_warning or batch.pixel_warning

    def add(self, other: "Report") -> None:
        """Add the report on the next part."""
        self.rows += other.rows
        self.anomalies += other.anomalies
        self.faulty += other.faulty
        self.first_fault = self.first_fault or other.first_fault
        self.pixel_warning = self.pixel_warning or other.pixel_warning
        self.files += other.files


def _needs_times(artifact: Artifact) -> bool:
    policy = artifact.manifest.policy
    return artifact.manifest.window is not None or (policy is not None and bool(policy.rules.silences))


@lru_cache(maxsize=1)
def load_once(path: Path, digest: str) -> Artifact:
    """Return the artifact at `path`, which this process loads only once.

    Raises:
        ArtifactError: the artifact cannot be loaded, or was replaced since the job began.
    """
    artifact = load(path)  # a digest as argument would skip the inspection, which this process has not done
    if read_digest(path) != digest:
        raise ArtifactCorrupt(f"{path} was replaced after the job began: start the command again")
    return artifact


def finished(job: Job, part: Part) -> Report | None:
    """Return the report on a part if the part is finished, or None."""
    try:
        return Report(**json.loads(job.report_path(part).read_bytes()))
    except FileNotFoundError:
        return None


def score_part(job: Job, part: Part, artifact: Artifact | None = None, show: Show | None = None) -> Report:
    """Score the rows of one part, and write the output, the faulty rows and the report.

    Two processes may score the same part at the same time, for example if Ray believes one of them to be dead: both
    write the same bytes.

    Args:
        job: the job.
        part: the part.
        artifact: the model; by default, `load_once` loads it.
        show: called after each batch with the number of its rows.

    Raises:
        ArtifactError: the artifact cannot be loaded, or was replaced since the job began.
        DataError: the source is damaged, or was changed after the job began; or a column cannot be written.
        OSError: the disk is full, or the folder cannot be written to.
    """
    torch.set_num_threads(1)  # parts are scored in parallel, and scores must not depend on the number of cores
    artifact = artifact or load_once(job.artifact, job.digest)
    _require_unchanged(part)
    report = Report()
    writer = _PartWriter(job, part)
    stream = job.open(artifact, part)
    file = Path(part.source).name if job.names_files else None
    options = job.alpha, job.explain, job.extrapolated
    with ExitStack() as files:
        faults = _FaultWriter(job.folder / FAULTS / f"{part.index:06}.ndjson", part.source, files)
        for batch in score_batches(artifact, stream, *options, first_row=part.first_row, file=file):
            report.count(batch)
            faults.add(batch.faulty)
            writer.add(batch.frame)
            if show is not None:
                show(batch.rows)
        _require_unchanged(part)
        if part.rows is not None and report.rows != part.rows:
            raise DataError(
                f"{part.source}: expected {part.rows:,} rows from row {part.first_row:,} on, got {report.rows:,}: the "
                "file was changed while it was scored; repeat the command"
            )
        report.files = writer.finish()
    with written(job.report_path(part)) as path:
        path.write_text(json.dumps(asdict(report)))
    return report


def fingerprint_of(source: str) -> tuple[int, int]:
    """Return the size in bytes and the time of the last change in ns of a source; 0 and 0 if it is no file."""
    try:
        status = Path(source).stat()
    except OSError:  # such as "digits"
        return 0, 0
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (0, 0)


def _is_same(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two fingerprints may be of the same file, read through two file systems.

    One of them may cut off the last digits of the time: NFS may give microseconds or whole seconds.
    """
    (size, time), (other_size, other_time) = one, other
    cut = any(time // unit * unit == other_time or other_time // unit * unit == time for unit in TIME_UNITS)
    return size == other_size and cut


def _require_unchanged(part: Part) -> None:
    if part.fingerprint is not None and not _is_same(part.fingerprint, fingerprint_of(part.source)):
        raise DataError(f"{part.source} was changed after the command began: repeat the command")


class _FaultWriter:
    """Writes the faulty rows of one part. The file exists only if there are any.

    Args:
        path: the file, which appears at the end of the block `files`.
        source: the source of the rows.
        files: closes the file.
    """

    def __init__(self, path: Path, source: str, files: ExitStack) -> None:
        self._path, self._source, self._files = path, source, files
        self._file: BinaryIO | None = None

    def add(self, rows: Sequence[FaultyRow]) -> None:
        """Write rows."""
        if not rows:
            return
        if self._file is None:
            temporary = self._files.enter_context(written(self._path))
            self._file = self._files.enter_context(temporary.open("wb"))
        for row in rows:
            fields: dict[str, Any] = {"source": self._source, "row": row.row, **row.ids, "detail": row.detail}
            self._file.write(orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE))


class _PartWriter:
    """Writes the output of one part: one file, or if its number of rows is unknown, a file per `Job.part_rows` rows."""

    def __init__(self, job: Job, part: Part) -> None:
        self._job, self._part = job, part
        self._frames: list[pl.DataFrame] = []
        self._rows = 0
        self._files: list[str] = []

    def add(self, frame: pl.DataFrame) -> None:
        """Add the next rows."""
        self._frames.append(frame)
        self._rows += len(frame)
        if self._part.rows is None and self._rows >= self._job.part_rows:
            self._write()

    def finish(self) -> list[str]:
        """Write the rows that are not written yet. Return the names of all files of the part, in order."""
        if self._frames or not self._files:
            self._write()
        return self._files

    def _write(self) -> None:
        frame = pl.concat(self._frames)
        suffix = "" if self._part.rows is not None else f"-{len(self._files):04}"
        name = f"part-{self._part.index:06}{suffix}.{self._job.format}"
        with written(self._job.folder / PARTS / name) as path:
            write_frame(frame, path, self._job.format)
        self._files.append(name)
        self._frames, self._rows = [], 0


def write_frame(frame: pl.DataFrame, path: Path, format_: str) -> None:
    """Write a frame as a file. In CSV, truth values are 0 and 1, as in `elbo score --format csv`.

    Raises:
        DataError: the format has no values of the type of a column, such as lists in CSV.
    """
    with polars_errors_as_data_error(f"the rows cannot be written as {format_}"):
        if format_ == "parquet":
            frame.write_parquet(path, compression=COMPRESSION)
        elif format_ == "csv":
            frame.with_columns(pl.col(pl.Boolean).cast(pl.Int8)).write_csv(path)
        else:
            frame.write_ndjson(path)


@contextmanager
def polars_errors_as_data_error(what: str) -> Iterator[None]:
    """Turn errors of polars about types into a DataError that begins with `what`."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"{what} ({printable(reason)[:200]}): convert the columns of --id, --time and --group in DATA to numbers "
            "or text, the same in all files, or choose another format"
        ) from error


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a temporary path for the caller to write. Then sync this file and rename it to `path`.

    So `path` is never half-written. After an error, the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
