"""The baseline of groups and seasons: adjusted scores, start sets, and artifacts that hold them."""

import math
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from models import artifact
from models.artifact import Artifact, load
from models.baseline import BUFFERS, START_ROWS, Baseline, BaselineBuffers, choose_start_set
from models.errors import ArtifactCorrupt
from models.manifest import MAX_GROUPS, Golden, Manifest, Season
from models.season import PERIODS, Period, columns, offsets_of_zone
from tests.models import builders

HOUR = 3600.0


def arrays_of(groups: int, periods: Sequence[Period] = (), zone: str = "UTC") -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a baseline with random coefficients. Groups with an even number have a start set."""
    random = np.random.RandomState(groups)
    coefficients = 0.1 * random.standard_normal((groups + 1, 2, columns(periods)))
    coefficients[:, 0, 0] = np.arange(groups + 1)
    coefficients[:, 1, 0] = 1.0 + np.arange(groups + 1) / 10
    moments, offsets = offsets_of_zone(zone)
    return {
        "coefficients": coefficients.astype(np.float32),
        "start_sets": np.sort(random.standard_normal((groups + 2, START_ROWS)), axis=1).astype(np.float32),
        "has_start_set": np.arange(groups + 1) % 2 == 0,
        "moments": moments,
        "offsets": offsets,
        "shift": np.array(0.0),
        "smallest": np.array(1e-9),
    }


def names(count: int) -> list[str]:
    return [f"host-{index:05}" for index in range(count)]


def publish(folder: Path, arrays: dict[str, npt.NDArray[Any]] | None, **fields: Any) -> Path:
    """Publish a PCA with the given baseline and fields of the manifest. Return the path of the artifact."""
    pipeline = builders.pipeline("pca")
    if arrays is not None:
        pipeline.add_module("baseline", BaselineBuffers(arrays))
    module = artifact.script(pipeline)
    golden = artifact.record_golden(module, *builders.batch(3))
    manifest = builders.manifest("m", artifact.weights_sha256(module), golden)
    return artifact.publish(module, manifest.model_copy(update=fields), folder)


def baseline_of(loaded: Artifact) -> Baseline:
    assert loaded.baseline is not None
    return loaded.baseline


def test_adjusted_score_of_two_groups_without_seasons_follows_the_definition() -> None:
    baseline = Baseline(names(2), (), arrays_of(2))
    score = np.array([1.0, math.e, math.e], np.float32)
    found = baseline.adjust(score, np.array([0, 1, baseline.pool]), np.full(3, np.nan))
    np.testing.assert_allclose(found, [0.0, 0.0, (1 - 2) / 1.2], atol=1e-6)


def test_adjusted_score_of_a_season_is_that_of_the_direct_computation() -> None:
    arrays = arrays_of(3, ("day",), "Europe/Berlin")
    baseline = Baseline(names(3), ("day",), arrays)
    time, score = 1_717_000_000.0, 2.5  # 2024-05-29, when the offset is two hours
    angle = 2 * np.pi * ((time + 2 * HOUR) % 86_400) / 86_400
    encodings = np.array([1.0, *(f(k * angle) for k in (1, 2, 3) for f in (np.cos, np.sin))])
    location, scale = arrays["coefficients"][1].astype(float) @ encodings
    found = baseline.adjust(np.array([score], np.float32), np.array([1]), np.array([time]))
    np.testing.assert_allclose(found, [(np.log(score) - location) / scale], rtol=1e-6)


def test_adjusted_scores_of_one_group_and_time_are_in_the_order_of_the_scores() -> None:
    baseline = Baseline(names(1), ("day", "week"), arrays_of(1, ("day", "week")))
    scores = np.array([-3.0, 0.0, 1e-30, 1.0, 2.0, 3e38, np.inf], np.float32)
    found = baseline.adjust(scores, np.zeros(7, int), np.full(7, 1e9))
    assert (np.diff(found) >= 0).all()
    assert np.isfinite(found[:-1]).all()
    assert np.isposinf(found[-1])
    assert np.isnan(baseline.adjust(np.array([np.nan], np.float32), np.zeros(1, int), np.zeros(1)))[0]


def test_adjusted_score_of_a_row_is_the_same_alone_and_among_other_rows() -> None:
    baseline = Baseline(names(9), ("day", "week"), arrays_of(9, ("day", "week"), "America/St_Johns"))
    random = np.random.RandomState(0)
    score, group = random.chisquare(5, 400).astype(np.float32), random.randint(0, 10, 400)
    time = random.uniform(1e9, 2e9, 400)
    together = baseline.adjust(score, group, time)
    alone = [baseline.adjust(score[[i]], group[[i]], time[[i]])[0] for i in range(400)]
    np.testing.assert_array_equal(together, alone)


def test_start_set_of_a_group_with_few_calibration_rows_and_of_an_unknown_group_comes_from_the_pool() -> None:
    arrays = arrays_of(2)
    baseline = Baseline(names(2), (), arrays)
    own, origin = baseline.start_set(baseline.find("host-00000"))
    assert origin == "group"
    np.testing.assert_array_equal(own, arrays["start_sets"][0])
    few, origin = baseline.start_set(baseline.find("host-00001"))
    assert origin == "pool"
    np.testing.assert_array_equal(few, arrays["start_sets"][3])
    for name in ("never seen", None, ""):
        unknown, origin = baseline.start_set(baseline.find(name))
        assert origin == "pool"
        np.testing.assert_array_equal(unknown, arrays["start_sets"][2])


@pytest.mark.parametrize("rows", [100, 101, 237, 1000])
def test_start_set_of_n_rows_gives_p_values_that_are_valid_at_every_level(rows: int) -> None:
    # The rank of a further exchangeable row among n + 1 rows is uniform, so its p-value has a known distribution.
    chosen = choose_start_set(np.arange(1, rows + 1, dtype=np.float32))
    further = np.arange(rows + 1) + 0.5  # one for each rank, all equally probable
    p_values = (1 + (chosen[None, :] >= further[:, None]).sum(axis=1)) / (START_ROWS + 1)
    levels = np.arange(1, START_ROWS + 2) / (START_ROWS + 1)
    share = (p_values[:, None] <= levels + 1e-12).mean(axis=0)
    assert (share <= levels + 1e-12).all()
    assert share[4] > levels[4] - 1.01 / (rows + 1)  # and hardly stricter than necessary


def test_start_set_of_scores_that_overflow_is_finite() -> None:
    chosen = choose_start_set(np.append(np.arange(99), np.inf).astype(np.float32))
    assert chosen[-1] == np.finfo(np.float32).max
    assert chosen[-2] == 98


def test_artifact_with_5000_groups_is_loaded_and_finds_every_group(tmp_path: Path) -> None:
    arrays = arrays_of(5000, ("day", "week"))
    season = Season(periods=["day", "week"], time_zone="UTC")
    path = publish(tmp_path, arrays, groups=names(5000), season=season)
    baseline = baseline_of(load(path))
    assert [baseline.find(name) for name in names(5000)] == list(range(5000))
    assert baseline.find("host-05000") == baseline.pool == 5000
    for name, array in arrays.items():
        np.testing.assert_array_equal(baseline.arrays[name], array)
    started = perf_counter()
    for _ in range(1000):
        baseline.find("host-04999")
    assert perf_counter() - started < 1.0  # a search through the names would take longer


def test_artifact_without_times_has_no_baseline_and_no_field_of_it(tmp_path: Path) -> None:
    path = publish(tmp_path, None)
    loaded = load(path)
    assert loaded.baseline is None
    assert not {"groups", "season"} & loaded.manifest.model_dump().keys()
    assert not {"groups", "season"} & loaded.manifest.model_dump(mode="json").keys()


def changed(name: str, array: npt.NDArray[Any] | None) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays for two groups, with `name` replaced."""
    return {**arrays_of(2), name: array}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("arrays", "groups", "reason"),
    [
        (arrays_of(2), ["a"], r"coefficients of the shape \[2, 2, 1\]"),
        (arrays_of(2), ["a", "b", "c"], r"coefficients of the shape \[4, 2, 1\]"),
        (None, ["a"], "got nothing"),
        (arrays_of(2, ("day",)), ["a", "b"], r"coefficients of the shape \[3, 2, 1\]"),
        (changed("start_sets", np.zeros((4, 99), np.float32)), ["a", "b"], "start_sets of the shape"),
        (changed("start_sets", np.full((4, 100), np.nan, np.float32)), ["a", "b"], "finite numbers in start_sets"),
        (changed("start_sets", -np.ones((4, 100), np.float32).cumsum(1)), ["a", "b"], "ascending"),
        (changed("has_start_set", np.ones(3, np.float32)), ["a", "b"], "has_start_set"),
        (changed("offsets", np.zeros(7)), ["a", "b"], "offsets of the shape"),
        (changed("shift", np.array(np.inf)), ["a", "b"], "finite numbers in shift"),
        (changed("smallest", np.array(0.0)), ["a", "b"], "positive smallest"),
        (changed("coefficients", np.zeros((3, 2, 1), np.float32)), ["a", "b"], "positive scales"),
    ],
)
def test_artifact_whose_baseline_does_not_fit_is_refused(
    tmp_path: Path, arrays: dict[str, npt.NDArray[Any]] | None, groups: list[str], reason: str
) -> None:
    path = publish(tmp_path, arrays, groups=groups)
    with pytest.raises(ArtifactCorrupt, match=reason):
        load(path)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        (["a", "b", "a"], "a name twice"),
        (["a", ""], "1 to 256 printable characters"),
        (["a\nb"], "1 to 256 printable characters"),
        (["\x1b[2J"], "1 to 256 printable characters"),
        (["x" * 257], "1 to 256 printable characters"),
        ([str(index) for index in range(MAX_GROUPS + 1)], "at most 100000"),
        ([7], "valid string"),
        ("abc", "valid list"),
    ],
)
def test_manifest_with_impossible_groups_is_refused(groups: Any, reason: str) -> None:
    fields = builders.manifest("m", "0" * 64, Golden(inputs={}, outputs={})).model_dump()
    with pytest.raises(ValidationError, match=reason):
        Manifest.model_validate({**fields, "groups": groups})


@pytest.mark.parametrize("periods", [[], ["week", "day"], ["day", "day"], ["month"]])
def test_manifest_with_impossible_periods_is_refused(periods: list[str]) -> None:
    with pytest.raises(ValidationError):
        Season.model_validate({"periods": periods, "time_zone": "UTC"})


def test_every_buffer_of_the_module_is_an_array_of_the_baseline() -> None:
    arrays = arrays_of(1)
    buffers = dict(BaselineBuffers(arrays).named_buffers())
    assert tuple(buffers) == BUFFERS
    for name, buffer in buffers.items():
        np.testing.assert_array_equal(buffer.numpy(), arrays[name])


@pytest.mark.parametrize("periods", [(), ("day",), PERIODS])
def test_adjusting_rows_one_by_one_gives_the_same_bits_as_in_a_batch(periods: tuple[Period, ...]) -> None:
    baseline = Baseline(names(5), periods, arrays_of(5, periods, "Europe/Berlin"))
    random = np.random.RandomState(1)
    score = np.append(random.exponential(3.0, 300), [0.0, np.inf, np.nan, 3e38]).astype(np.float32)
    group = random.randint(0, 6, len(score))
    time = np.where(random.random_sample(len(score)) < 0.1, np.nan, random.uniform(-1e9, 5e9, len(score)))
    rows = [slice(row, row + 1) for row in range(len(score))]
    single = np.concatenate([baseline.adjust(score[row], group[row], time[row]) for row in rows])
    np.testing.assert_array_equal(single, baseline.adjust(score, group, time))
