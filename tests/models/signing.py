"""Keys for tests of signatures, and changes of signed artifacts that a verifier must notice."""

import base64
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.keys import PrivateKey, create_key, read_private_key
from models.manifest import DIGEST_LENGTH, seal
from models.signatures import SIGNATURE_NAME, sign


def new_key(folder: Path, name: str = "release") -> PrivateKey:
    """Create the key `name` in `folder`; return the private key. The public key is in `folder`/`name`.pub."""
    folder.mkdir(parents=True, exist_ok=True)
    create_key(folder / name, name)
    return read_private_key(folder / name)


def signature_of(path: Path) -> Path:
    """Return the signature file of the artifact at `path`."""
    return path.with_name(SIGNATURE_NAME)


def edit_envelope(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON of the signature file of the artifact at `path`."""
    file = signature_of(path)
    envelope = json.loads(file.read_bytes())
    change(envelope)
    file.write_text(json.dumps(envelope))


def copy_version(path: Path, name: str, version: int) -> Path:
    """Copy the artifact at `path`, with its signature, to another name and version; return the path of the copy."""
    folder = path.parents[2] / name / str(version)
    shutil.copytree(path.parent, folder)
    return folder / path.name


def alter(path: Path, member: str) -> None:
    """Change one byte in a part of the artifact at `path`, and seal the artifact again, as an attacker can.

    Args:
        path: the artifact.
        member: the last part of the name of the archive member in which a byte is changed.
    """
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(member))
        with archive.open(info) as opened:
            assert opened.read(1)
    name, extra = (
        int.from_bytes(content[info.header_offset + at : info.header_offset + at + 2], "little") for at in (26, 28)
    )
    content[info.header_offset + 30 + name + extra + info.compress_size // 2] ^= 1
    path.write_bytes(seal(bytes(content[:-DIGEST_LENGTH]) + b"0" * DIGEST_LENGTH))


def _flip(text: str) -> str:
    raw = bytearray(base64.b64decode(text))
    raw[5] ^= 1
    return base64.b64encode(raw).decode()


def _remove(path: Path) -> None:
    signature_of(path).unlink()


def _truncate(path: Path) -> None:
    file = signature_of(path)
    file.write_bytes(file.read_bytes()[:-20])


def _empty(path: Path) -> None:
    signature_of(path).write_bytes(b"")


def _garbage(path: Path) -> None:
    signature_of(path).write_bytes(bytes(range(256)) * 4)


def _nested(path: Path) -> None:
    signature_of(path).write_bytes(b"[" * 60_000)


def _huge(path: Path) -> None:
    signature_of(path).write_bytes(b" " * 1_000_000)


def _is_folder(path: Path) -> None:
    signature_of(path).unlink()
    signature_of(path).mkdir()


def _is_dangling_link(path: Path) -> None:
    signature_of(path).unlink()
    signature_of(path).symlink_to("nowhere")


def _no_signatures(path: Path) -> None:
    edit_envelope(path, lambda envelope: envelope.update(signatures=[]))


def _flipped_signature(path: Path) -> None:
    edit_envelope(path, lambda envelope: envelope["signatures"][0].update(sig=_flip(envelope["signatures"][0]["sig"])))


def _flipped_text(path: Path) -> None:
    edit_envelope(path, lambda envelope: envelope.update(payload=_flip(envelope["payload"])))


def _short_signature(path: Path) -> None:
    edit_envelope(path, lambda envelope: envelope["signatures"][0].update(sig="AAAA"))


def _other_type(path: Path) -> None:
    edit_envelope(path, lambda envelope: envelope.update(payloadType="application/json"))


def _forged_by_stranger(path: Path) -> None:
    """Sign with an unknown key, and claim that the signature is that of the trusted key."""
    fingerprint = json.loads(signature_of(path).read_bytes())["signatures"][0]["keyid"]
    signature_of(path).unlink()
    sign(path, new_key(path.parents[2] / "stranger"))
    edit_envelope(path, lambda envelope: envelope["signatures"][0].update(keyid=fingerprint))


def _signed_by_stranger(path: Path) -> None:
    signature_of(path).unlink()
    sign(path, new_key(path.parents[2] / "stranger"))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {  # the change of a signed artifact, and a part of the reason
    "unsigned": (_remove, "is not signed"),
    "truncated": (_truncate, "is damaged"),
    "empty": (_empty, "is damaged"),
    "garbage": (_garbage, "is damaged"),
    "nested brackets": (_nested, "is damaged"),
    "huge": (_huge, "is larger than"),
    "folder": (_is_folder, "Is a directory"),
    "dangling link": (_is_dangling_link, "cannot read"),
    "no signatures": (_no_signatures, "is signed by no key"),
    "flipped bit in the signature": (_flipped_signature, "is not valid"),
    "flipped bit in the text": (_flipped_text, "is not valid"),
    "short signature": (_short_signature, "is not valid"),
    "other payload type": (_other_type, "type 'application/json'"),
    "unknown key": (_signed_by_stranger, "is signed by SHA256:"),
    "unknown key with the name of a trusted one": (_forged_by_stranger, "is not valid"),
}
