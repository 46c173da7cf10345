"""Ed25519 keys with which artifacts are signed and verified. This module imports no torch.

A public key is one line in OpenSSH's format, `ssh-ed25519 <base64> <comment>`, so that `ssh-keygen -l` shows its
fingerprint. A private key is a file that `elbo keygen`, `ssh-keygen -t ed25519` or `openssl genpkey -algorithm ed25519`
has written. No message contains a part of a key file, because the file may be a private key by mistake.
"""

import base64
import hashlib
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import KeyInvalid, printable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_TYPE = "ssh-ed25519"
MAX_FILE_BYTES = 1 << 20
MAX_COMMENT = 100  # characters
EXPECTED = f"expected lines such as '{KEY_TYPE} AAAAC3... comment', as in the .pub file of elbo keygen"


@dataclass(frozen=True)
class PublicKey:
    """A key that verifies signatures.

    Args:
        raw: the 32 bytes of the key.
        comment: what a person calls the key. Keys with equal bytes are equal, whatever their comments.
    """

    raw: bytes
    comment: str = field(default="", compare=False)

    def __str__(self) -> str:
        """Return the comment and the fingerprint."""
        return f"{self.comment} ({self.fingerprint})" if self.comment else self.fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint that `ssh-keygen -l` shows: SHA256: and 43 characters."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self._blob).digest()).decode().rstrip("=")

    @property
    def line(self) -> str:
        """The key as one line for a file of trusted keys."""
        return f"{KEY_TYPE} {base64.b64encode(self._blob).decode()} {self.comment}".rstrip()

    @property
    def _blob(self) -> bytes:
        """The key in the wire format of SSH (RFC 8709): the length of each part precedes the part."""
        return b"".join(len(part).to_bytes(4, "big") + part for part in (KEY_TYPE.encode(), self.raw))

    def verifies(self, signature: bytes, text: bytes) -> bool:
        """Return whether the owner of this key has made `signature` for `text`."""
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.verify(signature, text)
        except InvalidSignature:
            return False
        return True

    @cached_property
    def _key(self) -> "Ed25519PublicKey":
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        return Ed25519PublicKey.from_public_bytes(self.raw)


@dataclass(frozen=True)
class PrivateKey:
    """A key that signs. Its text form is that of its public key, so that no message shows the private one."""

    public: PublicKey
    _key: "Ed25519PrivateKey"

    def __repr__(self) -> str:
        """Return a text without the private key."""
        return f"PrivateKey({self.public})"

    def sign(self, text: bytes) -> bytes:
        """Return the signature for `text`, 64 bytes."""
        return self._key.sign(text)


def parse_public_keys(lines: Iterable[str], source: str) -> tuple[PublicKey, ...]:
    """Return the public keys in `lines`, without duplicates. Empty lines and lines that begin with # are skipped.

    Args:
        lines: one key per line.
        source: where the lines come from, for messages.

    Raises:
        KeyInvalid: a line is no ed25519 public key, or there is no key.
    """
    keys: dict[bytes, PublicKey] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        words = text.split(maxsplit=2)
        if len(words) < 2 or words[0] != KEY_TYPE:
            raise KeyInvalid(f"{source}: line {number} is not an ed25519 public key: {EXPECTED}")
        comment = printable(words[2])[:MAX_COMMENT] if len(words) == 3 else ""
        try:
            key = PublicKey(base64.b64decode(words[1], validate=True)[-32:], comment)
        except ValueError:
            key = None
        if key is None or key.line.split()[1] != words[1]:
            raise KeyInvalid(f"{source}: the key in line {number} is damaged: copy the line of the .pub file again")
        keys.setdefault(key.raw, key)
    if not keys:
        raise KeyInvalid(f"{source} has no key: {EXPECTED}; to load unsigned artifacts, unset ELBO_TRUSTED_KEYS")
    return tuple(keys.values())


def read_private_key(path: Path) -> PrivateKey:
    """Read the private key in the file at `path`.

    Raises:
        KeyInvalid: the file cannot be read, is no ed25519 private key, or is protected by a passphrase.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    content = read_small_file(path)
    is_openssh = content.lstrip().startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    key = None
    with suppress(ValueError, UnsupportedAlgorithm):
        try:
            key = (load_ssh_private_key if is_openssh else load_pem_private_key)(content, password=None)
        except TypeError:
            raise KeyInvalid(
                f"{path} is protected by a passphrase, for which elbo cannot ask: remove it from a copy of the key "
                "(ssh-keygen -p), or create a key with elbo keygen"
            ) from None
    if not isinstance(key, Ed25519PrivateKey):
        kind = "an ed25519 public key" if content.startswith(KEY_TYPE.encode()) else "something else"
        raise KeyInvalid(f"{path}: expected an ed25519 private key, got {kind}; create one with elbo keygen")
    return PrivateKey(PublicKey(key.public_key().public_bytes_raw(), path.stem), key)


def create_key(path: Path, comment: str) -> PublicKey:
    """Create a key. Write the private key to a new file `path` with mode 0600, and the public key to `path`.pub.

    Raises:
        KeyInvalid: one of the files exists, or cannot be written. No file is overwritten.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    public = PublicKey(key.public_key().public_bytes_raw(), comment)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    _create(path, 0o600, private)
    try:
        _create(path.with_name(f"{path.name}.pub"), 0o644, f"{public.line}\n".encode())
    except KeyInvalid:
        path.unlink()
        raise
    return public


def read_small_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a regular file of at most `limit` bytes. A pipe or a device is refused without waiting.

    Raises:
        KeyInvalid: the file is missing, larger or not regular, or this user may not read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise KeyInvalid(f"{path} is not a regular file")
            content = file.read(limit + 1)
    except OSError as error:
        raise KeyInvalid(f"cannot read {path}: {error.strerror}") from error
    if len(content) > limit:
        raise KeyInvalid(f"{path} is larger than {limit:,} bytes: it is no key file")
    return content


def _create(path: Path, mode: int, content: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except FileExistsError as error:
        raise KeyInvalid(f"{path} exists, and a key is never overwritten: choose another file") from error
    except OSError as error:
        raise KeyInvalid(f"cannot write {path}: {error.strerror}") from error
