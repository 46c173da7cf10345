"""The networks of encoders and decoders. In shapes, B is the number of rows; images have H x W pixels and C colours."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(sizes: Sequence[int], activation: str = "silu") -> nn.Sequential:
    """Return a multilayer perceptron from [B, sizes[0]] to [B, sizes[-1]].

    `activation` follows each linear layer except the last; with two sizes, the network is one linear map.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def conv_encoder(
    shape: Sequence[int], channels: Sequence[int], outputs: int, activation: str = "silu", dense: Sequence[int] = ()
) -> nn.Sequential:
    """Return a convolutional encoder from rows [B, H * W * C] to [B, outputs].

    Args:
        shape: shape of one row as an image: [H, W], or [H, W, C] with the colours last.
        channels: number of output channels of each convolution. Each convolution halves height and width, rounded up.
        outputs: width of the output.
        activation: a key of ACTIVATIONS.
        dense: hidden widths of the perceptron after the convolutions. Without `channels` and `dense`, the network is
            one linear map.
    """
    colours, sizes = _colours(shape), _sizes(shape, len(channels))
    layers: list[nn.Module] = [ToPicture(*sizes[0], colours)]  # [B, C, H, W]
    for inputs, filters in pairwise([colours, *channels]):
        layers += [nn.Conv2d(inputs, filters, 3, stride=2, padding=1), ACTIVATIONS[activation]()]  # [B, filters, h, w]
    deepest, (height, width) = [colours, *channels][-1], sizes[-1]
    return nn.Sequential(*layers, nn.Flatten(), *mlp([deepest * height * width, *dense, outputs], activation))


def conv_decoder(
    shape: Sequence[int], channels: Sequence[int], latents: int, activation: str = "silu", dense: Sequence[int] = ()
) -> nn.Sequential:
    """Return a decoder from [B, latents] to [B, H * W * C] that mirrors the layers of `conv_encoder`.

    `latents` is the width of the decoder's input. The other arguments are those of `conv_encoder`. The last layer has
    no activation.
    """
    colours, sizes = _colours(shape), _sizes(shape, len(channels))
    deepest, (height, width) = [colours, *channels][-1], sizes[-1]
    layers: list[nn.Module] = [
        *mlp([latents, *reversed(dense), deepest * height * width], activation),  # [B, deepest * h * w]
        nn.Unflatten(1, (deepest, height, width)),  # [B, deepest, h, w]
    ]
    stages = pairwise([*reversed(channels), colours])
    for (inputs, filters), (height, width) in zip(stages, reversed(sizes[:-1]), strict=True):
        # A transposed convolution turns n lines of pixels into 2 n - 1. An even size needs one more line.
        even = (1 - height % 2, 1 - width % 2)
        transposed = nn.ConvTranspose2d(inputs, filters, 3, stride=2, padding=1, output_padding=even)
        layers += [ACTIVATIONS[activation](), transposed]  # [B, filters, height, width]
    return nn.Sequential(*layers, ToRow())  # [B, H * W * C]


class AddLevels(nn.Module):
    """Add to each image the learnt images of its levels, so that convolutions see the condition.

    Args:
        width: number of values of an image, D.
        levels: number of values of a condition, C.
    """

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.width = width
        self.levels = nn.Linear(levels, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sums [B, D], for images that are followed by their conditions, x [B, D + C]."""
        images: Tensor = x[:, : self.width] + self.levels(x[:, self.width :])  # [B, D]
        return images


class ToPicture(nn.Module):
    """Reshape rows, in which the colours are the last index, to images."""

    def __init__(self, height: int, width: int, colours: int) -> None:
        super().__init__()
        self.height, self.width, self.colours = height, width, colours

    def forward(self, x: Tensor) -> Tensor:
        """Return images [B, C, H, W] for rows x [B, H * W * C]."""
        return x.reshape(-1, self.height, self.width, self.colours).permute(0, 3, 1, 2)  # [B, C, H, W]


class ToRow(nn.Module):
    """Flatten images to rows, in which the colours are the last index."""

    def forward(self, x: Tensor) -> Tensor:
        """Return rows [B, H * W * C] for images x [B, C, H, W]."""
        return x.permute(0, 2, 3, 1).flatten(1)  # [B, H * W * C]


def _colours(shape: Sequence[int]) -> int:
    return shape[2] if len(shape) == 3 else 1


def _sizes(shape: Sequence[int], stages: int) -> list[tuple[int, int]]:
    """Return the height and width of the input, followed by those of the output of each convolution."""
    return [(-(-shape[0] // 2**stage), -(-shape[1] // 2**stage)) for stage in range(stages + 1)]
