"""The manifest of an artifact, and where artifacts lie on disk. Needs no torch.

An artifact is a zip file. Its manifest is the member `<archive>/extra/manifest.json`; its comment is the seal,
`elbo-sha256:` and the SHA-256 of every byte before those 64 digits. `zipfile` and `hashlib` alone can read both.
"""

import hashlib
import io
import json
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from models.errors import ArtifactCorrupt, ArtifactForeign, ArtifactMissing, ArtifactTooNew, first_fault

FORMAT_VERSION = 2
FILE_NAME = "model.pt"
MEMBER = "extra/manifest.json"
SEAL = b"elbo-sha256:"
DIGEST_LENGTH = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)  # a folder, a query value and a metric label
UNREADABLE = (  # what zipfile and json raise on damaged bytes
    zipfile.BadZipFile, zlib.error, struct.error, StopIteration, EOFError, OSError, KeyError, RuntimeError, ValueError,
)  # fmt: skip
VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Feature(_Frozen):
    """One column of the training data, in raw units: what is usual for it."""

    name: str
    unit: str | None
    median: float
    minimum: float
    maximum: float
    missing: int = 0  # training rows that had no value there


class Data(_Frozen):
    """Where the model's knowledge comes from: the source, its SHA-256, and how many rows went where."""

    source: str
    rows: int
    fingerprint: str
    fit: int
    held_out: int
    calibration: int


class CalibrationSize(_Frozen):
    """Rows behind the conformal p-values, and the smallest p-value that they can give: 1 / (rows + 1)."""

    rows: int
    floor: float


class Recalibration(_Frozen):
    """Where a calibration comes from that is newer than the networks: which version it was put in, from which rows."""

    parent: str  # name@version, whose networks and weights these are
    parent_weights_sha256: str
    trained: str  # when the networks were
    source: str
    rows: int  # in the source; how many of them calibrate says `calibration`
    fingerprint: str


class Latent(_Frozen):
    """What one latent carries, measured on held-out rows."""

    kl: float | None  # nats, mean over the rows; None where the model charges none (PCA, autoencoder)
    variance: float  # of the posterior mean, or of the code
    active: bool


class Golden(_Frozen):
    """Inputs and the answers that the model gave to them when it was published; every load repeats them."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]


class Manifest(_Frozen):
    """Everything about an artifact but its numbers."""

    format_version: int
    name: str
    kind: str
    created: str
    shape: list[int]
    features: list[Feature]
    latents: int
    parts: list[str]
    pixel_range: tuple[float, float] | None
    training: dict[str, Any]
    data: Data
    metrics: dict[str, float]
    calibration: CalibrationSize
    golden: Golden
    versions: dict[str, str]
    weights_sha256: str
    history: list[dict[str, float]] = []  # by epoch: epoch, step, every term of the loss, held_out_loss, seconds
    latent_report: list[Latent] = []  # one a latent
    spectrum: list[float] = []  # eigenvalues of the fitted rows in model units, descending, at most 256
    total_variance: float = 0.0  # the sum of all eigenvalues, of which `spectrum` may hold the first only
    log_scale: float = 0.0  # nats: log density in raw units = that in model units - log_scale
    comparison: dict[str, dict[str, float]] = {}  # by kind: what other models reach on the same held-out rows
    recalibration: Recalibration | None = None  # None where the rows of `data` calibrate it too

    @property
    def width(self) -> int:
        """D: the number of features of one row."""
        return len(self.features)

    @property
    def is_image(self) -> bool:
        """Whether a row can be shown as a picture."""
        return self.pixel_range is not None


def read_manifest(path: Path) -> Manifest:
    """The manifest of the artifact at `path`, checked against the seal and the format version.

    Raises ArtifactMissing, ArtifactForeign, ArtifactCorrupt or ArtifactTooNew.
    """
    return parse(read_sealed(path), path)


def parse(content: bytes, path: Path) -> Manifest:
    """The manifest in the bytes of an artifact, which `read_sealed` gave for `path`."""
    fields = _fields(content)
    if fields is None:
        raise ArtifactForeign(f"{path} holds no {MEMBER}: it was not written by Elbo")
    _refuse_newer(fields, path)
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        fault = first_fault(error)
        field = ".".join(fault.path)
        raise ArtifactCorrupt(f"{path}: manifest field {field}: {fault.message}; publish the model again") from error


def _fields(content: bytes) -> dict[str, Any] | None:
    """The manifest as it stands in the archive; None if there is none, or no archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            member = next(name for name in archive.namelist() if name.partition("/")[2] == MEMBER)
            fields = json.loads(archive.read(member))
    except UNREADABLE:
        return None
    return fields if isinstance(fields, dict) else None


def _refuse_newer(fields: dict[str, Any], path: Path) -> None:
    version = fields.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ArtifactTooNew(
            f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}: "
            "upgrade Elbo, or train the model again with this version"
        )


def read_sealed(path: Path) -> bytes:
    """The bytes of the artifact at `path`, every one of which is as it was when it was written.

    Raises ArtifactMissing, ArtifactForeign or ArtifactCorrupt.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactMissing(f"cannot read {path}: {error.strerror}; `elbo train` writes artifacts") from error
    body, digest = content[:-DIGEST_LENGTH], content[-DIGEST_LENGTH:]
    if body.endswith(SEAL) and hashlib.sha256(body).hexdigest().encode() == digest:
        return content
    if fields := _fields(content):
        _refuse_newer(fields, path)  # a later format may be sealed in another way
    if SEAL not in content and zipfile.is_zipfile(io.BytesIO(content)):
        raise ArtifactForeign(f"{path} is a zip file without Elbo's seal: expected one that `elbo train` wrote")
    if not content.startswith(b"PK"):
        raise ArtifactForeign(f"{path} is no zip file: expected an artifact that `elbo train` wrote")
    raise ArtifactCorrupt(f"{path} is not as it was written (truncated or altered): copy it again, or train it again")


def seal(content: bytes) -> bytes:
    """`content`, a zip archive that ends in the comment SEAL and 64 placeholders, with its digest filled in."""
    body = content[:-DIGEST_LENGTH]
    return body + hashlib.sha256(body).hexdigest().encode()


def names(root: Path) -> list[str]:
    """The models under `root` which have at least one version, sorted."""
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in root.iterdir() if versions(root, entry.name))


def versions(root: Path, name: str) -> list[int]:
    """The published versions of `name`, ascending."""
    folder = root / name
    if not NAME.fullmatch(name) or not folder.is_dir():
        return []
    found = (entry for entry in folder.iterdir() if VERSION.fullmatch(entry.name))
    return sorted(int(entry.name) for entry in found if (entry / FILE_NAME).is_file())


def resolve(root: Path, reference: str) -> Path:
    """The file that `name` (its newest version) or `name@version` means. Raises ArtifactMissing."""
    name, at, version = reference.partition("@")
    present = versions(root, name)
    if not present:
        known = ", ".join(names(root)) or "none"
        raise ArtifactMissing(f"no model {name!r} in {root} (there: {known}); train it with `elbo train`")
    if at and version not in map(str, present):
        raise ArtifactMissing(f"model {name!r} has no version {version!r} (there: {present})")
    return root / name / (version or str(present[-1])) / FILE_NAME
