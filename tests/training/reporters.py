"""A reporter that keeps what it is told."""

from collections.abc import Mapping


class Silent:
    """Says nothing, remembers everything."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.notes: list[str] = []

    def start(self, title: str, total_steps: int) -> None:
        """Nothing to do."""

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:  # noqa: ARG002  # the protocol names them
        """Keep the terms."""
        self.epochs.append(dict(terms))

    def note(self, message: str) -> None:
        """Keep the message."""
        self.notes.append(message)

    def done(self, summary: Mapping[str, float]) -> None:
        """Nothing to do."""
