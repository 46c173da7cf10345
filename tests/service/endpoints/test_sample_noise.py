"""POST /sample of tables: with observation noise, samples are spread like the training rows."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch

from models import artifact
from models.pipeline import Pipeline
from service.app import create_app
from service.inference.sampling import NoiseSource
from service.settings import Settings
from tests.commands import write
from tests.models.publishing import publish
from tests.service.running import post, running
from tests.training.reporters import RecordingReporter
from training.config import EVERY_KIND, TrainConfig
from training.data.table import read_table
from training.train import train

pytestmark = pytest.mark.slow

Doubles = npt.NDArray[np.float64]
HEADER = "load,latency [ms],share [%],requests,failed"
N = 2000


def rows(count: int = N, seed: int = 0) -> Doubles:
    """Return rows that depend on one load: two real columns, a share in [0, 100], a count, and a binary column."""
    random = np.random.RandomState(seed)
    load = random.standard_normal(count)
    share = (50 + 15 * load + 25 * random.standard_normal(count)).clip(0, 100)
    latency = 200 + 30 * load + 40 * random.standard_normal(count)
    requests = random.poisson(20 + 4 * load.clip(-4, 4))
    failed = random.uniform(size=count) < 0.4
    return np.column_stack([load, latency, share, requests, failed])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with one model of each kind, and a model of an earlier release, without noise."""
    folder = tmp_path_factory.mktemp("noise")
    table = read_table(write(folder / "rows.csv", rows(), HEADER))
    for kind in EVERY_KIND:
        train(TrainConfig(model=kind, name=kind, epochs=40), table, folder / "artifacts", RecordingReporter())
    bounded = TrainConfig(model="pca", name="bounded", bounds=("share=40:60", "requests=18.5:"))
    train(bounded, table, folder / "artifacts", RecordingReporter())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "METHODS", tuple(name for name in artifact.METHODS if name != "observe"))
        patch.delattr(Pipeline, "observe")
        # TorchScript reuses the compiled methods of modules of the same type. An empty store makes it compile anew.
        patch.setattr(torch.jit._recursive, "concrete_type_store", torch.jit._recursive.ConcreteTypeStore())
        publish(folder / "artifacts", "pca", "earlier")
    return folder / "artifacts"


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[httpx.Client]:
    app = create_app(Settings(artifacts=root, max_rows=5000, poll_seconds=3600, log_level="warning"))
    with running(app) as found:
        yield found


def sample(client: httpx.Client, model: str, **body: object) -> Doubles:
    return np.array(post(client, "/sample", {"seed": 3, **body}, params={"model": model})["outputs"])


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_samples_of_a_table_have_the_means_and_deviations_of_the_training_rows(client: httpx.Client, kind: str) -> None:
    x, drawn = rows(), sample(client, kind, n=4000)
    assert drawn.std(axis=0) == pytest.approx(x.std(axis=0), rel=0.15)
    assert (np.abs(drawn.mean(axis=0) - x.mean(axis=0)) < 0.2 * x.std(axis=0)).all()


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_samples_of_a_table_keep_bounds_and_whole_numbers(client: httpx.Client, kind: str) -> None:
    x, drawn = rows(), sample(client, kind, n=4000)
    slack = 1e-6 * np.abs(x).max(axis=0)
    assert (drawn >= x.min(axis=0) - slack).all()
    assert (drawn <= x.max(axis=0) + slack).all()
    assert np.array_equal(drawn[:, 3:], drawn[:, 3:].round())
    assert set(np.unique(drawn[:, 4])) == {0.0, 1.0}
    assert not np.array_equal(drawn[:, 1], drawn[:, 1].round())


def test_samples_and_imputed_values_of_a_model_with_bounds_are_within_them(client: httpx.Client) -> None:
    drawn = sample(client, "bounded", n=2000)
    assert (drawn[:, 2].min(), drawn[:, 2].max()) == (40.0, 60.0)
    assert drawn[:, 3].min() == 19.0  # the first whole number
    assert 25.0 < drawn[:, 3].max() <= rows()[:, 3].max()  # the end that is not given is that of the training rows
    gaps = [[None if column in (2, 3) else value for column, value in enumerate(row)] for row in rows(200).tolist()]
    filled = np.array(post(client, "/impute", {"inputs": gaps}, params={"model": "bounded"})["outputs"])
    assert (filled[:, 2].min(), filled[:, 2].max()) == (40.0, 60.0)  # 200 rows of a column from 0 to 100
    assert filled[:, 3].min() >= 19.0
    assert np.array_equal(filled[:, 3], filled[:, 3].round())


def test_samples_of_pca_have_the_correlations_of_the_training_rows(client: httpx.Client) -> None:
    drawn = sample(client, "pca", n=5000)
    assert np.abs(np.corrcoef(drawn.T) - np.corrcoef(rows().T)).max() < 0.1


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_samples_without_noise_are_the_decoded_latents_of_the_samples_with_noise(
    client: httpx.Client, kind: str
) -> None:
    body = {"n": 5, "seed": 3}
    noisy, plain = (
        post(client, "/sample", {**body, "noise": noise}, params={"model": kind}) for noise in (True, False)
    )
    assert noisy["latents"] == plain["latents"]
    decoded = post(client, "/decode", {"latents": plain["latents"]}, params={"model": kind})["outputs"]
    assert np.array(decoded) == pytest.approx(np.array(plain["outputs"]), rel=1e-5)
    assert noisy["outputs"] != plain["outputs"]


def test_seed_gives_the_same_noisy_samples_and_the_same_first_samples_for_any_number(client: httpx.Client) -> None:
    two, five = sample(client, "ae", n=2), sample(client, "ae", n=5)
    assert np.array_equal(sample(client, "ae", n=5), five)
    assert two == pytest.approx(five[:2], rel=1e-5)
    assert not np.array_equal(sample(client, "ae", n=5, seed=4), five)


def test_temperature_zero_gives_the_centres_of_components_even_if_noise_is_on(client: httpx.Client) -> None:
    drawn, centres = sample(client, "pca", n=4, temperature=0), sample(client, "pca", n=4, temperature=0, noise=False)
    assert drawn[:, :3] == pytest.approx(centres[:, :3], rel=1e-6)
    assert np.array_equal(drawn[:, 3], centres[:, 3].round())


@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**53 - 1])
def test_row_noise_of_a_seed_is_the_third_stream_of_numpy_random_state(seed: int) -> None:
    expected = np.random.RandomState([seed % 2**32, seed // 2**32, 2]).standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_array_equal(NoiseSource().draw_rows(seed, 3, 4), expected)


def test_artifact_of_an_earlier_release_keeps_its_samples_and_refuses_noise(client: httpx.Client) -> None:
    answer = post(client, "/sample", {"n": 3, "seed": 3}, params={"model": "earlier"})
    decoded = post(client, "/decode", {"latents": answer["latents"]}, params={"model": "earlier"})["outputs"]
    assert np.array(decoded) == pytest.approx(np.array(answer["outputs"]), rel=1e-5)
    refused = client.post("/sample?model=earlier", json={"noise": True})
    assert refused.status_code == 422
    assert refused.json()["pointer"] == "/noise"
    assert "train the model again" in refused.json()["hint"]
