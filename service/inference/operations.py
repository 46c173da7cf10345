"""The operations that the endpoints run on a model.

The first dimension of every tensor counts rows, so that the rows of several requests can share a batch. The letters in
shapes mean: B rows, D features, K latents, P parts of the score. A model with a window takes windows [B, N, D] in place
of rows x [B, D]; its outputs have the same shapes, for the newest row of each window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models import artifact
from models.manifest import reaches
from service.inference.calibration import Calibration

MAX_IMPUTED_ROWS = 64  # rows in one run of IMPUTE, which then takes at most 0.1 s, except for large networks
MAX_IMPUTED_VALUES = 1 << 18  # values in one run of IMPUTE, which allocates 64 numbers for each value: 64 MB
MAX_DRAW_VALUES = 1 << 20  # numbers for which one call of `draw` may allocate memory: 4 MB
Tensors = tuple[Tensor, ...]  # each [B, ...]
Arrays = tuple[npt.NDArray[np.float32], ...]  # each [B, ...]


@dataclass(frozen=True, eq=False)  # every request hashes an operation, and hashing by identity is faster
class Operation:
    """A function that takes a model's module and tensors of rows.

    Args:
        name: the value of the metric label `operation`.
        function: called with the module and the inputs, each [B, ...]; returns the outputs, each [B, ...].
        batched: whether requests may share a batch. False if the outputs must be reproducible to the last bit: the last
            bit of a sum can depend on the size of the batch.
        onnx_method: the name of the graph that computes the whole operation in the ONNX twin, the copy of the networks
            for ONNX Runtime; empty if there is no such graph.
        for_gaps: the operation that does the same for rows with missing values, which are NaN; None if there is none.
    """

    name: str
    function: Callable[..., Tensors]
    batched: bool = True
    onnx_method: str = ""
    for_gaps: "Operation | None" = None

    def finish(self, outputs: Arrays, calibration: Calibration) -> Arrays:  # noqa: ARG002 - for subclasses
        """Return the results of the operation, computed from the outputs of `function`."""
        return outputs


@dataclass(frozen=True, eq=False)
class AnomalyOperation(Operation):
    """An operation that scores rows, and adds p-values and severities.

    Args:
        alpha: the false-alarm rate.
        extrapolated: whether a row may be anomalous although alpha is below the smallest possible p-value.
    """

    alpha: float = 0.05
    extrapolated: bool = False

    def finish(self, outputs: Arrays, calibration: Calibration) -> Arrays:
        """Insert p-values [B] and severities [B] after the scores [B]."""
        score, *explanation = outputs
        severity = calibration.severity(score, self.alpha)
        if not self.extrapolated and not reaches(calibration.floor, self.alpha):
            severity = np.minimum(severity, np.float32(1))  # no row is anomalous
        return score, calibration.p_value(score), severity, *explanation


def _encode(module: Any, x: Tensor) -> Tensors:
    mean, std = module.encode(x)
    return mean, std


def _decode(module: Any, z: Tensor) -> Tensors:
    return (module.decode(z),)


def _reconstruct(module: Any, x: Tensor) -> Tensors:
    return artifact.reconstruct(module, x, gaps=False)


def _reconstruct_gaps(module: Any, x: Tensor) -> Tensors:
    return artifact.reconstruct(module, x, gaps=True)


def _sample(module: Any, noise: Tensor, choice: Tensor) -> Tensors:
    z = _draw(module, noise, choice)
    return z, module.decode(z)


def _draw(module: Any, noise: Tensor, choice: Tensor) -> Tensor:
    """Draw latents [B, K] in parts, because `draw` needs memory for K x K numbers per row."""
    rows, latents = noise.shape
    if rows * latents * latents <= MAX_DRAW_VALUES:
        drawn: Tensor = module.draw(noise, choice)
        return drawn
    most = max(1, MAX_DRAW_VALUES // (latents * latents))
    parts = zip(noise.split(most), choice.split(most), strict=True)
    return torch.cat([module.draw(*part) for part in parts])


def _draw_latents(module: Any, noise: Tensor, choice: Tensor) -> Tensors:
    return (_draw(module, noise, choice),)


def _sample_rows(module: Any, noise: Tensor, choice: Tensor, row_noise: Tensor) -> Tensors:
    z, x_hat = _sample(module, noise, choice)
    return z, module.observe(x_hat, row_noise)


def _sample_standard(module: Any, noise: Tensor, choice: Tensor) -> Tensors:  # noqa: ARG001 - inputs of SAMPLE
    return noise, module.decode(noise)


def _sample_standard_rows(module: Any, noise: Tensor, choice: Tensor, row_noise: Tensor) -> Tensors:
    z, x_hat = _sample_standard(module, noise, choice)
    return z, module.observe(x_hat, row_noise)


def _complete(module: Any, noise: Tensor, choice: Tensor, row_noise: Tensor, x: Tensor) -> Tensors:
    z, x_hat, rows = module.complete(x[:1], noise, choice, row_noise)
    return z, x_hat, rows


def _impute(module: Any, x: Tensor) -> Tensors:
    mean, deviation, low, high = module.impute(x)
    return mean, deviation, low, high


def _score(module: Any, x: Tensor) -> Tensors:
    score, parts, contribution, expected = module.score(x)
    return score, parts, contribution, expected


def _score_gaps(module: Any, x: Tensor) -> Tensors:
    score, parts, contribution, expected = module.score_gaps(x)
    return score, parts, contribution, expected


ENCODE = Operation("encode", _encode, onnx_method="encode")  # x [B, D] -> mean [B, K], std [B, K]
DECODE = Operation("decode", _decode, onnx_method="decode")  # z [B, K] -> x_hat [B, D]
SAMPLE = Operation("sample", _sample, batched=False)  # noise [B, K], choice [B] -> z [B, K], x_hat [B, D]

# noise [B, K], choice [B], row_noise [B, D] -> z [B, K], x [B, D]
SAMPLE_ROWS = Operation("sample", _sample_rows, batched=False)

# Samples whose latents are the noise, with the same inputs and outputs as SAMPLE and SAMPLE_ROWS.
SAMPLE_STANDARD = Operation("sample", _sample_standard, batched=False)
SAMPLE_STANDARD_ROWS = Operation("sample", _sample_standard_rows, batched=False)


# Latents of samples: noise [B, K], choice [B] -> z [B, K]
DRAW = Operation("draw", _draw_latents, batched=False)

# Samples with given values: noise [B, K], choice [B], row_noise [B, 2 D], and the same x [B, D] in each row, with NaN
# for the values to draw -> z [B, K], x_hat [B, D] without observation noise, rows [B, D] with it.
COMPLETE = Operation("complete", _complete, batched=False)

# x [B, D] with NaN -> four arrays [B, D]: the rows without NaN, the standard deviation of each value, and the lower and
# the upper end of its interval. Not batched, because requests with many rows run in parts of `imputed_rows`, each of
# which lets other requests pass.
IMPUTE = Operation("impute", _impute, batched=False)


def imputed_rows(width: int) -> int:
    """Return how many rows of `width` features one run of IMPUTE may have."""
    return max(1, min(MAX_IMPUTED_ROWS, MAX_IMPUTED_VALUES // width))


class Run(NamedTuple):
    """One of the runs that together compute an operation for rows of which some have missing values."""

    operation: Operation
    places: npt.NDArray[np.intp]  # which rows it computes


def split_by_gaps(operation: Operation, x: npt.NDArray[np.float32]) -> list[Run]:
    """Return the runs of `operation` for rows x [B, D]: one for the complete rows, and short ones for the others."""
    assert operation.for_gaps is not None
    has_gaps = np.isnan(x).any(axis=1)  # [B]
    complete, incomplete = np.flatnonzero(~has_gaps), np.flatnonzero(has_gaps)
    most = imputed_rows(x.shape[1])
    parts = [incomplete[start : start + most] for start in range(0, len(incomplete), most)]
    return [Run(operation, complete)] * bool(len(complete)) + [Run(operation.for_gaps, places) for places in parts]


def in_order(runs: Sequence[Run], outputs: Sequence[Arrays]) -> Arrays:
    """Return the outputs [B, ...] of the runs of `split_by_gaps` in the order of the rows."""
    order = np.concatenate([run.places for run in runs]).argsort()
    return tuple(np.concatenate(arrays)[order] for arrays in zip(*outputs, strict=True))


# For rows that the online calibration of their group judges.
# x [B, D] -> score [B], parts [B, P], contribution [B, D], expected [B, D]
# Rows with missing values are not batched, for the same reason as those of IMPUTE.
SCORE = Operation(
    "anomaly", _score, onnx_method="score", for_gaps=Operation("anomaly_gaps", _score_gaps, batched=False)
)


@lru_cache(maxsize=64)  # requests share a batch only if their operation is the same object
def anomaly(alpha: float, extrapolated: bool = False) -> Operation:
    """Return the operation that scores x [B, D]. The severities are for the false-alarm rate `alpha`.

    If `alpha` is below the smallest possible p-value, severities are at most 1, so that no row is anomalous, unless
    `extrapolated` is true.

    It returns six arrays: score [B], p_value [B], severity [B], parts [B, P], contribution [B, D], expected [B, D].
    """
    of_gaps = AnomalyOperation("anomaly_gaps", _score_gaps, batched=False, alpha=alpha, extrapolated=extrapolated)
    return AnomalyOperation(
        "anomaly", _score, onnx_method="score", for_gaps=of_gaps, alpha=alpha, extrapolated=extrapolated
    )


@lru_cache(maxsize=2)
def reconstruct(gaps: bool) -> Operation:
    """Return the operation that reconstructs x [B, D].

    It returns two arrays: the reconstruction [B, D] and the mean squared error [B]. If `gaps` is true, x may contain
    NaN, and the error is the mean over the values that are present.
    """
    return Operation("reconstruct", _reconstruct_gaps if gaps else _reconstruct, onnx_method="reconstruct")
