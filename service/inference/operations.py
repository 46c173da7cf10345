"""What a model can be asked to compute: functions of tensors with rows first, which the batcher may batch.

B rows, D features, K latents, P parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from models import artifact
from service.inference.calibration import ByModule, Calibration

Outputs = tuple[Tensor, ...]  # each [B, ...]
Arrays = tuple[npt.NDArray[np.float32], ...]  # the same


@dataclass(frozen=True, eq=False)  # itself alone its equal: it is a key, and hashing its fields costs what a row does
class Operation:
    """A function of a model's module and row tensors.

    Args:
        name: for metrics.
        function: called with the module, then the rows.
        merges: whether requests may share a batch. A sum's last bit may depend on the batch's size, so what must be
            exact to the bit does not.
        arguments: numbers that a whole batch has in common.
        graph: of the twin, which computes all of it in one run.
        finish: what becomes of the outputs, with the model's calibration and `arguments`, if anything.
    """

    name: str
    function: Callable[..., Outputs]
    merges: bool = True
    arguments: tuple[float, ...] = ()
    graph: str = ""
    finish: Callable[..., Arrays] | None = None


def _encode(module: Any, x: Tensor) -> Outputs:
    mean, std = module.encode(x)
    return mean, std


def _decode(module: Any, z: Tensor) -> Outputs:
    return (module.decode(z),)


def _reconstruct(module: Any, x: Tensor) -> Outputs:
    return artifact.reconstruct(module, x, gaps=False)


def _reconstruct_gaps(module: Any, x: Tensor) -> Outputs:
    return artifact.reconstruct(module, x, gaps=True)


def _sample(module: Any, noise: Tensor, choice: Tensor) -> Outputs:
    z = module.draw(noise, choice)
    return z, module.decode(z)


def _score(module: Any, x: Tensor) -> Outputs:
    score, *explained = module.score(x)
    return score, *explained


def _judged(calibration: Calibration | ByModule, scored: Arrays, alpha: float) -> Arrays:
    score, *explained = scored
    return score, calibration.p_value(score), calibration.severity(score, alpha), *explained


ENCODE = Operation("encode", _encode, graph="encode")  # x [B, D] -> mean [B, K], std [B, K]
DECODE = Operation("decode", _decode, graph="decode")  # z [B, K] -> x_hat [B, D]
SAMPLE = Operation("sample", _sample, merges=False)  # noise [B, K], choice [B] -> z [B, K], x_hat [B, D]


@lru_cache(maxsize=64)  # one object is found in the queue at once
def anomaly(alpha: float) -> Operation:
    """x [B, D] -> score, p_value and severity, each [B]; parts [B, P]; contribution and expected, each [B, D]."""
    return Operation("anomaly", _score, arguments=(alpha,), graph="score", finish=_judged)


@lru_cache(maxsize=2)
def reconstruct(gaps: bool) -> Operation:
    """x [B, D] -> x_hat [B, D], mean squared error [B], with `gaps` of the values that are there."""
    return Operation("reconstruct", _reconstruct_gaps if gaps else _reconstruct, graph="reconstruct")
