"""The root of Elbo's error tree, and the branch that concerns artifacts.

ElboError
├── ArtifactError
│   ├── ArtifactMissing     no such model, version or file
│   ├── ArtifactForeign     a file, but not one that Elbo wrote
│   ├── ArtifactCorrupt     truncated or altered since it was sealed
│   ├── ArtifactTooNew      written by a later format than this program reads
│   └── ArtifactMismatch    intact, yet it does not reproduce its own golden answers here
├── DeviceMissing
├── training.errors.DataError and training.errors.FitError
└── the HTTP errors of service.errors
"""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pydantic import ValidationError  # `elbo --help` imports this module and must not wait for pydantic


class ElboError(Exception):
    """Base of every error that Elbo raises on purpose. `str(error)` is one line: expected, got, what to do."""

    code = "elbo_error"


class DeviceMissing(ElboError):
    """The device that was asked for is not there."""

    code = "device_missing"


class ArtifactError(ElboError):
    """An artifact cannot be found, read or trusted."""

    code = "artifact_error"


class ArtifactMissing(ArtifactError):
    """No such model, version or file."""

    code = "artifact_missing"


class ArtifactForeign(ArtifactError):
    """The file was not written by Elbo."""

    code = "artifact_foreign"


class ArtifactCorrupt(ArtifactError):
    """The file is truncated, or was altered after it was sealed."""

    code = "artifact_corrupt"


class ArtifactTooNew(ArtifactError):
    """The file's format version is later than this program understands."""

    code = "artifact_too_new"


class ArtifactMismatch(ArtifactError):
    """The model does not reproduce the golden answers that were recorded when it was published."""

    code = "artifact_mismatch"


class FieldFault(NamedTuple):
    """One field that pydantic rejects.

    Args:
        path: field names and indices that lead to the value, outermost first.
        kind: pydantic's name of the error, such as "missing" or "extra_forbidden".
        message: what was expected, such as "input should be greater than 0".
        value: the rejected value.
    """

    path: tuple[str, ...]
    kind: str
    message: str
    value: Any


def first_fault(error: "ValidationError") -> FieldFault:
    """Return the first field that `error` reports."""
    fault = error.errors(include_url=False)[0]
    message = fault["msg"].removeprefix("Value error, ")
    return FieldFault(
        path=tuple(map(str, fault["loc"])),
        kind=fault["type"],
        message=message[:1].lower() + message[1:],
        value=fault["input"],
    )
