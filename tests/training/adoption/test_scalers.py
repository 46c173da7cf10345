"""Scalers of scikit-learn as modules: compared with scikit-learn in float64."""

import io
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from sklearn import preprocessing
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn

from models.code_check import check_code
from models.exact_scaling import LIMIT, ExactScaling
from models.scaling import Scaling
from training.adoption.scalers import scaling_module
from training.errors import AdoptionError

Array = npt.NDArray[np.float64]
SCALERS: dict[str, Callable[[], Any]] = {
    "standard": preprocessing.StandardScaler,
    "standard without mean": lambda: preprocessing.StandardScaler(with_mean=False),
    "standard without scale": lambda: preprocessing.StandardScaler(with_std=False),
    "min max": preprocessing.MinMaxScaler,
    "min max of other range": lambda: preprocessing.MinMaxScaler(feature_range=(-3.0, 0.5)),
    "min max with clip": lambda: preprocessing.MinMaxScaler(clip=True),
    "robust": preprocessing.RobustScaler,
    "robust of unit variance": lambda: preprocessing.RobustScaler(unit_variance=True, quantile_range=(10.0, 80.0)),
    "robust without centre": lambda: preprocessing.RobustScaler(with_centering=False),
    "robust without scale": lambda: preprocessing.RobustScaler(with_scaling=False),
    "max abs": preprocessing.MaxAbsScaler,
    "yeo-johnson": preprocessing.PowerTransformer,
    "yeo-johnson without standardising": lambda: preprocessing.PowerTransformer(standardize=False),
    "box-cox": lambda: preprocessing.PowerTransformer("box-cox"),
    "box-cox without standardising": lambda: preprocessing.PowerTransformer("box-cox", standardize=False),
    "pipeline": lambda: make_pipeline(
        preprocessing.RobustScaler(), "passthrough", preprocessing.PowerTransformer(), preprocessing.MinMaxScaler()
    ),
}


def rows_for(name: str) -> npt.NDArray[np.float32]:
    """Return rows [400, 5]: skewed columns, a constant one, and one whose mean is a million deviations from 0."""
    random = np.random.RandomState(0)
    rows = np.column_stack(
        [
            random.lognormal(0.0, 1.0, 400),
            random.normal(3.0, 2.0, 400),
            np.full(400, 7.0),
            4e5 + random.normal(0.0, 0.4, 400),
            random.exponential(1e-6, 400) + 1e-9,
        ]
    ).astype(np.float32)
    if name.startswith("box-cox"):  # it needs positive columns that are not constant, and overflows far from 0
        rows[:, 1:4] = random.gamma(2.0, size=(400, 3))
    return rows


def fitted(name: str) -> tuple[Any, npt.NDArray[np.float32]]:
    rows = rows_for(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a constant column has no likelihood
        return SCALERS[name]().fit(rows.astype(np.float64)), rows


def error_in_float32_steps(found: Tensor, expected: Array) -> float:
    """Return the largest error, in distances between neighbouring float32 numbers."""
    step = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(found.double().numpy() - expected) / np.maximum(step, 1e-12)))


@pytest.mark.parametrize("name", SCALERS)
def test_module_of_a_scaler_transforms_rows_as_scikit_learn_does_in_float64(name: str) -> None:
    scaler, rows = fitted(name)
    scaling = scaling_module(scaler, rows.shape[1])
    expected = scaler.transform(rows.astype(np.float64))
    assert error_in_float32_steps(scaling(torch.from_numpy(rows)), expected) <= 1.0


@pytest.mark.parametrize("name", SCALERS)
def test_module_of_a_scaler_inverts_model_units_as_scikit_learn_does_in_float64(name: str) -> None:
    scaler, rows = fitted(name)
    scaling = scaling_module(scaler, rows.shape[1])
    units = scaler.transform(rows.astype(np.float64)).astype(np.float32)
    expected = scaler.inverse_transform(units.astype(np.float64))
    assert error_in_float32_steps(scaling.inverse(torch.from_numpy(units)), expected) <= 1.0


@pytest.mark.parametrize("name", SCALERS)
def test_shift_and_scale_of_a_scaler_describe_its_map_near_the_centre(name: str) -> None:
    scaler, rows = fitted(name)
    scaling = scaling_module(scaler, rows.shape[1])
    if any(part in name for part in ("yeo", "box", "pipeline")):
        low, high = (scaling.inverse(torch.full((1, 5), unit))[0] for unit in (-1.0, 1.0))
        assert torch.allclose(scaling.scale, (high - low) / 2, rtol=1e-2, atol=2e-2)
    else:
        u = torch.randn(9, 5)
        assert torch.allclose(scaling.inverse(u), u * scaling.scale + scaling.shift, rtol=1e-5, atol=1e-5)


def test_float64_keeps_the_digits_of_a_column_far_from_zero() -> None:
    values = np.linspace(16_000_000, 16_000_100, 101).reshape(-1, 1)
    scaler = preprocessing.StandardScaler().fit(values)
    exact = scaling_module(scaler, 1)(torch.from_numpy(values).float())
    assert error_in_float32_steps(exact, scaler.transform(values)) <= 1.0
    shifted = preprocessing.StandardScaler().fit(values + 0.3)
    found = scaling_module(shifted, 1)(torch.from_numpy(values).float())
    assert error_in_float32_steps(found, shifted.transform(values)) <= 1.0


@pytest.mark.parametrize("method", ["yeo-johnson", "box-cox"])
@pytest.mark.parametrize("power", [-8.0, -0.5, 0.0, 1e-17, 1e-9, 1.0, 2.0, 2.5, 9.0])
def test_power_transform_near_special_powers_equals_scikit_learn(method: str, power: float) -> None:
    values = np.array([[1e-30], [1e-9], [0.3], [1.0], [20.0], [3e4]])
    values = values if method == "box-cox" else np.vstack([values, -values, [[0.0]]])
    values = values.astype(np.float32).astype(np.float64)
    scaler = preprocessing.PowerTransformer(method, standardize=False).fit(np.random.RandomState(0).rand(50, 1) + 0.5)
    scaler.lambdas_ = np.array([power])
    units = scaler.transform(values)
    found = scaling_module(scaler, 1)(torch.from_numpy(values).float())
    np.testing.assert_allclose(found.numpy(), np.clip(units, -LIMIT, LIMIT), rtol=3e-7, atol=1e-30)


def test_power_transform_of_a_value_without_a_preimage_is_clamped_and_finite() -> None:
    scaler = preprocessing.PowerTransformer(standardize=False).fit(np.random.RandomState(0).rand(50, 1))
    scaler.lambdas_ = np.array([-2.0])  # its values are below 1/2
    x = scaling_module(scaler, 1).inverse(torch.tensor([[0.49], [0.5], [3.0], [1e30], [-1e30]]))
    assert bool(x.isfinite().all())
    assert x[0].item() == pytest.approx(scaler.inverse_transform([[0.49]])[0, 0], rel=1e-5)
    assert x[2].item() > 1e6


def test_box_cox_of_a_value_that_is_not_positive_is_finite_and_far_from_normal_rows() -> None:
    scaler = preprocessing.PowerTransformer("box-cox").fit(np.random.RandomState(0).lognormal(size=(200, 1)))
    u = scaling_module(scaler, 1)(torch.tensor([[0.0], [-5.0]]))
    assert bool(u.isfinite().all())
    assert float(u.max()) < -10.0


@pytest.mark.parametrize("name", SCALERS)
def test_compiled_module_of_a_scaler_gives_the_same_numbers_and_passes_the_code_check(name: str, tmp_path: Any) -> None:
    scaler, rows = fitted(name)
    scaling = scaling_module(scaler, rows.shape[1])
    x = torch.from_numpy(rows)
    scripted = torch.jit.script(_BothWays(scaling))
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    assert torch.equal(scripted(x)[0], scaling(x))
    assert torch.equal(scripted(x)[1], scaling.inverse(scaling(x)))
    with zipfile.ZipFile(buffer) as archive:
        names = [member for member in archive.namelist() if "/code/" in member and member.endswith(".py")]
        sources = {member.partition("/")[2]: archive.read(member) for member in names}
    check_code(sources, tmp_path)


@pytest.mark.parametrize("name", SCALERS)
def test_onnx_export_of_a_scaler_gives_the_same_numbers_in_onnx_runtime(name: str) -> None:
    scaler, rows = fitted(name)
    scaling = scaling_module(scaler, rows.shape[1])
    buffer = io.BytesIO()
    x = torch.from_numpy(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _BothWays(scaling),
            (x,),
            buffer,  # type: ignore[arg-type]  # the annotation fits only the other exporter
            dynamo=False,
            opset_version=18,
            input_names=["x"],
            dynamic_axes={"x": {0: "B"}},
        )
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    u, back = session.run(None, {"x": rows[:7]})
    np.testing.assert_allclose(u, scaling(x[:7]).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back, scaling.inverse(scaling(x[:7])).numpy(), rtol=1e-5, atol=1e-5)


class _BothWays(nn.Module):
    def __init__(self, scaling: Scaling) -> None:
        super().__init__()
        self.scaling = scaling

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = self.scaling(x)
        return u, self.scaling.inverse(u)


def test_mean_and_scale_give_the_affine_map() -> None:
    scaling = scaling_module((np.array([1.0, -2.0]), torch.tensor([2.0, 0.5])), 2)
    assert scaling(torch.tensor([[3.0, -1.0]])).tolist() == [[1.0, 2.0]]
    assert scaling.inverse(torch.tensor([[1.0, 2.0]])).tolist() == [[3.0, -1.0]]
    assert scaling_module((0.5, 0.25), 3)(torch.ones(1, 3)).tolist() == [[2.0, 2.0, 2.0]]
    assert isinstance(scaling, ExactScaling)


def test_no_scaler_changes_nothing_and_a_scaling_is_kept() -> None:
    x = torch.randn(5, 3)
    assert torch.equal(scaling_module(None, 3)(x), x)
    scaling = Scaling(torch.zeros(3), torch.ones(3))
    assert scaling_module(scaling, 3) is scaling


ROWS = np.random.RandomState(0).rand(60, 4)
REFUSED: dict[str, tuple[Any, str]] = {
    "quantile": (preprocessing.QuantileTransformer(n_quantiles=9).fit(ROWS), "QuantileTransformer .* no exact inverse"),
    "bins": (preprocessing.KBinsDiscretizer(3, quantile_method="averaged_inverted_cdf").fit(ROWS), "no inverse"),
    "function": (preprocessing.FunctionTransformer(np.log1p).fit(ROWS), "Python function"),
    "columns": (ColumnTransformer([("s", preprocessing.StandardScaler(), [2, 0])]).fit(ROWS), "reorders"),
    "unknown": (object(), "object cannot be put into the artifact"),
    "not fitted": (preprocessing.StandardScaler(), "StandardScaler is not fitted"),
    "other width": (preprocessing.StandardScaler().fit(ROWS[:, :3]), "has 3 features, but the rows have 4"),
    "inside a pipeline": (
        make_pipeline(preprocessing.StandardScaler(), preprocessing.QuantileTransformer(n_quantiles=9)).fit(ROWS),
        "QuantileTransformer",
    ),
    "other width of a mean": ((np.zeros(3), np.ones(4)), "the mean of the scaler has 3 features"),
    "scale of zero": ((np.zeros(4), np.array([1.0, 1.0, 0.0, 1.0])), "scale 0 for column 2"),
    "mean that is not finite": ((np.array([0.0, np.nan, 0.0, 0.0]), np.ones(4)), "mean nan .* column 1"),
    "text": (("a", "b"), "not an array of numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_scaler_without_an_exact_conversion_is_refused_with_the_reason(case: str) -> None:
    scaler, reason = REFUSED[case]
    with pytest.raises(AdoptionError, match=reason) as caught:
        scaling_module(scaler, 4)
    assert "\n" not in str(caught.value)


def test_scaling_of_another_width_is_refused() -> None:
    with pytest.raises(AdoptionError, match="has 2 features, but the rows have 4"):
        scaling_module(Scaling(torch.zeros(2), torch.ones(2)), 4)
