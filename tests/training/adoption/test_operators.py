"""Each name that adopted models may use is needed, and operators that do not check their arguments are rewritten."""

import ast
import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, ones
from torch.nn import functional

from models import allowed_code
from models.code_check import check_code
from training.adoption.copying import copy_module
from training.adoption.draws import without_noise
from training.adoption.inspection import inspect_module
from training.adoption.tracing import compile_functions

Function = Callable[[Tensor], Tensor]
ROWS = 20


class Applied(nn.Module):
    """A module that applies a function, or layers, to rows in a shape."""

    def __init__(self, function: Function, *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Layers(nn.Module):
    """Layers one after the other, of which a recurrent layer gives its outputs."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            found = layer(x)
            x = found[0] if isinstance(found, tuple) else found
        return x


class Attention(nn.Module):
    """Self-attention of one layer, with the mask of a language model."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.masked else None
        found: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=self.masked)[0]
        return found


class Cells(nn.Module):
    """An LSTM cell and a GRU cell in a loop of Python over the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden, memory = torch.zeros(x.shape[0], 4), torch.ones(x.shape[0], 4)
        third, outputs = torch.full((x.shape[0], 4), 0.5), []
        for step in range(x.shape[1]):
            hidden, memory = self.lstm(x[:, step], (hidden, memory))
            third = self.rnn(self.gru(hidden, third), third)
            outputs.append(third)
        return torch.stack(outputs, dim=1)


def sums(x: Tensor) -> Tensor:
    spread = x.std(dim=1, keepdim=True) + x.var(dim=1, keepdim=True) + x.norm(dim=1, keepdim=True)
    best = x.max(dim=1, keepdim=True).values - x.min(dim=1, keepdim=True).values
    found: Tensor = spread + best + x.logsumexp(dim=1, keepdim=True) + x.prod(dim=1, keepdim=True)
    return x * found


def arithmetic(x: Tensor) -> Tensor:
    found = (x.abs() + 1.0).pow(1.5) + torch.minimum(x, -x) + x.erf() + (x.abs() + 1).reciprocal()
    found = found + (x.abs() + 1.0).rsqrt() + x.sin() + x.cos()
    inside = ((x > -1.0) & ~(x <= -0.5)) | torch.logical_not(x > 2.0)
    return found.masked_fill(inside, 0.25) + torch.ones_like(x) * torch.logical_or(x > 3.0, x < -3.0)


def activations(x: Tensor) -> Tensor:
    parts = [
        functional.gelu(x), functional.gelu(x, approximate="tanh"), functional.elu(x), functional.celu(x),
        functional.selu(x), functional.leaky_relu(x), functional.mish(x), functional.hardswish(x),
        functional.hardsigmoid(x), functional.logsigmoid(x), functional.log_softmax(x, dim=1), functional.relu6(x),
        functional.glu(torch.cat((x, x), dim=1), dim=1),
    ]  # fmt: skip
    return torch.stack(parts).sum(dim=0)


def parts_of_rows(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    steps = list(x.unbind(dim=1))
    found = torch.cat((second, first), dim=1).roll(1, dims=1).flip(1)
    found = found + torch.stack(steps[::-1], dim=1) + x.narrow(1, 0, 1)
    return found + x.t().mul(2.0).t() + x.transpose(0, 1).transpose(0, 1) + x[:, :1].expand(-1, x.shape[1])


def images(x: Tensor) -> Tensor:
    padded = functional.pad(x, (1, 1, 1, 1)) + functional.pad(x, (1, 1, 1, 1), mode="reflect")
    small = functional.max_pool2d(padded, 2, 1) + functional.avg_pool2d(padded, 2, 1)
    small = functional.avg_pool2d(small, 2, 2, ceil_mode=True)
    pooled = functional.adaptive_avg_pool2d(x, 2)
    large = functional.interpolate(pooled, size=x.shape[-2:], mode="bilinear", align_corners=False)
    large = large + functional.interpolate(pooled, size=x.shape[-2:], mode="nearest")
    shuffled = functional.pixel_shuffle(pooled.repeat(1, 4, 1, 1), 2)
    return large + shuffled + functional.interpolate(small, size=x.shape[-2:]) + x.movedim(1, 2).movedim(2, 1)


def series(x: Tensor) -> Tensor:
    rows = x.transpose(1, 2)  # [B, C, T]
    pooled = functional.max_pool1d(rows, 2) + functional.avg_pool1d(rows, 2) + functional.adaptive_avg_pool1d(rows, 3)
    padded = functional.pad(rows, (1, 1), mode="reflect")[:, :, 1:-1]
    found = functional.interpolate(pooled, scale_factor=2.0, mode="linear") + padded
    products = torch.bmm(rows, rows.transpose(1, 2))  # [B, C, C]
    return torch.baddbmm(found, products, rows).transpose(1, 2)


def paddings(x: Tensor) -> Tensor:
    found = [functional.pad(x, (2, 1, 0, 3, 1, 1), mode=mode) for mode in ("replicate", "circular", "reflect")]
    found += [functional.pad(x.flatten(2), (2, 1), mode=mode) for mode in ("replicate", "circular")]
    return x + _mean(found)


def _mean(parts: list[Tensor]) -> Tensor:
    sums = torch.stack([(part.flatten(1) * torch.arange(part[0].numel()).sin()).sum(dim=1) for part in parts], dim=1)
    return sums.mean(dim=1).reshape(-1, 1, 1, 1, 1)


def resized_images(x: Tensor) -> Tensor:
    parts = [
        functional.interpolate(x, scale_factor=1.7, mode="bicubic"),
        functional.interpolate(x, size=(5, 11), mode="bicubic", align_corners=True),
        functional.interpolate(x, scale_factor=(1.7, 0.6), mode="bilinear"),
        functional.interpolate(x, scale_factor=1.3, mode="nearest-exact"),
    ]
    return x + _mean(parts).squeeze(4)


def resized_volumes(x: Tensor) -> Tensor:
    parts = [
        functional.interpolate(x, scale_factor=1.5, mode="trilinear"),
        functional.interpolate(x, size=(4, 3, 2), mode="trilinear", align_corners=True),
        functional.interpolate(x, scale_factor=(1.5, 2, 1), mode="nearest"),
        functional.interpolate(x, scale_factor=(1.5, 2, 1), mode="nearest-exact"),
    ]
    return x + _mean(parts)


def einsums(x: Tensor) -> Tensor:
    weight, step = torch.arange(12.0).reshape(4, 3).cos(), x[:, 0]  # [4, 3], [B, 4]
    attention = torch.einsum("bqd, bkd -> bqk", x, x).softmax(dim=-1)
    found = torch.einsum("bqk,bkd->bqd", attention, x) + torch.einsum("btf,gf->btg", x, weight @ weight.T)
    found = found + torch.einsum("fg,btg->tbf", weight @ weight.T, x).transpose(0, 1)
    outer = torch.einsum("bi,bj->bij", step, step[:, :3])
    sums = torch.einsum("bij->bi", outer) + torch.einsum("bij,bkj->bi", outer, outer)
    return found + sums.unsqueeze(1)


MODULES: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "sums": ((6,), lambda: Applied(sums)),
    "arithmetic": ((6,), lambda: Applied(arithmetic)),
    "activations": ((6,), lambda: Applied(activations)),
    "parts": ((6,), lambda: Applied(parts_of_rows)),
    "images": ((1, 4, 4), lambda: Applied(images)),
    "series": ((6, 2), lambda: Applied(series)),
    "norms": ((4, 6), lambda: Layers(nn.LayerNorm(6), nn.GroupNorm(2, 4), nn.PReLU(), nn.BatchNorm1d(4))),
    "norms without weights": ((4, 6), lambda: Layers(nn.BatchNorm1d(4, affine=False), nn.LayerNorm(6, bias=False))),
    "norms of instances": ((4, 6), lambda: Layers(nn.InstanceNorm1d(4), nn.InstanceNorm1d(4, affine=True))),
    "norms of instances by statistics": (
        (4, 6), lambda: Layers(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
    ),
    "paddings": ((2, 3, 4, 5), lambda: Applied(paddings)),
    "resized images": ((2, 5, 4), lambda: Applied(resized_images)),
    "resized volumes": ((2, 3, 4, 2), lambda: Applied(resized_volumes)),
    "einsums": ((5, 4), lambda: Applied(einsums)),
    "split by sizes": ((6,), lambda: Applied(lambda x: torch.cat(x.split([1, 2, 3], dim=1)[::-1], dim=1))),
    "places of columns": ((6,), lambda: Applied(lambda x: x[:, torch.tensor([[5, 0], [3, -2], [1, 2]])].flatten(1))),
    "convolutions of series": (
        (2, 8), lambda: Layers(nn.Conv1d(2, 3, 3, padding="same"), nn.ConvTranspose1d(3, 2, 3, padding=1)),
    ),
    "convolutions of volumes": (
        (1, 4, 4, 4), lambda: Layers(nn.Conv3d(1, 2, 3, padding=1), nn.ConvTranspose3d(2, 1, 3, padding=1)),
    ),
    "lstm": ((5, 3), lambda: Layers(nn.LSTM(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 3))),
    "two directions": ((5, 3), lambda: Layers(nn.LSTM(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 3))),
    "lstm without bias": ((5, 3), lambda: Layers(nn.LSTM(3, 3, bias=False, batch_first=True))),
    "gru": ((5, 3), lambda: Layers(nn.GRU(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 3))),
    "gru without bias": ((5, 3), lambda: Layers(nn.GRU(3, 3, bias=False, batch_first=True, bidirectional=False))),
    "plain recurrent": (
        (5, 3),
        lambda: Layers(nn.RNN(3, 3, batch_first=True), nn.RNN(3, 3, batch_first=True, nonlinearity="relu")),
    ),
    "cells": ((5, 4), Cells),
    "attention": ((5, 4), lambda: Attention(masked=False)),
    "masked attention": ((5, 4), lambda: Attention(masked=True)),
    "transformer": (
        (5, 4),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu"), 2),
    ),
    "causal": ((5, 4), lambda: Applied(lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True))),
}  # fmt: skip


def compiled(name: str) -> tuple[nn.Module, torch.jit.ScriptModule, Tensor]:
    """Return the module `name` in evaluation mode, its compiled copy, and rows [N, D]."""
    shape, build = MODULES[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = build()
    for buffer in module.buffers():  # running statistics other than those of a new module
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    rows = torch.randn(ROWS, torch.Size(shape).numel())
    functions = inspect_module(copy_module(module), module, shape, rows)
    return module.eval(), compile_functions(functions, rows)[0], rows


def code_of(script: torch.jit.ScriptModule) -> dict[str, bytes]:
    """Return the code of a scripted module by the name of its member, as an artifact has it."""
    content = io.BytesIO()
    torch.jit.save(script, content)
    with zipfile.ZipFile(content) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist() if name.endswith(".py")}
        return {member: archive.read(name) for member, name in members.items()}


def called(sources: dict[str, bytes]) -> set[str]:
    trees = [ast.parse(source) for source in sources.values()]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {name for call in calls if (name := ast.unparse(call.func)).startswith(("torch.", "ops."))}


@pytest.fixture(scope="module")
def networks() -> dict[str, tuple[nn.Module, torch.jit.ScriptModule, Tensor]]:
    return {name: compiled(name) for name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_compiled_module_gives_the_results_of_the_module_for_other_rows(networks: Any, name: str) -> None:
    module, script, rows = networks[name]
    other = torch.randn(9, rows.shape[1], generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = module(other.reshape(-1, *MODULES[name][0])).reshape(9, -1)
        found = script.reconstruct(other)
    assert float((found - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("name", MODULES)
def test_code_of_the_compiled_module_keeps_the_rules_for_artifacts(networks: Any, name: str) -> None:
    sources = code_of(networks[name][1])
    (root,) = (f"__torch__.models.adopted{mangled(member)}.Network" for member in sources)
    check_code(sources, Path("model.pt")).check_methods(root, ["reconstruct"])


def mangled(member: str) -> str:
    """Return the part of the class's full name that torch adds to tell classes of one name apart."""
    return member.removeprefix("code/__torch__/models/adopted").removesuffix(".py").replace("/", ".")


def test_every_name_that_only_adopted_models_may_use_is_needed(networks: Any) -> None:
    used = set().union(*(called(code_of(script)) for _, script, _ in networks.values()))
    assert set(allowed_code.ADOPTED) - used == set()
    assert used - set(allowed_code.OPERATORS) == set()


@pytest.mark.parametrize(
    "name", ["lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "scaled_dot_product_attention",
             "batch_norm", "upsample_nearest2d", "upsample_bilinear2d", "empty", "rand", "randn_like", "dropout"]
)  # fmt: skip
def test_operator_that_does_not_check_its_arguments_or_draws_is_allowed_nowhere(name: str) -> None:
    assert f"torch.{name}" not in allowed_code.OPERATORS


# Calls with one tensor whose sizes do not fit those of the others.
MISMATCHED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["pow", "le", "logical_and", "logical_or"], (ones(3, 8), ones(7))),
    "masked_fill": (ones(3, 8), ones(7) > 0, 0.0),
    "prelu": (ones(3, 8), ones(7)),
    "conv1d": (ones(2, 8, 9), ones(4, 8, 3), ones(5)),
    "conv3d": (ones(2, 8, 5, 5, 5), ones(4, 8, 3, 3, 3), ones(5)),
    "conv_transpose1d": (ones(2, 8, 9), ones(8, 4, 3), ones(5)),
    "conv_transpose3d": (ones(2, 8, 5, 5, 5), ones(8, 4, 3, 3, 3), ones(5)),
    "bmm": (ones(3, 4, 8), ones(3, 7, 5)),
    "baddbmm": (ones(3, 4, 5), ones(3, 4, 8), ones(3, 7, 5)),
    "layer_norm": (ones(3, 8), [8], ones(8), ones(7)),
    "group_norm": (ones(3, 8, 5), 2, ones(8), ones(7)),
}


def test_mismatched_tensors_are_tried_on_every_operator_that_takes_several() -> None:
    several = {name for name, rule in allowed_code.ADOPTED.items() if rule.tensors - len(rule.sizes) > 1}
    assert several == {f"torch.{name}" for name in MISMATCHED}


@pytest.mark.parametrize("name", MISMATCHED)
def test_operator_with_tensors_of_mismatched_shapes_raises_an_error(name: str) -> None:
    with pytest.raises(RuntimeError):
        getattr(torch.ops.aten, name)(*MISMATCHED[name])


def test_noise_of_a_draw_is_its_mean() -> None:
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    with without_noise() as mode:
        draws = [
            torch.distributions.Normal(mean, std).rsample(),
            mean + std * torch.randn_like(std),
            mean + std * torch.randn(2),
            torch.normal(mean, std),
            torch.normal(mean, 2.0),
            mean + std * torch.empty(2).normal_(),
        ]
    assert len(mode.lines) == len(draws)
    assert all("test_operators.py" in line for line in mode.lines)
    for draw in draws:
        torch.testing.assert_close(draw, mean)
