"""Divide the input of `elbo score` into parts that can be scored in any order."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from models.artifact import Artifact
from training.data.readers import SourcePart
from training.errors import DataError
from training.scoring.csv_parts import divide_csv
from training.scoring.job import Job, Part

PART_BYTES = 8 << 20  # the size of a part, in bytes of float32 values
MIN_PART_ROWS, MAX_PART_ROWS = 1024, 250_000
DIVISIBLE = (".csv", ".npy", ".parquet")


def default_part_rows(width: int) -> int:
    """Return the number of rows in a part, for rows of `width` values."""
    return min(MAX_PART_ROWS, max(MIN_PART_ROWS, PART_BYTES // (4 * width)))


def sources_of(data: str) -> list[str]:
    """Return the files of a dataset: those in the folder `data` if it has tables, or else `data` itself.

    Raises:
        DataError: the folder has tables of several formats.
    """
    path = Path(data)
    if not path.is_dir():
        return [data]
    found = sorted(
        file for file in path.iterdir() if file.suffix.lower() in DIVISIBLE and not file.name.startswith(".")
    )
    suffixes = sorted({file.suffix.lower() for file in found})
    if len(suffixes) > 1:
        raise DataError(f"{data} has files of several formats ({', '.join(suffixes)}): expected one format")
    return [str(file) for file in found] or [data]


def plan(job: Job, artifact: Artifact, sources: Sequence[str]) -> list[Part]:
    """Return the parts of all sources, in order.

    Raises:
        DataError: a source does not exist, or the model cannot take its rows.
    """
    parts: list[Part] = []
    for source in sources:
        for place, first_row, rows in _divide(job, artifact, source):
            parts.append(Part(len(parts), source, place, first_row, rows))
    return parts


def _divide(job: Job, artifact: Artifact, source: str) -> Iterator[tuple[SourcePart | None, int, int | None]]:
    """Yield the place, the number of the first row and the number of rows of each part of a source.

    The rows of a model with a window need the rows before them, so the source then is one part.
    """
    stream = job.open(artifact, Part(0, source))
    suffix, path = Path(source).suffix.lower(), Path(source)
    if suffix not in DIVISIBLE or artifact.manifest.window is not None or not path.is_file():
        yield None, 0, None
        return
    if suffix != ".csv":
        assert stream.total is not None
        for start in range(0, stream.total, job.part_rows):
            stop = min(start + job.part_rows, stream.total)
            yield SourcePart(start, stop), start, stop - start
        return
    escape = job.escape or artifact.manifest.training.get("escape")
    divided = divide_csv(path, escape, job.part_rows)
    if not divided:  # it cannot be divided, or it has no rows, which reading it reports
        yield None, 0, None
        return
    for part in divided:
        yield SourcePart(part.start, part.stop, part.first_line), part.first_row, part.rows
