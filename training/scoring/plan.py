"""Divide the input of `elbo score` into parts that can be scored in any order."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from models.artifact import Artifact
from training.data.readers import SourcePart
from training.data.row_stream import RowStream
from training.errors import DataError
from training.scoring.csv_parts import divide_csv
from training.scoring.job import Job, Part, fingerprint_of

PART_BYTES = 8 << 20  # the size of a part, in bytes of float32 values
MIN_PART_ROWS, MAX_PART_ROWS = 1024, 250_000
DIVISIBLE = (".csv", ".npy", ".parquet")


def default_part_rows(width: int) -> int:
    """Return the number of rows in a part, for rows of `width` values."""
    return min(MAX_PART_ROWS, max(MIN_PART_ROWS, PART_BYTES // (4 * width)))


def sources_of(data: str, output: Path | None = None) -> list[str]:
    """Return the files of a dataset: those in the folder `data` with a suffix of DIVISIBLE, or else `data` itself.

    A file that is to be written in this folder, `output`, is not among them.

    Raises:
        DataError: the folder has files of several of the formats DIVISIBLE.
    """
    path = Path(data)
    if not path.is_dir():
        return [data]
    written = None if output is None else output.absolute()
    found = sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in DIVISIBLE and not file.name.startswith(".") and file.absolute() != written
    )
    suffixes = sorted({file.suffix.lower() for file in found})
    if len(suffixes) > 1:
        raise DataError(f"{data} has files of several formats ({', '.join(suffixes)}): expected one format")
    return [str(file) for file in found] or [data]


def plan(job: Job, artifact: Artifact, sources: Sequence[str]) -> list[Part]:
    """Return the parts of all sources, in order.

    Raises:
        DataError: a source does not exist, the model cannot take its rows, or the columns that are copied into the
            output are not the same in all sources.
    """
    parts: list[Part] = []
    copied: tuple[str, ...] | None = None
    for source in sources:
        stream = job.open(artifact, Part(0, source))
        copied = stream.passed_on if copied is None else copied
        if stream.passed_on != copied:
            expected, got = ", ".join(copied) or "none", ", ".join(stream.passed_on) or "none"
            raise DataError(
                f"{source}: expected the columns of times and groups of {sources[0]} ({expected}), got {got}: give all "
                "files of the folder the same columns, or score the files one by one"
            )
        fingerprint = fingerprint_of(source)
        for source_part, first_row, rows in _divide(job, artifact, stream):
            parts.append(Part(len(parts), source, source_part, first_row, rows, fingerprint))
    return parts


def _divide(job: Job, artifact: Artifact, stream: RowStream) -> Iterator[tuple[SourcePart | None, int, int | None]]:
    """Yield the place in the file, the number of the first row and the number of rows of each part of a source.

    A source is one part if its format cannot be divided, or if the model has a window, because it then judges a row
    together with rows anywhere in the source.
    """
    path = Path(stream.source)
    suffix = path.suffix.lower()
    is_divisible = suffix in DIVISIBLE and path.is_file() and not (suffix == ".npy" and _is_archive(path))
    if not is_divisible or artifact.manifest.window is not None:
        yield None, 0, None
        return
    if suffix != ".csv":
        assert stream.total is not None
        if stream.total == 0:  # a Parquet file without rows: reading it raises DataError
            yield None, 0, None
        for start in range(0, stream.total, job.part_rows):
            stop = min(start + job.part_rows, stream.total)
            yield SourcePart(start, stop), start, stop - start
        return
    escape = job.escape or artifact.manifest.training.get("escape")
    divided = divide_csv(path, escape, job.part_rows)
    if not divided:  # the file cannot be divided, or it has no rows: reading it then raises DataError
        yield None, 0, None
        return
    for part in divided:
        yield SourcePart(part.start, part.stop, part.first_line), part.first_row, part.rows


def _is_archive(path: Path) -> bool:
    """Return whether a file is a zip archive, as files of numpy.savez are."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"
