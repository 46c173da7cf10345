"""The options of the methods of the client. The HTTP reference describes the ones that go to the server."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

Condition = Mapping[str, str | int | float | bool | None]


class CallOptions(TypedDict, total=False):
    """Options of every method.

    `model` is a name or name@version, instead of the client's. `timeout` is in seconds, for all attempts together.
    """

    model: str
    timeout: float | None


class RowOptions(CallOptions, total=False):
    """Options of methods that take rows or latents.

    `condition` is the condition of all rows, or one condition per row, for models trained with --condition.
    """

    condition: Condition | Sequence[Condition]


class EncodeOptions(RowOptions, total=False):
    """Options of `encode`. With `sample`, the latents are drawn from the posterior, by `seed`."""

    sample: bool
    seed: int


class SampleOptions(RowOptions, total=False):
    """Options of `sample`.

    `near` is a row or a latent vector, {"input": row} or {"latent": vector}; `given` has values by feature name.
    """

    seed: int
    temperature: float
    prior: Literal["fitted", "standard"]
    noise: bool
    given: Mapping[str, float] | Sequence[float | None]
    near: Mapping[str, Any]
    spread: float


class PathOptions(CallOptions, total=False):
    """Options of `interpolate`."""

    steps: int
    method: Literal["linear", "slerp"]
    condition: Condition


class EditOptions(CallOptions, total=False):
    """Options of `edit`. `amount` 1 is the distance between the mean latents of the two groups of rows."""

    away_from: str
    amount: float
    steps: int
    condition: Condition


class NeighbourOptions(RowOptions, total=False):
    """Options of `neighbours`. With `values`, the result has the rows of the neighbours."""

    n: int
    values: bool


class ScoreOptions(RowOptions, total=False):
    """Options of `score`.

    With `observe=False`, the rows are not live traffic: they raise no alerts, and the request may be repeated.
    """

    alpha: float
    extrapolated: bool
    observe: bool


class StreamOptions(ScoreOptions, total=False):
    """Options of `anomaly_stream`. `explain` is the number of features to report per row."""

    explain: int
    impute: bool
    time: str
    group: str


class AnomalyOptions(StreamOptions, total=False):
    """Options of `anomaly`."""

    fdr: float
    half_life: float
    half_life_rows: float
    detail: Literal["full", "none"]


class FeedbackOptions(CallOptions, total=False):
    """Options of `feedback`. Without rows, `group_name`, `since` and `until` choose rows that the server remembers."""

    group_name: str
    since: float | str
    until: float | str
    impute: bool
    time: str
    group: str


class BacktestOptions(CallOptions, total=False):
    """Options of `backtest`. `incidents` are known incidents, {"start": ..., "end": ..., "group": ...}."""

    alphas: Sequence[float]
    incidents: Sequence[Mapping[str, Any]]
    extrapolated: bool
    impute: bool
    time: str
    group: str
    drawings: bool


class PeersOptions(CallOptions, total=False):
    """Options of `peers`: how many groups to return, and how many features of each."""

    n: int
    explain: int
