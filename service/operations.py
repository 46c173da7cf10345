"""What a model can be asked to compute: functions of rows, which the engine may batch.

They are written so that a module of tensors can be asked, and one of NumPy's arrays: for few rows these cost less.
B rows, D features, K latents, P parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Outputs = tuple[Any, ...]  # tensors or arrays, each [B, ...]


@dataclass(frozen=True)
class Operation:
    """A function of a model's module and rows.

    Args:
        name: for metrics.
        function: called with the module, then the rows, then `arguments`.
        merges: whether requests may share a batch. A sum's last bit may depend on the batch's size, so what must be
            exact to the bit does not.
        arguments: numbers that a whole batch has in common.
    """

    name: str
    function: Callable[..., Outputs]
    merges: bool = True
    arguments: tuple[float, ...] = ()


def _encode(module: Any, x: Any) -> Outputs:
    mean, std = module.encode(x)
    return mean, std


def _decode(module: Any, z: Any) -> Outputs:
    return (module.decode(z),)


def _reconstruct(module: Any, x: Any) -> Outputs:
    x_hat = module(x)
    off = x_hat - x  # [B, D]
    return x_hat, (off * off).sum(1) / x.shape[1]


def _reconstruct_gaps(module: Any, x: Any) -> Outputs:
    x_hat, there = module(x), x == x  # [B, D], [B, D]
    off = x_hat - x  # [B, D]
    off[~there] = 0.0
    return x_hat, (off * off).sum(1) / there.sum(1)


def _sample(module: Any, noise: Any, choice: Any) -> Outputs:
    z = module.draw(noise, choice)
    return z, module.decode(z)


def _anomaly(module: Any, x: Any, alpha: float) -> Outputs:
    score, *explained = module.score(x)
    return score, module.p_value(score), module.severity(score, alpha), *explained


ENCODE = Operation("encode", _encode)  # x [B, D] -> mean [B, K], std [B, K]
DECODE = Operation("decode", _decode)  # z [B, K] -> x_hat [B, D]
SAMPLE = Operation("sample", _sample, merges=False)  # noise [B, K], choice [B] -> z [B, K], x_hat [B, D]


def anomaly(alpha: float) -> Operation:
    """x [B, D] -> score, p_value and severity, each [B]; parts [B, P]; contribution and expected, each [B, D]."""
    return Operation("anomaly", _anomaly, arguments=(alpha,))


def reconstruct(gaps: bool) -> Operation:
    """x [B, D] -> x_hat [B, D], mean squared error [B], with `gaps` of the values that are there."""
    return Operation("reconstruct", _reconstruct_gaps if gaps else _reconstruct)
