"""One job of `elbo score`: its options, its parts, and how one part is scored and written.

Local scoring and Ray call the same function, `score_part`. A part is written under a temporary name, synced and
renamed, and then its report is written. A part that has a report is finished: a job that was interrupted continues with
the other parts.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import torch

from models.artifact import Artifact, load
from training.data.readers import SourcePart
from training.data.row_stream import RowStream, stream_for_model
from training.errors import DataError
from training.scoring.frames import FaultyRow, score_batches

BATCH_ROWS = 16_384  # the rows that the model gets at once; larger batches are no faster
REPORTS, FAULTS, PARTS = "reports", "faults", "parts"  # the folders of a job

Show = Callable[[int], None]


@dataclass(frozen=True)
class Part:
    """Rows of one source that are scored together. Without `source_part`, it is the whole source."""

    index: int
    source: str
    source_part: SourcePart | None = None
    first_row: int = 0
    rows: int | None = None  # None if unknown


@dataclass(frozen=True)
class Job:
    """What all parts of a job have in common. A job is small: every task of Ray gets a copy."""

    artifact: Path
    digest: str  # the end of the artifact's file, by which a worker recognises that it loads the same artifact
    folder: Path  # where the parts are written
    format: str  # parquet, csv or ndjson
    alpha: float
    explain: int
    extrapolated: bool = False
    time: str | None = None
    group: str | None = None
    escape: str | None = None
    ids: tuple[str, ...] = ()
    part_rows: int = 0
    names_files: bool = False  # whether the output has a column with the file of a row

    def open(self, artifact: Artifact, part: Part) -> RowStream:
        """Open the rows of a part. Raise DataError if the model cannot take them."""
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
    """What was found in the rows of a part, or of all parts."""

    rows: int = 0
    anomalies: int = 0
    faulty: int = 0
    first_fault: str | None = None
    pixel_warning: str | None = None
    files: list[str] = field(default_factory=list)

    def refuse_faulty(self, source: str, faults: Path | None) -> None:
        """Raise DataError if there are faulty rows. `faults` is the file that lists them."""
        if self.faulty:
            verb = "rows is" if self.faulty == 1 else "rows are"
            raise DataError(
                f"{source}: {self.faulty:,} of {self.rows:,} {verb} faulty (the first is {self.first_fault}); "
                f"{faults} lists them, and the other rows are scored"
            )

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
    return load(path, digest=digest)


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
        artifact: the model; by default, this process loads it, once.
        show: called with the number of rows after each batch.

    Raises:
        DataError: the source is damaged, or was changed since the job began.
        OSError: the disk is full, or the folder cannot be written to.
    """
    torch.set_num_threads(1)  # parts are scored side by side; the scores then depend on no number of cores
    artifact = artifact or load_once(job.artifact, job.digest)
    report, faulty = Report(), []
    writer = _PartWriter(job, part)
    stream = job.open(artifact, part)
    file = Path(part.source).name if job.names_files else None
    options = job.alpha, job.explain, job.extrapolated
    for batch in score_batches(artifact, stream, *options, first_row=part.first_row, file=file):
        report.rows += batch.rows
        report.anomalies += batch.anomalies
        faulty += batch.faulty
        writer.add(batch.frame)
        if show is not None:
            show(batch.rows)
    if part.rows is not None and report.rows != part.rows:
        raise DataError(
            f"{part.source}: expected {part.rows:,} rows from row {part.first_row:,} on, got {report.rows:,}: the file "
            "was changed while it was scored; start again"
        )
    report.files = writer.finish()
    if faulty:
        report.faulty, first = len(faulty), faulty[0]
        report.first_fault = f"row {first.row}: {first.detail}"
        with written(job.folder / FAULTS / f"{part.index:06}.ndjson") as path:
            path.write_bytes(b"".join(_fault_lines(part, faulty)))
    with written(job.report_path(part)) as path:
        path.write_text(json.dumps(asdict(report)))
    return report


def _fault_lines(part: Part, faulty: list[FaultyRow]) -> Iterator[bytes]:
    for row in faulty:
        fields: dict[str, Any] = {"source": part.source, "row": row.row, **row.ids, "detail": row.detail}
        yield orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE)


class _PartWriter:
    """Writes the output of one part. A part whose number of rows is unknown becomes a file per `Job.part_rows` rows."""

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
        """Write the rest. Return the names of the files, in order."""
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
    """Write a frame as a file. In CSV, truth values are 0 and 1, as in `elbo score --format csv`."""
    if format_ == "parquet":
        frame.write_parquet(path)
    elif format_ == "csv":
        frame.with_columns(pl.col(pl.Boolean).cast(pl.Int8)).write_csv(path)
    else:
        frame.write_ndjson(path)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a temporary path. Sync and rename the file there to `path` at the end, so that it appears as a whole."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
