"""The verdicts of a model on rows."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Contribution:
    """How much one feature contributes to the score of a row.

    Args:
        name: name of the feature.
        value: its value in raw units; NaN if it is missing. For a column of text, its level; None if it is missing or
            unknown.
        expected: the value that the model expects, in raw units; for a column of text, the expected level.
        contribution: squared distance between the two, in standard deviations of normal rows.
    """

    name: str
    value: float | str | None
    expected: float | str | None
    contribution: float


@dataclass(frozen=True)
class Verdict:
    """The verdict on one row: a result of `POST /anomaly`.

    Args:
        row: number of the row, from 0.
        score: how anomalous the row is; the higher, the more anomalous.
        p_value: (1 + calibration scores that are at least as high) / (1 + calibration scores).
        severity: above 1 if and only if the row is anomalous.
        is_anomaly: whether the row is anomalous at alpha.
        parts: the parts of the score by name; their sum is the score.
        features: the features that contribute most, largest first.
    """

    row: int
    score: float
    p_value: float
    severity: float
    is_anomaly: bool
    parts: dict[str, float]
    features: list[Contribution]


@dataclass(frozen=True)
class Verdicts:
    """The verdicts on all rows, as arrays [B].

    Args:
        score: how anomalous each row is; the higher, the more anomalous. NaN if the model overflows for the row.
        p_value: (1 + calibration scores that are at least as high) / (1 + calibration scores).
        severity: above 1 if and only if the row is anomalous at alpha, unless a silence of the policy holds for it.
        is_anomaly: whether the row is anomalous at alpha.
    """

    score: npt.NDArray[np.float32]
    p_value: npt.NDArray[np.float32]
    severity: npt.NDArray[np.float32]
    is_anomaly: npt.NDArray[np.bool_]
