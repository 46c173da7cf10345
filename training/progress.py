"""Progress on standard error: a live bar on a terminal, a few plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.live import Live as Display
    from rich.progress import Progress, TaskID

LINES = 10  # number of plain progress lines per run
STAGES = 6  # statistics, calibration, evaluation, ONNX twin, artifact, plots
STAGE_SHARE = 0.03  # length of a stage on the bar, as a share of the training
WARNING = "WARNING: "  # the first word of a warning; in small letters, of a lesser problem


def is_warning(note: str) -> bool:
    """Return whether a note tells of a problem."""
    return note[: len(WARNING)].upper() == WARNING


class Reporter(Protocol):
    """Receives the progress of a run. Losses are in nats per row unless their name says otherwise."""

    def start(self, title: str, total_steps: int) -> None:
        """Begin a run of `total_steps` updates."""

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        """Report the end of epoch `epoch`, counted from 1, after `step` updates. `terms` are the parts of the loss."""

    def stage(self, title: str) -> None:
        """Begin a stage after the training, such as "calibrating". `title` is shown until the next stage begins."""

    def note(self, message: str) -> None:
        """Show a message that the user must see."""

    def done(self, summary: Mapping[str, float]) -> None:
        """Report that a model is trained and evaluated, with the figures in `summary`. Stages may follow."""


def reporter() -> "PlainReporter | LiveReporter":
    """Return a live bar if standard error is a terminal, else plain lines.

    The caller must close the reporter at the end, because the live bar hides the cursor.
    """
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return LiveReporter()
    return PlainReporter()


def format_figures(terms: Mapping[str, float]) -> str:
    """Return named figures on one line, such as `reconstruction 23.1  kl 4.27`."""
    return "  ".join(f"{name} {value:.4g}" for name, value in terms.items())


def format_loss(terms: Mapping[str, float]) -> str:
    """Return the terms of a loss on one line, followed by "nats" if they include the ELBO."""
    return format_figures(terms) + (" nats" if "elbo" in terms else "")


class SilentReporter:
    """Reports nothing. When several processes train together, only the first one reports."""

    def start(self, title: str, total_steps: int) -> None:
        """Do nothing."""

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        """Do nothing."""

    def stage(self, title: str) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Do nothing."""

    def done(self, summary: Mapping[str, float]) -> None:
        """Do nothing."""


class PlainReporter:
    """Prints about LINES lines per run on standard error, and flushes after each line."""

    def __init__(self) -> None:
        self._total = self._lines_printed = 0
        self._running = False
        self._began = time.monotonic()

    def start(self, title: str, total_steps: int) -> None:
        """Print the title of the run."""
        self._total, self._lines_printed, self._began = total_steps, 0, time.monotonic()
        self._running = True
        self.note(f"training {title}")

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        """Print one line each time another tenth of the steps is done."""
        tenth = LINES * step // self._total
        if tenth == self._lines_printed:
            return
        self._lines_printed = tenth
        seconds_left = (time.monotonic() - self._began) * (self._total - step) / step
        percent = 100 * step // self._total
        self.note(f"{percent:3d} %  epoch {epoch}  {format_loss(terms)}  {seconds_left:.0f} s left")

    def stage(self, title: str) -> None:
        """Print the stage, unless the model is already evaluated: the line of the published version follows soon."""
        if self._running:
            self.note(title)

    def note(self, message: str) -> None:
        """Print one line."""
        print(message, file=sys.stderr, flush=True)

    def done(self, summary: Mapping[str, float]) -> None:
        """Print the duration and the metrics."""
        self._running = False
        self.note(f"trained in {time.monotonic() - self._began:.1f} s  {format_figures(summary)}")

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


class LiveReporter:
    """Shows a progress bar with the time left, and the loss terms below it, on standard error.

    The bar of a model is full when all stages after its training are over, too.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.text import Text

        self._console = Console(stderr=True)
        title = TextColumn("{task.description}", markup=False)
        self._bar = Progress(title, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=self._console)
        self._terms = Text()
        self._display: Display | None = None
        self._began = time.monotonic()
        self._title, self._total_steps, self._stages = "", 0, 0
        self._result: str | None = None  # what `done` reported for the model whose bar is shown

    def start(self, title: str, total_steps: int) -> None:
        """Show the bar of a model."""
        from rich.console import Group
        from rich.live import Live as Display

        self._finish_bar()
        self._began = time.monotonic()
        self._title, self._total_steps, self._stages = title, total_steps, 0
        self._task = self._bar.add_task(title, total=total_steps * (1 + STAGES * STAGE_SHARE))
        if self._display is None:
            self._display = Display(Group(self._bar, self._terms), console=self._console, redirect_stdout=False)
            self._display.start()

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        """Move the bar."""
        self._terms.plain = f"epoch {epoch}  {format_loss(terms)}"
        self._bar.update(self._task, completed=step)

    def stage(self, title: str) -> None:
        """Move the bar to the beginning of the stage, and show the stage in the title."""
        completed = self._total_steps * (1 + min(self._stages, STAGES - 1) * STAGE_SHARE)
        self._stages += 1
        self._bar.update(self._task, completed=completed, description=f"{self._title}: {title}")
        if self._display is not None:
            self._display.refresh()

    def note(self, message: str) -> None:
        """Print one line above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def done(self, summary: Mapping[str, float]) -> None:
        """Keep the duration and the metrics, which are printed when the bar is full."""
        self._result = f"trained in {time.monotonic() - self._began:.1f} s  {format_figures(summary)}"

    def close(self) -> None:
        """Fill the bar if the model is trained, stop drawing, show the cursor again, and print the result."""
        self._finish_bar(stop=True)

    def _finish_bar(self, stop: bool = False) -> None:
        result, self._result = self._result, None
        if result is not None:
            self._bar.update(self._task, completed=self._bar.tasks[-1].total, description=self._title)
        if stop and self._display is not None:
            self._display.stop()
            self._display = None
        if result is not None:
            self.note(result)


class RowProgress(Protocol):
    """Shows how many rows are done."""

    def show(self, done: int) -> None:
        """Show that `done` rows are done."""


@contextmanager
def progress(title: str, total: int | None, prints_results: bool = True) -> Iterator[RowProgress]:
    """Show the progress of work.

    On a terminal, a bar is shown while the results go elsewhere. Otherwise, a line appears every few seconds.

    Args:
        title: name of the work.
        total: number of rows, possibly estimated; None if unknown.
        prints_results: whether the results go to standard output.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb" or not total:
        yield _RowLines(title, total or 0)
        return
    if prints_results and sys.stdout.isatty():  # the results show the progress
        yield _NoRowProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False) as bar:
        yield _RowBar(bar, bar.add_task(title, total=total))


class _NoRowProgress:
    def show(self, done: int) -> None:
        """Do nothing."""


class _RowBar:
    def __init__(self, bar: "Progress", task: "TaskID") -> None:
        self._bar, self._task = bar, task

    def show(self, done: int) -> None:
        """Move the bar. Stretch it if the total was an underestimate."""
        total = self._bar.tasks[0].total or 0
        self._bar.update(self._task, completed=done, total=max(total, done))


class _RowLines:
    def __init__(self, title: str, total: int) -> None:
        self._progress, self._done = SlowProgress(title, total), 0

    def show(self, done: int) -> None:
        """Print a line from time to time."""
        self._progress.advance(done - self._done)
        self._done = done


class SlowProgress:
    """Prints a line on standard error every few seconds during long work, and nothing during short work.

    Args:
        title: name of the work, with which each line begins.
        total: number of items of work.
        seconds: time before the first line and between lines.
    """

    def __init__(self, title: str, total: int, seconds: float = 10.0) -> None:
        self._title, self._total, self._seconds = title, total, seconds
        self._done = 0
        self._began = self._last_line = time.monotonic()

    def advance(self, count: int) -> None:
        """Count `count` more items as done."""
        self._done += count
        now = time.monotonic()
        if now - self._last_line >= self._seconds and 0 < self._done < self._total:
            self._last_line = now
            seconds_left = (now - self._began) * (self._total - self._done) / self._done
            percent = 100 * self._done // self._total
            print(f"{self._title}: {percent} %, {seconds_left:.0f} s left", file=sys.stderr, flush=True)
