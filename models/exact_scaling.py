"""Scalings of other libraries, computed in float64 and with exact inverses.

An `ExactScaling` converts float32 rows to float64, applies a map, and rounds once. `models.scaling.Scaling` computes in
float32 instead: with mean 1e6 and scale 1, it would lose all digits behind the point.
"""

import torch
from torch import Tensor, nn

from models.float64 import Float64Module
from models.scaling import Scaling

LIMIT = 1e18  # the largest result: its square is finite in float32
SMALLEST = 1.1754943508222875e-38  # the smallest positive normal number of float32
NEARLY_ZERO = 2.220446049250313e-16  # a smaller |power| counts as 0, as in scikit-learn


class ExactScaling(Scaling):
    """A map between raw units and model units in float64. Results beyond ±LIMIT are clamped to ±LIMIT.

    `shift` and `scale` are those of the map if it is affine. Otherwise, they describe it near the centre of the rows:
    `shift` is the raw value of 0 model units, and `scale` is half the distance between the raw values of 1 and -1.

    Args:
        map: a module like `Affine`, with `forward` and `inverse`, float64 [B, D].
        width: the number of features, D.
    """

    def __init__(self, map: nn.Module, width: int) -> None:  # noqa: A002 - the word of the field
        with torch.no_grad():
            one = torch.ones(1, width, dtype=torch.float64)
            low, centre, high = map.inverse(-one), map.inverse(0.0 * one), map.inverse(one)  # type: ignore[operator]
        shift = centre[0].clamp(-LIMIT, LIMIT)
        super().__init__(shift.float(), ((high - low)[0] / 2.0).clamp(1.0 / LIMIT, LIMIT).float())
        self.map = map
        self.limit = LIMIT  # TorchScript reads no numbers of the module file

    def forward(self, x: Tensor) -> Tensor:
        """Convert x [B, D] from raw units to model units."""
        u: Tensor = self.map(x.to(torch.float64))  # [B, D]
        return u.clamp(-self.limit, self.limit).to(torch.float32)

    def inverse(self, u: Tensor) -> Tensor:
        """Convert u [B, D] from model units to raw units."""
        x: Tensor = self.map.inverse(u.to(torch.float64))  # type: ignore[operator]
        return x.clamp(-self.limit, self.limit).to(torch.float32)


class Affine(Float64Module):
    """The map u = (x - shift) / scale.

    Args:
        shift: offset per feature, float64 [D].
        scale: positive scale per feature, float64 [D].
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return u [B, D] for x [B, D]."""
        return (x - self.shift) / self.scale

    def inverse(self, u: Tensor) -> Tensor:
        """Return x [B, D] for u [B, D]."""
        return u * self.scale + self.shift


class Clip(nn.Module):
    """The map that moves values into [low, high]. Its inverse changes nothing, as in scikit-learn's MinMaxScaler.

    Args:
        low: the smallest result.
        high: the largest result.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low = low
        self.high = high

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, D], clipped."""
        return x.clamp(self.low, self.high)

    def inverse(self, u: Tensor) -> Tensor:
        """Return u [B, D]."""
        return u


class Chain(nn.Module):
    """The map that applies `first` and then `second`."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        """Return u [B, D] for x [B, D]."""
        u: Tensor = self.second(self.first(x))
        return u

    def inverse(self, u: Tensor) -> Tensor:
        """Return x [B, D] for u [B, D]."""
        x: Tensor = self.first.inverse(self.second.inverse(u))  # type: ignore[operator]
        return x


class Power(Float64Module):
    """The map x -> ((1 + x)^power - 1) / power for x >= 0, and log(1 + x) for power 0.

    The inverse of a value that the map never gives, which is above -1 / power for a negative power, is very large.

    Args:
        power: the power of each feature, float64 [D].
    """

    power: Tensor
    divisor: Tensor
    logarithmic: Tensor

    def __init__(self, power: Tensor) -> None:
        super().__init__()
        logarithmic = power.abs() < NEARLY_ZERO
        self.register_buffer("logarithmic", logarithmic)
        self.register_buffer("power", torch.where(logarithmic, 0.0, power))
        self.register_buffer("divisor", torch.where(logarithmic, 1.0, power))
        self.lowest = NEARLY_ZERO - 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Return u [B, D] for x [B, D]."""
        return self.of_logarithm(torch.log1p(x))

    def of_logarithm(self, logarithm: Tensor) -> Tensor:
        """Return u [B, D] for log(1 + x) [B, D]."""
        return torch.where(self.logarithmic, logarithm, expm1(self.power * logarithm) / self.divisor)

    def logarithm(self, u: Tensor) -> Tensor:
        """Return log(1 + x) [B, D] for u [B, D]."""
        inner = torch.log1p((self.power * u).clamp(min=self.lowest)) / self.divisor
        return torch.where(self.logarithmic, u, inner)

    def inverse(self, u: Tensor) -> Tensor:
        """Return x [B, D] for u [B, D]."""
        return expm1(self.logarithm(u))


class YeoJohnson(nn.Module):
    """The power transform of Yeo & Johnson (2000, "A new family of power transformations", eq. 2.1).

    Args:
        power: the power of each feature, lambda, float64 [D].
    """

    def __init__(self, power: Tensor) -> None:
        super().__init__()
        self.positive = Power(power)
        self.negative = Power(2.0 - power)

    def forward(self, x: Tensor) -> Tensor:
        """Return u [B, D] for x [B, D]."""
        of_positive, of_negative = self.positive(x.clamp(min=0.0)), self.negative((-x).clamp(min=0.0))
        return torch.where(x >= 0.0, of_positive, -of_negative)

    def inverse(self, u: Tensor) -> Tensor:
        """Return x [B, D] for u [B, D]."""
        positive, negative = self.positive.inverse(u.clamp(min=0.0)), self.negative.inverse((-u).clamp(min=0.0))
        return torch.where(u >= 0.0, positive, -negative)


class BoxCox(nn.Module):
    """The power transform of Box & Cox (1964): (x^power - 1) / power for x > 0, and log(x) for power 0.

    A value that is not positive counts as SMALLEST, so a row with such a value is far from every row of training.

    Args:
        power: the power of each feature, lambda, float64 [D].
    """

    def __init__(self, power: Tensor) -> None:
        super().__init__()
        self.power = Power(power)
        self.smallest = SMALLEST

    def forward(self, x: Tensor) -> Tensor:
        """Return u [B, D] for x [B, D]."""
        return self.power.of_logarithm(torch.log(x.clamp(min=self.smallest)))

    def inverse(self, u: Tensor) -> Tensor:
        """Return x [B, D] for u [B, D]."""
        return torch.exp(self.power.logarithm(u))


def expm1(x: Tensor) -> Tensor:
    """Return exp(x) - 1, accurate also near 0, from operators that ONNX has, too."""
    small = torch.tanh(0.5 * x.clamp(-1.0, 1.0))
    return torch.where(x.square() < 1.0, 2.0 * small / (1.0 - small), torch.exp(x) - 1.0)
