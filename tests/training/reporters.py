"""A reporter that tests can inspect."""

from collections.abc import Mapping


class RecordingReporter:
    """Records titles, epochs and notes; prints nothing."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.epochs: list[dict[str, float]] = []
        self.notes: list[str] = []

    def start(self, title: str, total_steps: int) -> None:  # noqa: ARG002  # names set by the protocol
        """Record the title."""
        self.started.append(title)

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:  # noqa: ARG002  # names set by the protocol
        """Record the loss terms."""
        self.epochs.append(dict(terms))

    def stage(self, title: str) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Record the message."""
        self.notes.append(message)

    def done(self, summary: Mapping[str, float]) -> None:
        """Do nothing."""
