"""`elbo.adopt`: modules, estimators and files become models that give their numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import RobustScaler, StandardScaler
from torch import nn

import elbo
from elbo.errors import ElboWarning, NotSupportedError
from models.errors import ArtifactUntrusted
from models.keys import create_key
from training.errors import AdoptionError, DataError

pytestmark = pytest.mark.slow

RANDOM = np.random.RandomState(0)
MIXING = RANDOM.standard_normal((2, 5))
NAMES = ["a", "b", "c", "d", "e"]


def rows(count: int, seed: int) -> np.ndarray:
    """Return rows [count, 5] near a plane, in float32."""
    random = np.random.RandomState(seed)
    noise = 0.1 * random.standard_normal((count, 5))
    return (100 + random.standard_normal((count, 2)) @ MIXING + noise).astype(np.float32)


FIT, NORMAL = rows(300, 1), rows(400, 2)


class Linear(nn.Module):
    """The exact PCA of FIT as the parts `encoder` and `decoder`."""

    def __init__(self) -> None:
        super().__init__()
        pca = PCA(2).fit(FIT)
        self.encoder, self.decoder = nn.Linear(5, 2), nn.Linear(2, 5)
        axes, mean = torch.from_numpy(pca.components_).float(), torch.from_numpy(pca.mean_).float()
        with torch.no_grad():
            self.encoder.weight.copy_(axes)
            self.encoder.bias.copy_(-axes @ mean)
            self.decoder.weight.copy_(axes.T)
            self.decoder.bias.copy_(mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))  # type: ignore[no-any-return]  # a call of a module has no type


def test_adopted_module_gives_its_numbers_and_alarms_with_the_names_of_a_frame(tmp_path: Path) -> None:
    module = Linear()
    frame = pd.DataFrame(NORMAL, columns=NAMES)
    model = elbo.adopt(module, frame, fit_rows=frame[NAMES[::-1]].head(100), name="web", artifacts=tmp_path)
    assert (model.name, model.version, model.path) == ("web", 1, tmp_path / "web" / "1" / "model.pt")
    assert model.feature_names == NAMES
    fresh = rows(1000, 3)
    with torch.inference_mode():
        expected = module(torch.from_numpy(fresh)).numpy()
    np.testing.assert_allclose(model.reconstruct(pd.DataFrame(fresh, columns=NAMES)), expected, rtol=1e-5)
    assert 0.01 < model.is_anomaly(fresh, alpha=0.05).mean() < 0.12
    assert model.is_anomaly(fresh + np.array([0, 0, 9, 0, 0], np.float32), alpha=0.05).all()
    assert model.sample(3, seed=1).shape == (3, 5)


@pytest.mark.parametrize("kind", ["scaler", "estimator"])
def test_frame_whose_columns_are_in_another_order_than_in_the_fit_of_scikit_learn_is_refused(
    kind: str, tmp_path: Path
) -> None:
    titles = ["a [ms]", *NAMES[1:]]
    frame = pd.DataFrame(NORMAL, columns=titles)
    fitted = StandardScaler().fit(pd.DataFrame(FIT, columns=titles))
    moved = frame[[titles[1], titles[0], *titles[2:]]]
    module: Any = make_pipeline(StandardScaler(), PCA(2)).fit(pd.DataFrame(FIT, columns=titles))
    scaler = None
    if kind == "scaler":
        module, scaler = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 5)), fitted
        with torch.no_grad():  # the projection of scaled rows onto their principal components
            axes = torch.from_numpy(PCA(2).fit(fitted.transform(pd.DataFrame(FIT, columns=titles))).components_).float()
            for layer, weight in zip(module, (axes, axes.T), strict=True):
                layer.weight.copy_(weight)
                layer.bias.zero_()
    with pytest.raises(AdoptionError, match=r"StandardScaler was fitted with other columns.*column 1 is 'a' and 'b'"):
        elbo.adopt(module, moved, scaler=scaler, name="web", artifacts=tmp_path)
    assert not list(tmp_path.rglob("model.pt"))
    model = elbo.adopt(module, frame, scaler=scaler, name="web", artifacts=tmp_path)  # units are no part of a name
    assert model.feature_names == NAMES


@pytest.mark.parametrize("scaler", [StandardScaler(), RobustScaler()], ids=lambda scaler: type(scaler).__name__)
def test_adopted_pipeline_of_scikit_learn_gives_its_transform_and_inverse_transform(
    scaler: Any, tmp_path: Path
) -> None:
    pipeline = make_pipeline(scaler, PCA(2)).fit(FIT)
    model = elbo.adopt(pipeline, NORMAL, fit_rows=FIT, name="web", artifacts=tmp_path)
    fresh = rows(50, 4)
    codes = pipeline.transform(fresh)
    np.testing.assert_allclose(model.encode(fresh), codes, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.decode(codes), pipeline.inverse_transform(codes), rtol=1e-5)


def test_adopted_perceptron_gives_its_predictions(tmp_path: Path) -> None:
    centred = FIT - FIT.mean(axis=0)
    network = MLPRegressor(hidden_layer_sizes=(4, 2, 4), max_iter=5000, random_state=0, solver="lbfgs")
    network.fit(centred, centred)
    calibration, fresh = NORMAL - FIT.mean(axis=0), rows(20, 5) - FIT.mean(axis=0)
    model = elbo.adopt(network, calibration, fit_rows=centred, name="web", artifacts=tmp_path)
    np.testing.assert_allclose(model.reconstruct(fresh), network.predict(fresh), rtol=1e-4, atol=1e-4)


def test_adopted_torchscript_file_gives_the_numbers_of_the_module(tmp_path: Path) -> None:
    traced = torch.jit.trace(Linear().eval(), torch.from_numpy(FIT[:2]))
    torch.jit.save(traced, tmp_path / "web.pt")
    model = elbo.adopt(tmp_path / "web.pt", NORMAL, name="web", artifacts=tmp_path)
    with torch.inference_mode():
        expected = traced(torch.from_numpy(FIT)).numpy()
    np.testing.assert_allclose(model.reconstruct(FIT), expected, rtol=1e-5)


def test_module_without_encoder_reconstructs_and_scores_only(tmp_path: Path) -> None:
    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)  # type: ignore[no-any-return]  # a call of a module has no type

    model = elbo.adopt(Smooth(), NORMAL, name="web", artifacts=tmp_path)
    assert model.score(FIT[:3]).shape == (3,)
    for call in (
        lambda: model.encode(FIT),
        lambda: model.decode([[1.0]]),
        lambda: model.sample(1),
        lambda: model.interpolate(FIT[:1], FIT[1:2]),
        model.plot_samples,
        model.plot_latents,
    ):
        with pytest.raises(NotSupportedError, match=r"web cannot .* only reconstructs and scores rows"):
            call()


def test_module_that_reconstructs_badly_gives_a_warning(tmp_path: Path) -> None:
    class Bad(Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3.0 * self.decoder(self.encoder(x))  # type: ignore[no-any-return]  # a call of a module

    with pytest.warns(ElboWarning, match="reconstructs rows worse than predicting the mean"):
        model = elbo.adopt(
            Bad(),
            NORMAL,
            name="web",
            artifacts=tmp_path,
            encode="encoder",
            decode=lambda self, z: 3.0 * self.decoder(z),
        )
    assert any("worse than predicting the mean" in note for note in model.notes)


def test_adopted_model_is_signed(tmp_path: Path) -> None:
    create_key(tmp_path / "a.key", "a")
    create_key(tmp_path / "b.key", "b")
    model = elbo.adopt(Linear(), NORMAL, name="web", artifacts=tmp_path, key=tmp_path / "a.key")
    assert elbo.load("web", artifacts=tmp_path, keys=tmp_path / "a.key.pub") == model
    with pytest.raises(ArtifactUntrusted):
        elbo.load("web", artifacts=tmp_path, keys=tmp_path / "b.key.pub")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration_rows": NORMAL[:, :3]}, "shape"),
        ({"calibration_rows": NORMAL[:10]}, "10"),
        ({"calibration_rows": pd.DataFrame(NORMAL, columns=NAMES).assign(e="text")}, "column 'e' is String: expected"),
        (
            {
                "calibration_rows": pd.DataFrame(NORMAL, columns=NAMES),
                "fit_rows": pd.DataFrame(FIT[:, :4], columns=NAMES[:4]),
            },
            "fit_rows lack the column 'e' of calibration_rows",
        ),
        (
            {"calibration_rows": NORMAL, "module": make_pipeline(StandardScaler(), PCA(2)).fit(FIT), "scaler": (0, 1)},
            "has",
        ),
    ],
)
def test_arguments_that_do_not_fit_raise_an_error_and_publish_nothing(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdoptionError, match=message):
        elbo.adopt(**{"module": Linear(), "name": "web", "artifacts": tmp_path, **arguments})
    assert not list(tmp_path.rglob("model.pt"))


def test_model_with_other_features_than_the_served_version_is_published_only_if_asked_for(tmp_path: Path) -> None:
    elbo.adopt(Linear(), NORMAL, name="web", artifacts=tmp_path, feature_names=NAMES)
    other = ["a", "b", "c", "d", "memory"]
    with pytest.raises(DataError, match=r"data has other features than web@1 .*lacks e.*set replace_features"):
        elbo.adopt(Linear(), NORMAL, name="web", artifacts=tmp_path, feature_names=other)
    model = elbo.adopt(Linear(), NORMAL, name="web", artifacts=tmp_path, feature_names=other, replace_features=True)
    assert (model.path.parent.name if model.path else None, model.feature_names) == ("2", other)
