"""Detectors with PyOD's conventions, compared with PyOD's definitions, which are written out here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import erf
from scipy.stats import binom
from sklearn.base import clone

import elbo
from elbo.errors import ElboWarning
from elbo.pyod import PCA, VAE, AutoEncoder, PyODDetector

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the model reconstructs held-out rows worse than PCA:elbo.errors.ElboWarning"),
]

# A call with PyOD's defaults for the parameters that change what PyOD trains, but few and small layers.
MAKERS: dict[str, Callable[[], PyODDetector]] = {
    "PCA": lambda: PCA(n_components=2, contamination=0.05),
    "AutoEncoder": lambda: AutoEncoder(0.05, True, 0.02, 30, 64, hidden_neuron_list=[16, 2], batch_norm=False),
    "VAE": lambda: VAE(contamination=0.05, lr=0.02, epoch_num=40, encoder_neuron_list=[16], latent_dim=2),
}


def rows(count: int, seed: int) -> npt.NDArray[np.float64]:
    """Return rows of five features that depend on two factors; the first tenth are outliers."""
    random = np.random.RandomState(seed)
    x = random.standard_normal((count, 2)) @ np.random.RandomState(99).standard_normal((2, 5))
    x += 0.1 * random.standard_normal(x.shape)
    x[: count // 10] += 4 * random.standard_normal((count // 10, 5))
    return x


@pytest.fixture(scope="module", params=MAKERS)
def detector(request: pytest.FixtureRequest) -> PyODDetector:
    return MAKERS[request.param]().fit(rows(400, 0))


def test_higher_scores_are_more_anomalous_and_are_minus_those_of_scikit_learn(detector: PyODDetector) -> None:
    scores = detector.decision_function(rows(400, 1))
    assert np.median(scores[:40]) > np.quantile(scores[40:], 0.9)
    np.testing.assert_array_equal(scores, -detector.detector_.score_samples(rows(400, 1)))


def test_threshold_and_labels_follow_from_contamination_and_the_training_scores(detector: PyODDetector) -> None:
    np.testing.assert_array_equal(detector.decision_scores_, detector.decision_function(rows(400, 0)))
    assert detector.threshold_ == np.percentile(detector.decision_scores_, 95)
    assert detector.labels_.sum() == 20
    np.testing.assert_array_equal(detector.labels_, detector.predict(rows(400, 0)))
    np.testing.assert_array_equal(
        detector.predict(rows(99, 1)), detector.decision_function(rows(99, 1)) > detector.threshold_
    )


def test_predict_proba_rescales_the_scores_by_the_training_scores(detector: PyODDetector) -> None:
    x = rows(400, 1)
    scores, training = detector.decision_function(x), detector.decision_scores_
    linear = np.clip((scores - training.min()) / (training.max() - training.min()), 0, 1)
    unify = np.clip(erf((scores - training.mean()) / (np.std(training) * np.sqrt(2))), 0, 1)
    np.testing.assert_allclose(detector.predict_proba(x), np.column_stack((1 - linear, linear)), atol=1e-12)
    np.testing.assert_allclose(detector.predict_proba(x, method="unify")[:, 1], unify, atol=1e-12)
    with pytest.raises(ValueError, match="method: expected 'linear' or 'unify', got 'other'"):
        detector.predict_proba(x, method="other")  # type: ignore[arg-type]


def test_confidence_is_the_probability_of_the_same_prediction_on_other_training_rows(detector: PyODDetector) -> None:
    x = rows(60, 1)
    labels, confidence = detector.predict(x, return_confidence=True)
    for score, label, found in zip(detector.decision_function(x), labels, confidence, strict=True):
        posterior = (1 + sum(each <= score for each in detector.decision_scores_)) / (2 + 400)
        outlier = 1 - binom.cdf(400 - 20, 400, posterior)  # at least 20 rows are expected above the threshold
        assert found == pytest.approx(outlier if label else 1 - outlier, abs=1e-12)
    np.testing.assert_array_equal(confidence, detector.predict_confidence(x))
    np.testing.assert_array_equal(confidence, detector.predict_proba(x, return_confidence=True)[1])


def test_clone_has_the_parameters_and_fit_predict_returns_the_labels() -> None:
    first = MAKERS["PCA"]()
    np.testing.assert_array_equal(clone(first).fit_predict(rows(400, 0)), first.fit(rows(400, 0)).labels_)


def test_published_detector_gives_the_same_scores(detector: PyODDetector, tmp_path: Path) -> None:
    model = elbo.load(detector.publish(tmp_path, name="web"))
    np.testing.assert_allclose(model.score(rows(50, 1)), detector.decision_function(rows(50, 1)), rtol=1e-4, atol=1e-5)


def test_layers_of_the_constructor_are_the_layers_of_the_model(detector: PyODDetector) -> None:
    manifest = detector.detector_.model_.artifact.manifest
    assert manifest.latents == 2
    if not isinstance(detector, PCA):
        assert list(manifest.training["hidden"]) == [16]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: AutoEncoder(dropout_rate=0.2, batch_norm=True, epoch_num=1), "batch_norm, dropout_rate"),
        (lambda: VAE(capacity=0.5, decoder_neuron_list=[8], epoch_num=1), "capacity, decoder_neuron_list"),
        (lambda: PCA(n_components=0.9, weighted=False), "n_components, weighted"),  # type: ignore[arg-type]
    ],
)
@pytest.mark.filterwarnings("ignore:the model reconstructs:elbo.errors.ElboWarning")
@pytest.mark.filterwarnings("ignore:posterior collapse:elbo.errors.ElboWarning")
def test_parameters_without_a_counterpart_are_accepted_with_a_warning(
    make: Callable[[], PyODDetector], names: str
) -> None:
    with pytest.warns(ElboWarning, match=f"ignores {names}: Elbo has no counterpart"):
        make().fit(rows(600, 0))


@pytest.mark.parametrize("contamination", [0, 0.6, "auto", None])
def test_contamination_out_of_range_is_refused(contamination: Any) -> None:
    with pytest.raises(ValueError, match=r"contamination must be a number in \(0, 0.5\]"):
        PCA(contamination=contamination).fit(rows(100, 0))
