"""The history of a run, written during training: one JSON line per epoch, and TensorBoard scalars."""

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
TENSORBOARD = "tensorboard"  # folder of the TensorBoard events, beside FILE_NAME
POINTS = 400  # the manifest stores at most this many points of the history

Point = dict[str, float]


class HistoryRecorder:
    """A reporter that writes every epoch to `folder`, and passes all calls on to `inner`.

    Each line of metrics.jsonl is an object with epoch, step, loss terms, and seconds since the run began. `epoch`
    returns only after the line is on disk. If the folder cannot be written, the run continues without a history file.

    Args:
        inner: the reporter that shows the progress.
        folder: folder of the run; None keeps the history in memory and writes nothing.
        resume: continue the history in `folder`; epochs that are trained again replace their earlier lines.
        tensorboard: also write TensorBoard scalars.

    Raises:
        FitError: `tensorboard` is true, but the package tensorboard is not installed.
    """

    def __init__(self, inner: Reporter, folder: Path | None, resume: bool = False, tensorboard: bool = False) -> None:
        if tensorboard and find_spec("tensorboard") is None:
            raise FitError("--tensorboard needs the package tensorboard: pip install 'elbo[tensorboard]'")
        self._inner = inner
        self.notes: list[str] = []
        self._path = (folder or Path()) / FILE_NAME
        self._points = _read(self._path) if folder and resume else []
        # Seconds that the run took before it was resumed.
        self._earlier_seconds = self._points[-1].get("seconds", 0.0) if self._points else 0.0
        self._tensorboard = tensorboard
        self._writer: SummaryWriter | None = None
        self._writable = folder is not None  # becomes False after a failure
        self._rewound = False
        self._began = time.monotonic()

    @property
    def history(self) -> list[Point]:
        """Return the finite values of at most POINTS epochs, evenly spread, including the first and the last."""
        return thin([{name: v for name, v in point.items() if math.isfinite(v)} for point in self._points])

    def start(self, title: str, total_steps: int) -> None:
        """Begin or continue the run."""
        self._inner.start(title, total_steps)

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        """Write the epoch, then report it."""
        if not self._rewound:
            self.rewind(step - 1)
        seconds = round(self._earlier_seconds + time.monotonic() - self._began, 3)
        self._points.append({"epoch": epoch, "step": step, **terms, "seconds": seconds})
        self._write(self._points[-1:])
        if self._writer:
            for name, value in terms.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        self._inner.epoch(epoch, step, terms)

    def stage(self, title: str) -> None:
        """Pass the stage on."""
        self._inner.stage(title)

    def rewind(self, step: int) -> None:
        """Drop the epochs recorded after `step`.

        The first call of `epoch` also calls `rewind`, unless `rewind` was called before. If an epoch is trained
        again, its new line therefore replaces the earlier one.
        """
        self._points = [point for point in self._points if point["step"] <= step]
        self._write(self._points, replace=True)  # also drops a half-written last line
        if self._tensorboard and self._writable and self._writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            folder = self._path.parent / TENSORBOARD
            if not self._points:
                shutil.rmtree(folder, ignore_errors=True)  # the events there belong to another run
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._rewound = True

    def note(self, message: str) -> None:
        """Keep the message and pass it on."""
        self.notes.append(message)
        self._inner.note(message)

    def done(self, summary: Mapping[str, float]) -> None:
        """Report success."""
        self._close_writer()
        self._inner.done(summary)

    def move(self, folder: Path) -> None:
        """Move the history into `folder`, where the finished run is kept. A failure is reported as a note."""
        self._close_writer()
        if not self._writable:
            return
        try:
            for path in (self._path, self._path.parent / TENSORBOARD):
                if path.exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    path.rename(folder / path.name)
        except OSError as error:
            self.note(
                f"warning: failed to move the history to {folder} ({error.strerror}): it stays in {self._path.parent}"
            )

    def _close_writer(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    def _write(self, points: list[Point], replace: bool = False) -> None:
        if not self._writable:
            return
        lines = b"".join(orjson.dumps(point, option=orjson.OPT_APPEND_NEWLINE) for point in points)
        partial = self._path.with_name(f"{FILE_NAME}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if replace:
                try:
                    partial.write_bytes(lines)
                    partial.replace(self._path)
                finally:
                    partial.unlink(missing_ok=True)  # a part of a history; after the rename there is no such file
            else:
                with self._path.open("ab") as file:
                    file.write(lines)
        except OSError as error:
            self._writable = False
            self.note(
                f"warning: failed to write the history {self._path} ({error.strerror}): free space there, or set --runs"
            )


def _read(path: Path) -> list[Point]:
    """Return the points in the file at `path`, up to the first damaged line; [] if there is no file."""
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


def thin(points: list[Point], count: int = POINTS) -> list[Point]:
    """Return at most `count` of `points`, evenly spread. The first and the last point are included."""
    if len(points) <= count:
        return points
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]
