"""Whole training runs: published models are reproducible and calibrated, and have active latents."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import betabinom

from models import artifact
from models.errors import ElboError
from models.manifest import read_manifest
from tests.data import values
from tests.training.reporters import RecordingReporter
from training.config import AUTO_KINDS, EVERY_KIND, Kind, TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table, read_table, split_rows
from training.train import fit_model, train

pytestmark = pytest.mark.slow

FRESH_ROWS = 2_000


def table(rows: int, seed: int = 0, width: int = 8) -> Table:
    """Return noisy rows near a curved surface. No kind of model fits them exactly."""
    random = np.random.RandomState(seed)
    factors = random.standard_normal((rows, 2))
    mixing = np.random.RandomState(7).standard_normal((2, width))
    x = np.sin(factors @ mixing) * 10 + 100 + random.standard_normal((rows, width))
    names = [f"metric{i}" for i in range(width)]
    return Table(
        x=RowStore(x.astype(np.float32)),
        shape=(width,),
        names=names,
        units=["ms"] * width,
        labels=None,
        pixel_range=None,
        source="synthetic rows",
        missing=np.zeros(width, np.int64),
    )


def train_model(root: Path, model: Kind, rows: Table, **options: object) -> Path:
    """Train a small model and return the path of its artifact."""
    settings = {"latents": 2, "hidden": (32,), "epochs": 20} | options
    return train(TrainConfig(model=model, name=model, **settings), rows, root, RecordingReporter())


def count_alarms(path: Path, x: npt.NDArray[np.float32], alpha: float) -> int:
    """Return how many rows x [N, D] have a p-value of at most `alpha`."""
    with torch.inference_mode():
        module = artifact.load(path).module
        p = module.p_value(module.score(torch.from_numpy(x))[0]).numpy()
    return int((p <= np.float32(alpha)).sum())


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_number_of_false_alarms_on_fresh_rows_agrees_with_the_beta_binomial_distribution(
    kind: Kind, tmp_path: Path
) -> None:
    path = train_model(tmp_path, kind, table(2_000))
    fresh = values(table(FRESH_ROWS, seed=1))
    n = read_manifest(path).calibration.rows
    assert n == 400
    for alpha in (0.1, 0.05, 0.01):
        allowed = int(alpha * (n + 1))
        low, high = betabinom(FRESH_ROWS, allowed, n + 1 - allowed).interval(0.99)
        assert low <= count_alarms(path, fresh, alpha) <= high, alpha


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_rows_far_from_the_training_surface_raise_alarms(kind: Kind, tmp_path: Path) -> None:
    path = train_model(tmp_path, kind, table(2_000), epochs=60)
    anomalous = values(table(200, seed=1))
    anomalous[:, 3] += 40.0
    assert count_alarms(path, anomalous, 0.05) > 190


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_weights_are_equal_for_equal_seeds_and_differ_for_different_seeds(kind: Kind, tmp_path: Path) -> None:
    torch.manual_seed(1)  # neither the global generator nor the number of threads may change the result
    first = read_manifest(train_model(tmp_path, kind, table(200), seed=3, epochs=3))
    torch.manual_seed(2)
    torch.set_num_threads(2)
    second = read_manifest(train_model(tmp_path, kind, table(200), seed=3, epochs=3))
    torch.set_num_threads(1)
    other = read_manifest(train_model(tmp_path, kind, table(200), seed=4, epochs=3))
    assert first.weights_sha256 == second.weights_sha256
    assert first.metrics == second.metrics
    assert first.golden == second.golden
    assert first.weights_sha256 != other.weights_sha256


def test_manifest_of_a_run_records_data_features_split_and_options(tmp_path: Path) -> None:
    rows = table(200)
    manifest = read_manifest(train_model(tmp_path, "vae", rows, seed=5))
    fit_rows = rows.x.take(split_rows(200, 5).fit)
    assert (manifest.name, manifest.kind, manifest.shape, manifest.latents) == ("vae", "vae", [8], 2)
    assert [feature.name for feature in manifest.features] == rows.names
    assert {feature.unit for feature in manifest.features} == {"ms"}
    assert [feature.median for feature in manifest.features] == pytest.approx(np.median(fit_rows, axis=0).tolist())
    assert [feature.maximum for feature in manifest.features] == pytest.approx(fit_rows.max(axis=0).tolist())
    assert (manifest.data.fit, manifest.data.held_out, manifest.data.calibration) == (140, 20, 40)
    assert manifest.data.fingerprint == rows.fingerprint
    assert manifest.calibration.floor == pytest.approx(1 / 41)
    assert manifest.training["seed"] == 5
    assert {"elbo", "torch", "python", "numpy"} <= manifest.versions.keys()


def test_manifest_contains_the_reconstruction_error_of_the_published_model(tmp_path: Path) -> None:
    rows = table(200)
    path = train_model(tmp_path, "ae", rows)
    held_out = rows.x.take(split_rows(200, 0).held_out)
    with torch.inference_mode():
        x_hat = artifact.load(path).module(torch.from_numpy(held_out)).numpy()
    metrics = read_manifest(path).metrics
    assert metrics["reconstruction_error"] == pytest.approx(float(((x_hat - held_out) ** 2).mean()), rel=1e-5)
    mean = rows.x.take(split_rows(200, 0).fit).mean(axis=0)
    assert metrics["baseline_error"] == pytest.approx(float(((mean - held_out) ** 2).mean()), rel=1e-5)


def test_demonstration_vae_reconstructs_digits_with_active_latents(demonstration: Path) -> None:
    metrics = read_manifest(demonstration / "vae" / "1" / "model.pt").metrics
    assert metrics["active_latents"] >= 8
    assert metrics["reconstruction_error"] <= 0.02
    assert metrics["baseline_error"] == pytest.approx(0.074, abs=0.001)


def test_latent_counts_as_active_if_its_posterior_mean_varies(demonstration: Path) -> None:
    digits = read_table("digits")
    rows = torch.from_numpy(digits.x.take(split_rows(len(digits.x), 0).held_out))
    path = demonstration / "vae" / "1" / "model.pt"
    with torch.inference_mode():
        mean = artifact.load(path).module.encode(rows)[0].numpy()
    assert int((mean.var(axis=0) > 0.01).sum()) == read_manifest(path).metrics["active_latents"]


def test_samples_of_the_demonstration_models_are_near_real_digits_and_vary(demonstration: Path) -> None:
    """On average, a sample is closer to the nearest digit than a digit is to the mean digit.

    The samples have more than half of the variance of the digits.
    """
    digits = torch.from_numpy(values(read_table("digits")))
    random = np.random.RandomState(0)
    noise = torch.from_numpy(random.standard_normal((200, 16)).astype(np.float32))
    choice = torch.from_numpy(random.uniform(size=200).astype(np.float32))
    for kind in AUTO_KINDS:
        module = artifact.load(demonstration / kind / "1" / "model.pt").module
        with torch.inference_mode():
            samples = module.decode(module.draw(noise, choice))
        nearest = torch.cdist(samples, digits).amin(dim=1).mean()
        assert float(nearest) < float(torch.cdist(digits.mean(dim=0, keepdim=True), digits).mean()), kind
        assert float(samples.var(dim=0).sum()) > 0.5 * float(digits.var(dim=0).sum()), kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": 9, "model": "pca"}, "lower --latents to 8"),
        ({"latents": 140, "model": "vae"}, "140 latents need at least 141 rows to fit, got 140"),
        ({"learning_rate": 1e12, "model": "ae"}, "lower --learning-rate"),
        ({"likelihood": "bernoulli", "scale": "none", "model": "vae"}, "use --scale range"),
        ({"output": "sigmoid", "scale": "none", "model": "ae"}, "use --scale range"),
    ],
)
def test_training_fails_with_one_line_and_writes_nothing_if_the_options_are_impossible(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    options = {"latents": 2, "hidden": (32,), "epochs": 20, "name": "x"} | options
    with pytest.raises(ElboError, match=message) as caught:
        train(TrainConfig(**options), table(200), tmp_path, RecordingReporter())
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("flaw", ["constant", "collinear", "huge", "tiny"])
def test_model_trained_with_an_extreme_column_gives_finite_scores(kind: Kind, flaw: str, tmp_path: Path) -> None:
    rows = table(300)
    x = values(rows)
    match flaw:
        case "constant":
            x[:, 0] = 5.0
        case "collinear":
            x[:, 0] = 2 * x[:, 1]
        case "huge":
            x[:, 0] *= 1e12
        case "tiny":
            x[:, 0] *= 1e-12
    path = train_model(tmp_path, kind, replace(rows, x=RowStore(x)))
    with torch.inference_mode():
        module = artifact.load(path).module
        score = module.score(torch.from_numpy(x))[0]
    assert bool(score.isfinite().all())
    assert 0 <= count_alarms(path, x, 0.05) < 60


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_vae_on_images_beats_the_baseline_with_either_likelihood(likelihood: str, tmp_path: Path) -> None:
    path = train_model(
        tmp_path,
        "vae",
        read_table("digits"),
        likelihood=likelihood,
        latents=8,
        hidden=(64,),
        epochs=60,
        learning_rate=5e-3,
    )
    metrics = read_manifest(path).metrics
    assert metrics["elbo"] == pytest.approx(metrics["reconstruction"] - metrics["kl"], abs=1e-3)
    assert metrics["reconstruction_error"] < 0.7 * metrics["baseline_error"]


@pytest.mark.parametrize(
    ("model", "option"),
    [
        ("ae", {"noise": 0.5}),
        ("ae", {"masking": 0.3}),
        ("ae", {"l2": 0.01}),
        ("ae", {"hidden": ()}),
        ("vae", {"hidden": ()}),
        ("vae", {"variance": "learned"}),
        ("pca", {"robust": True}),
        ("ensemble", {"noise": 0.5}),
        ("ensemble", {"robust": True}),
        ("vae", {"variance": "optimal"}),
        ("vae", {"variance": 0.5}),
        ("vae", {"samples": 3}),
        ("vae", {"free_bits": 0.5}),
        ("vae", {"beta": 4.0}),
        ("vae", {"warm_up": 50}),
    ],
)
def test_training_option_changes_the_weights_and_the_artifact_still_loads(
    model: Kind, option: dict[str, object], tmp_path: Path
) -> None:
    default = read_manifest(train_model(tmp_path, model, table(300)))
    changed = read_manifest(train_model(tmp_path, model, table(300), **option))
    assert default.weights_sha256 != changed.weights_sha256
    loaded = artifact.load(tmp_path / model / "2" / "model.pt")
    with torch.inference_mode():
        x_hat = loaded.module(torch.from_numpy(values(table(300))))
    assert bool(x_hat.isfinite().all())


def test_published_optimal_variance_is_the_mean_squared_error_of_the_fit_rows(tmp_path: Path) -> None:
    rows = table(300)
    path = train_model(tmp_path, "vae", rows, variance="optimal", epochs=40)
    state = torch.jit.load(path).state_dict()
    fit_rows = torch.from_numpy(rows.x.take(split_rows(300, 0).fit))
    module = artifact.load(path).module
    with torch.inference_mode():
        mean, std = module.encode(fit_rows)
        random = torch.Generator().manual_seed(0)
        errors = []
        for _ in range(20):
            x_hat = module.decode(mean + std * torch.randn(mean.shape, generator=random))
            errors.append(((fit_rows - x_hat) / state["scaling.scale"]).square().mean())
    published = float(state["core.likelihood.log_variance"].exp())
    assert published == pytest.approx(float(torch.stack(errors).mean()), rel=0.05)


@pytest.mark.parametrize("kind", ["vae", "auto"])
def test_fitted_model_that_is_published_later_equals_the_model_that_train_publishes(
    kind: Literal["vae", "auto"], tmp_path: Path
) -> None:
    config = TrainConfig(model=kind, name="web", latents=2, hidden=(32,), epochs=3)
    trained = artifact.load(train(config, table(200), tmp_path / "trained", RecordingReporter()))
    fitted = fit_model(config, table(200), RecordingReporter())
    assert not (tmp_path / "fitted").exists()
    for version in (1, 2):  # it can be published more than once
        published = artifact.load(fitted.assemble(RecordingReporter()).publish(tmp_path / "fitted"))
        assert published.path == tmp_path / "fitted" / "web" / str(version) / "model.pt"
        same = {"created": trained.manifest.created, "history": trained.manifest.history}  # they contain times
        assert published.manifest.model_copy(update=same) == trained.manifest
        created = published.manifest.created.encode(), trained.manifest.created.encode()
        assert {name: text.replace(*created) for name, text in published.exhibits.items()} == trained.exhibits
        assert published.twin is not None


def test_model_without_twin_has_the_same_weights(tmp_path: Path) -> None:
    fitted = fit_model(TrainConfig(model="pca", name="web", latents=2), table(200), RecordingReporter())
    whole, quick = (
        artifact.load(fitted.assemble(RecordingReporter(), twin=twin).publish(tmp_path)) for twin in (True, False)
    )
    assert quick.manifest.weights_sha256 == whole.manifest.weights_sha256
    assert (whole.twin is None, quick.twin is None) == (False, True)
