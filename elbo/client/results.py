"""Results of the methods of the client.

In shapes, N is the number of rows, D of features and K of latents. Arrays are float32 unless their type says otherwise.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reply:
    """Fields of every response of a model.

    Args:
        model: name of the model that computed the response.
        version: version of that model.
        request_id: identifier of the request in the server's log.
        warning: a reason why the result may be meaningless, such as pixels in a wrong range; None if there is none.
    """

    model: str
    version: int
    request_id: str
    warning: str | None


@dataclass(frozen=True, slots=True)
class Encoded(Reply):
    """Latents [N, K] of rows, and their posterior standard deviations [N, K]; zeros for an autoencoder.

    `seed` is None unless the latents are samples. `imputed` is the number of missing values in the rows, which training
    medians replaced.
    """

    latents: Array
    std: Array
    seed: int | None
    imputed: int


@dataclass(frozen=True, slots=True)
class Decoded(Reply):
    """Rows [N, D] in raw units."""

    outputs: Array


@dataclass(frozen=True, slots=True)
class Reconstructed(Reply):
    """Reconstructed rows [N, D] in raw units, and the mean squared error [N] of each row in raw units squared.

    `imputed` is the number of missing values in the rows, which training medians replaced.
    """

    outputs: Array
    errors: Array
    imputed: int


@dataclass(frozen=True, slots=True)
class Sampled(Reply):
    """New rows [N, D] in raw units, their latents [N, K], and the seed that draws the same rows again.

    `conditions` has the levels of each row, [N], if the call had `condition`; otherwise, it is None.
    """

    outputs: Array
    latents: Array
    seed: int
    conditions: list[dict[str, str]] | None


@dataclass(frozen=True, slots=True)
class LatentPath(Reply):
    """The rows [N, D] in raw units along a path through the latent space, and their latents [N, K]."""

    outputs: Array
    latents: Array


@dataclass(frozen=True, slots=True)
class Imputed(Reply):
    """Complete rows [N, D] with the uncertainty of each value, all [N, D] in raw units.

    `std` is the standard deviation of an estimate, and 0 for a known value. `low` and `high` are the ends of a 90 %
    interval. `imputed` is the number of missing values.
    """

    outputs: Array
    std: Array
    low: Array
    high: Array
    imputed: int


@dataclass(frozen=True, slots=True)
class Neighbours(Reply):
    """The n held-out rows that are nearest to each of N rows, the nearest first.

    Args:
        indices: [N, n], the position of each neighbour among the held-out rows, as in `held_out()`, from 0.
        distances: [N, n], Euclidean distances between latents, without unit.
        usual_distance: median distance from a held-out row to the nearest other one; None if there is only one row.
        labels: [N, n], the labels of the neighbours; None if the training data had none.
        values: [N, n, D], the values of the neighbours in raw units, with None for a neighbour whose values are not in
            the artifact; None unless the call had `values=True`.
    """

    indices: npt.NDArray[np.int64]
    distances: Array
    usual_distance: float | None
    labels: list[list[str]] | None
    values: list[list[list[float | None] | None]] | None


@dataclass(frozen=True, slots=True)
class Scores(Reply):
    """Score, p-value and severity of each row, [N] each; NaN for rows that could not be scored."""

    score: Array
    p_value: Array
    severity: Array

    @property
    def is_anomaly(self) -> npt.NDArray[np.bool_]:
        """Whether each row is anomalous at the alpha of the request: its severity is above 1. [N]."""
        return self.severity > 1


@dataclass(frozen=True, slots=True)
class Contribution:
    """How much one feature contributes to the score of a row.

    Args:
        name: name of the feature, or of a column of text.
        value: its value in raw units, or the level of a column of text; None if it is missing.
        expected: the value that the model expects, in raw units, or the expected level of a column of text.
        contribution: squared distance between the two, in standard deviations of normal rows.
    """

    name: str
    value: float | str | None
    expected: float | str
    contribution: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one row.

    Args:
        row: index of the row, from 0.
        score: higher is more anomalous.
        p_value: the conformal p-value.
        severity: above 1 if and only if the row is anomalous at alpha.
        is_anomaly: the verdict. With a half-life, `fdr` or a silence, it may differ from `severity` > 1.
        features: the features that contribute most, largest contribution first.
        time: Unix time in seconds, if the row has a time.
        group: the group of the row, if it has one.
        fields: all fields of the verdict in the response, by name. Some models add fields, such as `state`.
    """

    row: int
    score: float
    p_value: float
    severity: float
    is_anomaly: bool
    features: tuple[Contribution, ...]
    time: float | None = None
    group: str | None = None
    fields: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class RowError:
    """A row that could not be scored. It does not affect the other rows.

    Args:
        row: index of the row, from 0.
        detail: what is wrong with the row.
        pointer: JSON pointer to the invalid value, such as "/records/3/cpu".
    """

    row: int
    detail: str
    pointer: str | None


@dataclass(frozen=True, slots=True)
class Verdicts(Reply):
    """The verdicts on the N rows of a request.

    Args:
        rows: N.
        anomalies: number of anomalous rows.
        failed: number of rows that could not be scored.
        unknown_fields: number of values whose name is not a feature.
        alpha: the false-alarm rate that decided.
        threshold: the score above which a row is anomalous; None if each group has its own, or if there are too few
            calibration rows for `alpha`.
        results: the verdicts on the rows that could be scored; empty with `detail="none"`.
        errors: the rows that could not be scored; empty with `detail="none"`.
    """

    rows: int
    anomalies: int
    failed: int
    unknown_fields: int
    alpha: float | None
    threshold: float | None
    results: tuple[Verdict, ...]
    errors: tuple[RowError, ...]

    def array(self, name: str) -> npt.NDArray[np.float64]:
        """Return "score", "p_value" or "severity" of each row, float64 [N]; NaN for rows that could not be scored."""
        values = np.full(self.rows, np.nan)
        for result in self.results:
            values[result.row] = getattr(result, name)
        return values

    @property
    def is_anomaly(self) -> npt.NDArray[np.bool_]:
        """Whether each row is anomalous, [N]; False for rows that could not be scored."""
        values = np.zeros(self.rows, np.bool_)
        values[[result.row for result in self.results if result.is_anomaly]] = True
        return values


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """The counts of a stream that has ended, and the model that judged its rows. See `Verdicts`."""

    model: str
    version: int
    rows: int
    anomalies: int
    failed: int
    unknown_fields: int
    warning: str | None


@dataclass(frozen=True, slots=True)
class FeedbackReply(Reply):
    """The changes that feedback has made.

    Args:
        verdict: the verdict of the request.
        groups: the change of each group, as the HTTP reference describes it.
        unused: number of rows without effect.
        errors: the rows that could not be scored.
    """

    verdict: str
    groups: tuple[dict[str, Any], ...]
    unused: int
    errors: tuple[RowError, ...]


@dataclass(frozen=True, slots=True)
class Peers(Reply):
    """How groups differ from their peers at one moment.

    A group differs if its `deviation` is above `limit`. `groups` has one object per group, as the HTTP reference
    describes it, with the most different group first. `time` is the moment, as Unix time in seconds. `compared` is the
    number of groups that were compared, and `others` the number of groups whose newest row is of another time.
    """

    time: float
    compared: int
    others: int
    limit: float
    groups: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class BacktestReply(Reply):
    """The report on a history, as the HTTP reference describes it."""

    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Model:
    """One model version that is served.

    `shape` is the shape of one row, `width` its number of values D, and `latents` is K. `features` has the names of the
    features in order; it is empty in the list of `models()`. `fields` has all fields of the response.
    """

    name: str
    version: int
    kind: str
    shape: tuple[int, ...]
    width: int
    latents: int
    features: tuple[str, ...]
    fields: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Models:
    """The models that are served, the name of the default model, and the artifacts that failed to load."""

    default: str | None
    models: tuple[Model, ...]
    failures: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class HeldOut(Reply):
    """The held-out rows in the artifact: latents [M, K] of the first M, and values [R, D] of the first R.

    `labels` has the numbers of the labels, [M]; None if the training data had no labels. `label_names` has the names of
    the labels 0, 1, and so on; None if they have no names.
    """

    latents: Array
    inputs: Array
    labels: tuple[int, ...] | None
    label_names: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class CalibrationScores(Reply):
    """Scores of the calibration set, ascending; of more than 2,000 scores, 2,000 evenly spaced ones.

    `rows` is the number of rows of the calibration set.
    """

    rows: int
    scores: Array
