"""Convert estimators of scikit-learn into networks with the methods `encode`, `decode` and `forward`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.float64 import Float64Module
from training.errors import AdoptionError

SUPPORTED = "PCA, IncrementalPCA, TruncatedSVD, FactorAnalysis and MLPRegressor"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "logistic": torch.sigmoid,
    "exp": torch.exp,
}


class LinearCode(Float64Module):
    """A linear map of rows into a code, and a linear map back. Both compute in float64.

    Args:
        centre: subtracted from rows before they are encoded, and added after they are decoded, [D].
        encoder: the code is (x - centre) @ encoder, [D, K].
        decoder: the reconstruction is z @ decoder + centre, [K, D].
    """

    centre: Tensor
    encoder_weight: Tensor
    decoder_weight: Tensor

    def __init__(self, centre: Any, encoder: Any, decoder: Any) -> None:
        super().__init__()
        self.register_buffer("centre", _tensor(centre))
        self.register_buffer("encoder_weight", _tensor(encoder))
        self.register_buffer("decoder_weight", _tensor(decoder))

    def encode(self, x: Tensor) -> Tensor:
        """Return the code [B, K] of x [B, D]."""
        return ((x.to(torch.float64) - self.centre) @ self.encoder_weight).to(torch.float32)

    def decode(self, z: Tensor) -> Tensor:
        """Return the reconstruction [B, D] from codes z [B, K]."""
        return (z.to(torch.float64) @ self.decoder_weight + self.centre).to(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction [B, D] of x [B, D]."""
        return self.decode(self.encode(x))


class Perceptron(Float64Module):
    """Fully connected layers, of which the output of one hidden layer is the code. Computes in float64.

    Args:
        weights: the weight of each layer, [inputs, outputs].
        biases: the bias of each layer, [outputs].
        activation: the name of the activation of hidden layers.
        output_activation: the name of the activation of the last layer.
        code_layers: how many layers the encoder has.
    """

    def __init__(
        self, weights: list[Any], biases: list[Any], activation: str, output_activation: str, code_layers: int
    ) -> None:
        super().__init__()
        layers = []
        for weight, bias in zip(weights, biases, strict=True):
            layer = nn.Linear(weight.shape[0], weight.shape[1], dtype=torch.float64)
            layer.weight.data, layer.bias.data = _tensor(weight).T.contiguous(), _tensor(bias)
            layers.append(layer)
        self.layers = nn.ModuleList(layers)
        names = [activation] * (len(layers) - 1) + [output_activation]
        self._activations = [ACTIVATIONS[name] for name in names]
        self._code_layers = code_layers

    def encode(self, x: Tensor) -> Tensor:
        """Return the code [B, K] of x [B, D]."""
        return self._apply_layers(x, 0, self._code_layers)

    def decode(self, z: Tensor) -> Tensor:
        """Return the reconstruction [B, D] from codes z [B, K]."""
        return self._apply_layers(z, self._code_layers, len(self.layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction [B, D] of x [B, D]."""
        return self._apply_layers(x, 0, len(self.layers))

    def _apply_layers(self, x: Tensor, first: int, end: int) -> Tensor:
        x = x.to(torch.float64)
        for number in range(first, end):
            x = self._activations[number](self.layers[number](x))
        return x.to(torch.float32)


def module_of(estimator: Any) -> nn.Module:
    """Return a network whose `encode` is the `transform` of `estimator`, and whose `decode` is `inverse_transform`.

    The code of an MLPRegressor is its narrowest hidden layer, and `forward` is its `predict`. The code of a
    FactorAnalysis is the posterior mean of its factors.

    Args:
        estimator: a fitted estimator of scikit-learn, of one of the types in SUPPORTED.

    Raises:
        AdoptionError: the estimator is of another type, not fitted, or an MLPRegressor that was fitted with other
            targets than its rows.
    """
    from sklearn import decomposition
    from sklearn.neural_network import MLPRegressor

    converters: dict[type, Callable[[Any], nn.Module]] = {
        decomposition.PCA: _of_pca,
        decomposition.IncrementalPCA: _of_pca,
        decomposition.TruncatedSVD: _of_svd,
        decomposition.FactorAnalysis: _of_factor_analysis,
        MLPRegressor: _of_perceptron,
    }
    name = type(estimator).__name__
    convert = converters.get(type(estimator))
    if convert is None:
        raise AdoptionError(
            f"the estimator {name} cannot be adopted: Elbo converts {SUPPORTED}, or adopts a torch module"
        )
    if not hasattr(estimator, "components_") and not hasattr(estimator, "coefs_"):
        raise AdoptionError(f"the estimator {name} is not fitted: call its fit with normal rows")
    return convert(estimator).eval().requires_grad_(False)


def split_pipeline(estimator: Any) -> tuple[Any, Any]:
    """Return the scaler and the estimator of a scikit-learn Pipeline that ends with an estimator.

    The scaler is the Pipeline of the steps before the estimator; None if there are none, or if `estimator` is no
    Pipeline.
    """
    from sklearn.pipeline import Pipeline

    if not isinstance(estimator, Pipeline):
        return None, estimator
    return (estimator[:-1] if len(estimator.steps) > 1 else None), estimator.steps[-1][1]


def is_estimator(value: Any) -> bool:
    """Return whether `value` is an estimator of scikit-learn. The answer needs no import of scikit-learn."""
    return not isinstance(value, nn.Module) and any(
        base.__module__.startswith("sklearn.") and base.__name__ == "BaseEstimator" for base in type(value).__mro__
    )


def _of_pca(estimator: Any) -> nn.Module:
    components = np.asarray(estimator.components_, np.float64)  # [K, D]
    deviation = np.ones(len(components))
    if estimator.whiten:
        deviation = np.sqrt(np.asarray(estimator.explained_variance_, np.float64))
    least = np.finfo(np.float64).eps  # scikit-learn's own limit, for components without variance
    encoder = components / np.maximum(deviation, least)[:, None]
    return LinearCode(estimator.mean_, encoder.T, components * deviation[:, None])


def _of_svd(estimator: Any) -> nn.Module:
    components = np.asarray(estimator.components_, np.float64)  # [K, D]
    return LinearCode(np.zeros(components.shape[1]), components.T, components)


def _of_factor_analysis(estimator: Any) -> nn.Module:
    """Return the posterior mean of the factors (Barber, "Bayesian reasoning and machine learning", eq. 21.1.9)."""
    components = np.asarray(estimator.components_, np.float64)  # [K, D]
    scaled = components / np.asarray(estimator.noise_variance_, np.float64)
    covariance = np.linalg.inv(np.eye(len(components)) + scaled @ components.T)  # of the posterior, [K, K]
    return LinearCode(estimator.mean_, scaled.T @ covariance, components)


def _of_perceptron(estimator: Any) -> nn.Module:
    sizes = [len(bias) for bias in estimator.intercepts_]  # of the hidden layers and of the output
    if sizes[-1] != estimator.n_features_in_:
        raise AdoptionError(
            f"the MLPRegressor predicts {sizes[-1]} numbers from {estimator.n_features_in_} features: expected an "
            "autoencoder, fitted with fit(X, X)"
        )
    if estimator.out_activation_ not in ACTIVATIONS or estimator.activation not in ACTIVATIONS:
        raise AdoptionError(
            f"the MLPRegressor has the activations {estimator.activation} and {estimator.out_activation_}: expected "
            f"one of {', '.join(ACTIVATIONS)}"
        )
    hidden = sizes[:-1]
    narrowest = [number for number, size in enumerate(hidden) if size == min(hidden)]
    code_layers = narrowest[len(narrowest) // 2] + 1 if hidden else 0
    if not hidden:
        raise AdoptionError("the MLPRegressor has no hidden layer, so it has no code: use PCA")
    return Perceptron(
        estimator.coefs_, estimator.intercepts_, estimator.activation, estimator.out_activation_, code_layers
    )


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, np.float64))
