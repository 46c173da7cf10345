"""Convert scalers of scikit-learn into modules that an artifact can contain."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.columns import parse_title
from models.exact_scaling import Affine, BoxCox, Chain, Clip, ExactScaling, YeoJohnson
from models.scaling import Scaling
from training.errors import AdoptionError

SUPPORTED = "StandardScaler, MinMaxScaler, RobustScaler, MaxAbsScaler, PowerTransformer, a Pipeline of these, "
ADVICE = f"give {SUPPORTED}or (mean, scale); or apply the step to the rows before they are sent"
REASONS = {
    "QuantileTransformer": "its map has steps, so that it has no exact inverse",
    "KBinsDiscretizer": "it keeps only the bin of a value, so that it has no inverse",
    "Binarizer": "it keeps only one bit of a value, so that it has no inverse",
    "Normalizer": "it divides each row by its length, so that it has no inverse",
    "FunctionTransformer": "it runs a Python function, which an artifact cannot contain",
    "ColumnTransformer": "it reorders or drops columns, so that features and columns no longer agree",
}


def scaling_module(scaler: Any, width: int) -> Scaling:
    """Return the module that converts rows as `scaler` does.

    Its `forward` is `transform`, and its `inverse` is `inverse_transform`. Both are computed in float64 and
    rounded to float32 once.

    Args:
        scaler: a fitted StandardScaler, MinMaxScaler, RobustScaler, MaxAbsScaler or PowerTransformer of
            scikit-learn, or a Pipeline of these; a pair (mean, scale) of arrays [D] or numbers; a `Scaling`; or None
            for no change.
        width: the number of features, D.

    Raises:
        AdoptionError: the scaler is of an unsupported type, not fitted, or of another width.
    """
    if isinstance(scaler, Scaling):
        _require_width(type(scaler).__name__, len(scaler.shift), width)
        return scaler
    if scaler is None:
        return Scaling(torch.zeros(width), torch.ones(width))
    if isinstance(scaler, tuple | list) and len(scaler) == 2:
        return ExactScaling(_of_arrays(scaler, width), width)
    return ExactScaling(_joined(_maps(scaler, width), width), width)


def require_same_columns(fitted: Any, names: Sequence[str] | None) -> None:
    """Raise AdoptionError if a scaler or an estimator was fitted with a frame whose columns are not those of the rows.

    Args:
        fitted: a scaler or an estimator of scikit-learn, or any other object, which fits.
        names: the names of the columns of the rows; None if they have no names.
    """
    steps = getattr(fitted, "steps", None)
    first = steps[0][1] if isinstance(steps, list) and steps else fitted  # the first step of a Pipeline has the names
    found = getattr(first, "feature_names_in_", None)
    if found is None or names is None or len(found) != len(names):
        return
    columns = [parse_title(str(title))[0] for title in found]  # without units
    if columns != list(names):
        raise AdoptionError(
            f"the {type(first).__name__} was fitted with other columns than the rows have: "
            f"{differing_column(columns, names)}; give rows with the columns of its fit, in the same order"
        )


def differing_column(first: Sequence[str], second: Sequence[str]) -> str:
    """Return the first column in which two tables differ."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return f"column {number + 1} is {one!r} and {other!r}"
    return f"{len(first)} and {len(second)} columns"


def _joined(maps: Sequence[nn.Module], width: int) -> nn.Module:
    joined, *others = maps or [_affine(np.zeros(width), np.ones(width))]
    for other in others:
        joined = Chain(joined, other)
    return joined


def _maps(scaler: Any, width: int) -> list[nn.Module]:
    """Return the maps that `scaler` applies, one after the other."""
    from sklearn import preprocessing
    from sklearn.pipeline import Pipeline

    if isinstance(scaler, Pipeline):
        steps = [step for _, step in scaler.steps if step is not None and step != "passthrough"]
        return [map_ for step in steps for map_ in _maps(step, width)]
    converters: dict[type, Callable[[Any], list[nn.Module]]] = {
        preprocessing.StandardScaler: _of_standard,
        preprocessing.MinMaxScaler: _of_min_max,
        preprocessing.RobustScaler: _of_robust,
        preprocessing.MaxAbsScaler: _of_max_abs,
        preprocessing.PowerTransformer: _of_power,
    }
    name = type(scaler).__name__
    convert = converters.get(type(scaler))
    if convert is None:
        reason = REASONS.get(name, "Elbo knows no exact conversion of it")
        raise AdoptionError(f"the scaler {name} cannot be put into the artifact: {reason}; {ADVICE}")
    if not hasattr(scaler, "n_features_in_"):
        raise AdoptionError(f"the scaler {name} is not fitted: call its fit with the rows that trained the network")
    _require_width(name, scaler.n_features_in_, width)
    return convert(scaler)


def _require_width(name: str, found: int, width: int) -> None:
    if found != width:
        raise AdoptionError(
            f"the scaler {name} has {found} features, but the rows have {width}: give the scaler that was fitted with "
            "the columns of these rows"
        )


def _of_standard(scaler: Any) -> list[nn.Module]:
    width = scaler.n_features_in_
    mean = scaler.mean_ if scaler.with_mean else np.zeros(width)
    return [_affine(mean, scaler.scale_ if scaler.with_std else np.ones(width))]


def _of_min_max(scaler: Any) -> list[nn.Module]:
    scale = np.asarray(scaler.scale_, np.float64)
    map_ = _affine(-np.asarray(scaler.min_, np.float64) / scale, 1.0 / scale)
    return [map_, Clip(*map(float, scaler.feature_range))] if scaler.clip else [map_]


def _of_robust(scaler: Any) -> list[nn.Module]:
    width = scaler.n_features_in_
    centre = scaler.center_ if scaler.with_centering else np.zeros(width)
    return [_affine(centre, scaler.scale_ if scaler.with_scaling else np.ones(width))]


def _of_max_abs(scaler: Any) -> list[nn.Module]:
    map_ = _affine(np.zeros(scaler.n_features_in_), scaler.scale_)
    return [map_, Clip(-1.0, 1.0)] if getattr(scaler, "clip", False) else [map_]


def _of_power(scaler: Any) -> list[nn.Module]:
    power = torch.from_numpy(np.asarray(scaler.lambdas_, np.float64).copy())
    if not bool(power.isfinite().all()):
        raise AdoptionError("the scaler PowerTransformer has lambdas that are not finite: fit it with rows without NaN")
    map_ = BoxCox(power) if scaler.method == "box-cox" else YeoJohnson(power)
    return [map_, *_of_standard(scaler._scaler)] if scaler.standardize else [map_]


def _of_arrays(pair: Sequence[Any], width: int) -> Affine:
    arrays = []
    for name, values in zip(("mean", "scale"), pair, strict=True):
        try:
            array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float64)
        except (TypeError, ValueError) as error:
            raise AdoptionError(f"the scaler is a pair, but its {name} is not an array of numbers: {ADVICE}") from error
        array = np.full(width, array) if array.ndim == 0 else array.reshape(-1)
        if len(array) != width:
            raise AdoptionError(
                f"the {name} of the scaler has {len(array)} features, but the rows have {width}: give one number per "
                "column of the rows"
            )
        arrays.append(array)
    return _affine(*arrays)


def _affine(shift: Any, scale: Any) -> Affine:
    """Return the map (x - shift) / scale. Raise AdoptionError if it has no inverse."""
    shift, scale = (np.array(values, np.float64) for values in (shift, scale))
    if not (np.isfinite(shift).all() and np.isfinite(scale).all() and (scale > 0.0).all()):
        column = int(np.argmin(np.isfinite(shift) & np.isfinite(scale) & (scale > 0.0)))
        raise AdoptionError(
            f"the scaler has mean {shift[column]:g} and scale {scale[column]:g} for column {column}: the mean must be "
            "finite, and the scale finite and above 0"
        )
    return Affine(torch.from_numpy(shift), torch.from_numpy(scale))
