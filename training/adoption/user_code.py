"""Find the line of the user's code that a message should name."""

import linecache
import traceback
from pathlib import Path
from types import TracebackType

import torch

ROOT = Path(__file__).resolve().parents[2]
OWN_FOLDERS = (str(Path(torch.__file__).parent), *(f"{ROOT / folder}/" for folder in ("training", "models", "elbo")))
MAX_LINE = 100  # characters of a line that a message repeats


def is_of_user(file: str) -> bool:
    """Return whether `file` belongs neither to torch nor to Elbo."""
    return not file.startswith(OWN_FOLDERS) and not file.startswith("<frozen")


def shown_line(file: str, number: int) -> str | None:
    """Return `file:number` with the line itself, or None if the file is not the user's."""
    if not is_of_user(file):
        return None
    source = " ".join(linecache.getline(file, number).split())[:MAX_LINE]
    return f"{Path(file).name}:{number}" + (f" ({source})" if source else "")


def current_line() -> str:
    """Return the innermost line of the user's code that is running."""
    return _last(traceback.extract_stack())


def line_of_error(found: TracebackType | None) -> str:
    """Return the innermost line of the user's code in a traceback; an empty string if there is none."""
    return _last(traceback.extract_tb(found))


def _last(stack: traceback.StackSummary) -> str:
    for frame in reversed(stack):
        if frame.lineno is not None and (shown := shown_line(frame.filename, frame.lineno)):
            return shown
    return ""
