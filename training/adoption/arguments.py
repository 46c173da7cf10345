"""How messages name the arguments of adoption: as in Python (`shape=`), or as on the command line (`--shape`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# The options of `elbo adopt`, by the arguments of `elbo.adopt`. Columns of a file have their names in the file itself.
OPTIONS = {
    "calibration_rows": "--calibrate",
    "fit_rows": "--fit-rows",
    "scaler": "--scaler",
    "weights": "--weights",
    "prior": "--prior",
    "shape": "--shape",
    "encode": "--encode",
    "decode": "--decode",
    "spread": "--spread",
    "feature_names": "the header of --calibrate",
}
_names_options: ContextVar[bool] = ContextVar("names_options", default=False)


@contextmanager
def named_as_options() -> Iterator[None]:
    """Name arguments as options of the command line while the block runs."""
    token = _names_options.set(True)
    try:
        yield
    finally:
        _names_options.reset(token)


def argument(name: str) -> str:
    """Return the name of an argument as the subject of a sentence: calibration_rows, or --calibrate."""
    return OPTIONS[name] if _names_options.get() else name


def setting(name: str, value: Any = None) -> str:
    """Return how the user sets an argument: shape=[2, 3], or --shape 2x3; without a value, shape= or --shape."""
    if not _names_options.get():
        return f"{name}=" + ("" if value is None else repr(value))
    if value is None:
        return OPTIONS[name]
    is_shape = isinstance(value, Sequence) and not isinstance(value, str)
    return f"{OPTIONS[name]} {'x'.join(map(str, value)) if is_shape else value}"


def by_interface(python: str, command_line: str) -> str:
    """Return the words for a user of Python, or those for a user of the command line."""
    return command_line if _names_options.get() else python
