"""Schemas of request bodies and responses. They validate requests, and they are part of the OpenAPI document.

Arrays have the type `Any`, so that pydantic does not visit every number. `service.codec` reads and writes arrays.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator

from models.manifest import Season, Timeline
from service.inference.sampling import SEEDS

_NUMBERS = {"type": "array", "items": {"type": "number"}}
_VALUES = {"type": "array", "items": {"type": ["number", "null"]}}
_NESTED = {"type": "array", "items": {"type": "array", "items": {}}}
_ROW = {
    "anyOf": [_VALUES, _NESTED],
    "description": "A flat list of D numbers, or nested lists of the model's shape; null for a missing value, if the "
    "feature had missing values in training",
}
_RECORD = {"type": "object", "additionalProperties": {"type": ["number", "string", "null"]}}
_CONDITION = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
}
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
PartialRow = Annotated[Any, WithJsonSchema({"anyOf": [_RECORD, *_ROW["anyOf"]]})]
Metrics = Annotated[Any, WithJsonSchema({"type": "array", "minItems": 1, "items": _METRIC})]
# The condition of all rows, or a list with one condition per row
Condition = Annotated[Any, WithJsonSchema(_CONDITION)]
RowConditions = Annotated[
    Any, WithJsonSchema({"anyOf": [_CONDITION, {"type": "array", "minItems": 1, "items": _CONDITION}]})
]
Seed = Annotated[
    int, Field(ge=0, lt=SEEDS, description="whole number below 2^53; the same seed gives the same numbers")
]


_ROW_CONDITIONS = (
    'models trained with `--condition` only: the condition of all rows, such as `{"label": "7"}`, or a list with one '
    "condition per row; for a column that is absent, the model takes the level as unknown"
)


def drop_null_defaults(schema: dict[str, Any]) -> None:
    """Remove each `"default": null`: it would be invalid for a field that must be an array if it is present."""
    for field in schema.get("properties", {}).values():
        if field.get("default", ...) is None:
            del field["default"]


class Body(BaseModel):
    """Base class of all request bodies. Validation is strict: numbers in quotes and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra=drop_null_defaults)

    @field_validator("seed", "n", "steps", "explain", mode="before", check_fields=False)
    @classmethod
    def _as_integer(cls, value: Any) -> Any:
        """Return 8 for 8.0. Both are integers in JSON Schema, and some programs write the second."""
        is_whole = type(value) is float and value.is_integer() and abs(value) < 2**53
        return int(value) if is_whole else value


_RECORDS = (
    'N objects with a number per feature name; for a column of text, with its level, such as `{"protocol": "tcp"}`'
)


class EncodeBody(Body):
    """Rows to encode. They are in exactly one of the fields `inputs` and `records`."""

    inputs: Rows = Field(None, description="N rows in raw units; windows of rows for a model with a window")
    records: Records = Field(None, description=_RECORDS)
    sample: bool = Field(
        False, description="whether to sample latents from the posterior; false returns the posterior mean"
    )
    seed: Seed | None = Field(
        None, description="seed of the samples; by default a random seed, which the response contains"
    )
    condition: RowConditions = Field(None, description=_ROW_CONDITIONS)


class DecodeBody(Body):
    """Latents to decode."""

    latents: Vectors = Field(description="N latent vectors of K numbers")
    condition: RowConditions = Field(None, description=_ROW_CONDITIONS)


class ReconstructBody(Body):
    """Rows to reconstruct. They are in exactly one of the fields `inputs` and `records`."""

    inputs: Rows = Field(None, description="N rows in raw units; windows of rows for a model with a window")
    records: Records = Field(None, description=_RECORDS)
    condition: RowConditions = Field(None, description=_ROW_CONDITIONS)


class End(Body):
    """A point of the latent space: either a row or a latent vector."""

    input: Row = Field(None, description="a row in raw units, which stands for its posterior mean")
    latent: Vector = Field(None, description="a latent vector of K numbers")


class SampleBody(Body):
    """A request for new rows: from the model's prior, with given values of some features, or near a row."""

    n: int = Field(1, ge=1, lt=SEEDS, description="number of rows; at most ELBO_MAX_ROWS")
    seed: Seed | None = Field(
        None, description="seed of the noise; by default a random seed, which the response contains"
    )
    temperature: float = Field(
        1.0,
        ge=0.0,
        le=100.0,
        description="factor of the noise; 0 gives the centre of a component of the prior",
    )
    prior: Literal["fitted", "standard"] = Field(
        "fitted",
        description="distribution of the latents: fitted (a mixture of Gaussians that is fitted to the latents of the "
        "training rows; N(0, I) for a VAE of an earlier release) or standard (N(0, I), only for a VAE)",
    )
    noise: bool | None = Field(
        None,
        description="whether the rows include observation noise; they then stay within the range of the training rows, "
        "and whole-number features are rounded; false returns the mean of each row given its latents. By default true "
        "for tables, false for images and for artifacts of earlier releases",
    )
    condition: RowConditions = Field(
        None,
        description='models trained with `--condition` only: the condition to draw rows for, such as `{"label": "7"}`, '
        "or a list with one condition per row; for a column that is absent, levels are drawn by their shares in the "
        "training rows. With `near`, it is one condition, and a column that is absent stays unknown",
    )
    given: PartialRow = Field(
        None,
        description="values of some features, by name or as a row with null for the others: the other values are drawn "
        "given these. With `noise` false, the other values are what the latents decode to",
    )
    near: End | None = Field(
        None,
        description="a row or a latent vector: the latents of the samples scatter around its latents",
    )
    spread: float = Field(
        0.3,
        ge=0.0,
        le=100.0,
        description="with `near`: how far the latents of the samples scatter, relative to samples without `near`; 1 "
        "gives the same standard deviations. `temperature` multiplies it",
    )


class ImputeBody(Body):
    """Rows with missing values. They are in exactly one of the fields `inputs` and `records`."""

    inputs: Rows = Field(None, description="N rows in raw units, with null for a missing value of any feature")
    records: Records = Field(None, description=f"{_RECORDS}; a missing value is null or absent")


class InterpolateBody(Body):
    """The two ends of an interpolation, and the path between them."""

    start: End
    end: End
    steps: int = Field(8, ge=2, lt=SEEDS, description="number of points, both ends included; at most ELBO_MAX_ROWS")
    method: Literal["linear", "slerp"] = Field(
        "linear",
        description="path between the latents: a straight line, or spherical linear interpolation (slerp), which falls "
        "back to a straight line for parallel, opposite and zero vectors",
    )
    condition: Condition = Field(
        None,
        description='models trained with `--condition` only: the condition of all points, such as `{"label": "7"}`; '
        "for a column that is absent, the model takes the level as unknown",
    )


class EditBody(Body):
    """A row or a latent vector, and the direction in which it is moved."""

    input: Row = Field(None, description="a row in raw units; the path starts at its posterior mean")
    latent: Vector = Field(None, description="a latent vector of K numbers, where the path starts")
    direction: str = Field(
        min_length=1,
        description="the label towards which the row moves. The direction leads from the mean latents of the rows with "
        "the label `away_from` to the mean latents of the rows with this label. GET /models/{reference} lists the "
        "labels in `directions`",
    )
    away_from: str | None = Field(
        None,
        description="the label where the direction begins; by default, it begins at the mean of all rows with other "
        "labels",
    )
    amount: float = Field(
        1.0,
        ge=-100.0,
        le=100.0,
        description="how far the row moves: 1 is the distance between the means, and negative numbers move it the "
        "other way",
    )
    steps: int = Field(
        1,
        ge=1,
        lt=SEEDS,
        description="number of rows in the response, at most ELBO_MAX_ROWS; 1 returns the row moved by `amount`, and "
        "more return the path from the unmoved row to it, both included",
    )
    condition: Condition = Field(
        None,
        description='models trained with `--condition` only: the condition of all rows, such as `{"label": "7"}`; for '
        "a column that is absent, the model takes the level as unknown",
    )


class NeighboursBody(Body):
    """Rows or latents whose nearest held-out rows are wanted. Exactly one of `inputs` and `latents` is given."""

    inputs: Rows = Field(None, description="N rows in raw units; windows of rows for a model with a window")
    latents: Vectors = Field(None, description="N latent vectors of K numbers")
    n: int = Field(5, ge=1, le=100, description="neighbours of each row; N times n may be at most ELBO_MAX_ROWS")
    values: bool = Field(
        False,
        description="whether the response contains the values of the neighbours, which are rows of the training data; "
        "if the server has API keys, this needs the scope admin",
    )
    condition: RowConditions = Field(None, description=f"only with `inputs`; {_ROW_CONDITIONS}")


class AnomalyBody(Body):
    """Rows to score, and options that determine which rows are anomalous.

    The rows are in exactly one of the fields `inputs`, `records` and `metrics`.
    """

    inputs: Rows = Field(None, description="N rows in raw units, or windows of rows for a model with a window")
    records: Records = Field(
        None,
        description="N objects with a number per feature name, which may be followed by the feature's unit: "
        "`temp [°C]`; for a column of text, with its level. A missing value is null or absent. A row with a level that "
        "the model does not know is anomalous. Other names are ignored, but a record that has other names "
        "and lacks features is an error unless the request has `impute` true",
    )
    metrics: Metrics = Field(
        None,
        description="a batch in Telegraf's JSON format: the fields of one group at one time form a row; a feature is "
        "named `name_field`, `name.field`, `name/field` or `field`",
    )
    alpha: float = Field(
        0.05,
        gt=0.0,
        lt=1.0,
        description="false-alarm rate: the accepted share of normal rows that are flagged as anomalous; a model with a "
        "budget of alarms (`policy.alpha` of GET /models/{reference}) has a default of its own",
    )
    fdr: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="false discovery rate: the accepted share of normal rows among those flagged, decided over the "
        "whole request (Benjamini-Hochberg) instead of per row by alpha",
    )
    extrapolated: bool = Field(
        False,
        description="whether rows may be anomalous at an alpha below the smallest possible p-value: a tail fitted to "
        "the largest calibration scores then gives the threshold, and the false-alarm rate is not guaranteed. If "
        "false, no row is anomalous at such an alpha, and no severity is above 1",
    )
    explain: int = Field(
        3, ge=0, lt=SEEDS, description="number of features to report per row: those that contribute most"
    )
    impute: bool = Field(
        True,
        description="whether a row in `records`, `metrics`, NDJSON or CSV may lack up to half of the features that "
        "were never missing in training; its score is then the expected score given its other values, or, for models "
        "with a window or conditions, the score with training medians. If false, the row is an error. "
        "If the request has `impute` true, a row may lack features although it has names that are not features",
    )
    half_life: float | None = Field(
        None,
        gt=0.0,
        lt=1e12,
        description="half-life in seconds: decide by the exponentially weighted mean severity of each group over time",
    )
    half_life_rows: float | None = Field(
        None,
        gt=0.0,
        lt=1e12,
        description="half-life in rows: like `half_life`, for rows without timestamps",
    )
    time: str = Field(
        "timestamp",
        description="key of the time in records: Unix time in s, ms, us or ns, or ISO 8601. For a model that was "
        "trained with times, the default is the column of its training data",
    )
    group: str = Field(
        "host",
        description="key of the group in records; in `metrics` the name of a tag. For a model that was trained with "
        "groups, the default is the column of its training data",
    )
    detail: Literal["full", "none"] = Field(
        "full", description="none responds with counts only, for clients that do not read verdicts"
    )
    observe: bool | None = Field(
        None,
        description="whether the rows are live traffic. If false, they raise no alerts, are no evidence of drift, do "
        "not change what is remembered of their groups, and count only in `elbo_unobserved_rows_total`. By default "
        "ELBO_OBSERVE; false if the request has an API key "
        "without the scope `write`",
    )
    condition: RowConditions = Field(
        None,
        description='models trained with `--condition` only: the condition of all rows, such as `{"label": "7"}`, or '
        "for `inputs` a list with one condition per row. A level in a record or a line overrides it",
    )


class FeedbackBody(Body):
    """What a person knows about rows that the service has judged: they were normal, or they were an incident.

    The rows are in `records` or `metrics`. Without these fields, they are rows of a group that the service remembers:
    those from `since` to `until`, or the latest ones if both are absent.
    """

    verdict: Literal["normal", "incident"] = Field(
        description="`normal` adds the scores of the rows to the calibration of their group. `incident` removes them"
    )
    group_name: str | None = Field(
        None,
        max_length=1000,
        description="name of a group, without `records` and `metrics`; absent for rows that have no group",
    )
    since: float | str | None = Field(
        None,
        description="time of the first row, as Unix time in s, ms, us or ns, or ISO 8601. If `since` and `until` are "
        "absent, the feedback is about the state of the group: its present incident or change, or its latest alarms",
    )
    until: float | str | None = Field(None, description="time of the last row; by default the newest row")
    records: Records = Field(None, description="rows as in /anomaly")
    metrics: Metrics = Field(None, description="rows as in /anomaly, in Telegraf's JSON format")
    impute: bool = Field(True, description="as in /anomaly")
    time: str = Field("timestamp", description="key of the time in the rows, as in /anomaly")
    group: str = Field("host", description="key of the group in the rows, as in /anomaly")


class PeersQuery(Body):
    """Options of the comparison of groups, in the query."""

    n: int = Field(20, ge=1, le=1000, description="largest number of groups to return: those that deviate most")
    explain: int = Field(
        3, ge=0, le=20, description="largest number of features to report per group: those that differ most"
    )


class KnownIncident(Body):
    """A known incident: a period in which alarms are correct."""

    start: float | str = Field(description="its first moment: Unix time in s, ms, us or ns, or ISO 8601")
    end: float | str = Field(description="its last moment, in the same forms")
    group: str | None = Field(None, description="the group that it concerns; null or empty: all groups")


class BacktestBody(Body):
    """The history to judge, and options that determine which rows are anomalous.

    The rows are in exactly one of the fields `records` and `metrics`. Each has a time.
    """

    records: Records = Field(None, description="N objects as for /anomaly, with a time and perhaps a group")
    metrics: Metrics = Field(None, description="a batch in Telegraf's JSON format, as for /anomaly")
    alphas: list[Annotated[float, Field(gt=0.0, lt=1.0)]] | None = Field(
        None,
        min_length=1,
        max_length=8,
        description="false-alarm rates to compare; the details of the report are for the first. By default the alpha "
        "that keeps the budget of the model's policy, if it has one, 0.05, 0.01 and 0.001",
    )
    incidents: list[KnownIncident] | None = Field(
        None,
        max_length=1000,
        description="known incidents: the report says which were found and after how long, and which alerts were false",
    )
    extrapolated: bool = Field(
        False,
        description="whether rows may be anomalous at an alpha below the smallest possible p-value, as for /anomaly",
    )
    impute: bool = Field(True, description="whether a row may lack features, as for /anomaly")
    time: str = Field("timestamp", description="key of the time, as for /anomaly")
    group: str = Field("host", description="key of the group, as for /anomaly")
    drawings: bool = Field(False, description="whether the response has drawings of the groups and the worst alerts")


_WARNING = "models of images only: the pixels are in another range than those that the model was trained on"
_IMPUTED = "number of missing values in the rows, replaced by training medians; absent if none was missing"


class ModelAnswer(BaseModel):
    """Base class of the responses that a model computes."""

    model: str = Field(description="name of the model that computed the response")
    version: int = Field(description="version of that model")


class EncodeAnswer(ModelAnswer):
    """Latents of the rows."""

    latents: Vectors = Field(description="[N, K]")
    std: Vectors = Field(description="[N, K]: standard deviation of the posterior; zeros for an autoencoder")
    seed: int | None = Field(None, description="seed of the samples, if `sample` was true")
    imputed: int | None = Field(None, description=_IMPUTED)
    warning: str | None = Field(None, description=_WARNING)


class DecodeAnswer(ModelAnswer):
    """Decoded rows."""

    outputs: Vectors = Field(description="[N, D] in raw units; for a level of a column of text, its probability")
    records: list[dict[str, float | str]] | None = Field(
        None,
        description="models with columns of text only: the rows by column, with the most probable level of each column "
        "of text, and with whole numbers where all training rows have whole numbers",
    )


class ReconstructAnswer(DecodeAnswer):
    """Reconstructed rows and their errors."""

    errors: Vector = Field(description="[N]: mean squared error per row over the values present, in raw units squared")
    imputed: int | None = Field(None, description=_IMPUTED)
    warning: str | None = Field(None, description=_WARNING)


class InterpolateAnswer(DecodeAnswer):
    """The decoded rows along the path, and the latents of these rows."""

    latents: Vectors = Field(description="[N, K]")
    imputed: int | None = Field(None, description=_IMPUTED)
    warning: str | None = Field(None, description=_WARNING)


class EditAnswer(InterpolateAnswer):
    """The moved rows, and their latents."""


class NeighboursAnswer(ModelAnswer):
    """The nearest held-out rows of each row, the nearest first. The distances are Euclidean, between latents."""

    indices: list[list[int]] = Field(
        description="[N, n]: which held-out rows they are, counted from 0 as in GET /models/{reference}/held-out"
    )
    distances: Vectors = Field(description="[N, n]")
    usual_distance: float | None = Field(
        description="median distance from a held-out row to the nearest other held-out row; null if there is only one. "
        "A row whose nearest neighbour is much further away than this is unlike the held-out rows"
    )
    labels: list[list[str]] | None = Field(
        None, description="[N, n]: the labels of the neighbours; absent if the training data had no labels"
    )
    values: list[list[Row]] | None = Field(
        None,
        description="[N, n]: the values of the neighbours in raw units; null for a row whose values are not in the "
        "artifact. Absent unless the request has `values` true",
    )
    imputed: int | None = Field(None, description=_IMPUTED)
    warning: str | None = Field(None, description=_WARNING)


class SampleAnswer(DecodeAnswer):
    """New rows, the latents of these rows, and the seed with which the same rows can be sampled again."""

    latents: Vectors = Field(description="[N, K]")
    seed: int = Field(description="send this seed to get the same samples again")
    conditions: list[dict[str, str]] | None = Field(
        None, description="[N]: the condition of each row; absent if the model knows no conditions"
    )


class ImputeAnswer(DecodeAnswer):
    """Complete rows, and how certain the values are that were missing."""

    std: Vectors = Field(description="[N, D]: standard deviation of a value that was missing; 0 if it was known")
    low: Vectors = Field(
        description="[N, D]: lower end of an interval that contains the missing value in 90 % of cases; the value "
        "itself if it was known"
    )
    high: Vectors = Field(description="[N, D]: upper end of this interval")
    imputed: int = Field(description="number of missing values in the rows")
    probabilities: list[dict[str, dict[str, float]]] | None = Field(
        None,
        description="models with columns of text only: for each row, the probability of each level in the columns of "
        "text whose level was missing",
    )
    warning: str | None = Field(None, description=_WARNING)


class FeatureReport(BaseModel):
    """The contribution of one feature to the score of a row."""

    name: str
    value: float | str | None = Field(
        description="value in the request, in raw units, or the level in a column of text; null if it is missing"
    )
    expected: float | str = Field(
        description="expected value, in raw units, or the expected level in a column of text: "
        "for tables the prediction from the other features or the mean, "
        "whichever is further from the value; for images the reconstruction"
    )
    contribution: float = Field(
        description="squared distance from the expected value, in standard deviations of normal rows (for images in "
        "the model's units); 0 for a missing value, or, for models with a window or conditions, the distance of the "
        "median that replaces it"
    )
    lag: int | None = Field(
        None,
        description="anomalous rows of models with a window only, for features that contribute at least a tenth of "
        "the largest contribution: how many rows before this row the deviation of the feature probably began. 0: it "
        "began with this row. window_rows - 1: it began with the oldest row of the window, or earlier",
    )
    since: float | None = Field(
        None, description="Unix time in seconds of the row with which the deviation began, if the rows have times"
    )


class UnseenLevel(BaseModel):
    """A level that no training row has."""

    feature: str = Field(description="the column of text")
    got: str = Field(description="the level, at most 100 characters of it")
    known: list[str] = Field(description="the levels that the model knows")


class Result(BaseModel):
    """The verdict on one row."""

    row: int = Field(description="index of the row in the request, from 0")
    score: float = Field(description="higher is more anomalous; a score beyond float32 is given as the largest float32")
    p_value: float = Field(
        description="conformal p-value: (1 + calibration rows that score at least as high) / (1 + calibration rows); "
        "for rows with a time and a model with times, corrected for the recent false-alarm rate of the group"
    )
    severity: float = Field(
        description="-log p of the score divided by -log p of the threshold; > 1 means anomalous at alpha"
    )
    smoothed: float | None = Field(None, description="mean severity over the group's past, if a half-life was given")
    is_anomaly: bool = Field(
        description="whether severity > 1; with a half-life, whether smoothed > 1; with `fdr`, whether "
        "Benjamini-Hochberg rejects the p-value; false if `silenced`"
    )
    silenced: bool | None = Field(
        None, description="true if a silence of the model's policy holds for the row, which is then never anomalous"
    )
    parts: dict[str, float] = Field(description="parts of the score by name; their sum is the score")
    features: list[FeatureReport] = Field(description="the features that contribute most, largest contribution first")
    imputed: list[str] | None = Field(None, description="features whose value is missing, if any")
    unseen_levels: list[UnseenLevel] | None = Field(
        None,
        description="levels of columns of text that the model does not know, if there are any. The p-value of such a "
        "row is the smallest possible one, so the row is anomalous at every alpha that the calibration reaches",
    )
    time: float | None = Field(None, description="Unix time in seconds, if the row has a time")
    group: str | None = Field(
        None,
        description="group of the row, if it has one; a name of more than 128 characters is replaced by its beginning "
        "and a hash",
    )
    window_rows: int | None = Field(
        None,
        description="models with a window only: how many rows of the window are there, this row included. With less "
        "than a third of the window, the row is never anomalous",
    )
    warming_up: bool | None = Field(None, description="models with a window only: whether the window is not full yet")
    calibration: Literal["group", "pool"] | None = Field(
        None,
        description="models with times only, for rows with a time: whether most of the scores that give the p-value "
        "are of the row's own group, or of all groups of the training data",
    )
    state: Literal["usual", "incident", "changed"] | None = Field(
        None,
        description="models with times only, for rows with a time: the state of the group after the row. `incident`: "
        "alarms have outnumbered other rows; `changed`: an incident has lasted so long that it is now judged as usual",
    )


class RowProblem(BaseModel):
    """A row that could not be scored; it does not affect the other rows."""

    row: int = Field(description="index of the row in the request, from 0")
    detail: str
    pointer: str | None = Field(description="JSON pointer to the invalid value")


class Calibration(BaseModel):
    """The calibration set. P-values are computed from the scores of its rows."""

    rows: int = Field(description="rows in the calibration set")
    floor: float = Field(description="smallest possible p-value: 1 / (rows + 1)")
    method: Literal["cross"] | None = Field(
        None,
        description="`cross`: the calibration rows trained the served model too, but each was scored by another model, "
        "which was fitted without it. Absent if no calibration row trained the model. Only in `GET /models`",
    )
    folds: int | None = Field(None, description="number of models that scored calibration rows; only with `method`")


class AnomalyAnswer(ModelAnswer):
    """The verdicts and their counts, or only the counts if `detail` is none."""

    rows: int = Field(description="rows in the request")
    anomalies: int = Field(description="rows flagged as anomalous")
    failed: int = Field(description="rows that could not be scored")
    unknown_fields: int = Field(description="values whose name is not a feature")
    warning: str | None = Field(None, description=_WARNING)
    alpha: float | None = None
    fdr: float | None = None
    threshold: float | None = Field(
        None,
        description="the score above which a row is anomalous at alpha; null if alpha is below the smallest possible "
        "p-value and `extrapolated` was not requested, and if each group has its own threshold, because its model was "
        "trained with times",
    )
    calibration: Calibration | None = None
    extrapolated: bool | None = Field(
        None,
        description="whether alpha is below the smallest possible p-value and `extrapolated` was requested: threshold "
        "and severity then come from a fitted tail; `fdr` still uses p-values only",
    )
    results: list[Result] | None = None
    errors: list[RowProblem] | None = Field(None, description="rows that could not be scored")


class GroupFeedback(BaseModel):
    """What feedback has changed in one group."""

    group: str | None = Field(description="name of the group; null for rows that have no group")
    rows: int = Field(
        description="rows that the feedback is about. If it is about the present state of the group, these are the "
        "anomalous rows of which it was not yet decided whether they are an incident"
    )
    added: int = Field(description="scores that the calibration set has now, and did not have before")
    removed: int = Field(
        description="scores that the calibration set no longer has; the oldest leave it if it has more than 1000"
    )
    calibration_rows: int = Field(description="scores in the calibration set")
    state: Literal["usual", "incident", "changed"] = Field(description="the state of the group now, as in /anomaly")


class FeedbackAnswer(ModelAnswer):
    """What feedback has changed."""

    verdict: Literal["normal", "incident"]
    groups: list[GroupFeedback] = Field(description="the groups of the rows, by name")
    unused: int = Field(
        description="rows of the request without effect: they could not be scored, their window has too few rows, or a "
        "silence of the policy holds for them"
    )
    errors: list[RowProblem] = Field(description="rows of the request that could not be scored")


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(description="urn:elbo:problem: followed by the code")
    title: str
    status: int
    code: str = Field(description="stable identifier that programs may rely on")
    detail: str = Field(description="what happened, in one sentence")
    request_id: str = Field(description="identifies the request in the server's log")
    pointer: str | None = Field(None, description="JSON pointer to the invalid value")
    expected: str | None = None
    got: str | None = None
    hint: str | None = Field(None, description="what to do")


class BackendChoice(BaseModel):
    """The backend that runs a model."""

    name: Literal["torchscript", "onnx"]
    reason: str = Field(description="why this backend was chosen")
    precision: Literal["float32", "bfloat16"] = Field(description="number format of matrix products")
    errors: dict[str, float] = Field(
        description="largest difference between bfloat16 and float32 outputs on the artifact's golden inputs, relative "
        "to the largest number of each output"
    )


class WindowInfo(BaseModel):
    """The rows that a model judges together: a row, and the rows before it in its group."""

    rows: int = Field(description="N: rows of a window, its newest row included; `inputs` are [B, N, D]")
    scales: list[int] = Field(description="over how many of the newest rows the model takes means and deviations")


class ModelSummary(BaseModel):
    """One loaded version."""

    name: str
    version: int
    kind: str = Field(description="pca, ae, vae, ensemble or adopted")
    created: str = Field(description="ISO 8601, UTC")
    shape: list[int] = Field(description="shape of one row")
    width: int = Field(description="D: numbers per row")
    latents: int = Field(description="K: latents per row; 0 if the model only reconstructs and scores rows")
    parts: list[str] = Field(description="names of the parts of the score")
    pixel_range: tuple[float, float] | None = Field(
        description="raw values of black and white; null unless rows are images"
    )
    window: WindowInfo | None = Field(
        None, description="the rows that the model judges together; absent if it judges each row alone"
    )
    pictures: bool = Field(description="whether outputs are available as image/png")
    completes_rows: bool = Field(description="whether the model supports /impute, and `given` in /sample")
    exhibits: list[str] = Field(
        description="which of GET /models/{reference}/held-out, .../calibration and .../card are available"
    )
    metrics: dict[str, float] = Field(description="metrics on held-out rows")
    warnings: list[str] = Field(
        description="why the model may be of no use: it reconstructs worse than the mean or than PCA, or its threshold "
        "flags almost nothing; empty for artifacts of earlier releases"
    )
    calibration: Calibration
    device: str
    backend: BackendChoice
    signed_by: str | None = Field(
        description="the trusted key that has signed the artifact; null if ELBO_TRUSTED_KEYS is not set"
    )
    load_seconds: float = Field(description="time to load the artifact, verify it and choose the backend")
    warm_seconds: float = Field(description="time of the warm-up, which runs every operation at every batch size")
    groups: int | None = Field(
        None,
        description="number of groups, such as hosts, with a baseline of their own; rows of other groups are compared "
        "with all groups together. Absent if there are none",
    )
    season: Season | None = Field(
        None,
        description="the periods, day or week, in which the usual score returns, and the time zone of their hours. "
        "Absent if the model was trained without `--season`",
    )
    conditions: dict[str, list[str]] | None = Field(
        None,
        description="the levels of each column of conditions, by its name; absent if the model was trained without "
        "`--condition`",
    )
    categories: dict[str, list[str]] | None = Field(
        None, description="the levels of each column of text, by its name; absent if there are none"
    )


class FailedVersion(BaseModel):
    """A version that failed to load, or a folder that the server cannot read."""

    name: str | None = Field(description="null if the artifact folder itself cannot be read")
    version: int | None = Field(description="null if a folder cannot be read, so that its versions are unknown")
    code: str
    detail: str


class ModelList(BaseModel):
    """The models that are served, and what failed to load. A model that was loaded before a failure stays served."""

    default: str | None = Field(description="model for requests that do not name one")
    models: list[ModelSummary] = Field(description="every loaded version, by name, newest version first")
    failures: list[FailedVersion]


class FeatureInfo(BaseModel):
    """Statistics of one feature over the training rows, in raw units."""

    name: str
    unit: str | None
    median: float
    minimum: float
    maximum: float
    missing: int = Field(description="training rows in which the value was missing; if 0, requests must have the value")
    values: Literal["whole", "boolean"] | None = Field(
        None,
        description="boolean if all training rows have 0 or 1: true and false are then accepted, too; whole if all "
        "have whole numbers; absent otherwise",
    )


class LatentInfo(BaseModel):
    """Statistics of one latent over the held-out rows."""

    kl: float | None = Field(description="mean KL divergence per row, in nats; null for models without a KL term")
    variance: float = Field(description="variance of the posterior mean")
    active: bool


class ModelDetail(ModelSummary):
    """Everything about one version."""

    features: list[FeatureInfo]
    training: dict[str, Any] = Field(description="configuration of the training run")
    data: dict[str, Any] = Field(description="source of the training rows, and how they were split")
    policy: dict[str, Any] | None = Field(
        None,
        description="the policy of the model: its `rules`, the `alpha` that keeps its budget of alarms, and how many "
        "rows it left out of the calibration; absent if the model has no policy",
    )
    timeline: Timeline | None = Field(
        None,
        description="the columns of times and groups, the usual time between two rows of a group, and the periods of "
        "the training rows. If the model was trained without times, this field is absent, and so are `incident_rows` "
        "and `scaled_by_group`",
    )
    incident_rows: int | None = Field(
        None, description="number of consecutive rows of a group after which an incident counts as a change"
    )
    scaled_by_group: bool | None = Field(
        None, description="whether rows are converted into common units before the model sees them"
    )
    recalibration: dict[str, Any] | None = Field(
        description="source of the rows that `elbo calibrate` used, and the version with the same networks; null if "
        "the model was not recalibrated"
    )
    versions: dict[str, str] = Field(description="versions of the software that trained the model")
    weights_sha256: str
    history: list[dict[str, float]] = Field(description="every term of the loss per epoch; empty for PCA")
    latent_report: list[LatentInfo] = Field(description="one entry per latent")
    spectrum: list[float] = Field(
        description="largest eigenvalues of the covariance of the fit rows in model units, descending"
    )
    total_variance: float = Field(description="sum of all eigenvalues")
    comparison: dict[str, dict[str, float]] = Field(description="metrics of other model kinds on the same rows")
    directions: list[str] = Field(description="the labels towards which POST /edit can move rows")


class HeldOut(ModelAnswer):
    """The held-out rows in the artifact, and the latents of these rows."""

    rows: int = Field(description="number of held-out rows; the artifact has the latents of at most 2,000 of them")
    labels: list[int] | None = Field(
        description="[M]: labels from the training data, if it has any; training does not use them"
    )
    label_names: list[str] | None = Field(description="names of the labels 0, 1, ..., if they have names")
    latents: Vectors = Field(description="[M, K]: latents of the first M held-out rows")
    inputs: Rows = Field(description="[R, D]: the first R held-out rows in raw units; null for a missing value")


class CalibrationScores(ModelAnswer):
    """The scores of the calibration set. The score of a new row is compared with these scores."""

    rows: int = Field(description="rows in the calibration set")
    scores: Vector = Field(description="in ascending order; of more than 2,000 scores, 2,000 evenly spaced ones")


class PeerFeatureReport(BaseModel):
    """A feature in which a group differs from its peers."""

    name: str
    deviation: float = Field(
        description="how far the group is above the median of all groups, in standard deviations between groups. If "
        "`scaled_by_group`, the values of the feature are compared, otherwise their distances from what the model "
        "expects"
    )
    value: float = Field(description="value of the feature, in raw units")
    peers: float = Field(
        description="if `scaled_by_group`, the value that the group would have if it were like its peers; otherwise "
        "the median of the values of all groups"
    )


class PeerReport(BaseModel):
    """A group, compared with its peers."""

    group: str
    time: float = Field(description="time of the newest judged row of the group, as Unix time in seconds")
    rank: int = Field(description="1 for the group that deviates most")
    deviation: float = Field(description="the larger one of `score_deviation` and `feature_deviation`")
    is_different: bool = Field(description="whether `deviation` is above `limit`")
    score_deviation: float = Field(
        description="how far `score` is above the median of all groups, in standard deviations between groups"
    )
    feature_deviation: float | None = Field(
        description="each group has a distance of its features from the median features of all groups. This is how far "
        "that distance is above the median distance, in standard deviations between groups; null unless "
        "`scaled_by_group`, or if the row has no feature that can be compared"
    )
    score: float = Field(
        description="adjusted score of the newest row: how far the logarithm of its score is above what is usual for "
        "the group and the time, divided by the usual deviation"
    )
    p_value: float = Field(description="p-value of the newest row when it was judged, by the calibration of its group")
    has_baseline: bool = Field(
        description="whether the group has a baseline of its own; if false, its rows are compared with what is usual "
        "for all groups together"
    )
    features: list[PeerFeatureReport] = Field(description="the features that differ most")


class PeersAnswer(ModelAnswer):
    """How groups differ from their peers at one moment."""

    time: float = Field(description="time of the newest of the compared rows, as Unix time in seconds")
    compared: int = Field(description="number of groups whose newest rows are compared")
    others: int = Field(description="number of remembered groups whose newest row is of another time")
    limit: float = Field(
        description="a group differs if its deviation is above this number. If no group really differs, the largest "
        "deviation is above it at no more than about 5 % of the moments, provided that scores and distances of "
        "features are about normally distributed"
    )
    scaled_by_group: bool = Field(description="whether the model was trained with `--scale-by-group`")
    groups: list[PeerReport] = Field(description="at most `n` groups, those that deviate most first")


class Health(BaseModel):
    """The response of a health probe."""

    status: str
