"""Options of the methods of the client. Except for `model` and `timeout`, they are the options of the HTTP API.

`/openapi.json` of a server, and its page `/docs`, describe their limits and defaults.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

Condition = Mapping[str, str | int | float | bool | None]


class CallOptions(TypedDict, total=False):
    """Options of every method.

    `model` is a name or name@version, in place of the client's. `timeout` is the limit in seconds for the call, with
    all its requests and attempts; None for no limit.
    """

    model: str
    timeout: float | None


class RowOptions(CallOptions, total=False):
    """Options of methods that take rows or latents.

    `condition` is one condition for all rows, or a list with one per row, for models trained with --condition. A
    condition is a mapping such as {"label": "7"}.
    """

    condition: Condition | Sequence[Condition]


class EncodeOptions(RowOptions, total=False):
    """Options of `encode`. With `sample`, the latents are drawn from the posterior, by `seed`."""

    sample: bool
    seed: int


class SampleOptions(RowOptions, total=False):
    """Options of `sample`.

    `temperature` is a factor of the noise. `noise` says whether rows have observation noise. `given` has the values of
    some features, by name, or as a row with None for the others. `near` is {"input": row} or {"latent": vector}: the
    latents of the samples scatter around it, by `spread` times as much as without `near`.
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
    """Options of `edit`.

    The direction leads from the mean latents of the rows with the label `away_from`, by default of all other rows, to
    those of the rows with the label `direction`. `amount` 1 is the distance between the two.
    """

    away_from: str
    amount: float
    steps: int
    condition: Condition


class NeighbourOptions(RowOptions, total=False):
    """Options of `neighbours`: `n` is the number of neighbours per row. With `values`, the result has their values."""

    n: int
    values: bool


class ScoreOptions(RowOptions, total=False):
    """Options of `score`.

    `alpha` is the false-alarm rate that you accept. With `extrapolated`, rows may be anomalous at an alpha below the
    smallest p-value, without a guarantee. With `observe=False`, the rows are not live traffic: they raise no alerts,
    and the request may be repeated.
    """

    alpha: float
    extrapolated: bool
    observe: bool


class StreamOptions(ScoreOptions, total=False):
    """Options of `anomaly_stream`.

    `explain` is the number of features to report per row. `impute` says whether a record may lack features. `time` and
    `group` are the names of the fields that have the time and the group of a row.
    """

    explain: int
    impute: bool
    time: str
    group: str


class AnomalyOptions(StreamOptions, total=False):
    """Options of `anomaly`.

    `fdr` is a false discovery rate, which decides in place of `alpha`. `half_life`, in seconds, and `half_life_rows`
    smooth the severity of each group. With `detail="none"`, the result has only the counts.
    """

    fdr: float
    half_life: float
    half_life_rows: float
    detail: Literal["full", "none"]


class FeedbackOptions(CallOptions, total=False):
    """Options of `feedback`.

    Without rows, `group_name`, `since` and `until` choose rows that the server remembers. A time is Unix time or ISO
    8601.
    """

    group_name: str
    since: float | str
    until: float | str
    impute: bool
    time: str
    group: str


class BacktestOptions(CallOptions, total=False):
    """Options of `backtest`.

    `alphas` are the false-alarm rates to compare. `incidents` are known incidents, {"start": ..., "end": ...,
    "group": ...}. With `drawings`, the report has drawings of the groups and the worst alerts.
    """

    alphas: Sequence[float]
    incidents: Sequence[Mapping[str, Any]]
    extrapolated: bool
    impute: bool
    time: str
    group: str
    drawings: bool


class PeersOptions(CallOptions, total=False):
    """Options of `peers`: the largest number of groups to return, and of features to report for each."""

    n: int
    explain: int
