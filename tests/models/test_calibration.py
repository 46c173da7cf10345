"""Conformal p-values, compared with their definition and guarantee; severities, compared with p-values."""

import numpy as np
import pytest
import torch
from scipy.stats import betabinom, binom, chisquare, expon

from models.artifact import freeze, script
from models.calibration import Calibration
from tests.models.builders import CORES, D, pipeline

NEW_ROWS = 2_000
REPETITIONS = 4_000
SIGNIFICANCE = 1e-4  # significance level of the statistical tests; their seeds are fixed


def calibration(n: int, seed: int = 0) -> Calibration:
    return Calibration(torch.from_numpy(np.random.RandomState(seed).standard_normal(n).astype(np.float32)))


def test_p_value_is_the_share_of_calibration_scores_that_are_at_least_as_large() -> None:
    p = Calibration(torch.tensor([3.0, 1.0, 2.0, 2.0])).p_value(torch.tensor([0.0, 1.0, 2.0, 2.5, 3.0, 4.0]))
    assert p.tolist() == pytest.approx([5 / 5, 5 / 5, 4 / 5, 2 / 5, 2 / 5, 1 / 5])


@pytest.mark.parametrize("alpha", [0.1, 0.05, 0.01])
@pytest.mark.parametrize("n", [199, 400, 1000])
def test_number_of_false_alarms_lies_in_the_99_percent_interval(alpha: float, n: int) -> None:
    """The number of false alarms among new rows is beta-binomial, because the calibration rows are random too."""
    new_scores = np.random.RandomState(n).exponential(size=NEW_ROWS).astype(np.float32)
    scores = np.random.RandomState(n + 1).exponential(size=n).astype(np.float32)
    p_value = Calibration(torch.from_numpy(scores)).p_value(torch.from_numpy(new_scores))
    alarms = int((p_value <= np.float32(alpha)).sum())
    allowed = int(alpha * (n + 1) + 1e-9)
    low, high = betabinom(NEW_ROWS, allowed, n + 1 - allowed).interval(0.99)
    assert low <= alarms <= high


def p_values(n: int, new_rows: int) -> np.ndarray:
    """Return p-values [REPETITIONS, new_rows]. Each repetition has its own n calibration scores.

    All scores, of calibration rows and of new rows, have the same distribution.
    """
    random = np.random.RandomState(n)
    scores = torch.from_numpy(random.exponential(size=(REPETITIONS, n + new_rows)).astype(np.float32))
    return np.array([Calibration(repetition[:n]).p_value(repetition[n:]).numpy() for repetition in scores])


@pytest.mark.parametrize("n", [4, 19])
@pytest.mark.slow
def test_p_values_of_normal_rows_are_uniform(n: int) -> None:
    """The rank of a row among n + 1 exchangeable rows is uniform.

    The p-value of a normal row is therefore at most k / (n + 1) with probability exactly k / (n + 1).
    """
    ranks = np.rint(p_values(n, 1) * (n + 1)).astype(int).ravel()
    assert chisquare(np.bincount(ranks, minlength=n + 2)[1:]).pvalue > SIGNIFICANCE


@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (19, 0.25), (99, 0.1)])
@pytest.mark.slow
def test_number_of_false_alarms_is_beta_binomial_if_the_rows_share_a_calibration_set(n: int, alpha: float) -> None:
    """For m new rows, the number is beta-binomial(m, k, n + 1 - k), where k = floor(alpha (n + 1)).

    Marques F., "Universal distribution of the empirical coverage in split conformal prediction", 2025. The shared
    calibration set makes the false alarms dependent: the variance of their number exceeds the binomial variance.
    """
    m, k = 20, int(alpha * (n + 1) + 1e-9)
    alarms = (p_values(n, m) <= alpha * (1 + 1e-6)).sum(axis=1)
    distribution = betabinom(m, k, n + 1 - k)
    # Count `last` alarms and more together, because the chi-square test needs several repetitions for each number.
    last = int(distribution.isf(5 / REPETITIONS))
    counted = np.bincount(np.minimum(alarms, last), minlength=last + 1)
    expected = np.append(distribution.pmf(np.arange(last)), distribution.sf(last - 1)) * REPETITIONS
    assert chisquare(counted, expected).pvalue > SIGNIFICANCE
    assert alarms.var() > 1.05 * binom(m, alarms.mean() / m).var()


@pytest.mark.parametrize("alpha", [0.5, 0.1, 0.05, 0.001])
@pytest.mark.parametrize("kind", CORES)
def test_severity_is_above_one_if_and_only_if_the_score_is_above_the_threshold(kind: str, alpha: float) -> None:
    model = pipeline(kind)
    rows = 3 * torch.randn(400, D, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.calibration = Calibration(model.score(rows[:50])[0])
        frozen = freeze(script(model))
        score = frozen.score(torch.cat((rows, 5 * rows[:20])))[0]
    anomalous = frozen.severity(score, alpha) > 1
    assert torch.equal(anomalous, score > frozen.threshold(alpha))
    if alpha >= 1 / 51:
        assert torch.equal(anomalous, frozen.p_value(score) <= alpha)
    assert 0 < int(anomalous.sum()) < len(score)


REACHABLE = [
    (n, alpha) for n in (1, 5, 19, 99, 360) for alpha in (0.5, 0.29, 0.2, 0.1, 0.07, 0.05) if alpha >= 1 / (n + 1)
]


@pytest.mark.parametrize(("n", "alpha"), REACHABLE)
def test_severity_is_above_one_if_and_only_if_the_p_value_is_at_most_alpha(n: int, alpha: float) -> None:
    model = calibration(n)
    near = torch.cat([model.scores + shift for shift in (0.0, 1e-6, -1e-6, 0.1)])
    scores = torch.cat([near, torch.linspace(-6, 6, 500)])
    anomalous = model.p_value(scores) <= torch.tensor(alpha)
    assert torch.equal(model.severity(scores, alpha) > 1.0, anomalous)
    assert torch.equal(scores > model.threshold(alpha), anomalous)


@pytest.mark.parametrize("alpha", [0.05, 1e-4])
def test_severity_never_falls_as_the_score_rises(alpha: float) -> None:
    severity = calibration(99).severity(torch.linspace(-10, 30, 2000), alpha)
    assert bool((severity.diff() >= 0).all())
    assert float(severity[-1]) > 2 * float(severity[1000])  # it also rises above the largest calibration score


def test_threshold_is_near_the_exact_quantile_even_if_alpha_is_below_the_smallest_p_value() -> None:
    """The scores are exponential: the calibration fits exactly this tail, and the quantiles are known."""
    model = Calibration(torch.from_numpy(np.random.RandomState(0).exponential(size=20_000).astype(np.float32)))
    assert float(model.threshold(1e-6)) == pytest.approx(expon.isf(1e-6), rel=0.1)


def test_severity_is_finite_and_flags_larger_scores_if_all_calibration_scores_are_equal() -> None:
    model = Calibration(torch.full((50,), 2.0))
    severity = model.severity(torch.tensor([1.0, 2.0, 2.5]), 0.05)
    assert severity[1] <= 1.0 < severity[2]
    assert bool(severity.isfinite().all())


def test_severity_is_between_zero_and_one_if_the_score_is_below_every_calibration_score() -> None:
    severity = calibration(99).severity(torch.tensor([-1e30, -1e3, -3.0]), 0.05)
    assert bool(((severity >= 0) & (severity < 1)).all())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shift", [0.0, -3.0, 30.0])
def test_rounding_does_not_change_the_p_value_of_a_score_that_equals_a_calibration_score(
    scale: float, shift: float
) -> None:
    scores = scale * (torch.from_numpy(np.random.RandomState(0).permutation(300)).float() + 100 * shift)
    model = Calibration(scores)
    expected = 1.0 - (scores.argsort().argsort()) / 301  # of the 300 scores, 300 minus the rank are as large or larger
    for rounded in (scores, scores * (1 + 2e-6), scores * (1 - 2e-6)):
        assert torch.allclose(model.p_value(rounded), expected, atol=1.5 / 301 * 1e-3)


@pytest.mark.parametrize("n", [1, 5, 40, 359])
@pytest.mark.parametrize("alpha", [0.5, 0.05, 1e-5])
def test_severity_is_the_surprisal_of_the_score_divided_by_that_of_the_threshold(n: int, alpha: float) -> None:
    """The expected values follow from the definition, in NumPy and float64.

    The surprisal of the i-th largest calibration score is -log(i / (n + 1)). Between two calibration scores, it is
    linear. Above all of them, its slope is 1 / mean excess of the largest tenth. Below all of them, it falls
    exponentially.
    """
    scores = np.sort(np.random.RandomState(n).gamma(2.0, size=n))
    raised = scores + 1e-5 * (np.abs(scores) + torch.from_numpy(np.abs(scores)).median().item())
    surprisals = -np.log(np.arange(n, 0, -1) / (n + 1))
    tenth = max(1, round(0.1 * n))
    excess = max(np.mean(raised[-tenth:] - raised[-min(tenth + 1, n)]), 1e-6 * max(1.0, raised[-1]))

    def surprisal(score: np.ndarray) -> np.ndarray:
        inside = np.interp(score, raised, surprisals)
        above = surprisals[-1] + (score - raised[-1]) / excess
        below = surprisals[0] * np.exp(np.minimum(0.0, (score - raised[0]) / excess))
        return np.asarray(np.where(score > raised[-1], above, np.where(score < raised[0], below, inside)))

    allowed = int(alpha * (n + 1) + 1e-6) - 1  # maximum number of calibration scores at or above an anomalous score
    reached = raised[-1] + excess * (-np.log(alpha) - surprisals[-1])
    threshold = raised[n - 1 - min(allowed, n - 1)] if allowed >= 0 else reached
    model = Calibration(torch.from_numpy(scores.astype(np.float32)))
    assert float(model.threshold(alpha)) == pytest.approx(threshold, rel=1e-5)
    new = np.concatenate((np.linspace(raised[0] - 1, raised[-1] + 3 * max(excess, 0.1), 301), raised))
    new = new[np.abs(new - threshold) > 1e-4]  # nearer scores may round to the other side of the threshold
    expected = surprisal(new) / surprisal(np.array([threshold]))
    severity = model.severity(torch.from_numpy(new.astype(np.float32)), alpha).numpy()
    np.testing.assert_allclose(severity, expected, rtol=2e-3, atol=1e-6)


def test_p_values_have_the_number_type_of_the_scores() -> None:
    model = Calibration(torch.arange(5.0))
    for number_type in (torch.float32, torch.float64):
        p_value = model.p_value(torch.tensor([2.5], dtype=number_type))
        assert p_value.dtype == number_type
        assert p_value.item() == pytest.approx(3 / 6)
