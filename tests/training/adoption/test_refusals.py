"""What cannot be adopted is refused with one line that names the cause and what to do, and nothing is published."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from training.adoption.adopt import adopt
from training.errors import AdoptionError

D, K = 6, 2
ROWS = np.random.default_rng(0).normal(size=(90, D)).astype(np.float32)


class Base(nn.Module):
    """An autoencoder, of which each subclass does one thing that cannot be adopted."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(D, K), nn.Linear(K, D)

    def path(self, x: Tensor) -> Tensor:
        found: Tensor = self.up(self.down(x))
        return found

    def forward(self, x: Tensor) -> Any:
        return self.path(x)


class BranchesOnValues(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.path(x)
        return self.path(-x)


class LoopsOverValues(Base):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max())):
            x = self.path(x)
        return x


class ReadsANumber(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.path(x / x.abs().mean().item())


class SelectsRows(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.path(x)[torch.nonzero(x[:, 0] < 99.0)[:, 0]]


class DrawsUniformNumbers(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.path(x + torch.rand_like(x))


class DropsAlways(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.path(nn.functional.dropout(x, 0.5, training=True))


class NormalisesByTheBatch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.path((x - x.mean(dim=0)) / x.std(dim=0, correction=0).clamp(min=1.0))


class CountsItsCalls(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.path(x) + self.calls


class FixesTheNumberOfRows(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.path(x) + torch.from_numpy(np.zeros((len(x), D), np.float32))


class WritesIntoParts(Base):
    def forward(self, x: Tensor) -> Tensor:
        found = torch.zeros(x.shape[0], D)
        found[:, :3] = self.path(x)[:, :3]
        found[:, 3:] = self.path(x)[:, 3:]
        return found


class SortsRows(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.path(x.sort(dim=1).values)


class ReturnsTheLoss(Base):
    def forward(self, x: Tensor) -> Tensor:
        return (self.path(x) - x).square().mean()


class ReturnsACode(Base):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(x)
        return found


class NeedsLabels(Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.path(x + y)


class LeavesTorch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.path(torch.from_numpy(np.tanh(x.numpy())))


class Overflows(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.path(x) + torch.exp(1e3 * x.abs() + 1e3)


class IsNan(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.path(x) * torch.log(-1.0 - x.abs())


class IsNanForOneRow(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.path(x) * torch.sqrt(0.0 * x + ROWS[:, 0].max().item() - 1e-3 - x[:, :1])


class HasNanInItsSpread(Base):
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.down(x)
        return mean, torch.log(-1.0 - mean.abs())

    def decode(self, z: Tensor) -> Tensor:
        found: Tensor = self.up(z)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x)[0])


class ReturnsItsInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x


def with_bad_weight(value: float) -> nn.Module:
    module = Base()
    with torch.no_grad():
        module.down.weight[0, 1] = value
    return module


def complex_weights() -> nn.Module:
    module = Base()
    module.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    return module


def on_meta() -> nn.Module:
    return Base().to("meta")


MODULES: list[tuple[Any, str, str]] = [
    (BranchesOnValues, "test_refusals.py:", "(if x.sum() > 0:) makes a branch of the values of a tensor"),
    (LoopsOverValues, "test_refusals.py:", "(for _ in range(int(x.abs().max())):) makes a number of the values"),
    (ReadsANumber, "test_refusals.py:", "makes a number of the values of a tensor"),
    (SelectsRows, "test_refusals.py:", "makes a number of results of the values of a tensor"),
    (DrawsUniformNumbers, "test_refusals.py:", "draws random numbers (rand_like)"),
    (DropsAlways, "test_refusals.py:", "drops values at random in evaluation mode"),
    (NormalisesByTheBatch, "gives a row another result alone than among", "must not depend on other rows"),
    (CountsItsCalls, "gives two results for the same rows, even in evaluation mode", "leave out what it changes"),
    (FixesTheNumberOfRows, "np.zeros((len(x), D), np.float32)", "use x.shape[0]"),
    (WritesIntoParts, "found[:, :3] = self.path(x)[:, :3]", "put the parts together with torch.stack or torch.cat"),
    (SortsRows, "x.sort(dim=1)", "uses the operator sort, which is not among the reviewed operators"),
    (ReturnsTheLoss, "forward of ReturnsTheLoss", "which is the loss: expected the reconstruction of each row"),
    (ReturnsACode, "returns a tensor of the shape [5, 2]", "expected a reconstruction with 6 values per row"),
    (NeedsLabels, "missing 1 required positional argument: 'y'", "encode= and decode="),
    (LeavesTorch, "test_refusals.py:", "makes an array of NumPy of the values of a tensor"),
    (IsNan, "reconstruct gives NaN for 16 of the 16 rows given", "check the rows and the scaler"),
    (IsNanForOneRow, "reconstruct gives NaN for 1 of the 90 rows given", "check the rows and the scaler"),
    (HasNanInItsSpread, "encode gives NaN for 16 of the 16 rows given", "check the rows and the scaler"),
    (ReturnsItsInput, "it returns its input", "expected a reconstruction"),
    (Overflows, "gives infinite values", "check the rows and the scaler"),
    (lambda: with_bad_weight(float("nan")), "weight down.weight has values that are not finite", "load the weights"),
    (lambda: with_bad_weight(float("inf")), "weight down.weight has values that are not finite", "load the weights"),
    (on_meta, "the weight down.weight is on the meta device", "load the weights first"),
    (lambda: nn.LazyLinear(3), "has no shape yet", "run the module on some rows"),
    (complex_weights, "the weight phase is complex", "expected real weights"),
    (lambda: "model.pt", "expected a torch.nn.Module to adopt, got str", "torch.nn.Module"),
    (lambda: nn.Linear(4, 4), "cannot run on rows of the shape [6]", "give shape="),
]  # fmt: skip


def refusal(tmp_path: Path, module: Any, rows: Any = ROWS, **options: Any) -> str:
    """Return the message of the refusal to adopt `module`, after a check that nothing was published."""
    with pytest.raises(AdoptionError) as error:
        adopt(module, rows, name="m", artifacts=tmp_path, **options)
    assert not list(tmp_path.rglob("model.pt"))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("build", "cause", "advice"), MODULES, ids=lambda each: getattr(each, "__name__", None))
def test_module_that_cannot_be_adopted_is_refused_with_its_cause(
    build: Any, cause: str, advice: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    message = refusal(tmp_path, build())
    assert cause in message
    assert advice in message


def with_value(value: float) -> np.ndarray:
    rows = ROWS.copy()
    rows[3, 2] = value
    return rows


INPUTS: list[tuple[str, Any, dict[str, Any], str]] = [
    ("NaN", with_value(np.nan), {}, "calibration_rows[3] has a value that is NaN (value 2 of the row)"),
    ("infinite", with_value(np.inf), {}, "calibration_rows[3] has a value that is infinite"),
    ("texts", np.array([["a", "b"]]), {}, "calibration_rows have values of the type <U1: expected numbers"),
    ("one dimension", ROWS[:, 0], {}, "calibration_rows have the shape [90]: expected [N, D]"),
    ("no rows", ROWS[:0], {}, "calibration_rows have the shape [0, 6]"),
    ("shape", ROWS, {"shape": (2, 2)}, "which are 6 values, and shape=[2, 2] has 4"),
    ("fit rows", ROWS, {"fit_rows": ROWS[:, :4]}, "fit_rows have rows of the shape [4]"),
    ("few rows", ROWS[:30], {}, "calibration_rows has 30 distinct rows: expected at least 56"),
    ("copies", np.repeat(ROWS[:30], 3, axis=0), {}, "has 30 distinct rows (60 more equal other rows)"),
    ("trained rows", ROWS, {"fit_rows": ROWS}, "has 0 distinct rows (90 more equal other rows or fit rows)"),
    ("names", ROWS, {"feature_names": ["a", "b"]}, "feature_names has 2 names: expected 6"),
    ("equal names", ROWS, {"feature_names": list("aabcde")}, "feature_names has names twice: a"),
    ("scaler width", ROWS, {"scaler": (np.zeros(4), np.ones(4))}, "the mean of the scaler has 4 features"),
    ("scaler zero", ROWS, {"scaler": (np.zeros(D), np.zeros(D))}, "the scaler has mean 0 and scale 0 for column 0"),
    ("scaler NaN", ROWS, {"scaler": (np.full(D, np.nan), np.ones(D))}, "the scaler has mean nan and scale 1"),
    ("scaler module", ROWS, {"scaler": nn.Linear(D, D)}, "the scaler Linear has no method inverse"),
    ("prior", ROWS, {"prior": "standard"}, "prior= is given, but the module has no encoder and decoder"),
    ("one name", ROWS, {"encode": "down"}, "encode= is given without decode="),
    ("unknown name", ROWS, {"encode": "embed", "decode": "up"}, "encode='embed': Base has no such method or part"),
    ("wrong pair", ROWS, {"encode": "up", "decode": "down"}, "cannot run it on rows of the shape [6]"),
    ("closure", ROWS, {"encode": lambda x: x, "decode": "up"}, "encode= is a function of 1 arguments"),
    ("other part", ROWS, {"encode": nn.Linear(D, K), "decode": "up"}, "encode= is no part of the module"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "cause"), [case[1:] for case in INPUTS], ids=[case[0] for case in INPUTS])
def test_input_that_does_not_fit_is_refused_with_its_cause(
    rows: Any, options: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    assert cause in refusal(tmp_path, Base(), rows, **options)


def test_artifact_whose_publication_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise AdoptionError("no card")

    monkeypatch.setattr("training.adoption.adopt.make_exhibits", fail)
    assert refusal(tmp_path, Base()) == "no card"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert not [path for path in (tmp_path / "m").iterdir() if path.name.isdigit()]
