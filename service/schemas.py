"""The bodies and answers of the HTTP interface: what the OpenAPI document says, and what a request may hold.

Arrays are `Any` to pydantic, which therefore never walks them; `service.codec` reads and writes them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from service.inference.sampling import SEEDS

_NUMBERS = {"type": "array", "items": {"type": "number"}}
_VALUES = {"type": "array", "items": {"type": ["number", "null"]}}
_NESTED = {"type": "array", "items": {"type": "array", "items": {}}}
_ROW = {
    "anyOf": [_VALUES, _NESTED],
    "description": "A flat list of D numbers, or nested lists of the model's shape; null where a value is missing, for "
    "features that lacked some in training",
}
_RECORD = {"type": "object", "additionalProperties": {"type": ["number", "string", "null"]}}
_METRIC = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "object", "additionalProperties": {"type": "string"}},
        "fields": {"type": "object"},
        "timestamp": {"type": ["integer", "number", "string"]},
    },
    "required": ["fields"],
}

Rows = Annotated[Any, WithJsonSchema({"type": "array", "minItems": 1, "items": _ROW})]
Row = Annotated[Any, WithJsonSchema(_ROW)]
Vectors = Annotated[Any, WithJsonSchema({"type": "array", "minItems": 1, "items": _NUMBERS})]
Vector = Annotated[Any, WithJsonSchema(_NUMBERS)]
Records = Annotated[Any, WithJsonSchema({"type": "array", "minItems": 1, "items": _RECORD})]
Metrics = Annotated[Any, WithJsonSchema({"type": "array", "minItems": 1, "items": _METRIC})]
Seed = Annotated[int, Field(ge=0, lt=SEEDS, description="whole number below 2^53: the same seed, the same numbers")]


class Body(BaseModel):
    """What a request says. Strict: a number in quotation marks is no number, and an unknown field is a typo."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class EncodeBody(Body):
    """Rows to codes."""

    inputs: Rows = Field(description="N rows in raw units")
    sample: bool = Field(False, description="false: latents are the posterior mean; true: a draw from the posterior")
    seed: Seed | None = Field(None, description="of the draw; without it one is chosen and told")


class DecodeBody(Body):
    """Codes to rows."""

    latents: Vectors = Field(description="N vectors of K numbers")


class ReconstructBody(Body):
    """Rows through the code and back."""

    inputs: Rows = Field(description="N rows in raw units")


class SampleBody(Body):
    """New rows from the model's prior."""

    n: int = Field(1, ge=1, description="how many; at most ELBO_MAX_ROWS")
    seed: Seed | None = Field(None, description="without it one is chosen and told")
    temperature: float = Field(1.0, ge=0.0, le=100.0, description="scales the noise: 0 is each component's centre")


class End(Body):
    """One end of an interpolation: a row or a code."""

    input: Row = Field(None, description="a row in raw units; its posterior mean is the end")
    latent: Vector = Field(None, description="K numbers")


class InterpolateBody(Body):
    """Rows along the way between two."""

    start: End
    end: End
    steps: int = Field(8, ge=2, description="how many points, both ends included; at most ELBO_MAX_ROWS")
    method: Literal["linear", "slerp"] = Field(
        "linear", description="a straight line, or along the great circle (straight where none is determined)"
    )


class AnomalyBody(Body):
    """Rows to judge: `inputs`, `records` or `metrics`."""

    inputs: Rows = Field(None, description="N rows in raw units")
    records: Records = Field(
        None,
        description="N objects: a number for each feature name, null or absent where it is missing; others are ignored",
    )
    metrics: Metrics = Field(
        None,
        description="a batch of Telegraf's JSON format: the fields of one host and moment are a row, under the names "
        "`name_field`, `name.field`, `name/field` or `field`",
    )
    alpha: float = Field(0.05, gt=0.0, lt=1.0, description="the share of normal rows that may be called anomalous")
    fdr: float | None = Field(
        None, gt=0.0, lt=1.0,
        description="instead of alpha row by row: the share of the rows called anomalous that may be normal "
        "(Benjamini-Hochberg over this request)",
    )  # fmt: skip
    explain: int = Field(3, ge=0, description="how many features to name a row, those that contribute most")
    impute: bool = Field(
        True,
        description="whether training medians stand for values that `records`, `metrics`, NDJSON and CSV lack, up to "
        "half of a row, also of features that lacked none in training; false: such a row is an error",
    )
    half_life: float | None = Field(
        None, gt=0.0, lt=1e12,
        description="seconds: decide by the severity's exponentially weighted mean over each group's rows in time",
    )  # fmt: skip
    half_life_rows: float | None = Field(
        None, gt=0.0, lt=1e12, description="the same with a half-life counted in rows, which needs no timestamps"
    )
    time: str = Field("timestamp", description="what records call their time: Unix s, ms, us or ns, or ISO 8601")
    group: str = Field("host", description="what records call the group that they belong to; a tag of `metrics`")
    detail: Literal["full", "none"] = Field("full", description="none: counts alone, for senders who read no verdicts")


_IMPUTED = "how many values were missing in the rows sent, where any was: the training medians stood for them"


class HttpResponse(BaseModel):
    """What every answer says."""

    model: str = Field(description="name of the model that answered")
    version: int = Field(description="its version")


class EncodeAnswer(HttpResponse):
    """Codes."""

    latents: Vectors = Field(description="[N, K]")
    std: Vectors = Field(description="[N, K]: the posterior's standard deviation; zeros for an autoencoder")
    seed: int | None = Field(None, description="of the draw, where `sample` was true")
    imputed: int | None = Field(None, description=_IMPUTED)


class DecodeAnswer(HttpResponse):
    """Rows."""

    outputs: Vectors = Field(description="[N, D] in raw units")


class ReconstructAnswer(DecodeAnswer):
    """Rows, and how far they are from those sent."""

    errors: Vector = Field(description="[N]: mean squared error of a row's present values, in raw units squared")
    imputed: int | None = Field(None, description=_IMPUTED)


class InterpolateAnswer(DecodeAnswer):
    """Rows and their codes."""

    latents: Vectors = Field(description="[N, K]")
    imputed: int | None = Field(None, description=_IMPUTED)


class SampleAnswer(DecodeAnswer):
    """New rows, their codes, and the seed that gives them again."""

    latents: Vectors = Field(description="[N, K]")
    seed: int = Field(description="send it to get the same samples again")


class FeatureReport(BaseModel):
    """Why a row is strange: one feature's part in it."""

    name: str
    value: float | None = Field(description="what was sent, in raw units; null where it is missing")
    expected: float = Field(
        description="in raw units: what the other features say of it, or its mean, whichever it is further from; of "
        "pictures the reconstruction"
    )
    contribution: float = Field(
        description="squared distance from that, in deviations of normal rows (of pictures, in the model's own units); "
        "of a missing value that of the median in its place"
    )


class Result(BaseModel):
    """The verdict on one row."""

    row: int = Field(description="its place in the request, from 0")
    score: float = Field(description="higher is stranger; what overflows float32 is given as its largest number")
    p_value: float = Field(description="conformal: the share of normal rows at least as strange; never 0")
    severity: float = Field(description="> 1 means anomalous at alpha, for every model")
    smoothed: float | None = Field(None, description="the severity's mean over the group's past, where asked for")
    is_anomaly: bool = Field(description="severity > 1, or what `fdr` decides over the request, or smoothed > 1")
    parts: dict[str, float] = Field(description="the score's parts by name; they sum to it")
    features: list[FeatureReport] = Field(description="those that contribute most, the largest first")
    imputed: list[str] | None = Field(None, description="the features whose value is missing, where any is")
    time: float | None = Field(None, description="Unix seconds, where the row said it")
    group: str | None = Field(None, description="where the row said it")


class RowProblem(BaseModel):
    """A row that could not be judged; the others were."""

    row: int = Field(description="its place in the request, from 0")
    detail: str
    pointer: str | None = Field(description="JSON pointer to the value at fault")


class Calibration(BaseModel):
    """What the p-values rest on."""

    rows: int = Field(description="normal rows that trained nothing")
    floor: float = Field(description="the smallest p-value they can give: 1 / (rows + 1)")


class AnomalyAnswer(HttpResponse):
    """Verdicts; with `detail` none the counts alone."""

    rows: int = Field(description="how many were sent")
    anomalies: int = Field(description="how many are anomalous")
    failed: int = Field(description="how many could not be judged")
    unknown_fields: int = Field(description="values whose name is no feature's")
    alpha: float | None = None
    fdr: float | None = None
    threshold: float | None = Field(None, description="the score above which a row is anomalous at alpha")
    calibration: Calibration | None = None
    extrapolated: bool | None = Field(
        None,
        description="whether alpha lies below the calibration's floor: threshold and severity then rest on a fitted "
        "tail and on no p-value; `fdr` rests on p-values alone",
    )
    results: list[Result] | None = None
    errors: list[RowProblem] | None = Field(None, description="rows that could not be judged")


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(description="urn:elbo:problem: and the code")
    title: str
    status: int
    code: str = Field(description="stable: programs may rely on it")
    detail: str = Field(description="one sentence for a person")
    request_id: str = Field(description="look it up in the log")
    pointer: str | None = Field(None, description="JSON pointer to the value at fault")
    expected: str | None = None
    got: str | None = None
    hint: str | None = Field(None, description="what to do")


class BackendChoice(BaseModel):
    """What computes the answers."""

    name: Literal["torchscript", "onnx"]
    reason: str = Field(description="why this one")
    precision: Literal["float32", "bfloat16"] = Field(description="of matrix products")
    errors: dict[str, float] = Field(
        description="of answers in bfloat16 against float32 on the artifact's golden inputs, relative to the largest "
        "number in each"
    )


class ModelSummary(BaseModel):
    """One loaded version."""

    name: str
    version: int
    kind: str = Field(description="pca, ae or vae")
    created: str = Field(description="ISO 8601, UTC")
    shape: list[int] = Field(description="of one row")
    width: int = Field(description="D: numbers in one row")
    latents: int = Field(description="K: numbers in one code")
    parts: list[str] = Field(description="names of the score's parts")
    pixel_range: tuple[float, float] | None = Field(description="raw values of black and of white, for images")
    pictures: bool = Field(description="whether outputs can be asked for as image/png")
    exhibits: list[str] = Field(description="what else GET /models/{reference}/... tells: held-out, calibration, card")
    metrics: dict[str, float] = Field(description="on rows held out from training")
    calibration: Calibration
    device: str
    backend: BackendChoice
    load_seconds: float = Field(description="to load, verify, and choose the backend")
    warm_seconds: float = Field(description="to run every operation at every size of batch")


class FailedVersion(BaseModel):
    """A version that lies in the folder and cannot be served."""

    name: str
    version: int
    code: str
    detail: str


class ModelList(BaseModel):
    """What is served, and what is not though it is there."""

    default: str | None = Field(description="answers where no model is named")
    models: list[ModelSummary] = Field(description="every loaded version, by name, newest first")
    failures: list[FailedVersion]


class FeatureInfo(BaseModel):
    """One feature of a row, from the training rows, in raw units."""

    name: str
    unit: str | None
    median: float
    minimum: float
    maximum: float
    missing: int = Field(description="training rows that lacked it; where there are none, it may not be missing")


class LatentInfo(BaseModel):
    """What one latent carries, on held-out rows."""

    kl: float | None = Field(description="nats, mean over rows; null where the model charges none")
    variance: float = Field(description="of the posterior mean")
    active: bool


class ModelDetail(ModelSummary):
    """One version, whole."""

    features: list[FeatureInfo]
    training: dict[str, Any] = Field(description="the configuration of its training")
    data: dict[str, Any] = Field(description="where its rows came from and how they were split")
    recalibration: dict[str, Any] | None = Field(
        description="where `elbo calibrate` took rows from since, and the version that has the same networks"
    )
    versions: dict[str, str] = Field(description="of the software that made it")
    weights_sha256: str
    history: list[dict[str, float]] = Field(description="by epoch: every term of the loss; empty for PCA")
    latent_report: list[LatentInfo] = Field(description="one a latent")
    spectrum: list[float] = Field(description="the largest eigenvalues of the fitted rows, model units, descending")
    total_variance: float = Field(description="the sum of all eigenvalues")
    comparison: dict[str, dict[str, float]] = Field(description="what other kinds reach on the same rows")


class HeldOut(HttpResponse):
    """Rows that did not train the model, as far as the artifact carries them, and their codes."""

    rows: int = Field(description="how many were held out; at most 2,000 are told of")
    labels: list[int] | None = Field(description="[M], where the training data had some; never trained on")
    label_names: list[str] | None = Field(description="what labels 0, 1, ... mean, where they have names")
    latents: Vectors = Field(description="[M, K]: codes of the first M held-out rows")
    inputs: Rows = Field(description="[R, D]: the first R of these rows, raw units, null where a value is missing")


class CalibrationScores(HttpResponse):
    """What a new row's score is compared with."""

    rows: int = Field(description="calibration rows")
    scores: Vector = Field(description="ascending; of more than 2,000 evenly spaced order statistics")


class Health(BaseModel):
    """A probe's answer."""

    status: str


BODIES: tuple[type[Body], ...] = (EncodeBody, DecodeBody, ReconstructBody, SampleBody, InterpolateBody, AnomalyBody)
