"""The file of API keys: one line per key, with its name, the SHA-256 hash of its value, its scopes and its limits.

    prometheus = {sha256 = "9f86d081…", scopes = ["metrics", "write"]}
    shop = {sha256 = "60303ae2…", scopes = ["infer"], requests_per_second = 50, burst = 100, concurrent_requests = 8}

The file does not contain the values of keys, so nobody can send requests with its content. A plain SHA-256 hash is
enough, because `elbo key add` draws the values at random: 256 bits cannot be guessed, unlike a password.

If such a file is cut off, the line that is cut is invalid, and lines that are missing grant nothing. A key that an
editor has written as a TOML table of several lines has no such protection: without its last lines, it may lack limits.
"""

import fcntl
import hashlib
import os
import re
import secrets
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from models.errors import ElboError, first_fault
from service.access.scopes import Scope

PREFIX = "elbo_"  # of every value, so that people and scanners for secrets recognise a key
MAX_KEYS = 100  # each key may add its own series to the metrics
_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}"
_FILE_MODE = 0o600


class KeyFileError(ElboError):
    """The file of API keys cannot be read or changed."""

    code = "key_file_error"


class ApiKey(BaseModel):
    """What the file says about one key. A limit that is None does not apply."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = Field(min_length=1)
    requests_per_second: float | None = Field(None, ge=0.001, le=1e6)
    burst: int | None = Field(None, ge=1, le=1_000_000)  # requests that may come at once; default: one second's worth
    rows_per_second: float | None = Field(None, ge=0.001, le=1e9)
    concurrent_requests: int | None = Field(None, ge=1, le=1_000_000)

    @property
    def limits(self) -> dict[str, float]:
        """The limits that apply, by name."""
        return self.model_dump(exclude={"sha256", "scopes"}, exclude_none=True)


Keys = dict[str, ApiKey]
_ADAPTER: TypeAdapter[Keys] = TypeAdapter(dict[Annotated[str, Field(pattern=f"^{_NAME}$")], ApiKey])


def new_value() -> str:
    """Return the value of a new key: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(value: str) -> str:
    """Return the SHA-256 hash of a value, in hexadecimal digits."""
    return hashlib.sha256(value.encode()).hexdigest()


def parse(text: str, path: Path) -> Keys:
    """Return the keys by name. Raises KeyFileError, which names `path`, if `text` is not a valid file of keys."""
    try:
        content = tomllib.loads(text)
        if any(name.startswith(PREFIX) for name in content):
            raise KeyFileError(f"{path}: a name begins with {PREFIX}, as values of keys do: expected the name of a key")
        keys = _ADAPTER.validate_python(content)
    except tomllib.TOMLDecodeError as error:
        raise KeyFileError(f"{path}: expected a TOML file with one line per API key: {error}") from error
    except ValidationError as error:
        fault = first_fault(error)
        # The value is not shown: somebody may have written a key in place of its hash.
        raise KeyFileError(f"{path}: {'.'.join(fault.path)}: {fault.message}") from None
    names_by_hash: dict[str, str] = {}
    for name, key in keys.items():
        other = names_by_hash.setdefault(key.sha256, name)
        if other != name:
            raise KeyFileError(f"{path}: {other} and {name} have the same sha256: expected another one for each key")
        if key.burst and not key.requests_per_second:
            raise KeyFileError(f"{path}: {name}.burst: expected requests_per_second beside it")
    if len(keys) > MAX_KEYS:
        raise KeyFileError(f"{path}: expected at most {MAX_KEYS} API keys, got {len(keys)}")
    return keys


def read(path: Path) -> Keys:
    """Return the keys in the file by name. Raises KeyFileError."""
    return parse(_text(path), path)


def add(path: Path, name: str, key: ApiKey) -> None:
    """Add a key to the file, which is created if necessary. Raises KeyFileError if the file has a key of this name."""
    if not re.fullmatch(_NAME, name) or name.startswith(PREFIX):
        raise KeyFileError(
            f"expected a name of at most 63 letters, digits, _ and -, which does not begin with {PREFIX}, got {name!r}"
        )

    def append(text: str) -> str:
        if name in parse(text, path):
            raise KeyFileError(f"{path} already has a key {name}: choose another name, or elbo key remove {name}")
        separator = "" if not text or text.endswith("\n") else "\n"
        new_text = f"{text}{separator}{_line(name, key)}\n"
        parse(new_text, path)
        return new_text

    _change(path, append, must_exist=False)


def remove(path: Path, name: str) -> None:
    """Remove a key from the file. Raises KeyFileError if the file has no key of this name."""

    def without_line(text: str) -> str:
        keys = parse(text, path)
        if name not in keys:
            raise KeyFileError(f"{path} has no key {name}: expected one of {', '.join(keys) or '(the file is empty)'}")
        line_start = re.compile(rf'\s*(?:{name}|"{name}"|\'{name}\')\s*=')
        rest = "".join(line for line in text.splitlines(keepends=True) if not line_start.match(line))
        if parse(rest, path).keys() != keys.keys() - {name}:
            raise KeyFileError(f"{path}: the key {name} is not on a line of its own: remove it with an editor")
        return rest

    _change(path, without_line, must_exist=True)


def _line(name: str, key: ApiKey) -> str:
    """Return the line of a key."""
    scopes = ", ".join(f'"{scope}"' for scope in sorted(key.scopes))
    fields = [f'sha256 = "{key.sha256}"', f"scopes = [{scopes}]"]
    fields += [f"{limit} = {value!r}" for limit, value in key.limits.items()]
    return f"{name} = {{{', '.join(fields)}}}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise KeyFileError(
            f"cannot read the API keys in {path} ({error.strerror}): expected the file that elbo key add writes"
        ) from error
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{path}: expected text in UTF-8: {error.reason}") from error


def _change(path: Path, edit: Callable[[str], str], must_exist: bool) -> None:
    """Replace the text of the file by `edit(text)` in one step, so that the server never reads half a file.

    A symbolic link is followed. An existing file keeps its mode and its owner, so that the server can still read it. A
    new file can be read by its owner only.
    """
    path = path.resolve()
    with _locked_folder(path) as folder:
        old = path.stat() if path.exists() else None
        new_text = edit(_text(path) if old or must_exist else "")
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                os.fchmod(descriptor, old.st_mode & 0o777 if old else _FILE_MODE)
                if old and (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(descriptor, old.st_uid, old.st_gid)
                file.write(new_text)
                file.flush()
                os.fsync(descriptor)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
        os.fsync(folder)


@contextmanager
def _locked_folder(path: Path) -> Iterator[int]:
    """Lock the folder of `path`, so that commands that run at the same time do not undo each other's changes.

    The block gets the descriptor of the folder.
    """
    try:
        descriptor = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise KeyFileError(f"cannot open the folder {path.parent} ({error.strerror}): create it first") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
