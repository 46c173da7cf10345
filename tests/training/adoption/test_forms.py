"""The forms of modules that can be adopted, each with a small module whose weights are random."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import artifact
from models.artifact import Artifact
from models.prior import gaussian_prior
from models.scaling import Scaling
from tests.training.reporters import RecordingReporter
from training.adoption.adopt import adopt

pytestmark = pytest.mark.slow
D, K = 6, 2
ROWS = np.random.default_rng(0).normal(size=(90, D)).astype(np.float32)


class Embedding(nn.Module):
    """An autoencoder whose functions have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(D, K), nn.Linear(K, D)

    def embed(self, x: Tensor) -> Tensor:
        return torch.tanh(self.down(x))

    def rebuild(self, z: Tensor) -> Tensor:
        found: Tensor = self.up(z)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.rebuild(self.embed(x))


class Variational(nn.Module):
    """A VAE. `form` is what encode returns."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.hidden, self.both, self.up = nn.Linear(D, 8), nn.Linear(8, 2 * K), nn.Linear(K, D)
        self.form = form

    def encode(self, x: Tensor) -> Any:
        both = self.both(torch.relu(self.hidden(x)))
        mean, log_variance = both.chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance)
        draw = mean + std * torch.randn_like(std)
        return {
            "log_variance": (mean, log_variance), "std": (mean, std), "draw": (draw, mean, log_variance),
            "joined": both, "dict": {"mu": mean, "logvar": log_variance},
            "distribution": torch.distributions.Normal(mean, std),
        }[self.form]  # fmt: skip

    def decode(self, z: Tensor) -> Tensor:
        found: Tensor = self.up(z)
        return found


class OnlyForward(nn.Module):
    """A VAE with forward alone, which always draws. `form` is what forward returns."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.network = nn.ModuleDict({"mean": nn.Linear(D, K), "log_variance": nn.Linear(D, K), "up": nn.Linear(K, D)})
        self.form = form

    def forward(self, x: Tensor) -> Any:
        mean, log_variance = self.network["mean"](x), self.network["log_variance"](x)
        x_hat = self.network["up"](mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
        loss = (x_hat - x).square().mean()
        return {
            "tensor": x_hat, "tuple": (x_hat, mean, log_variance), "with input": [x_hat, x, mean, log_variance],
            "dict": {"loss": loss, "x_hat": x_hat, "mu": mean}, "loss first": (loss, x_hat),
        }[self.form]  # fmt: skip


def adopted(module: nn.Module, tmp_path: Path, rows: Any = ROWS, **options: Any) -> tuple[Artifact, list[str]]:
    """Adopt `module`; return the loaded artifact, and the notes."""
    torch.manual_seed(1)
    report = RecordingReporter()
    path = adopt(module, rows, name="m", artifacts=tmp_path, report=report, **options)
    return artifact.load(path), report.notes


def reconstruct(found: Artifact, rows: np.ndarray = ROWS) -> Tensor:
    with torch.inference_mode():
        x_hat: Tensor = found.module(torch.from_numpy(rows.reshape(len(rows), -1)))
    return x_hat


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def expected_of(module: Embedding) -> Tensor:
    with torch.no_grad():
        return module.up(torch.tanh(module.down(torch.from_numpy(ROWS))))  # type: ignore[no-any-return]


def test_functions_may_be_named_by_methods(tmp_path: Path) -> None:
    module = Embedding()
    found, _ = adopted(module, tmp_path, encode="embed", decode="rebuild")
    assert found.manifest.latents == K
    assert_equal(reconstruct(found), expected_of(module))


@pytest.mark.parametrize("kind", ["bound methods", "functions", "parts"])
def test_functions_may_be_given(tmp_path: Path, kind: str) -> None:
    module = Embedding()
    given: tuple[Any, Any] = {
        "bound methods": (module.embed, module.rebuild),
        "functions": (lambda m, x: torch.tanh(m.down(x)), lambda m, z: m.up(z)),
        "parts": (module.down, "up"),
    }[kind]
    found, _ = adopted(module, tmp_path, encode=given[0], decode=given[1])
    with torch.no_grad():
        expected = module.up(module.down(torch.from_numpy(ROWS))) if kind == "parts" else expected_of(module)
    assert_equal(reconstruct(found), expected)


@pytest.mark.parametrize("form", ["log_variance", "std", "draw", "joined", "dict", "distribution"])
def test_encoder_may_give_the_spread_of_the_latents_in_every_usual_form(tmp_path: Path, form: str) -> None:
    torch.manual_seed(2)
    module = Variational(form)
    found, notes = adopted(module, tmp_path)
    x = torch.from_numpy(ROWS)
    with torch.no_grad():
        mean, log_variance = module.both(torch.relu(module.hidden(x))).chunk(2, dim=1)
        expected = mean, torch.exp(0.5 * log_variance)
        latents = found.module.encode(x)
    assert_equal(latents[0], expected[0])
    assert_equal(latents[1], expected[1])
    assert found.manifest.adoption is not None
    assert found.manifest.adoption.spread == ("std" if form in ("std", "distribution") else "log_variance")
    assert sum("of the latents; if it is not" in note for note in notes) == 1


@pytest.mark.parametrize("form", ["tensor", "tuple", "with input", "dict", "loss first"])
def test_forward_may_give_the_reconstruction_in_every_usual_form(tmp_path: Path, form: str) -> None:
    torch.manual_seed(3)
    module = OnlyForward(form)
    found, notes = adopted(module, tmp_path)
    with torch.no_grad():
        expected = module.network["up"](module.network["mean"](torch.from_numpy(ROWS)))
    assert_equal(reconstruct(found), expected)
    assert found.manifest.only_reconstructs
    has_code = form in ("tuple", "with input", "dict")
    assert found.manifest.parts == (["t2", "q"] if has_code else ["q"])
    assert sum("draws normal noise: the artifact has its mean" in note for note in notes) == 1


def test_parts_that_are_not_the_whole_path_of_forward_are_not_taken_for_it(tmp_path: Path) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.middle, self.decoder = nn.Linear(D, K), nn.Linear(K, K), nn.Linear(K, D)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.decoder(self.middle(self.encoder(x)))
            return found

    module = Between()
    found, notes = adopted(module, tmp_path)
    assert found.manifest.only_reconstructs
    assert_equal(reconstruct(found), module(torch.from_numpy(ROWS)).detach())
    assert sum("give other reconstructions than forward" in note for note in notes) == 1


class Lightning(Embedding):
    """A module that refers to its trainer, as those of Lightning, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self._trainer = (each for each in range(3))  # a generator cannot be copied


def compiled() -> nn.Module:
    return torch.compile(Embedding())  # type: ignore[return-value]


def parametrised() -> nn.Module:
    module = Embedding()
    torch.nn.utils.parametrizations.weight_norm(module.down)
    torch.nn.utils.parametrizations.spectral_norm(module.up)
    module(torch.from_numpy(ROWS))
    return module


def with_old_norms() -> nn.Module:
    module = Embedding()
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(module.down)
    torch.nn.utils.spectral_norm(module.up)
    module(torch.from_numpy(ROWS))
    return module


def with_attribute_that_has_a_gradient() -> nn.Module:
    module = Embedding()
    module.last = module(torch.from_numpy(ROWS))
    return module


@pytest.mark.parametrize(
    "build", [Lightning, compiled, parametrised, with_old_norms, with_attribute_that_has_a_gradient,
              lambda: nn.DataParallel(Embedding()), lambda: Embedding().bfloat16(), lambda: Embedding().double()],
    ids=["Lightning", "compile", "parametrisations", "old norms", "attribute", "DataParallel", "bfloat16", "double"],
)  # fmt: skip
def test_wrapped_and_converted_modules_are_adopted_and_do_not_change(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(4)
    module = build()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found, _ = adopted(module, tmp_path, encode="embed", decode="rebuild")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(tensor.dtype == before[name].dtype for name, tensor in module.state_dict().items())
    assert all(part.training for part in module.modules())
    plain = getattr(module, "_orig_mod", getattr(module, "module", module))
    with torch.no_grad():
        x = torch.from_numpy(ROWS).to(next(plain.parameters()).dtype)
        expected = plain.eval()(x).float()
    tolerance = 0.02 if build is not Lightning and x.dtype == torch.bfloat16 else 2e-6
    assert float((reconstruct(found) - expected).abs().max()) <= tolerance * float(expected.abs().max())


class Scripted(Embedding):
    """A module that computes with the number of rows in Python, which only TorchScript follows."""

    def encode(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 1.0
        found = torch.zeros(len(x), 2)
        for _ in range(2):
            found = found + 0.5 * self.down(x)
        return found

    def decode(self, z: Tensor) -> Tensor:
        found: Tensor = self.up(z)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class Dropping(nn.Module):
    """The layers of a module, with dropout between them, and only a forward."""

    def __init__(self, module: Scripted) -> None:
        super().__init__()
        self.layers = nn.Sequential(module.down, nn.Dropout(0.5), module.up)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


@pytest.mark.parametrize("form", ["module", "scripted", "scripted forward", "traced"])
def test_module_in_torchscript_or_that_only_scripts_is_adopted(form: str, tmp_path: Path) -> None:
    module = Scripted().eval()
    x = torch.from_numpy(ROWS)
    expected = module(x).detach()
    if form == "scripted":
        given: nn.Module = artifact.script_methods(module, ["forward", "encode", "decode"])
    elif form == "scripted forward":
        given = artifact.script_methods(Dropping(module).eval(), ["forward"])
    elif form == "traced":
        given = artifact.trace_methods(nn.Sequential(module.down, module.up), {"forward": x})
    else:
        given = module
    found, _ = adopted(given, tmp_path)
    assert found.manifest.only_reconstructs == (form in ("scripted forward", "traced"))
    assert_equal(reconstruct(found), expected)


def test_windows_are_rows_with_a_name_for_each_value(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.GRU(2, 3, batch_first=True), nn.LSTM(3, 2, batch_first=True)

        def encode(self, x: Tensor) -> Tensor:
            return self.encoder(x)[1][-1]  # type: ignore[no-any-return]

        def decode(self, z: Tensor) -> Tensor:
            return self.decoder(z.unsqueeze(1).expand(-1, 5, -1))[0]  # type: ignore[no-any-return]

    windows = np.random.default_rng(1).normal(size=(90, 5, 2)).astype(np.float32)
    found, _ = adopted(Recurrent(), tmp_path, windows, feature_names=["cpu", "load"])
    assert (found.manifest.shape, found.manifest.latents) == ([5, 2], 3)
    assert [feature.name for feature in found.manifest.features[:3]] == ["cpu[0]", "load[0]", "cpu[1]"]


SCALE = np.linspace(1.0, 2.0, D)


@pytest.mark.parametrize("kind", ["pair", "Scaling", "module"])
def test_scaler_is_part_of_the_artifact(tmp_path: Path, kind: str) -> None:
    mean, scale = torch.full((D,), 5.0), torch.from_numpy(SCALE).float()
    scaler = {"pair": (np.full(D, 5.0), SCALE), "Scaling": Scaling(mean, scale), "module": Scaling(mean, scale)}[kind]
    module, rows = Embedding(), (ROWS * SCALE + 5.0).astype(np.float32)
    found, _ = adopted(module, tmp_path, rows, encode="embed", decode="rebuild", scaler=scaler)
    with torch.no_grad():
        expected = module((torch.from_numpy(rows) - mean) / scale) * scale + mean
    assert_equal(reconstruct(found, rows), expected)


def test_prior_is_fitted_or_standard_or_given(tmp_path: Path) -> None:
    module = Embedding()
    noise, choice = torch.randn(500, K, generator=torch.Generator().manual_seed(0)), torch.rand(500)
    draws = {}
    for name, prior in (("fitted", None), ("standard", "standard"), ("given", gaussian_prior(torch.full((K,), 7.0)))):
        found, _ = adopted(copy.deepcopy(module), tmp_path / name, encode="embed", decode="rebuild", prior=prior)
        draws[name] = found.module.draw(noise, choice)
    latents = module.embed(torch.from_numpy(ROWS)).detach()
    torch.testing.assert_close(draws["standard"], noise)
    torch.testing.assert_close(draws["given"], 7.0 * noise)
    assert float((draws["fitted"].mean(dim=0) - latents.mean(dim=0)).abs().max()) < 0.3
    assert float((draws["fitted"].std(dim=0) / latents.std(dim=0) - 1.0).abs().max()) < 0.3
