"""Detectors and transformers for scikit-learn: rates, equality with `elbo train` and the server, pipelines, pickles."""

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from joblib.externals.loky import get_reusable_executor
from scipy.stats import betabinom
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

import elbo
from elbo.errors import ElboWarning
from elbo.sklearn import (
    AutoencoderDetector,
    EnsembleDetector,
    PCADetector,
    PCATransformer,
    VAEDetector,
    VAETransformer,
)
from elbo.sklearn.detectors import Detector
from service.app import create_app
from service.settings import Settings
from tests.service.running import running
from training.config import TrainConfig
from training.data.table import read_table
from training.progress import SilentReporter
from training.train import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the model reconstructs held-out rows worse than PCA:elbo.errors.ElboWarning"),
]

Array = npt.NDArray[Any]
ALPHA = 0.1
NETWORK: dict[str, Any] = {"epochs": 40, "hidden": (16,), "learning_rate": 0.02}
SMALL = NETWORK | {"calibration": "split"}
DETECTORS: list[Detector] = [
    PCADetector(alpha=ALPHA, calibration="split"),
    AutoencoderDetector(alpha=ALPHA, **SMALL),
    VAEDetector(alpha=ALPHA, **SMALL),
    EnsembleDetector(alpha=ALPHA, **SMALL),
]
of_every_kind = pytest.mark.parametrize("detector", DETECTORS, ids=lambda each: type(each).__name__)


def normal_rows(count: int, seed: int) -> Array:
    """Return rows of five features that depend on two factors, [count, 5]."""
    random = np.random.RandomState(seed)
    mixing = np.random.RandomState(99).standard_normal((2, 5))
    return 10 + random.standard_normal((count, 2)) @ mixing + 0.1 * random.standard_normal((count, 5))


def labelled_rows() -> tuple[Array, Array]:
    """Return 300 rows, and labels of scikit-learn: -1 for the 30 outliers, whose features do not fit together."""
    x, y = normal_rows(300, 5), np.ones(300, int)
    y[::10] = -1
    x[::10] = np.random.default_rng(6).permuted(x[::10], axis=0)
    return x, y


@of_every_kind
def test_predict_on_new_normal_rows_raises_as_many_false_alarms_as_alpha_allows(detector: Detector) -> None:
    rows, fresh = 2000, 4000
    fitted = clone(detector).fit(normal_rows(rows, 0))
    calibration = len(fitted._pipeline.calibration.scores)
    assert calibration == rows // 5
    # Given the calibration scores, the rate of false alarms has a beta distribution (Vovk 2012, proposition 2b).
    allowed = int(ALPHA * (calibration + 1))
    band = betabinom(fresh, allowed, calibration + 1 - allowed).ppf([0.001, 0.999])
    alarms = int((fitted.predict(normal_rows(fresh, 1)) == -1).sum())
    assert band[0] <= alarms <= band[1]


@of_every_kind
def test_predict_agrees_with_the_p_value_and_with_the_decision_function(detector: Detector) -> None:
    fitted = clone(detector).fit(normal_rows(400, 0))
    x = np.concatenate((normal_rows(200, 1), labelled_rows()[0]))
    outlier = fitted.predict(x) == -1
    assert 0 < outlier.sum() < len(x)
    np.testing.assert_array_equal(outlier, fitted.p_value(x) <= ALPHA)
    np.testing.assert_array_equal(outlier, fitted.decision_function(x) < 0)
    np.testing.assert_array_equal(fitted.predict_proba(x)[:, 1], fitted.p_value(x))
    np.testing.assert_allclose(fitted.predict_proba(x).sum(axis=1), 1)


@of_every_kind
def test_detector_gives_the_scores_and_the_auroc_of_elbo_train_with_the_same_seed(
    detector: Detector, tmp_path: Path
) -> None:
    x, y = labelled_rows()
    np.savez(tmp_path / "rows.npz", X=x, y=(y == -1).astype(int))
    options = {} if isinstance(detector, PCADetector) else NETWORK
    config = TrainConfig(model=detector._kind, name="m", seed=3, calibration="split", **options)
    path = train(config, read_table(str(tmp_path / "rows.npz")), tmp_path / "artifacts", SilentReporter())
    expected = elbo.load(path).score(x)
    scores = -clone(detector).set_params(random_state=3).fit(x).score_samples(x)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert roc_auc_score(y == -1, scores) == roc_auc_score(y == -1, expected)


@of_every_kind
def test_published_detector_gives_the_same_scores_and_verdicts_over_http(detector: Detector, tmp_path: Path) -> None:
    x = pd.DataFrame(normal_rows(400, 0), columns=["cpu", "memory", "disk", "network", "errors"])
    fitted = clone(detector).fit(x)
    path = fitted.publish(tmp_path, name="web")
    assert path == tmp_path / "web" / "1" / "model.pt"
    rows = pd.DataFrame(labelled_rows()[0], columns=x.columns)
    with running(create_app(Settings(artifacts=tmp_path, log_level="warning"))) as client:
        csv = rows[list(reversed(x.columns))].to_csv(index=False)
        response = client.post(f"/anomaly?alpha={ALPHA}", content=csv, headers={"Content-Type": "text/csv"})
        assert response.status_code == 200, response.text
        results = response.json()["results"]
    scores = np.array([result["score"] for result in results])
    np.testing.assert_allclose(scores, -fitted.score_samples(rows), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([result["p_value"] for result in results], fitted.p_value(rows), rtol=1e-6)
    np.testing.assert_array_equal([result["is_anomaly"] for result in results], fitted.predict(rows) == -1)


def test_import_of_elbo_sklearn_does_not_import_torch() -> None:
    program = "import elbo.sklearn, elbo.pyod, sys; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_pickle_contains_no_training_rows_and_can_be_published(tmp_path: Path) -> None:
    x = np.random.RandomState(0).standard_normal((20_000, 20))
    fitted = PCADetector(calibration="split", latents=2).fit(x)
    content = pickle.dumps(fitted)
    assert len(content) < x.astype(np.float32).nbytes / 2
    loaded = pickle.loads(content)
    np.testing.assert_array_equal(loaded.score_samples(x[:100]), fitted.score_samples(x[:100]))
    published = elbo.load(loaded.publish(tmp_path, name="web"))
    np.testing.assert_allclose(published.score(x[:100]), -fitted.score_samples(x[:100]), rtol=1e-5)


def test_same_random_state_gives_the_same_model_and_another_gives_another() -> None:
    x = normal_rows(200, 0)
    first, same, other = (
        VAEDetector(**SMALL, random_state=state).fit(x).score_samples(x) for state in (1, np.int64(1), 2)
    )
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 1e-3
    drawn, again = (
        VAEDetector(**SMALL, random_state=np.random.RandomState(7)).fit(x).score_samples(x) for _ in range(2)
    )
    np.testing.assert_array_equal(drawn, again)


def test_detector_with_too_few_rows_for_alpha_warns_and_calls_no_row_an_outlier() -> None:
    with pytest.warns(ElboWarning, match=r"no row is an outlier at alpha=0.05: .* only 12 calibration rows"):
        fitted = PCADetector().fit(normal_rows(12, 0))
    far = normal_rows(5, 1) + 1000
    assert (fitted.predict(far) == 1).all()
    assert fitted.offset_ == -np.inf
    assert fitted.score_samples(far).max() < fitted.score_samples(normal_rows(50, 2)).min()


def test_fit_warns_about_rows_that_follow_each_other_as_in_a_time_series() -> None:
    x = np.random.RandomState(0).standard_normal((1000, 3)).cumsum(axis=0)
    with pytest.warns(ElboWarning, match="as in a time series"):
        PCADetector().fit(x)


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        (PCADetector(alpha=0), "alpha: expected a rate above 0 and below 1, got 0"),
        (VAEDetector(epochs=0), "epochs: input should be greater than or equal to 1, got 0"),
        (VAEDetector(random_state=-1), "random_state: input should be greater than or equal to 0, got -1"),
        (AutoencoderDetector(l2=-1), "l2: input should be greater than or equal to 0, got -1"),
        (PCADetector(latents=500), "500 latents need at least 501 rows to fit"),
    ],
)
def test_fit_with_an_invalid_parameter_raises_a_value_error_that_names_it(detector: Detector, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detector.fit(normal_rows(50, 0))


def test_missing_values_are_accepted_only_in_columns_that_have_some_in_training() -> None:
    x = pd.DataFrame(normal_rows(200, 0), columns=list("abcde"))
    x.loc[::7, "b"] = np.nan
    fitted = PCADetector(calibration="split").fit(x)
    np.testing.assert_allclose(-fitted.score_samples(x), fitted.model_.score(x), rtol=1e-4, atol=1e-5)
    x.loc[0, "c"] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN in feature c, in which no training row"):
        fitted.predict(x)
    x["c"] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN in all rows of feature c: leave the feature out"):
        PCADetector().fit(x)


def test_grid_search_over_latents_refits_the_best_detector_in_a_pipeline() -> None:
    x, y = labelled_rows()
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    pipeline = Pipeline([("scale", StandardScaler()), ("detect", PCADetector(calibration="split"))])
    search = GridSearchCV(pipeline, {"detect__latents": np.array([1, 2])}, scoring="roc_auc", cv=folds).fit(x, y)
    assert search.best_score_ > 0.8
    assert search.best_estimator_["detect"].model_.artifact.manifest.latents == search.best_params_["detect__latents"]
    assert roc_auc_score(y, search.decision_function(x)) > 0.8


def test_cross_validation_in_two_processes_gives_the_scores_of_one() -> None:
    x, y = labelled_rows()
    folds = StratifiedKFold(2, shuffle=True, random_state=0)
    arguments: dict[str, Any] = {"scoring": "roc_auc", "cv": folds}
    try:
        parallel = cross_val_score(PCADetector(calibration="split"), x, y, n_jobs=2, **arguments)
    finally:
        get_reusable_executor().shutdown(wait=True)
    np.testing.assert_array_equal(parallel, cross_val_score(PCADetector(calibration="split"), x, y, **arguments))


def test_latents_of_a_vae_in_a_pipeline_classify_digits() -> None:
    x, y = load_digits(return_X_y=True)
    some = y < 4
    transformer = VAETransformer(latents=8, epochs=60, random_state=0)
    pipeline = make_pipeline(StandardScaler(), transformer, LogisticRegression(max_iter=1000))
    fit, test = slice(0, 500), slice(500, None)
    assert pipeline.fit(x[some][fit], y[some][fit]).score(x[some][test], y[some][test]) > 0.8


def test_principal_components_of_rows_of_two_factors_reconstruct_the_rows() -> None:
    random = np.random.RandomState(0)
    x = 5 + random.standard_normal((200, 2)) @ random.standard_normal((2, 6))
    transformer = PCATransformer(latents=2)
    latents = transformer.fit_transform(x)
    assert latents.shape == (200, 2)
    np.testing.assert_allclose(transformer.inverse_transform(latents), x, atol=1e-4)
    assert transformer.inverse_transform(latents.astype(np.float32)).dtype == np.float32
    with pytest.raises(ValueError, match="X has 3 latents, but PCATransformer has 2: expected the output of transform"):
        transformer.inverse_transform(np.zeros((1, 3)))


def test_transformer_publishes_a_model_that_encodes_alike(tmp_path: Path) -> None:
    x = pd.DataFrame(normal_rows(100, 0), columns=["a", "b", "c", "d", "e [%]"])
    transformer = PCATransformer(latents=2).fit(x)
    model = elbo.load(transformer.publish(tmp_path, name="web"))
    features = model.artifact.manifest.features
    assert [(feature.name, feature.unit) for feature in features][3:] == [("d", None), ("e", "%")]
    np.testing.assert_allclose(model.encode(x), transformer.transform(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Input X has two columns with the name 'e'"):
        PCATransformer().fit(x.rename(columns={"a": "e [s]"}))


def test_verbose_1_shows_the_progress_and_0_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    VAEDetector(**SMALL).fit(normal_rows(100, 0))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    VAEDetector(**SMALL, verbose=1).fit(normal_rows(100, 0))
    assert "training model (vae)" in capsys.readouterr().err


def test_options_of_scikit_learn_that_the_caller_has_set_do_not_reach_the_training() -> None:
    from sklearn import config_context

    x = normal_rows(100, 0)
    with warnings.catch_warnings(), config_context(transform_output="pandas"):
        frame = PCATransformer(latents=2).fit_transform(x)
    assert list(frame.columns) == ["pcatransformer0", "pcatransformer1"]
