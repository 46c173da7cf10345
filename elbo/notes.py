"""Warnings of Python from the notes of a training or an adoption."""

import warnings
from collections.abc import Iterable

from elbo.errors import ElboWarning
from training.progress import WARNING, is_warning


def warn_of(notes: Iterable[str], stacklevel: int) -> None:
    """Issue an `ElboWarning` for each note that is a warning, without its first word.

    Args:
        notes: what a `training.progress.Reporter` received.
        stacklevel: as of `warnings.warn`: 1 is the line that calls this function.
    """
    for note in notes:
        if is_warning(note):
            warnings.warn(note[len(WARNING) :], ElboWarning, stacklevel=stacklevel + 1)
