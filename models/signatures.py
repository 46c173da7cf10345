"""Detached signatures of artifacts. This module imports no torch.

The file `model.pt.sig` beside an artifact is a DSSE envelope (https://github.com/secure-systems-lab/dsse): a text, and
signatures of this text. The text is JSON with the name and the version of the model and the SHA-256 of `model.pt`. That
file contains everything that Elbo reads of a version: module, weights, manifest, ONNX twin and exhibits. A signature is
therefore invalid for other content, for another name and for another version.

The verifier computes the expected text from the name and the version under which the artifact is to be loaded, and from
the bytes that are then loaded. The signed text must equal the expected text, byte for byte. If the texts differ and a
trusted key has signed, the verifier parses the signed text, to report the difference.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from models.errors import ArtifactUntrusted, KeyInvalid, join_names, printable
from models.inspection import inspect_artifact
from models.keys import KEY_TYPE, PrivateKey, PublicKey, parse_public_keys, read_small_file
from models.manifest import FILE_NAME, NAME, VERSION, parse, read_sealed
from models.staging import staging_folder
from models.versions import unwritable_as_artifact_error

SIGNATURE_NAME = f"{FILE_NAME}.sig"
PAYLOAD_TYPE = "application/vnd.elbo.version+json"
MAX_SIGNATURE_BYTES = 64 * 1024
MAX_SIGNATURES = 16


class _Signature(BaseModel):
    keyid: str  # the fingerprint of the key
    sig: str  # base64


class _Envelope(BaseModel):
    payload: str  # base64
    payloadType: str
    signatures: list[_Signature]


@dataclass(frozen=True)
class TrustedKeys:
    """The trusted keys. At least one of them must have signed an artifact.

    Args:
        keys: the keys.
        source: where they come from, for messages.
    """

    keys: tuple[PublicKey, ...]
    source: str = "ELBO_TRUSTED_KEYS"

    def verify(self, content: bytes, path: Path, name: str, version: int) -> PublicKey:
        """Return the trusted key that has signed `content` as `version` of model `name`.

        Args:
            content: the bytes of the artifact at `path`. They must be the bytes that are loaded.
            path: the artifact. Its signature file is beside it.
            name: name of the model.
            version: version of the model.

        Raises:
            ArtifactUntrusted: the artifact is unsigned, or no signature of a trusted key fits.
        """
        reference = f"{name}@{version}"
        file = path.with_name(SIGNATURE_NAME)
        if not os.path.lexists(file):
            raise ArtifactUntrusted(
                f"{path} is not signed, and ELBO_TRUSTED_KEYS is set: check where it comes from, then sign it with "
                f"elbo sign {reference} --key FILE"
            )
        envelope = _read_envelope(file)
        by_fingerprint = {key.fingerprint: key for key in self.keys}
        trusted = [(by_fingerprint[each.keyid], each) for each in envelope.signatures if each.keyid in by_fingerprint]
        if not trusted:
            signers = join_names([printable(each.keyid)[:60] for each in envelope.signatures]) or "no key"
            known = join_names([str(key) for key in self.keys])
            raise ArtifactUntrusted(
                f"{path} is signed by {signers}, and {self.source} trusts {known}: "
                f"check where it comes from, then sign it with a trusted key: elbo sign {reference} --key FILE"
            )
        expected, signed = signed_text(content, name, version), _decode(envelope.payload)
        for key, signature in trusted:
            if key.verifies(_decode(signature.sig), _encoded(signed)):
                if signed == expected:
                    return key
                raise ArtifactUntrusted(f"{path}: {_difference(signed, expected)}; it was signed by {key}")
        raise ArtifactUntrusted(
            f"{file}: the signature of {trusted[0][0]} is not valid, because the file was altered: check where it "
            f"comes from, then sign the version again with elbo sign {reference} --key FILE"
        )


class TrustedKeySource:
    """Reads the trusted keys, and reads them again when their file changes.

    Args:
        setting: the path of a file with one public key per line; or, if it begins with a key type or #, the keys
            themselves, separated by commas or line breaks.
    """

    def __init__(self, setting: str) -> None:
        self._inline = setting if setting.lstrip().startswith((KEY_TYPE, "#")) else None
        self._path = Path(setting)
        self._state: tuple[int, ...] | None = None
        self.keys = self._read()

    def refresh(self) -> None:
        """Read the file again if it has changed. If it cannot be read or has no key, `keys` stay as they are.

        Raises:
            KeyInvalid: the file cannot be read, has no key, or has a line that is no key.
        """
        if self._inline is None and (self._state is None or self._state != _file_state(self._path)):
            self.keys = self._read()

    def _read(self) -> TrustedKeys:
        if self._inline is not None:
            source = "ELBO_TRUSTED_KEYS"
            return TrustedKeys(parse_public_keys(self._inline.replace(",", "\n").splitlines(), source), source)
        self._state = None  # if reading fails, `refresh` tries again
        state = _file_state(self._path)
        content = read_small_file(self._path).decode(errors="replace")
        source = str(self._path)
        keys = TrustedKeys(parse_public_keys(content.splitlines(), source), source)
        self._state = state
        return keys


def trusted_keys(setting: str | None) -> TrustedKeys | None:
    """Return the keys in `setting`, a value of ELBO_TRUSTED_KEYS; None if it is empty. Raises KeyInvalid."""
    return TrustedKeySource(setting).keys if setting else None


def signed_text(content: bytes, name: str, version: int) -> bytes:
    """Return the text that a signature of `content` as `version` of model `name` covers."""
    files = {FILE_NAME: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    return json.dumps({"files": files, "name": name, "version": version}, sort_keys=True).encode()


def sign(path: Path, key: PrivateKey) -> str:
    """Sign the artifact at `path`. Return its SHA-256.

    Signatures by other keys are kept if they are for the same content, name and version.

    Raises:
        ArtifactError: the artifact is damaged or unsafe, is not in a folder <name>/<version>, or has MAX_SIGNATURES
            signatures already; or its folder is not writable.
    """
    content = read_sealed(path)
    parse(content, path)
    inspect_artifact(content, path)
    name, version = identify(path)
    file = path.with_name(SIGNATURE_NAME)
    text = signed_text(content, name, version)
    others = [each for each in _present_signatures(file, text) if each.keyid != key.public.fingerprint]
    if len(others) >= MAX_SIGNATURES:
        raise ArtifactUntrusted(f"{file} has {len(others)} signatures already: delete the file, and sign again")
    with unwritable_as_artifact_error(path.parent), staging_folder(path.parents[1]) as staging:
        written = staging / SIGNATURE_NAME
        write_signature(written, text, key, others)
        written.replace(file)
    return hashlib.sha256(content).hexdigest()


def signer(content: bytes, name: str, key: PrivateKey | None) -> Callable[[Path, int], None]:
    """Return a function that signs `content`, given the staging folder and the version. Without `key`, do nothing."""

    def write(staging: Path, version: int) -> None:
        if key is not None:
            write_signature(staging / SIGNATURE_NAME, signed_text(content, name, version), key)

    return write


def write_signature(file: Path, text: bytes, key: PrivateKey, others: Sequence[_Signature] = ()) -> None:
    """Write a signature of `text` by `key` to `file`, after the signatures `others`."""
    own = _Signature(keyid=key.public.fingerprint, sig=base64.b64encode(key.sign(_encoded(text))).decode())
    payload = base64.b64encode(text).decode()
    envelope = _Envelope(payload=payload, payloadType=PAYLOAD_TYPE, signatures=[*others, own])
    with file.open("wb") as opened:
        opened.write(envelope.model_dump_json(indent=1).encode() + b"\n")
        opened.flush()
        os.fsync(opened.fileno())


def identify(path: Path) -> tuple[str, int]:
    """Return the name and the version under which the artifact at `path` is loaded: those of its folders.

    Raises:
        ArtifactUntrusted: the folders have no such names.
    """
    for place in (path.absolute(), path.resolve()):  # vae/latest/model.pt has a version only once resolved
        name, version = place.parent.parent.name, place.parent.name
        if NAME.fullmatch(name) and VERSION.fullmatch(version):
            return name, int(version)
    raise ArtifactUntrusted(
        f"{path} has no name and version that a signature can be for: expected a path such as vae/3/{FILE_NAME}"
    )


def is_signed(path: Path) -> bool:
    """Return whether the artifact at `path` has a signature file, which may be invalid."""
    return path.with_name(SIGNATURE_NAME).exists()


def _file_state(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError as error:
        raise KeyInvalid(f"cannot read {path}: {error.strerror}") from error
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _present_signatures(file: Path, text: bytes) -> list[_Signature]:
    """Return the signatures in `file` that are for `text`; none if the file is missing or damaged."""
    try:
        envelope = _read_envelope(file)
        return envelope.signatures if _decode(envelope.payload) == text else []
    except ArtifactUntrusted:
        return []


def _read_envelope(file: Path) -> _Envelope:
    try:
        content = read_small_file(file, MAX_SIGNATURE_BYTES)
        envelope = _Envelope.model_validate_json(content)
        if envelope.payloadType != PAYLOAD_TYPE:
            raise ArtifactUntrusted(
                f"{file} is a signature of type {printable(envelope.payloadType)[:60]!r}, expected {PAYLOAD_TYPE!r}"
            )
        for each in (envelope.payload, *(signature.sig for signature in envelope.signatures)):
            _decode(each)
    except KeyInvalid as error:
        raise ArtifactUntrusted(str(error)) from error
    except (ValidationError, ValueError) as error:
        raise ArtifactUntrusted(f"{file} is damaged, or is no signature of Elbo: sign the version again") from error
    if len(envelope.signatures) > MAX_SIGNATURES:
        raise ArtifactUntrusted(
            f"{file} has {len(envelope.signatures)} signatures, expected at most {MAX_SIGNATURES}: "
            "sign the version again"
        )
    return envelope


def _decode(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _encoded(text: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's pre-authentication encoding of PAYLOAD_TYPE and `text`."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(text), text)


def _difference(signed: bytes, expected: bytes) -> str:
    """Return how `signed`, a text that a trusted key has signed, differs from the `expected` text."""
    new = json.loads(expected)
    try:
        old = json.loads(signed)
    except ValueError:
        old = None
    if not isinstance(old, dict) or old.keys() != new.keys():
        return "the signature is of another release of Elbo: sign the version again"
    if (old["name"], old["version"]) != (new["name"], new["version"]):
        return f"the signature is for {old['name']}@{old['version']}, not for {new['name']}@{new['version']}"
    return "the file was altered after it was signed"
