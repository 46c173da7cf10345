"""The likelihoods: whether the variance is learned, its bounds, and the variance that is set from a batch."""

import math

import pytest
import torch
from torch import distributions

from models.likelihood import (
    EXACT_BEYOND,
    LOG_VARIANCE_RANGE,
    BernoulliLikelihood,
    GaussianLikelihood,
    OptimalGaussianLikelihood,
)

B, D = 40, 6


def rows_and_output(error: float = 0.4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [B, D] and outputs [B, D] that differ from them by about `error`."""
    torch.manual_seed(0)
    output = torch.randn(B, D, dtype=torch.float64)
    return output + error * torch.randn(B, D, dtype=torch.float64), output


@pytest.mark.parametrize("learn", [True, False])
def test_variance_of_a_gaussian_is_learned_only_if_asked(learn: bool) -> None:
    x, output = rows_and_output()
    likelihood = GaussianLikelihood(torch.ones(1, dtype=torch.float64), learn)
    assert likelihood.log_variance.requires_grad is learn
    assert likelihood.log_prob(x, output).requires_grad is learn


def test_gaussian_uses_a_variance_within_its_bounds() -> None:
    x, output = rows_and_output()
    lowest, highest = LOG_VARIANCE_RANGE
    for variance, used in ((1e-30, lowest), (1e30, highest)):
        log_prob = GaussianLikelihood(torch.tensor([variance]).double()).log_prob(x, output)
        exact = distributions.Normal(output, math.exp(0.5 * used)).log_prob(x).sum(dim=1)
        assert torch.allclose(log_prob, exact, rtol=1e-9)
    narrow = GaussianLikelihood(torch.tensor([1e-6]).double(), lowest=-1.0).log_prob(x, output)
    exact = distributions.Normal(output, math.exp(-0.5)).log_prob(x).sum(dim=1)
    assert torch.allclose(narrow, exact, rtol=1e-9)


def test_optimal_gaussian_in_training_uses_the_mean_squared_error_of_the_batch_as_variance() -> None:
    x, output = rows_and_output()
    likelihood = OptimalGaussianLikelihood(torch.tensor([7.0]).double())
    assert not likelihood.log_variance.requires_grad
    variance = (x - output).square().mean()
    exact = distributions.Normal(output, variance.sqrt()).log_prob(x).sum(dim=1)
    assert torch.allclose(likelihood.log_prob(x, output), exact, rtol=1e-9)
    assert float(likelihood.log_variance.exp()) == pytest.approx(float(variance), rel=1e-9)


def test_optimal_gaussian_in_evaluation_keeps_the_variance_of_the_last_training_batch() -> None:
    (x, output), (other, other_output) = rows_and_output(0.4), rows_and_output(3.0)
    likelihood = OptimalGaussianLikelihood(torch.tensor([7.0]).double())
    likelihood.log_prob(x, output)
    likelihood.eval()
    exact = distributions.Normal(other_output, (x - output).square().mean().sqrt()).log_prob(other).sum(dim=1)
    for _ in range(2):  # a call in evaluation mode does not change the variance
        assert torch.allclose(likelihood.log_prob(other, other_output), exact, rtol=1e-9)


def test_optimal_gaussian_lets_gradients_through_the_variance_of_the_batch() -> None:
    """The gradient of the sum of the log-densities is that of -N/2 log(mean squared error), with N = B D numbers."""
    x, output = rows_and_output()
    output.requires_grad_()
    OptimalGaussianLikelihood(torch.ones(1).double()).log_prob(x, output).sum().backward()
    exact = (x - output) / (x - output).square().mean()
    assert output.grad is not None
    assert torch.allclose(output.grad, exact.detach(), rtol=1e-9)


@pytest.mark.parametrize(
    ("error", "expected"), [(0.25, math.log(0.25)), (0.0, LOG_VARIANCE_RANGE[0]), (1e30, LOG_VARIANCE_RANGE[1])]
)
def test_set_variance_of_an_optimal_gaussian_stays_within_its_bounds(error: float, expected: float) -> None:
    likelihood = OptimalGaussianLikelihood(torch.ones(1).double())
    likelihood.set_variance(torch.tensor(error).double())
    assert likelihood.log_variance.shape == (1,)
    assert float(likelihood.log_variance) == pytest.approx(expected)


def test_mean_of_a_gaussian_is_the_output() -> None:
    _, output = rows_and_output()
    assert torch.equal(GaussianLikelihood(torch.ones(1)).mean(output), output)


@pytest.mark.parametrize("logit", [-300.0, -EXACT_BEYOND + 1, -20.5, 0.0, 20.5, EXACT_BEYOND - 1, 300.0])
def test_bernoulli_likelihood_of_grey_values_is_exact_for_large_logits(logit: float) -> None:
    x = torch.tensor([[0.0], [0.3], [1.0]]).double()
    exact = [value * -math.log1p(math.exp(-logit)) if logit > 0 else value * (logit - math.log1p(math.exp(logit)))
             for value in x[:, 0].tolist()]  # fmt: skip
    log_zero = -logit - math.log1p(math.exp(-logit)) if logit > 0 else -math.log1p(math.exp(logit))
    exact = [one + (1.0 - value) * log_zero for one, value in zip(exact, x[:, 0].tolist(), strict=True)]
    found = BernoulliLikelihood().log_prob(x, torch.full_like(x, logit))
    assert found.tolist() == pytest.approx(exact, rel=1e-14, abs=1e-13)
