"""Estimators of scikit-learn as networks: compared with scikit-learn."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF, PCA, FactorAnalysis, IncrementalPCA, TruncatedSVD
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from training.adoption.estimators import is_estimator, module_of, split_pipeline
from training.errors import AdoptionError

RANDOM = np.random.RandomState(0)
ROWS = (RANDOM.randn(300, 3) @ RANDOM.randn(3, 7) + 0.1 * RANDOM.randn(300, 7) + 100.0).astype(np.float32)
LINEAR = {
    "pca": PCA(3),
    "pca with whitening": PCA(3, whiten=True),
    "pca of all components": PCA(),
    "incremental pca": IncrementalPCA(3),
    "incremental pca with whitening": IncrementalPCA(3, whiten=True),
    "truncated svd": TruncatedSVD(3, random_state=0),
}


@pytest.mark.parametrize("name", LINEAR)
def test_module_of_a_decomposition_encodes_and_decodes_as_scikit_learn_does(name: str) -> None:
    estimator = LINEAR[name].fit(ROWS.astype(np.float64))
    module: Any = module_of(estimator)
    z = estimator.transform(ROWS.astype(np.float64))
    codes = module.encode(torch.from_numpy(ROWS))
    np.testing.assert_allclose(codes.numpy(), z, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(module.decode(codes).numpy(), estimator.inverse_transform(codes.numpy()), rtol=1e-6)
    np.testing.assert_allclose(module(torch.from_numpy(ROWS)).numpy(), estimator.inverse_transform(z), rtol=1e-6)


def test_module_of_a_factor_analysis_encodes_the_posterior_mean_and_decodes_its_expectation() -> None:
    estimator = FactorAnalysis(3).fit(ROWS.astype(np.float64))
    module: Any = module_of(estimator)
    codes = module.encode(torch.from_numpy(ROWS)).numpy()
    np.testing.assert_allclose(codes, estimator.transform(ROWS.astype(np.float64)), rtol=1e-6, atol=1e-6)
    expected = codes.astype(np.float64) @ estimator.components_ + estimator.mean_
    np.testing.assert_allclose(module.decode(torch.from_numpy(codes)).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
def test_module_of_a_perceptron_predicts_as_scikit_learn_does_and_encodes_its_narrowest_layer(activation: str) -> None:
    rows = (ROWS.astype(np.float64) - ROWS.mean(axis=0)) / ROWS.std(axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 20 iterations are too few for convergence
        estimator = MLPRegressor(hidden_layer_sizes=(6, 2, 5), activation=activation, max_iter=20, random_state=0).fit(
            rows, rows
        )
    module: Any = module_of(estimator)
    x = torch.from_numpy(rows).float()
    np.testing.assert_allclose(module(x).numpy(), estimator.predict(x.double().numpy()), rtol=1e-6, atol=1e-6)
    codes = module.encode(x)
    assert codes.shape == (300, 2)
    np.testing.assert_allclose(module.decode(codes).numpy(), module(x).numpy(), rtol=1e-5, atol=1e-6)


def test_code_of_a_perceptron_with_layers_of_equal_width_is_the_middle_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator = MLPRegressor(hidden_layer_sizes=(4, 4, 4), max_iter=2, random_state=0).fit(ROWS, ROWS)
    module: Any = module_of(estimator)
    first = np.maximum(ROWS.astype(np.float64) @ estimator.coefs_[0] + estimator.intercepts_[0], 0.0)
    second = np.maximum(first @ estimator.coefs_[1] + estimator.intercepts_[1], 0.0)
    np.testing.assert_allclose(module.encode(torch.from_numpy(ROWS)).numpy(), second, rtol=1e-6, atol=1e-5)


def _regressor_of_other_targets() -> MLPRegressor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MLPRegressor(hidden_layer_sizes=(3,), max_iter=2).fit(ROWS, ROWS[:, :2])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: KMeans(2), "KMeans cannot be adopted: Elbo converts PCA"),
        (lambda: NMF(2), "NMF cannot be adopted"),
        (lambda: PCA(2), "PCA is not fitted"),
        (MLPRegressor, "MLPRegressor is not fitted"),
        (_regressor_of_other_targets, "predicts 2 numbers from 7 features: expected an autoencoder"),
    ],
)
def test_estimator_without_an_exact_conversion_is_refused_with_the_reason(make: Any, reason: str) -> None:
    with pytest.raises(AdoptionError, match=reason):
        module_of(make())


def test_pipeline_is_split_into_its_scaler_and_its_estimator() -> None:
    pipeline = make_pipeline(StandardScaler(), PCA(2)).fit(ROWS)
    scaler, estimator = split_pipeline(pipeline)
    assert estimator is pipeline[-1]
    np.testing.assert_array_equal(scaler.transform(ROWS), pipeline[0].transform(ROWS))
    assert split_pipeline(estimator) == (None, estimator)
    assert split_pipeline(make_pipeline(estimator)) == (None, estimator)


def test_only_estimators_of_scikit_learn_are_estimators() -> None:
    assert is_estimator(PCA(2))
    assert is_estimator(make_pipeline(PCA(2)))
    assert not is_estimator(torch.nn.Linear(2, 2))
    assert not is_estimator("model.onnx")
