"""Access control: find the API key of a request, and check what it may do.

The time that the check of a wrong key takes says nothing about the valid keys. The server computes the SHA-256 hash of
the given value, and looks this hash up in a dictionary. A value that begins like a valid key has an unrelated hash. The
dictionary compares the bytes of two SHA-256 hashes only if Python's own 64-bit hashes of these bytes are equal. To
choose a value for which they are equal, a client must know the SHA-256 hash of a valid key.
`benchmarks/serving/key_timing.py` measures the times.
"""

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from service.access import key_file
from service.access.key_file import ApiKey, KeyFileError, Keys
from service.access.limits import Headers, KeyLimits
from service.access.scopes import ANY_KEY, OPEN, Required, Scope
from service.errors import BadRequest, Forbidden, Unauthorized
from service.shared_memory import SharedCounters

log = logging.getLogger("elbo.access_control")
MAX_VALUE_BYTES = 256  # only so many bytes of a value are hashed; no valid key is longer
NAMES_OF_HEADERS = (b"authorization", b"x-api-key")
_BEARER = b"bearer "
_NO_VALUE = bytes(48)  # hashed in place of a missing key, so that both checks take equally long
_ABSENT = (
    "the request has no API key",
    "send the header Authorization: Bearer KEY, or X-API-Key: KEY",
    'Bearer realm="elbo"',
)
_INVALID = (
    "the API key is not valid",
    "check that it is complete, or ask whoever runs the server for a new one",
    'Bearer realm="elbo", error="invalid_token"',
)
_Stamp = tuple[int, int, int] | str  # the file's inode, time and size, or why they cannot be read


class GrantedKey:
    """A key in use: its name, its scopes and its limits.

    Args:
        name: the name of the key.
        key: what the file says about it.
        limits: None if it has no limits.

    Attributes:
        definition: what the file says about the key.
        hash: the SHA-256 hash of its value.
        is_revoked: whether the file no longer has this key, with this value and these scopes.
    """

    __slots__ = ("definition", "hash", "is_revoked", "limits", "name", "scopes")

    def __init__(self, name: str, key: ApiKey, limits: KeyLimits | None) -> None:
        self.name = name
        self.definition = key
        self.hash = bytes.fromhex(key.sha256)
        self.scopes = ANY_KEY if Scope.ADMIN in key.scopes else key.scopes
        self.limits = limits
        self.is_revoked = False

    def require(self, scope: Required) -> None:
        """Raise Forbidden if the key does not have `scope`."""
        if scope in self.scopes or scope is ANY_KEY or scope is OPEN:
            return
        raise Forbidden(
            f"the API key {self.name} does not have the scope {scope}",
            expected=f"a key with the scope {scope}",
            got=f"the scopes {', '.join(sorted(self.scopes))}",
            headers={"WWW-Authenticate": f'Bearer realm="elbo", error="insufficient_scope", scope="{scope}"'},
        )

    def enter(self) -> None:
        """Count a request of this key. Raises RateLimited if the key has reached a limit."""
        if self.limits:
            self.limits.enter()

    def undo_enter(self) -> None:
        """Forget a request that `enter` has counted, because it is handled again from the beginning."""
        if self.limits:
            self.limits.undo_enter()

    def exit(self, rows: int) -> None:
        """Count the end of a request that `enter` has counted, and those `rows` of it that are not counted yet."""
        if self.limits:
            self.limits.exit()
            self.limits.count_rows(rows)

    def count_rows(self, rows: int) -> None:
        """Count rows of a stream."""
        if self.limits:
            self.limits.count_rows(rows)

    def must_wait(self) -> bool:
        """Return whether a stream must wait before its next rows. Raises Unauthorized if the key is revoked."""
        if self.is_revoked:
            raise _unauthorized(is_absent=False)
        return self.limits is not None and not self.limits.may_send_rows()

    def headers(self) -> Headers:
        """Return the headers that describe the limits of this key, and what is left of them."""
        return self.limits.headers() if self.limits else ()


class AccessControl:
    """The API keys of one process.

    Args:
        path: the file of keys (ELBO_API_KEYS_FILE).
        counters: the counters of all processes.

    Raises:
        KeyFileError: the file is not valid.
    """

    def __init__(self, path: Path, counters: SharedCounters) -> None:
        self._path = path
        self._counters = counters
        self._by_hash: dict[bytes, GrantedKey] = {}
        self._limits: list[KeyLimits] = []
        self._stamp = _stamp(path)
        self._use(key_file.read(path))
        if not self._by_hash:
            log.warning(
                "%s has no API keys, so every request that needs a key is refused: add one with elbo key add", path
            )

    def find(self, headers: Mapping[bytes, bytes]) -> GrantedKey:
        """Return the key of a request.

        Args:
            headers: the headers of the request by lower-case name.

        Raises:
            BadRequest: the request has two different keys (RFC 6750, section 3.1).
            Unauthorized: the request has no valid key.
        """
        value = headers.get(b"authorization", b"")
        value = value[len(_BEARER) :].strip() if value[: len(_BEARER)].lower() == _BEARER else b""
        if b"x-api-key" in headers:
            other = headers[b"x-api-key"].strip()
            if value and other and value != other:
                raise BadRequest(
                    "the headers Authorization and X-API-Key of the request have different API keys",
                    expected="one API key",
                    got="two",
                    hint="send the key in one header",
                    headers={"WWW-Authenticate": 'Bearer realm="elbo", error="invalid_request"'},
                )
            value = value or other
        key = self._by_hash.get(hashlib.sha256(value[:MAX_VALUE_BYTES] or _NO_VALUE).digest())
        if key is None:
            raise _unauthorized(is_absent=not value)
        return key

    def current(self, key: GrantedKey) -> GrantedKey | None:
        """Return the key that now has the value of `key`: `key`, unless the file has changed; None if there is none."""
        return self._by_hash.get(key.hash)

    async def reload(self, always: bool = False) -> None:
        """Read the file again if it has changed or `always` is set. Keep the keys and log an error if it is invalid."""
        try:
            keys = await asyncio.to_thread(self._read_if_changed, always)
        except KeyFileError as error:
            log.error("the API keys stay as they are: %s", error)
            return
        if keys is not None:
            self._use(keys)
            log.info("read the API keys again", extra={"fields": {"file": str(self._path), "keys": len(keys)}})

    async def refresh_limits(self) -> None:
        """Update the limits with the requests and rows that all processes have counted."""
        if self._counters.has_other_processes:
            for limits in self._limits:
                limits.refresh()

    def _read_if_changed(self, always: bool) -> Keys | None:
        stamp = _stamp(self._path)
        if stamp == self._stamp and not always:
            return None
        self._stamp = stamp
        return key_file.read(self._path)

    def _use(self, keys: Keys) -> None:
        """Replace the keys in one step. A key whose limits have not changed keeps its buckets as they are."""
        before = {key.name: key for key in self._by_hash.values()}
        granted = [GrantedKey(name, key, self._limits_of(name, key, before.get(name))) for name, key in keys.items()]
        self._limits = [key.limits for key in granted if key.limits]
        self._by_hash = {key.hash: key for key in granted}
        for key in before.values():
            now = keys.get(key.name)
            key.is_revoked = not now or (now.sha256, now.scopes) != (key.definition.sha256, key.definition.scopes)

    def _limits_of(self, name: str, key: ApiKey, before: GrantedKey | None) -> KeyLimits | None:
        if not key.limits:
            return None
        if before and before.definition.limits == key.limits:
            return before.limits
        return KeyLimits(name, key, self._counters)


def _stamp(path: Path) -> _Stamp:
    """Return a value that changes when the file changes, also if another file takes its place."""
    try:
        found = path.stat()
    except OSError as error:
        return error.strerror or "unreadable"
    return found.st_ino, found.st_mtime_ns, found.st_size


def _unauthorized(is_absent: bool) -> Unauthorized:
    detail, hint, challenge = _ABSENT if is_absent else _INVALID
    return Unauthorized(detail, expected="a valid API key", hint=hint, headers={"WWW-Authenticate": challenge})
