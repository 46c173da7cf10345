"""Scalings and their inverses."""

import pytest
import torch

from models.scaling import ImputingScaling, standardise


def test_standardised_columns_have_mean_zero_and_variance_one() -> None:
    x = torch.randn(1000, 3) * torch.tensor([1.0, 1e-3, 1e4]) + torch.tensor([0.0, 5.0, -7e4])
    u = standardise(x)(x)
    assert torch.allclose(u.mean(dim=0), torch.zeros(3), atol=1e-3)
    assert torch.allclose(u.std(dim=0, correction=0), torch.ones(3), atol=1e-3)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6])
def test_standardise_centres_a_constant_column_and_gives_it_a_scale_of_one(constant: float) -> None:
    scaling = standardise(torch.full((1000, 1), constant))
    assert float(scaling.scale) == 1.0
    assert scaling(torch.tensor([[constant + 1.0]])).item() == pytest.approx(1.0, abs=0.1)


def test_inverse_reverses_the_scaling() -> None:
    x = torch.randn(100, 4) * 50 + 3
    scaling = standardise(x)
    assert torch.allclose(scaling.inverse(scaling(x)), x, atol=1e-4)


def test_imputing_scaling_replaces_missing_values_with_the_fill_values() -> None:
    rows, fill = torch.randn(50, 3) * 4 + 1, torch.tensor([7.0, -2.0, 0.5])
    gaps = torch.rand(50, 3) < 0.3
    filled = torch.where(gaps, fill, rows)
    scaling = standardise(rows)
    imputing = ImputingScaling(scaling, fill)
    assert torch.equal(imputing(rows.masked_fill(gaps, torch.nan)), scaling(filled))
    assert torch.equal(imputing(rows), scaling(rows))
    assert torch.equal(imputing.inverse(rows), scaling.inverse(rows))


def test_plain_scaling_keeps_missing_values() -> None:
    u = standardise(torch.randn(9, 2))(torch.tensor([[torch.nan, 1.0]]))
    assert u.isnan().tolist() == [[True, False]]
