"""A run's state on disk: written atomically while it trains, so that a killed run loses minutes and not days."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from training.errors import FitError

FILE_NAME = "checkpoint.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state`, tensors and plain values, so that a reader sees this or the one before, never half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{FILE_NAME}.{os.getpid()}"
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / FILE_NAME)


def exists(folder: Path) -> bool:
    """Whether a run left its state in `folder`."""
    return (folder / FILE_NAME).is_file()


def load(folder: Path, identity: str) -> dict[str, Any]:
    """The state that was saved for the run `identity`. Nothing in the file is executed.

    Raises FitError if there is none, if it is damaged, or if it belongs to another run.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise FitError(f"nothing to resume: there is no {path}; train without --resume")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["identity"]
    except Exception as error:  # whatever a damaged file makes torch raise
        raise FitError(f"{path} is damaged: train without --resume ({type(error).__name__})") from error
    if found != identity:
        raise FitError(f"{path} belongs to a run with other data or options: repeat those, or train without --resume")
    return state


def remove(folder: Path) -> None:
    """Forget the run: it has been published, so a file that cannot be removed does no harm."""
    with suppress(OSError):
        (folder / FILE_NAME).unlink()
    with suppress(OSError):
        folder.rmdir()  # if nothing else is in it
