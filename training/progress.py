"""What training tells the person who waits: a live bar on a terminal, a few plain lines anywhere else."""

import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.live import Live as Display

LINES = 10  # plain lines a run


class Reporter(Protocol):
    """Where a fit reports to. Losses are in nats a row, unless their name says otherwise."""

    def start(self, title: str, total_steps: int) -> None:
        """A run of `total_steps` updates begins."""

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        """Epoch number `epoch`, from 1, ended; `step` updates are made in all. `terms` are the parts of the loss."""

    def note(self, message: str) -> None:
        """Something that the user must see."""

    def done(self, summary: Mapping[str, float]) -> None:
        """The run ended well; `summary` says how well."""


def reporter() -> "Plain | Live":
    """The reporter that fits where standard error goes. Close it whatever happens: a bar hides the cursor."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return Live()
    return Plain()


def phrase(terms: Mapping[str, float]) -> str:
    """`reconstruction 23.1  kl 4.27`: terms or figures in one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in terms.items())


def loss_phrase(terms: Mapping[str, float]) -> str:
    """The terms of a loss in one line; those of an ELBO are in nats a row."""
    return phrase(terms) + (" nats" if "elbo" in terms else "")


class Muted:
    """Says nothing: of processes that train together, one speaks."""

    def start(self, title: str, total_steps: int) -> None:
        """Nothing."""

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""

    def done(self, summary: Mapping[str, float]) -> None:
        """Nothing."""


class Plain:
    """About LINES lines a run on standard error, each flushed."""

    def __init__(self) -> None:
        self._total = self._told = 0
        self._began = time.monotonic()

    def start(self, title: str, total_steps: int) -> None:
        """Say what begins."""
        self._total, self._told, self._began = total_steps, 0, time.monotonic()
        self.note(f"training {title}")

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        """One line whenever another tenth of the steps is behind."""
        tenth = LINES * step // self._total
        if tenth == self._told:
            return
        self._told = tenth
        left = (time.monotonic() - self._began) * (self._total - step) / step
        self.note(f"{100 * step // self._total:3d} %  epoch {epoch}  {loss_phrase(terms)}  {left:.0f} s left")

    def note(self, message: str) -> None:
        """One line."""
        print(message, file=sys.stderr, flush=True)

    def done(self, summary: Mapping[str, float]) -> None:
        """One line: how long it took, and how good it is."""
        self.note(f"trained in {time.monotonic() - self._began:.1f} s  {phrase(summary)}")

    def close(self) -> None:
        """Nothing is held."""


class Live:
    """A bar with the time left, and the terms under it, redrawn in place on standard error."""

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

    def start(self, title: str, total_steps: int) -> None:
        """Show the bar."""
        from rich.console import Group
        from rich.live import Live as Display

        self._began = time.monotonic()
        self._task = self._bar.add_task(title, total=total_steps)
        self._display = Display(Group(self._bar, self._terms), console=self._console, redirect_stdout=False)
        self._display.start()

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        """Move the bar."""
        self._terms.plain = f"epoch {epoch}  {loss_phrase(terms)}"
        self._bar.update(self._task, completed=step)

    def note(self, message: str) -> None:
        """One line, above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def done(self, summary: Mapping[str, float]) -> None:
        """Fill the bar and leave it, then say how long it took and how good it is."""
        self._bar.update(self._task, completed=self._bar.tasks[-1].total)
        self.close()
        self.note(f"trained in {time.monotonic() - self._began:.1f} s  {phrase(summary)}")

    def close(self) -> None:
        """Stop drawing and show the cursor again."""
        if self._display is not None:
            self._display.stop()
            self._display = None


class Patience:
    """A word on standard error now and then, for work that turns out to take long: nothing within the first seconds.

    Args:
        title: what is done.
        total: of what `advance` counts.
        seconds: before the first word and between two.
    """

    def __init__(self, title: str, total: int, seconds: float = 10.0) -> None:
        self._title, self._total, self._seconds = title, total, seconds
        self._done = 0
        self._began = self._told = time.monotonic()

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._told >= self._seconds and self._done < self._total:
            self._told = now
            left = (now - self._began) * (self._total - self._done) / self._done
            share = 100 * self._done // self._total
            print(f"{self._title}: {share} %, {left:.0f} s left", file=sys.stderr, flush=True)
