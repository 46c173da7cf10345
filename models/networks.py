"""The networks that encoders and decoders are made of."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """A multilayer perceptron, [B, sizes[0]] to [B, sizes[-1]]: SiLU between its linear layers, none at its end.

    With two sizes it is one linear map.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
