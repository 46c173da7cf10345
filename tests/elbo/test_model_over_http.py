"""A model in this process gives the numbers that the server gives over HTTP for the same rows."""

from functools import partial
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

import elbo
from elbo.model import Model
from tests.elbo.conftest import WINDOW, Site, metric_rows, series
from tests.service.running import post

pytestmark = pytest.mark.slow

# A sum in float32 may differ in its last bits, because batches of other sizes are summed in another order.
assert_close = partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)


@pytest.fixture(params=["fitted", "loaded"], scope="module")
def site_models(request: pytest.FixtureRequest, site: Site) -> dict[str, Model]:
    """Return the models by name: as `fit` returned them, and as `load` returns them."""
    if request.param == "fitted":
        return site.fitted
    return {name: elbo.load(name, artifacts=site.artifacts) for name in site.fitted}


def ask(client: httpx.Client, path: str, body: dict[str, Any], model: str, field: str) -> npt.NDArray[np.float32]:
    return np.array(post(client, f"{path}?model={model}", body)[field], np.float32)


def lists(rows: npt.NDArray[np.float32]) -> list[Any]:
    """Return rows as JSON has them: with None for a missing value."""
    values = rows.astype(object)
    values[np.isnan(rows)] = None
    as_lists: list[Any] = values.tolist()
    return as_lists


def gappy_rows() -> npt.NDArray[np.float32]:
    rows = metric_rows(40, seed=5)
    rows[::3, 2] = np.nan
    rows[4, 1] += 500
    return rows


def test_encode_reconstruct_and_decode_equal_those_of_the_server(
    client: httpx.Client, site: Site, site_models: dict[str, Model]
) -> None:
    rows, images = gappy_rows(), site.digits[:20]
    web, vae = site_models["web"], site_models["vae"]
    for model, x in ((web, rows), (vae, images)):
        latents = ask(client, "/encode", {"inputs": lists(x)}, model.name, "latents")
        std = ask(client, "/encode", {"inputs": lists(x)}, model.name, "std")
        for one, other in zip(model.posterior(x), (latents, std), strict=True):
            assert_close(one, other)
        outputs = ask(client, "/reconstruct", {"inputs": lists(x)}, model.name, "outputs").reshape(x.shape)
        errors = ask(client, "/reconstruct", {"inputs": lists(x)}, model.name, "errors")
        assert_close(model.reconstruct(x), outputs)
        np.testing.assert_allclose(model.reconstruction_error(x), errors, rtol=1e-4)
        decoded = ask(client, "/decode", {"latents": latents.tolist()}, model.name, "outputs").reshape(x.shape)
        assert_close(model.decode(latents), decoded)


def test_draws_from_the_posterior_equal_those_of_the_server_for_the_same_seed(
    client: httpx.Client, site: Site, site_models: dict[str, Model]
) -> None:
    body = {"inputs": site.digits[:5].tolist(), "sample": True, "seed": 11}
    expected = ask(client, "/encode", body, "vae", "latents")
    drawn = site_models["vae"].encode(site.digits[:5], sample=True, seed=11)
    assert_close(drawn, expected)
    assert not np.allclose(drawn, site_models["vae"].encode(site.digits[:5]), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("web", {}),
        ("web", {"temperature": 0.5, "noise": False}),
        ("vae", {}),
        ("vae", {"noise": True}),
        ("vae", {"prior": "standard", "temperature": 1.5}),
        ("conditional", {}),
        ("conditional", {"condition": {"label": "7"}}),
    ],
)
def test_samples_equal_those_of_the_server_bit_by_bit_for_the_same_seed(
    client: httpx.Client, site_models: dict[str, Model], name: str, options: dict[str, Any]
) -> None:
    expected = ask(client, "/sample", {"n": 30, "seed": 123456789012345, **options}, name, "outputs")
    rows = site_models[name].sample(30, seed=123456789012345, **options)
    assert rows.shape == (30, *site_models[name].shape)
    assert np.array_equal(rows.reshape(30, -1), expected.reshape(30, -1))


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_interpolation_equals_that_of_the_server(
    client: httpx.Client, site: Site, site_models: dict[str, Model], method: str
) -> None:
    start, end = site.digits[0], site.digits[1]
    body = {"start": {"input": start.tolist()}, "end": {"input": end.tolist()}, "steps": 7, "method": method}
    expected = ask(client, "/interpolate", body, "vae", "outputs").reshape(7, 8, 8)
    found = site_models["vae"].interpolate(start[None], end[None], 7, method=method)  # type: ignore[arg-type]  # a parameter
    assert_close(found, expected)


@pytest.mark.parametrize("name", ["web", "vae"])
def test_scores_and_explanations_equal_those_of_the_server(
    client: httpx.Client, site: Site, site_models: dict[str, Model], name: str
) -> None:
    rows = gappy_rows() if name == "web" else np.concatenate((site.digits[:20], 1 - site.digits[:3]))
    model = site_models[name]
    answer = post(
        client, f"/anomaly?model={name}", {"inputs": lists(rows), "explain": 2, "alpha": 0.1, "observe": False}
    )
    expected = answer["results"]
    np.testing.assert_allclose(model.score(rows), [each["score"] for each in expected], rtol=1e-4)
    assert model.p_value(rows) == pytest.approx([each["p_value"] for each in expected], rel=1e-6)
    assert model.severity(rows, alpha=0.1) == pytest.approx([each["severity"] for each in expected], rel=1e-4)
    flagged = [each["is_anomaly"] for each in expected]
    assert model.is_anomaly(rows, alpha=0.1).tolist() == flagged
    assert 0 < sum(flagged) < len(flagged)
    assert model.threshold(0.1) == pytest.approx(answer["threshold"], rel=1e-6)
    for verdict, each in zip(model.explain(rows, 2, alpha=0.1), expected, strict=True):
        assert (verdict.row, verdict.is_anomaly) == (each["row"], each["is_anomaly"])
        assert verdict.parts == pytest.approx(each["parts"], rel=1e-4, abs=1e-3)
        assert [found.name for found in verdict.features] == [feature["name"] for feature in each["features"]]
        for found, feature in zip(verdict.features, each["features"], strict=True):
            assert found.expected == pytest.approx(feature["expected"], rel=1e-4, abs=1e-5)
            assert found.contribution == pytest.approx(feature["contribution"], rel=1e-3, abs=1e-4)


def test_scores_of_records_that_lack_a_feature_equal_those_of_the_server(
    client: httpx.Client, site_models: dict[str, Model]
) -> None:
    records = [{"cpu": 51.0, "latency": None, "errors": 3.0}, {"cpu": 97.0, "latency": 900.0, "errors": None}]
    answer = post(client, "/anomaly?model=web", {"records": records, "observe": False})
    scores = [each["score"] for each in answer["results"]]
    np.testing.assert_allclose(site_models["web"].score(records), scores, rtol=1e-5)


def test_condition_of_rows_gives_the_latents_and_scores_of_the_server(
    client: httpx.Client, site: Site, site_models: dict[str, Model]
) -> None:
    images, model = site.digits[:4], site_models["conditional"]
    each = [{"label": "3"}, {"label": "5"}, {}, {"label": "0"}]
    for condition in ({"label": "3"}, each, None):
        body = {"inputs": images.tolist(), "condition": condition}
        assert_close(model.encode(images, condition=condition), ask(client, "/encode", body, "conditional", "latents"))
    answer = post(
        client, "/anomaly?model=conditional", {"inputs": images.tolist(), "condition": {"label": "3"}, "observe": False}
    )
    scores = model.score(images, condition={"label": "3"})
    np.testing.assert_allclose(scores, [result["score"] for result in answer["results"]], rtol=1e-4)
    assert not np.allclose(scores, model.score(images), rtol=1e-3)


def test_windows_get_the_scores_and_latents_of_the_server(client: httpx.Client, site_models: dict[str, Model]) -> None:
    rows = metric_rows(30, seed=9)[:, :2]
    windows = np.stack([rows[start : start + WINDOW] for start in range(20)])
    windows[3, :2] = np.nan  # two rows are not there
    model = site_models["hosts"]
    expected = post(client, "/anomaly?model=hosts", {"inputs": lists(windows), "observe": False})["results"]
    np.testing.assert_allclose(model.score(windows), [each["score"] for each in expected], rtol=1e-4)
    latents = ask(client, "/encode", {"inputs": lists(windows)}, "hosts", "latents")
    np.testing.assert_allclose(model.encode(windows), latents, rtol=1e-4, atol=1e-5)


def test_rows_with_times_are_judged_with_the_rows_before_them(site_models: dict[str, Model]) -> None:
    frame, model = series(20, seed=3), site_models["hosts"]
    host = frame.filter(host="a").select("cpu", "latency").to_numpy()
    windows = np.full((20, WINDOW, 2), np.nan, np.float32)
    for newest in range(20):
        rows = host[max(0, newest - WINDOW + 1) : newest + 1]
        windows[newest, -len(rows) :] = rows
    of_host_a = model.score(frame)[::2]
    np.testing.assert_allclose(of_host_a, model.score(windows), rtol=1e-5)
