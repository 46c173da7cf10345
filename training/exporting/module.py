"""A published model as one module in Python, from rows in raw units to scores and p-values.

`torch.export` and the ONNX exporter follow Python, not TorchScript. The operators of the artifact's TorchScript are
therefore run one by one in Python.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.manifest import Manifest
from training.adoption.scripted import run_method

SHAPES = {
    "x_hat": "D", "mean": "K", "std": "K", "score": "", "p_value": "", "parts": "P", "contribution": "D",
    "expected": "D",
}  # fmt: skip
LATENT_OUTPUTS = ("mean", "std")


class Weights(nn.Module):
    """The weights and the constants of a scripted module under the same names, as a Python module.

    Args:
        script: the scripted module, on the CPU.
    """

    def __init__(self, script: Any) -> None:
        super().__init__()
        object.__setattr__(self, "_script", script)
        for name, tensor in [*script.named_parameters(recurse=False), *script.named_buffers(recurse=False)]:
            self._buffers[name] = tensor.detach().clone()  # register_buffer would find the scripted module's own
        for name, child in script.named_children():
            self._modules[name] = Weights(child)

    def __getattr__(self, name: str) -> Any:
        """Return a weight or a part, or else the constant `name` of the scripted module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_script"], name)


class WholeModel(nn.Module):
    """Every output of a model for rows, in the order of `outputs`.

    Args:
        script: the module of the artifact, thawed.
        manifest: its manifest.
        scores: the calibration scores in ascending order, if p-values must do without torch.searchsorted, which ONNX
            does not have.
    """

    def __init__(self, script: torch.jit.ScriptModule, manifest: Manifest, scores: Tensor | None = None) -> None:
        super().__init__()
        self.weights = Weights(script)
        self.outputs = outputs_of(manifest)
        object.__setattr__(self, "_script", script)
        self._searches = scores is None
        if scores is not None:
            self.rows = len(scores)
            size = 1 << self.rows.bit_length()  # the next power of two, so that every search takes the same steps
            padded = torch.full((size,), torch.inf, dtype=scores.dtype)
            padded[: self.rows] = scores
            self.register_buffer("padded", padded)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs [B, ...] for rows x [B, D], or windows x [B, N, D]."""
        mean, std = self._run("encode", x)
        score, parts, contribution, expected = self._run("score", x)
        p_value = self._run("p_value", score) if self._searches else self.p_value(score)
        found = {
            "x_hat": self._run("decode", mean), "mean": mean, "std": std, "score": score, "p_value": p_value,
            "parts": parts, "contribution": contribution, "expected": expected,
        }  # fmt: skip
        return tuple(found[name] for name in self.outputs)

    def _run(self, method: str, *inputs: Tensor) -> Any:
        return run_method(self.__dict__["_script"], method, self.weights, *inputs)

    def p_value(self, score: Tensor) -> Tensor:
        """Return the p-values [B] of scores [B]: `models.calibration.Calibration.p_value`, as a binary search."""
        padded: Any = self.padded
        below = torch.zeros_like(score, dtype=torch.int64)  # [B], number of calibration scores < score found so far
        step = len(padded) // 2
        while step:
            candidate = padded[below + (step - 1)]  # [B]
            below = below + step * torch.logical_not(candidate >= score).to(torch.int64)  # NaN counts as the largest
            step //= 2
        at_least = (self.rows - below.clamp(max=self.rows)).to(score.dtype)
        return (at_least + 1.0) / float(self.rows + 1)


def outputs_of(manifest: Manifest) -> tuple[str, ...]:
    """Return the names of the outputs of a model."""
    return tuple(name for name in SHAPES if not (manifest.only_reconstructs and name in LATENT_OUTPUTS))


def output_shapes(manifest: Manifest) -> Mapping[str, list[int]]:
    """Return the lengths of each output after the number of rows. The latents of a row end with its condition."""
    latents = manifest.latents + manifest.condition_width
    lengths = {"D": [manifest.width], "K": [latents], "P": [len(manifest.parts)], "": []}
    return {name: lengths[SHAPES[name]] for name in outputs_of(manifest)}


def input_shape(manifest: Manifest) -> list[int]:
    """Return the lengths of a row with its condition, or of a window."""
    width = manifest.width + manifest.condition_width
    return [width] if manifest.window is None else [manifest.window.rows, width]
