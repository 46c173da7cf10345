"""Models are saved as `elbo train` publishes them, loaded by name, version or path, copied and pickled."""

import copy
import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import elbo
from elbo.errors import NotSupportedError, OptionError
from elbo.model import Model
from models import artifact
from models.errors import ArtifactCorrupt, ArtifactMissing, ArtifactNameInvalid, ArtifactUntrusted
from models.keys import create_key
from service.app import create_app
from service.inference.backends import TorchScriptBackend
from service.settings import Settings
from tests.data import ROOT
from tests.elbo.conftest import NAMES, Site, metric_rows
from tests.preloaded import run_preloaded
from tests.service.running import post, running
from training.errors import DataError

pytestmark = pytest.mark.slow

ROWS = metric_rows(20, seed=3)


@pytest.fixture(scope="module")
def web(site: Site) -> Model:
    return site.fitted["web"]


def test_saved_model_is_the_next_version_and_has_twin_card_and_exhibits(web: Model, tmp_path: Path) -> None:
    paths = [web.save(tmp_path), web.save(tmp_path)]
    assert paths == [tmp_path / "web" / str(version) / "model.pt" for version in (1, 2)]
    saved = artifact.load(paths[0])
    assert saved.twin is not None
    assert set(saved.exhibits) == {"held-out.json", "calibration.json", "card.md"}
    assert artifact.read_trained_rows(saved) is not None
    assert paths[0].read_bytes() == web.to_bytes()


def test_model_saved_under_another_name_is_the_same_model_with_this_name(web: Model, tmp_path: Path) -> None:
    path = web.save(tmp_path, "shop")
    shop = elbo.load("shop", artifacts=tmp_path)
    assert (shop.name, shop.manifest.name, shop.version) == ("shop", "shop", 1)
    assert path == shop.path
    assert shop.manifest.model_copy(update={"name": "web"}) == web.manifest
    assert np.array_equal(shop.score(ROWS), web.score(ROWS))
    assert shop.artifact.twin is not None
    assert artifact.read_trained_rows(shop.artifact) == artifact.read_trained_rows(artifact.load(web.save(tmp_path)))
    assert str(shop.card) == str(web.card).replace("# web", "# shop").replace("--name web", "--name shop")


def test_saved_model_is_served(web: Model, tmp_path: Path) -> None:
    web.save(tmp_path, "shop")
    with running(create_app(Settings(artifacts=tmp_path, log_level="warning"))) as client:
        answer = post(client, "/reconstruct", {"inputs": ROWS.tolist()})
    assert isinstance(client, httpx.Client)
    np.testing.assert_allclose(np.array(answer["outputs"]), web.reconstruct(ROWS), rtol=1e-5)


def test_model_with_other_features_is_saved_under_the_name_of_another_only_if_asked_for(
    site: Site, tmp_path: Path
) -> None:
    site.fitted["web"].save(tmp_path)
    with pytest.raises(DataError, match=r"the model has other features than web@1 .*set replace_features"):
        site.fitted["vae"].save(tmp_path, "web")
    assert site.fitted["vae"].save(tmp_path, "web", replace_features=True).parent.name == "2"


def test_name_that_is_no_folder_name_is_refused(web: Model, tmp_path: Path) -> None:
    with pytest.raises((ArtifactNameInvalid, ValueError)):
        web.save(tmp_path, "../evil")
    assert list(tmp_path.iterdir()) == []


def test_signed_model_is_loaded_with_the_trusted_key_only(web: Model, tmp_path: Path) -> None:
    create_key(tmp_path / "release.key", "release")
    create_key(tmp_path / "other.key", "other")
    signed, unsigned = web.save(tmp_path / "a", key=tmp_path / "release.key"), web.save(tmp_path / "a")
    assert elbo.load(signed, keys=tmp_path / "release.key.pub") == web
    assert elbo.load(signed, keys=(tmp_path / "release.key.pub").read_text()) == web
    for path, key in ((unsigned, "release"), (signed, "other")):
        with pytest.raises(ArtifactUntrusted):
            elbo.load(path, keys=tmp_path / f"{key}.key.pub")


def test_trusted_keys_of_the_environment_hold_for_load(
    web: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = create_key(tmp_path / "release.key", "release")
    monkeypatch.setenv("ELBO_TRUSTED_KEYS", public.line)
    with pytest.raises(ArtifactUntrusted):
        elbo.load(web.save(tmp_path))


def test_model_is_loaded_by_name_version_folder_or_path(
    web: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.save(tmp_path / "artifacts")
    web.calibrate(metric_rows(100, seed=8)).save(tmp_path / "artifacts")
    monkeypatch.chdir(tmp_path)
    for reference, version in {
        "web": 2,
        "web@1": 1,
        "artifacts/web": 2,
        "artifacts/web/1": 1,
        "artifacts/web/1/model.pt": 1,
    }.items():
        model = elbo.load(reference)
        assert (model.name, model.version) == ("web", version), reference
    shutil.move(tmp_path / "artifacts", tmp_path / "models")
    monkeypatch.setenv("ELBO_ARTIFACTS", "models")
    assert elbo.load("web@2").version == 2


def test_file_outside_of_an_artifact_folder_has_the_name_in_its_manifest(web: Model, tmp_path: Path) -> None:
    copy = shutil.copy(web.save(tmp_path / "artifacts"), tmp_path / "downloaded.pt")
    model = elbo.load(copy)
    assert (model.name, model.version, model.path) == ("web", None, Path(copy))
    assert model.save(tmp_path / "others").parent == tmp_path / "others" / "web" / "1"


def test_model_that_does_not_exist_raises_an_error_that_names_it(tmp_path: Path, web: Model) -> None:
    web.save(tmp_path)
    with pytest.raises(ArtifactMissing, match=r"'nope'.*available: web"):
        elbo.load("nope", artifacts=tmp_path)
    with pytest.raises(ArtifactMissing, match="there is no model at"):
        elbo.load(tmp_path / "web" / "7")


def test_damaged_artifact_is_refused(web: Model, tmp_path: Path) -> None:
    path = web.save(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactCorrupt):
        elbo.load(path)


def test_pickled_model_gives_the_same_numbers_in_another_process(web: Model, tmp_path: Path) -> None:
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(web))
    program = (
        "import pickle, sys, numpy as np\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "np.save(sys.argv[2], model.score(np.load(sys.argv[3])))\n"
    )
    np.save(tmp_path / "rows.npy", ROWS)
    files = [str(tmp_path / name) for name in ("model.pickle", "scores.npy", "rows.npy")]
    run_preloaded([sys.executable, "-c", program, *files], cwd=ROOT).check_returncode()
    assert np.array_equal(np.load(tmp_path / "scores.npy"), web.score(ROWS))


def test_copies_are_the_model_itself_and_models_with_equal_artifacts_are_equal(web: Model, tmp_path: Path) -> None:
    assert copy.copy(web) is web
    assert copy.deepcopy({"model": web})["model"] is web
    again = elbo.load(web.save(tmp_path))
    assert again == web
    assert hash(again) == hash(web)
    assert again != web.calibrate(metric_rows(100, seed=8))


def test_judge_gives_the_arrays_of_four_methods_from_one_run_of_the_model(
    web: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = metric_rows(300, seed=5)
    rows[:3, 1] += 300
    expected = web.score(rows), web.p_value(rows), web.severity(rows, alpha=0.02), web.is_anomaly(rows, alpha=0.02)
    run, runs = TorchScriptBackend.run, 0

    def count(*arguments: Any) -> Any:
        nonlocal runs
        runs += 1
        return run(*arguments)

    monkeypatch.setattr(TorchScriptBackend, "run", count)
    verdicts = web.judge(rows, alpha=0.02)
    assert runs == 1
    found = verdicts.score, verdicts.p_value, verdicts.severity, verdicts.is_anomaly
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert verdicts.is_anomaly[:3].all()


def test_threads_that_use_one_model_at_once_get_the_numbers_of_one_thread(web: Model) -> None:
    def work(seed: int) -> list[np.ndarray]:
        rows = metric_rows(50, seed)
        return [
            web.score(rows),
            web.encode(rows),
            web.sample(5, seed=seed),
            web.severity(rows, alpha=0.01 + seed / 500),
        ]

    expected = [work(seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(work, range(24)), expected, strict=True):
            assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_rows_above_one_batch_get_the_numbers_of_rows_alone(web: Model) -> None:
    rows = metric_rows(3000, seed=4)
    whole = web.score(rows), web.encode(rows), web.reconstruct(rows)
    for start in (0, 1023, 1024, 2999):
        alone = rows[start : start + 1]
        for one, other in zip(whole, (web.score(alone), web.encode(alone), web.reconstruct(alone)), strict=True):
            np.testing.assert_allclose(one[start], other[0], rtol=1e-5, atol=1e-5)
    verdicts = web.explain(rows, 1)
    assert [verdict.row for verdict in verdicts] == list(range(3000))


def test_file_of_rows_gives_the_scores_of_the_rows_in_memory(web: Model, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    (tmp_path / "rows.csv").write_text(
        "\n".join([",".join(NAMES), *(",".join(map(repr, row)) for row in ROWS.tolist())]) + "\n"
    )
    for name in ("rows.npy", "rows.csv"):
        np.testing.assert_allclose(web.score(tmp_path / name), web.score(ROWS), rtol=1e-6)


def test_recalibrated_model_keeps_its_latents_and_has_the_p_values_of_the_new_rows(web: Model) -> None:
    normal = metric_rows(199, seed=12) + np.array([0, 20, 0], np.float32)
    calibrated = web.calibrate(normal)
    assert calibrated.version is None
    assert calibrated.manifest.calibration.rows == 199
    assert np.array_equal(calibrated.score(ROWS), web.score(ROWS))
    scores = np.sort(web.score(normal))
    expected = (1 + len(scores) - np.searchsorted(scores, web.score(ROWS))) / (1 + len(scores))
    np.testing.assert_allclose(calibrated.p_value(ROWS), expected, rtol=1e-6)
    assert not np.allclose(calibrated.p_value(ROWS), web.p_value(ROWS))
    with pytest.raises(DataError, match="expected at least 999"):
        web.calibrate(normal, alpha=0.001)


def test_evaluation_counts_the_alarms_of_the_model(web: Model) -> None:
    rows = metric_rows(500, seed=21)
    rows[:100, 1] += 300
    labels = ["fault"] * 100 + ["ok"] * 400
    evaluation = web.evaluate(rows, labels=labels, normal=["ok"])
    flagged = web.is_anomaly(rows, alpha=0.05)
    assert evaluation.rows == 500
    assert evaluation.alarm_rates["0.05"] == pytest.approx(flagged[100:].mean())
    assert evaluation.detection_rates is not None
    assert evaluation.detection_rates["0.05"] == pytest.approx(flagged[:100].mean())


def test_representations_and_card_describe_the_model(web: Model, tmp_path: Path) -> None:
    assert repr(web) == "<elbo.Model 'web', not saved: pca, 3 features, 1 latents>"
    assert repr(elbo.load(web.save(tmp_path))).startswith("<elbo.Model 'web', version 1: pca")
    assert "<th style='text-align:left'>calibrated on</th>" in web._repr_html_()
    assert str(web.card).startswith("# web\n")
    assert web.card._repr_markdown_() == str(web.card)


def test_names_in_the_table_of_a_notebook_are_escaped() -> None:
    rows = {"<script>": metric_rows(60)[:, 0], "b": metric_rows(60)[:, 1]}
    table = elbo.fit(rows, "pca")._repr_html_()
    assert "<script>" not in table
    assert "&lt;script&gt;" in table


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.decode([[1.0, 2.0]]), DataError, r"latents: expected an array \[B, 1\], got the shape \[1, 2\]"),
        (lambda m: m.decode([[np.nan]]), DataError, "latents: expected finite numbers"),
        (lambda m: m.encode(ROWS[:, :2]), DataError, "rows of 2 numbers: expected 3"),
        (lambda m: m.encode([[1.0, None, 2.0]]), DataError, "row 0: column 'latency' has no value"),
        (lambda m: m.encode([[1.0, np.inf, 2.0]]), DataError, "row 0: column 'latency' has the value inf"),
        (
            lambda m: m.encode([{"cpu": 1.0, "latency": None, "errors": 2.0}]),
            DataError,
            "row 0 has no value for 'latency'",
        ),
        (lambda m: m.encode({"cpu": [1.0], "latency": [2.0]}), DataError, "data lacks 1 of the model's 3 columns"),
        (lambda m: m.severity(ROWS, alpha=0.0), OptionError, "alpha: expected a number above 0 and below 1, got 0.0"),
        (lambda m: m.sample(0), OptionError, "n: expected at least 1, got 0"),
        (lambda m: m.sample(1, prior="standard"), OptionError, "prior: expected 'fitted'"),
        (lambda m: m.interpolate(ROWS[:2], ROWS[:1]), DataError, "start has 2 rows: expected one"),
        (lambda m: m.interpolate(ROWS[:1], ROWS[:1], 1), OptionError, "steps: expected at least 2, got 1"),
        (lambda m: m.sample(1, condition={"label": "7"}), NotSupportedError, "web knows no condition of a row"),
        (lambda m: m.score(ROWS, condition={"label": "7"}), NotSupportedError, "web knows no condition of a row"),
    ],
)
def test_wrong_calls_raise_a_one_line_error_that_says_what_was_expected(
    web: Model, call: object, error: type[elbo.ElboError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        call(web)  # type: ignore[operator]  # a function
    assert os.linesep not in str(caught.value)


def test_condition_that_the_model_does_not_know_raises_an_error_that_lists_its_levels(site: Site) -> None:
    with pytest.raises(elbo.ElboError, match="'label' has no level \"12\""):
        site.fitted["conditional"].sample(2, condition={"label": "12"})


def test_windows_of_another_shape_raise_an_error(site: Site) -> None:
    with pytest.raises(DataError, match=r"hosts judges windows, so expected \[B, 5, 2\]"):
        site.fitted["hosts"].score(ROWS[:, :2])
