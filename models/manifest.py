"""The manifest of an artifact, and the layout of the artifact folder. This module does not import torch.

An artifact is a zip file. The manifest is the member `<archive>/extra/manifest.json`. The zip comment is the seal:
`elbo-sha256:` and 64 hexadecimal digits. The digits are the SHA-256 of all bytes before them. Python's `zipfile` and
`hashlib` are enough to read the manifest and to verify the seal.
"""

import hashlib
import io
import json
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from models.archive_check import MAX_FILE_BYTES, MAX_MANIFEST_BYTES, MAX_MANIFEST_VALUES, open_archive
from models.errors import (
    ArtifactCorrupt,
    ArtifactForeign,
    ArtifactMissing,
    ArtifactNameInvalid,
    ArtifactTooNew,
    ArtifactUnreadable,
    ArtifactUnsafe,
    first_fault,
    printable,
)
from models.policy_rules import AppliedPolicy

if TYPE_CHECKING:
    from models.categories import CategoryColumns

FORMAT_VERSION = 2
FILE_NAME = "model.pt"
MEMBER = "extra/manifest.json"
SEAL = b"elbo-sha256:"
DIGEST_LENGTH = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)  # valid as a folder, a query value and a metric label
UNREADABLE = (  # the exceptions that zipfile and json raise on damaged bytes
    zipfile.BadZipFile, zlib.error, struct.error, StopIteration, EOFError, OSError, KeyError, RuntimeError, ValueError,
)  # fmt: skip
SERIES_CORRELATION = 0.5  # from this rank correlation between neighbouring rows on, the rows are a series
WIDE_SPAN = 8.0  # pixels are too dark only for models with at least this range, as 0 to 16 or 0 to 255
ZERO_SHARE = 0.005  # pixels up to this share of the value of white count as 0
DARK_SHARE = 128.0  # pixels are too dark if they lie in the lowest part, one in this many, of the range
SHARE_TOLERANCE = 1e-3
FLOOR_TOLERANCE = 1e-6  # without it, rounding could make an alpha of 0.005 smaller than a floor of 1 / 200
MAX_TEXT = 10_000  # characters of one text in a manifest
MIN_WINDOW_ROWS, MAX_WINDOW_ROWS = 2, 1_000
WARM_SHARE = 3  # a row is judged once a third of its window is there; a gap of more than a third ends the window
NEW_FIELDS = (
    "timeline",
    "window",
    "groups",
    "season",
    "policy",
    "incident_rows",
    "conditions",
    "adoption",
    "categories",
)  # fields that earlier releases do not know
MIN_INCIDENT_ROWS, MAX_INCIDENT_ROWS = 30, 1000  # see `service.anomaly.online_calibration`
MAX_BLOCKS = 1000  # blocks that a manifest lists
MAX_GROUPS = 100_000  # groups that a manifest names
MAX_GROUP_NAME = 256  # characters of the name of a group
MAX_LEVELS = 100  # levels of a column of conditions
MAX_LEVEL_NAME = 100  # characters of the name of a level
MAX_CONDITION_COLUMNS = 4
MAX_COMBINATIONS = 1_000  # combinations of levels
MAX_CATEGORIES = 512  # columns of text
MAX_CATEGORY_LEVELS = 50  # levels of a category, without OTHER_LEVEL
MAX_RARE_LEVELS = 1_000  # levels that count as OTHER_LEVEL
OTHER_LEVEL = "(other)"  # stands for the levels of a category that too few training rows have
VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)


def reaches(floor: float, alpha: float) -> bool:
    """Return whether `alpha` is at least `floor`, the smallest possible p-value, up to rounding."""
    return alpha >= floor * (1 - FLOOR_TOLERANCE)


def calibration_rows_needed(alpha: float) -> int:
    """Return the smallest number n of calibration rows with 1 / (n + 1) <= `alpha`, where `alpha` is above 0."""
    return math.ceil(1.0 / alpha - 1e-9) - 1


def is_level_name(name: str) -> bool:
    """Return whether a manifest may name a level `name`: it needs 1 to MAX_LEVEL_NAME printable characters."""
    return 0 < len(name) <= MAX_LEVEL_NAME and name.isprintable()


def is_group_name(name: str) -> bool:
    """Return whether a manifest may name a group `name`: it needs 1 to MAX_GROUP_NAME printable characters."""
    return 0 < len(name) <= MAX_GROUP_NAME and name.isprintable()


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_max_length=MAX_TEXT)


Count = Annotated[int, Field(ge=0, le=2**53)]
Length = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Feature(_Frozen):
    """One column of the training data, and its range in raw units."""

    name: str
    unit: str | None
    median: float
    minimum: float
    maximum: float
    missing: Count = 0  # number of training rows without a value for the feature
    mean: float | None = None  # None in artifacts of earlier releases
    values: Literal["whole", "boolean"] | None = None  # whether all training values were whole numbers, or 0 and 1


class Data(_Frozen):
    """The training data: source, SHA-256, and number of rows for each use."""

    source: str
    rows: Count
    fingerprint: str  # SHA-256
    fit: Count
    held_out: Count
    calibration: Count
    distinct: Count | None = None  # groups of equal or nearly equal rows; None in artifacts of earlier releases
    neighbour_correlation: float | None = None  # largest rank correlation between a row and a row near it


class CalibrationSize(_Frozen):
    """The number of calibration rows, and the smallest p-value that they can give: 1 / (rows + 1)."""

    rows: Count
    floor: float
    # cross: each calibration row was scored by a model that was fitted without this row. None: the published model
    # scored the calibration rows, which did not train it. Earlier releases do not know the two fields, so they are left
    # out if they are None.
    method: Literal["cross"] | None = None
    folds: Annotated[int, Field(ge=2, le=2**31 - 1)] | None = None  # number of models that scored calibration rows

    @model_serializer(mode="wrap")
    def _leave_out_absent_fields(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialise(self).items() if value is not None}

    def reaches(self, alpha: float) -> bool:
        """Return whether a p-value can be as small as `alpha`. If not, any threshold at `alpha` is an extrapolation."""
        return reaches(self.floor, alpha)


class Recalibration(_Frozen):
    """The origin of a calibration that is newer than the networks: the parent version, and the new calibration rows."""

    parent: str  # name@version of the artifact that the networks and weights were copied from
    parent_weights_sha256: str
    trained: str  # when the networks were trained
    source: str
    rows: Count  # rows in the source; the model was calibrated on `Manifest.calibration.rows` of them
    fingerprint: str  # SHA-256


class Latent(_Frozen):
    """How much the model uses one latent, measured on held-out rows."""

    kl: float | None  # mean KL divergence over the rows, in nats; None unless the model is a VAE
    variance: float  # variance of the posterior mean over the rows
    active: bool


class Period(_Frozen):
    """A period, both ends included, in ISO 8601 and UTC."""

    first: str
    last: str


class Block(_Frozen):
    """The periods of the fit, held-out and calibration rows in a block of the history; None if it has no such rows."""

    fit: Period | None
    held_out: Period | None
    calibration: Period | None


class Timeline(_Frozen):
    """The times of the training rows, and how they were split by time.

    Each period goes from the first to the last of its rows. If there are blocks, the three periods overlap.
    """

    time_column: str
    group_column: str | None  # the column that names the group of each row, such as its host
    groups: Count  # number of groups; 1 without a column of groups
    usual_step_seconds: float | None  # the usual time between two rows of a group; None if it is unknown
    gap_rows: Count  # rows of each group that are left out between two parts
    fit: Period
    held_out: Period
    calibration: Period | None  # None if the model was recalibrated on rows without times
    # The blocks of `--split blocks`, oldest first; empty if the oldest rows fit and the newest calibrate.
    blocks: Annotated[list[Block], Field(max_length=MAX_BLOCKS)] = []


class Window(_Frozen):
    """The rows that a model judges together: a row and those before it, of the same group and without a gap."""

    rows: Annotated[int, Field(ge=MIN_WINDOW_ROWS, le=MAX_WINDOW_ROWS)]  # N, with the newest row
    scales: Annotated[list[Length], Field(min_length=1, max_length=8)]  # how many of the newest rows are summarised

    @model_validator(mode="after")
    def _check_scales(self) -> Self:
        if self.scales != sorted(set(self.scales)) or self.scales[-1] != self.rows:
            raise ValueError(f"expected ascending scales that end with {self.rows}, got {self.scales}")
        return self

    @property
    def least_rows(self) -> int:
        """How many rows of a window must be there before its newest row is judged."""
        return max(1, round(self.rows / WARM_SHARE))

    def longest_gap_seconds(self, usual_step_seconds: float | None) -> float:
        """Return the longest time between two rows of a window; infinity if the usual step is unknown."""
        return self.rows / WARM_SHARE * usual_step_seconds if usual_step_seconds else math.inf


class Season(_Frozen):
    """The periods in which the usual score returns, and the time zone of their hours."""

    periods: Annotated[list[Literal["day", "week"]], Field(min_length=1, max_length=2)]
    time_zone: Annotated[str, Field(min_length=1, max_length=MAX_GROUP_NAME)]

    @model_validator(mode="after")
    def _check_periods(self) -> Self:
        if self.periods != sorted(set(self.periods)):
            raise ValueError(f"expected day, week, or both in this order, got {', '.join(self.periods)}")
        return self


class ConditionColumn(_Frozen):
    """A column that tells the model a condition of each row, such as its class. It is not a feature."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_GROUP_NAME)]
    levels: Annotated[list[str], Field(min_length=2, max_length=MAX_LEVELS)]

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        for level in self.levels:
            if not is_level_name(level):
                raise ValueError(
                    f"expected levels with 1 to {MAX_LEVEL_NAME} printable characters, got {level[:MAX_LEVEL_NAME]!r}"
                )
        if len(set(self.levels)) < len(self.levels):
            raise ValueError("expected different levels, got one twice")
        return self


class Conditions(_Frozen):
    """The conditions that the model knows of a row, and how often they occur in the training data.

    A condition is one-hot: the C levels of all columns one after the other. See `models.conditional`.
    """

    columns: Annotated[list[ConditionColumn], Field(min_length=1, max_length=MAX_CONDITION_COLUMNS)]
    # The combinations of levels that fit rows have: the index of the level in each column.
    combinations: Annotated[list[list[Count]], Field(min_length=1, max_length=MAX_COMBINATIONS)]
    shares: list[Annotated[float, Field(gt=0, le=1)]]  # share of each combination; the sum is 1

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise ValueError("expected different names of columns, got one twice")
        sizes = [len(column.levels) for column in self.columns]
        for combination in self.combinations:
            if len(combination) != len(sizes) or any(
                level >= size for level, size in zip(combination, sizes, strict=True)
            ):
                raise ValueError(f"expected a level of each column, got {combination}")
        if len(self.shares) != len(self.combinations) or abs(sum(self.shares) - 1.0) > SHARE_TOLERANCE:
            raise ValueError("expected a share of each combination, with the sum 1")
        return self

    @property
    def width(self) -> int:
        """C: the number of levels of all columns together."""
        return sum(len(column.levels) for column in self.columns)


class Category(_Frozen):
    """A column of text. Each level is a feature, which is 1 in the rows of this level and 0 in all others.

    The features of the levels are consecutive. If a level has too few rows to be learnt, it counts as OTHER_LEVEL,
    which is then the last level.
    """

    name: Annotated[str, Field(min_length=1, max_length=MAX_GROUP_NAME)]
    levels: Annotated[list[str], Field(min_length=1, max_length=MAX_CATEGORY_LEVELS + 1)]
    first: Count  # the index of the feature of the first level
    rare: Annotated[list[str], Field(max_length=MAX_RARE_LEVELS)] = []  # levels that count as OTHER_LEVEL
    new_share: Annotated[float, Field(ge=0, le=1)] = 0.0  # estimated share of new rows with a level that is not known

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        for level in (*self.levels, *self.rare):
            if not is_level_name(level):
                raise ValueError(
                    f"expected levels with 1 to {MAX_LEVEL_NAME} characters that print, got {level[:MAX_LEVEL_NAME]!r}"
                )
        known = [*self.levels, *self.rare]
        if len(set(known)) < len(known):
            raise ValueError("expected different levels, got one twice")
        if bool(self.rare) != (self.levels[-1] == OTHER_LEVEL):
            raise ValueError(f"expected {OTHER_LEVEL!r} as the last level if and only if there are rare levels")
        return self

    @property
    def features(self) -> range:
        """The indices of the features of the levels."""
        return range(self.first, self.first + len(self.levels))

    @property
    def feature_names(self) -> list[str]:
        """The names of the features of the levels, such as protocol=tcp."""
        return [f"{self.name}={level}" for level in self.levels]


class Adoption(_Frozen):
    """Where the network of an adopted model comes from: it was trained elsewhere. See `training.adoption`."""

    source: str  # the class of the module, or the format of its file
    functions: Annotated[list[str], Field(min_length=1, max_length=8)]  # the functions of the module that are used
    spread: Literal["log_variance", "std"] | None = None  # what the encoder gives besides the mean
    scaler: str | None = None  # the class of the scaler; None if the model takes raw rows
    prior: Literal["fitted", "standard"] | None = None  # None if the model only reconstructs
    without_completion: str | None = None  # why the model does not complete rows; None if it does


class Golden(_Frozen):
    """Golden answers: inputs, and the model's outputs at publication. `load` checks that the outputs still agree."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]


class Manifest(_Frozen):
    """The description of an artifact: everything except the weights."""

    format_version: int
    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    kind: str
    created: str
    shape: Annotated[list[Length], Field(min_length=1, max_length=8)]
    features: Annotated[list[Feature], Field(min_length=1)]
    latents: Count  # 0 if the model only reconstructs and scores rows
    parts: Annotated[list[str], Field(max_length=64)]
    pixel_range: tuple[float, float] | None
    training: dict[str, Any]
    data: Data
    metrics: dict[str, float]
    calibration: CalibrationSize
    golden: Golden
    versions: dict[str, str]
    weights_sha256: str
    history: list[dict[str, float]] = []  # per epoch: epoch, step, each term of the loss, held_out_loss, seconds
    latent_report: list[Latent] = []  # one entry per latent
    spectrum: list[float] = []  # at most 256 eigenvalues of the covariance in model units, largest first
    total_variance: float = 0.0  # the sum of all eigenvalues
    log_scale: float = 0.0  # nats: log density in raw units = log density in model units - log_scale
    comparison: dict[str, dict[str, float]] = {}  # metrics of other models on the same held-out rows, by kind
    recalibration: Recalibration | None = None  # None if the model was not recalibrated
    warnings: list[str] = []  # why the model may be of no use; see training.evaluation.worth
    timeline: Timeline | None = None  # None if the model was trained without times
    window: Window | None = None  # None if the model judges each row alone
    # The groups with a baseline of their own: group i has the coefficients i of the baseline in the artifact.
    groups: Annotated[list[str], Field(max_length=MAX_GROUPS)] = []
    season: Season | None = None  # None if the baseline does not depend on the time
    # After how many rows an incident of a group counts as a change; None: as many as the service uses by default.
    incident_rows: Annotated[int, Field(ge=MIN_INCIDENT_ROWS, le=MAX_INCIDENT_ROWS)] | None = None
    policy: AppliedPolicy | None = None  # None if every deviation matters, and alarms are not limited
    conditions: Conditions | None = None  # None if the model knows no condition of a row
    adoption: Adoption | None = None  # None if Elbo trained the network
    # The columns of text. Their features are the last ones, in the order of the columns.
    categories: Annotated[list[Category], Field(max_length=MAX_CATEGORIES)] = []

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if math.prod(self.shape) != len(self.features):
            raise ValueError(f"expected {math.prod(self.shape)} features for shape {self.shape}, got {self.width}")
        return self

    @model_validator(mode="after")
    def _check_latents(self) -> Self:
        if self.latents == 0 and self.adoption is None:
            raise ValueError("expected at least one latent, because only an adopted model may have none")
        return self

    @model_validator(mode="after")
    def _check_categories(self) -> Self:
        if not self.categories:
            return self
        place = self.width - sum(len(category.levels) for category in self.categories)
        for category in self.categories:
            names = [self.features[index].name for index in category.features if index < self.width]
            if category.first != place or names != category.feature_names:
                raise ValueError(f"expected the levels of {category.name[:100]!r} to be the features from {place} on")
            place += len(names)
        if len(set(self.column_names)) < len(self.column_names):
            raise ValueError("expected different names of columns, got one twice")
        return self

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        for name in self.groups:
            if not is_group_name(name):
                raise ValueError(
                    f"expected names of groups with 1 to {MAX_GROUP_NAME} printable characters, got {name[:100]!r}"
                )
        if len(set(self.groups)) < len(self.groups):
            raise ValueError("expected different names of groups, got a name twice")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_absent_fields(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the fields, without the empty ones that earlier releases do not know and would refuse."""
        fields: dict[str, Any] = serialise(self)
        absent = {name for name in NEW_FIELDS if not getattr(self, name)}
        fields = {name: value for name, value in fields.items() if name not in absent}
        for feature in fields["features"]:
            if feature.get("values") is None:
                feature.pop("values", None)
        timeline = fields.get("timeline")
        if timeline is not None and not timeline.get("blocks"):
            timeline.pop("blocks", None)
        return fields

    @property
    def width(self) -> int:
        """D: the number of features per row."""
        return len(self.features)

    @property
    def numbers(self) -> int:
        """The number of features that are no levels of categories. They come first."""
        return self.categories[0].first if self.categories else self.width

    @property
    def column_names(self) -> list[str]:
        """The names of the columns of the training data: the features that are numbers, then the categories."""
        numbers = [feature.name for feature in self.features[: self.numbers]]
        return numbers + [category.name for category in self.categories]

    @property
    def category_columns(self) -> "CategoryColumns | None":
        """The columns of the training data, which translate levels; None if none of them is a category."""
        from models.categories import CategoryColumns

        if not self.categories:
            return None
        numbers = self.features[: self.numbers]
        return CategoryColumns(
            [feature.name for feature in numbers],
            [(category.name, category.levels, category.rare) for category in self.categories],
            [feature.values is not None for feature in numbers],
        )

    @property
    def only_reconstructs(self) -> bool:
        """Whether the model reconstructs and scores rows, but neither encodes them nor decodes latents."""
        return self.latents == 0

    @property
    def condition_width(self) -> int:
        """C: the number of values of a condition; 0 if the model knows no condition of a row."""
        return 0 if self.conditions is None else self.conditions.width

    @property
    def is_image(self) -> bool:
        """Whether rows are images."""
        return self.pixel_range is not None

    def pixel_warning(self, low: float, high: float) -> str | None:
        """Return a warning if pixels from `low` to `high` are in another range than the model's; None otherwise.

        They are if one lies outside of the range by more than half of its width, or if all lie in a small part of it.
        If black is negative, they also are if the darkest pixel is 0, as in images from 0 to 1 or from 0 to 255.
        """
        if self.pixel_range is None:
            return None
        black, white = self.pixel_range
        span = white - black
        is_outside = low < black - span / 2 or high > white + span / 2
        is_dark = span >= WIDE_SPAN and low < high <= max(1.0, black + span / DARK_SHARE) and low >= min(black, -1.0)
        is_positive = black < 0 < white and 0 <= low <= ZERO_SHARE * white and low < high
        if not is_outside and not is_dark and not is_positive:
            return None
        return (
            f"the pixels lie between {low:.6g} and {high:.6g}, but the model was trained on pixels from {black:g} "
            f"(black) to {white:g} (white): scale them to that range"
        )


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the artifact at `path`, and verify the seal and the format version.

    Raises:
        ArtifactError: ArtifactMissing, ArtifactUnreadable, ArtifactForeign, ArtifactCorrupt or ArtifactTooNew.
    """
    return parse(read_sealed(path), path)


def parse(content: bytes, path: Path) -> Manifest:
    """Return the manifest in `content`, the bytes that `read_sealed` returned for `path`."""
    try:
        open_archive(content).close()
    except zipfile.BadZipFile as error:
        raise ArtifactUnsafe(f"{path} is no zip file that Elbo writes: {error}") from error
    fields = _fields(content)
    if fields is None:
        raise ArtifactForeign(f"{path} has no valid manifest in the member {MEMBER}: it was not written by Elbo")
    _refuse_newer(fields, path)
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        fault = first_fault(error)
        field = ".".join(fault.path)
        message = f"{path}: manifest field {printable(field[:100]) or 'shape'}: {printable(fault.message[:200])}"
        raise ArtifactCorrupt(f"{message}; publish the model again") from error


def _fields(content: bytes) -> dict[str, Any] | None:
    """Return the manifest in the archive without validation.

    Return None if `content` is not an archive, if it has no manifest, or if the manifest is too large. The server calls
    this function on files without a valid seal, and outside of a trial, so the memory for the values is limited.
    """
    try:
        with open_archive(content) as archive:
            member = next(info for info in archive.infolist() if info.filename.partition("/")[2] == MEMBER)
            if member.file_size > MAX_MANIFEST_BYTES:
                return None
            text = archive.read(member)
            if sum(map(text.count, (b"[", b"{", b","))) > MAX_MANIFEST_VALUES:
                return None
            fields = json.loads(text, parse_constant=_refuse_constant)
    except UNREADABLE:
        return None
    return fields if isinstance(fields, dict) else None


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _refuse_newer(fields: dict[str, Any], path: Path) -> None:
    version = fields.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ArtifactTooNew(
            f"{path} has format version {version}, but this release reads format versions up to {FORMAT_VERSION}: "
            "upgrade Elbo, or train the model again with this release"
        )


def read_sealed(path: Path) -> bytes:
    """Read the bytes of the artifact at `path`, and verify the seal.

    Raises:
        ArtifactError: ArtifactMissing, ArtifactUnreadable, ArtifactForeign, ArtifactCorrupt or ArtifactTooNew.
    """
    content = _read_file(path)
    body, digest = content[:-DIGEST_LENGTH], content[-DIGEST_LENGTH:]
    if body.endswith(SEAL) and hashlib.sha256(body).hexdigest().encode() == digest:
        return content
    if fields := _fields(content):
        _refuse_newer(fields, path)  # a later format may have another kind of seal
    if SEAL not in content and zipfile.is_zipfile(io.BytesIO(content)):
        raise ArtifactForeign(f"{path} is a zip file without Elbo's seal: expected an artifact written by `elbo train`")
    if not content.startswith(b"PK"):
        raise ArtifactForeign(f"{path} is not a zip file: expected an artifact written by `elbo train`")
    raise ArtifactCorrupt(
        f"{path} is truncated or was altered after it was written: copy it again, or train the model again"
    )


def read_digest(path: Path) -> str:
    """Return the digest that the seal of the artifact at `path` claims. `read_sealed` verifies it.

    Raises:
        ArtifactError: ArtifactMissing, ArtifactUnreadable, ArtifactForeign or ArtifactUnsafe.
    """
    return _read_file(path, DIGEST_LENGTH).decode("ascii", "replace")


def _read_file(path: Path, last: int = MAX_FILE_BYTES) -> bytes:
    """Return the final `last` bytes of the regular file at `path`. Bytes that are appended meanwhile are not read."""
    try:
        # O_NONBLOCK: without it, opening a FIFO would wait for somebody who writes to it.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactForeign(f"{path} is not a regular file: expected an artifact written by `elbo train`")
            if status.st_size > MAX_FILE_BYTES:
                raise ArtifactUnsafe(f"{path} has {status.st_size:,} bytes, an artifact has at most {MAX_FILE_BYTES:,}")
            file.seek(max(0, status.st_size - last))
            return file.read(min(last, status.st_size))
    except FileNotFoundError as error:
        raise ArtifactMissing(f"{path} does not exist; create artifacts with `elbo train`") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def seal(content: bytes) -> bytes:
    """Return `content`, a zip archive that ends in SEAL and 64 placeholders, with the SHA-256 in their place."""
    body = content[:-DIGEST_LENGTH]
    return body + hashlib.sha256(body).hexdigest().encode()


def model_folder(root: Path, name: str) -> Path:
    """Return the folder of model `name`. Every reader and writer that turns a name into a path calls this function.

    Raises:
        ArtifactNameInvalid: the name could lead out of `root`.
    """
    if not NAME.fullmatch(name):
        raise ArtifactNameInvalid(
            f"{printable(name[:100])!r} is no name of a model: expected 1 to 64 letters, digits, '.', '_' and '-', of "
            "which the first is a letter or a digit"
        )
    return root / name


def version_folder(root: Path, name: str, version: int) -> Path:
    """Return the folder of one version of model `name`. Raises ArtifactNameInvalid."""
    if not VERSION.fullmatch(str(version)):
        raise ArtifactNameInvalid(f"{version} is no version of a model: expected a number from 1 to 999999999")
    return model_folder(root, name) / str(version)


def folders(root: Path) -> list[str]:
    """Return the names of the entries of `root` that can be the folder of a model, sorted.

    Raises:
        OSError: `root` cannot be read, or does not exist.
    """
    return sorted(name for name in os.listdir(root) if NAME.fullmatch(name))  # noqa: PTH208 - needs only the names


def names(root: Path) -> list[str]:
    """Return the names of the models under `root` that have at least one version, sorted.

    Models whose folder cannot be read are left out.

    Raises:
        ArtifactUnreadable: `root` cannot be read.
    """
    try:
        candidates = folders(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(root, error) from error
    found = []
    for name in candidates:
        with suppress(ArtifactUnreadable):
            if versions(root, name):
                found.append(name)
    return found


def versions(root: Path, name: str) -> list[int]:
    """Return the published versions of model `name`, ascending. A version whose file cannot be read is included.

    Raises:
        ArtifactUnreadable: the folder of the model cannot be read.
    """
    folder = root / name
    if not NAME.fullmatch(name):
        return []
    try:
        entries = os.listdir(folder)  # noqa: PTH208 - needs only the names
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error
    found = (entry for entry in entries if VERSION.fullmatch(entry))
    return sorted(int(entry) for entry in found if _may_be_artifact(folder / entry / FILE_NAME))


def _may_be_artifact(path: Path) -> bool:
    """Return whether `path` is a regular file, or true if the operating system refuses to tell."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def _unreadable(path: Path, error: OSError) -> ArtifactUnreadable:
    return ArtifactUnreadable(
        f"cannot read {path}: {error.strerror}; check the permissions and the file system (ls -l, dmesg)"
    )


def resolve(root: Path, reference: str) -> Path:
    """Return the path of the artifact that `reference` selects: `name` (the newest version) or `name@version`.

    Raises:
        ArtifactMissing: the model or the version does not exist.
        ArtifactUnreadable: the folder of the model cannot be read.
    """
    name, at, version = reference.partition("@")
    present = versions(root, name)
    if not present:
        available = ", ".join(names(root)) or "none"
        raise ArtifactMissing(f"no model {name!r} in {root} (available: {available}); train it with `elbo train`")
    if at and version not in map(str, present):
        raise ArtifactMissing(f"model {name!r} has no version {version!r} (available: {present})")
    return version_folder(root, name, int(version or present[-1])) / FILE_NAME
