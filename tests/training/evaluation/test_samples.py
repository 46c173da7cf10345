"""Measures of samples: against direct computations, against theory, and as `elbo evaluate --samples` prints them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import kstest

from tests.commands import succeed
from tests.data import ROOT
from training.evaluation.samples import (
    DRAWS,
    TEST_ROWS,
    SampleQuality,
    classify,
    copy_p_value,
    expected_coverage,
    likeness,
    nearest_distances,
    squared_mmd,
    two_sample_p_value,
)

Rows = npt.NDArray[np.float64]


def normal(rows: int, seed: int, columns: int = 4) -> Rows:
    return np.random.RandomState(seed).standard_normal((rows, columns))


def test_density_and_coverage_equal_a_direct_computation() -> None:
    real, drawn, k = normal(40, 0), normal(30, 1) + 0.5, 5
    radius = np.sort(cdist(real, real), axis=1)[:, k]
    inside = [[bool(np.linalg.norm(row - one) <= r) for one in drawn] for row, r in zip(real, radius, strict=True)]
    density = sum(map(sum, inside)) / (k * len(drawn))
    coverage = sum(any(places) for places in inside) / len(real)
    assert likeness(real, drawn, k) == pytest.approx((density, coverage))


@pytest.mark.parametrize("draws", [30, 100, 300])
def test_samples_of_the_same_distribution_have_density_1_and_the_expected_coverage(draws: int) -> None:
    found = [likeness(normal(100, seed), normal(draws, 1000 + seed)) for seed in range(60)]
    density, coverage = np.mean(found, axis=0)
    assert density == pytest.approx(1.0, abs=0.04)  # E[density] = 1: Naeem et al. 2020, lemma 1
    assert coverage == pytest.approx(expected_coverage(100, draws), abs=0.01)


def test_coverage_is_one_half_if_samples_resemble_only_half_of_the_rows() -> None:
    real = np.concatenate((normal(200, 0), normal(200, 1) + 50.0))
    assert likeness(real, normal(2000, 2)).coverage == pytest.approx(0.5, abs=0.02)


def test_samples_far_from_every_row_have_density_and_coverage_0() -> None:
    assert likeness(normal(100, 0), normal(100, 1) + 1e6) == (0.0, 0.0)


def test_squared_mmd_equals_the_double_sums_of_its_definition() -> None:
    both, m = normal(15, 0), 6
    kernel = np.exp(-cdist(both, both, "sqeuclidean"))
    first, second = range(m), range(m, 15)

    def mean(rows: range, others: range) -> float:
        return float(np.mean([kernel[i, j] for i in rows for j in others if i != j]))

    expected = mean(first, first) + mean(second, second) - 2.0 * mean(first, second)
    assert squared_mmd(kernel, (np.arange(15) < m)[:, None]) == pytest.approx([expected])


def test_two_sample_p_values_are_uniform_if_the_distributions_are_equal() -> None:
    values = [two_sample_p_value(normal(30, s), normal(20, 500 + s), np.random.RandomState(s)) for s in range(150)]
    assert kstest(values, "uniform").pvalue > 0.01


@pytest.mark.parametrize("change", [lambda x: x + 0.5, lambda x: 1.8 * x, np.abs])
def test_two_sample_p_value_is_small_if_the_distributions_differ(change: Callable[[Rows], Rows]) -> None:
    assert two_sample_p_value(normal(200, 0), change(normal(200, 1)), np.random.RandomState(0)) < 0.01


def test_two_sample_p_value_of_sorted_rows_is_large_if_the_distributions_are_equal() -> None:
    real = normal(3 * TEST_ROWS, 0)
    real = real[real[:, 0].argsort()]  # the first TEST_ROWS rows have another distribution than all rows
    assert two_sample_p_value(real, normal(TEST_ROWS, 1), np.random.RandomState(0)) > 0.05


def test_nearest_distances_equal_a_direct_computation() -> None:
    rows, training = normal(20, 0), normal(30, 1)
    assert nearest_distances(rows, training) == pytest.approx(cdist(rows, training).min(axis=1))


def test_copy_p_value_is_uniform_without_copies_and_small_if_a_fifth_of_the_samples_are_copies() -> None:
    values = []
    for seed in range(100):
        training = normal(100, 3 * seed)
        distances = [nearest_distances(normal(80, 3 * seed + i), training) for i in (1, 2)]
        values.append(copy_p_value(*distances))
    assert kstest(values, "uniform").pvalue > 0.01
    training, real, drawn = normal(300, 0), normal(300, 1), normal(300, 2)
    drawn[:60] = training[:60] + 1e-3
    assert copy_p_value(nearest_distances(drawn, training), nearest_distances(real, training)) < 1e-3


def test_classifier_is_sure_of_rows_of_one_kind_and_unsure_between_the_kinds() -> None:
    labels = np.repeat([3, 7], 200)
    rows = normal(400, 0) + 20.0 * (labels == 7)[:, None]
    found = classify(rows, labels, np.concatenate((normal(50, 1), normal(50, 2) + 10.0)), np.random.RandomState(0))
    assert found is not None
    sure, sure_of_rows, accuracy = found
    assert (sure_of_rows, accuracy) == (1.0, 1.0)
    assert 0.5 <= sure < 1.0


@pytest.mark.parametrize("labels", [np.zeros(100, int), np.repeat([0, 1], [95, 5])], ids=["one class", "a rare class"])
def test_rows_of_too_few_classes_or_rows_per_class_are_not_classified(labels: npt.NDArray[np.int64]) -> None:
    assert classify(normal(100, 0), labels, normal(10, 1), np.random.RandomState(0)) is None


@pytest.mark.slow
def test_evaluate_with_samples_prints_their_measures_and_recognises_the_training_rows(tmp_path: Path) -> None:
    folder = ["--artifacts", str(tmp_path)]
    succeed("train", "digits", "--model", "pca", "--name", "pca", *folder, "--runs", str(tmp_path / "runs"))
    samples = orjson.loads(succeed("evaluate", "pca", "digits", "--samples", "--json", *folder).stdout)["samples"]
    assert (samples["draws"], samples["rows"]) == (DRAWS, 539)  # the held-out and the calibration rows
    assert samples["confident"] > 0.6  # 0.24 with one Gaussian instead of a mixture
    assert samples["coverage"] > 0.9  # 0.56 with one Gaussian
    assert samples["classifier_accuracy"] > 0.95
    assert samples["copy_p_value"] > 0.01
    text = succeed("evaluate", "pca", "digits", "--samples", *folder).stdout
    for label in ("density", "coverage", "same distribution", "classifier is sure", "copies"):
        assert f"\n{label} " in text


def test_every_measure_of_samples_is_documented() -> None:
    page = (ROOT / "docs" / "reference" / "measures.md").read_text()
    assert [name for name in SampleQuality.__dataclass_fields__ if f"`{name}`" not in page] == []
