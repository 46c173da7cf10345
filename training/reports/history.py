"""The record of a run: one JSON line an epoch that outlives the process, and TensorBoard's scalars."""

import math
import os
import shutil
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from training.errors import FitError
from training.progress import Reporter

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FILE_NAME = "metrics.jsonl"
TENSORBOARD = "tensorboard"  # folder of its events, beside the file
POINTS = 400  # of a history that goes into a manifest

Point = dict[str, float]


class Recorder:
    """A reporter that tells `inner` all that it hears, and writes every epoch to `folder`.

    A line of metrics.jsonl is one object: epoch, step, the terms, seconds since the run began. It is written when
    `epoch` returns. A folder that cannot be written costs the record, not the run.

    Args:
        inner: who shows the progress.
        folder: of the run; without it the history is kept, and nothing written.
        resume: go on with the record that is there: the epochs that are made again take the place of their first lines.
        tensorboard: write TensorBoard's scalars too. Raises FitError where it is not installed.
    """

    def __init__(self, inner: Reporter, folder: Path | None, resume: bool = False, tensorboard: bool = False) -> None:
        if tensorboard and find_spec("tensorboard") is None:
            raise FitError("--tensorboard needs the package tensorboard: pip install 'elbo[tensorboard]'")
        self._inner = inner
        self.notes: list[str] = []
        self._path = (folder or Path()) / FILE_NAME
        self._points = _read(self._path) if folder and resume else []
        self._earlier = self._points[-1].get("seconds", 0.0) if self._points else 0.0  # spent before this process
        self._tensorboard = tensorboard
        self._writer: SummaryWriter | None = None
        self._writable = folder is not None
        self._rewound = False
        self._began = time.monotonic()

    @property
    def history(self) -> list[Point]:
        """The epochs so far, evenly thinned to at most POINTS with the first and the last; finite values only."""
        return thinned([{name: v for name, v in point.items() if math.isfinite(v)} for point in self._points])

    def start(self, title: str, total_steps: int) -> None:
        """The run begins, or goes on."""
        self._inner.start(title, total_steps)

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        """Record the epoch, then tell it."""
        if not self._rewound:
            self.rewind(step - 1)
        seconds = round(self._earlier + time.monotonic() - self._began, 3)
        self._points.append({"epoch": epoch, "step": step, **terms, "seconds": seconds})
        self._write(self._points[-1:])
        if self._writer:
            for name, value in terms.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        self._inner.epoch(epoch, step, terms)

    def rewind(self, step: int) -> None:
        """Forget what was recorded after `step`. The first epoch does so by itself; earlier is only earlier."""
        self._points = [point for point in self._points if point["step"] <= step]
        self._write(self._points, anew=True)  # without a last line that was only half written
        if self._tensorboard and self._writable and self._writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            folder = self._path.parent / TENSORBOARD
            if not self._points:
                shutil.rmtree(folder, ignore_errors=True)  # another run's
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._rewound = True

    def note(self, message: str) -> None:
        """Pass it on, and keep it."""
        self.notes.append(message)
        self._inner.note(message)

    def done(self, summary: Mapping[str, float]) -> None:
        """The run ended well."""
        self._finish()
        self._inner.done(summary)

    def move(self, folder: Path) -> None:
        """Put the record into `folder`, where the finished run is kept. What fails is noted."""
        self._finish()
        if not self._writable:
            return
        try:
            for path in (self._path, self._path.parent / TENSORBOARD):
                if path.exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    path.rename(folder / path.name)
        except OSError as error:
            self.note(f"warning: the record stays in {self._path.parent} ({error.strerror})")

    def _finish(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    def _write(self, points: list[Point], anew: bool = False) -> None:
        if not self._writable:
            return
        lines = b"".join(orjson.dumps(point, option=orjson.OPT_APPEND_NEWLINE) for point in points)
        partial = self._path.with_name(f"{FILE_NAME}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if anew:
                partial.write_bytes(lines)
                partial.replace(self._path)
            else:
                with self._path.open("ab") as file:
                    file.write(lines)
        except OSError as error:
            self._writable = False
            self.note(f"warning: no record in {self._path} ({error.strerror}): make room there, or set --runs")


def _read(path: Path) -> list[Point]:
    """The lines of the record at `path`, up to the first that is damaged; none where there is no record."""
    points: list[Point] = []
    try:
        for line in path.read_bytes().splitlines():
            point = {name: math.nan if value is None else value for name, value in orjson.loads(line).items()}
            points.append({name: float(value) for name, value in point.items()} | _counts(point))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # JSONDecodeError is a ValueError
        pass
    return points


def _counts(point: Point) -> Point:
    return {"epoch": int(point["epoch"]), "step": int(point["step"])}


def thinned(points: list[Point], most: int = POINTS) -> list[Point]:
    """At most `most` of `points`, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]
