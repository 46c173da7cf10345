"""The base of Elbo's exceptions, and the exceptions about artifacts.

ElboError
├── ArtifactError
│   ├── ArtifactMissing     no such model, version or file
│   ├── ArtifactNameInvalid the name or the version of a model is not valid as the name of a folder
│   ├── ArtifactUnreadable  the operating system refuses to read the file or folder
│   ├── ArtifactForeign     the file was not written by Elbo
│   ├── ArtifactCorrupt     truncated or altered after it was sealed
│   ├── ArtifactUnsafe      intact, but it has something that could harm this machine; it was not run
│   ├── ArtifactTooNew      a later format version than this release can read
│   ├── ArtifactUntrusted   no key that this machine trusts has signed it as this name and version
│   ├── ArtifactMismatch    intact, but its outputs differ from its golden answers on this machine
│   └── ArtifactUnwritable  the artifact folder is full, or this user may not write to it
├── DeviceMissing
├── KeyInvalid              a key for signatures cannot be read or written
├── training.errors.DataError, training.errors.FitError and training.errors.AdoptionError
└── the HTTP errors in service.errors
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pydantic import ValidationError  # `elbo --help` imports this module and must not wait for pydantic


class ElboError(Exception):
    """Base of all exceptions that Elbo raises on purpose.

    `str(error)` is one line: what happened, what was expected, what to do.
    """

    code = "elbo_error"


class DeviceMissing(ElboError):
    """The requested device is not available."""

    code = "device_missing"


class KeyInvalid(ElboError):
    """A file of keys cannot be read, has no ed25519 key, or would be overwritten."""

    code = "key_invalid"


class ArtifactError(ElboError):
    """An artifact cannot be found, read or trusted."""

    code = "artifact_error"


class ArtifactMissing(ArtifactError):
    """No such model, version or file."""

    code = "artifact_missing"


class ArtifactNameInvalid(ArtifactError):
    """The name or the version of a model is not valid as the name of a folder."""

    code = "artifact_name_invalid"


class ArtifactUnreadable(ArtifactError):
    """The operating system refuses to read the file or folder: no permission, or an I/O error."""

    code = "artifact_unreadable"


class ArtifactForeign(ArtifactError):
    """The file was not written by Elbo."""

    code = "artifact_foreign"


class ArtifactCorrupt(ArtifactError):
    """The file is truncated or was altered after it was sealed."""

    code = "artifact_corrupt"


class ArtifactUnsafe(ArtifactError):
    """The file is intact, but has something that no artifact needs and that could harm this machine. It was not run."""

    code = "artifact_unsafe"


class ArtifactTooNew(ArtifactError):
    """The file has a later format version than this release can read."""

    code = "artifact_too_new"


class ArtifactUntrusted(ArtifactError):
    """ELBO_TRUSTED_KEYS is set, and none of its keys has signed the artifact as this version of this model."""

    code = "artifact_untrusted"


class ArtifactMismatch(ArtifactError):
    """The outputs of the model differ from the golden answers, which were recorded at publication."""

    code = "artifact_mismatch"


class ArtifactUnwritable(ArtifactError):
    """An artifact cannot be written to the artifact folder."""

    code = "artifact_unwritable"


class FieldFault(NamedTuple):
    """One field that pydantic rejects.

    Args:
        path: the field names and indices on the way to the value, outermost first.
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
    if fault["type"] in ("model_type", "model_attributes_type"):  # pydantic's message names a class of this code
        message = "input should be an object"
    return FieldFault(
        path=tuple(map(str, fault["loc"])),
        kind=fault["type"],
        message=message[:1].lower() + message[1:],
        value=fault["input"],
    )


def join_names(names: Sequence[str], limit: int = 5) -> str:
    """Return `names` as one string. If there are more than `limit` names, the string is like "a, b, c and 4 more"."""
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


def shortened(text: str, limit: int) -> str:
    """Return `text`, or its beginning and a hash of the whole if it has more than `limit` characters.

    The hash tells two long texts with the same beginning apart. Without it, the rows of two hosts could be taken for
    those of one. `limit` must be above 30.
    """
    if len(text) <= limit:
        return text
    digest = blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return f"{text[: limit - len(digest) - 3]}...{digest}"


def printable(text: str) -> str:
    r"""Return `text` with an escape such as \n or \x1b in place of every character that does not print.

    Text from a file or a client can then neither begin a line of its own nor control the terminal.
    """
    if text.isprintable():
        return text
    return "".join([char if char.isprintable() else char.encode("unicode_escape").decode() for char in text])


def printable_lines(text: str) -> str:
    """Return `text` as `printable` does, but keep its line breaks. Use it for reports with names from an artifact."""
    return "\n".join(map(printable, text.split("\n")))
