import numpy as np
import pytest
import torch
from scipy import stats

from models.categories import CategoryColumns
from models.columns import read_level
from models.levels import Categories, LevelPolicy, LevelSoftmax, MixedLikelihood, MixedObservation, columns_of_features
from models.manifest import OTHER_LEVEL, Category

SIZES = (3, 2)


@pytest.mark.parametrize(
    ("value", "level"),
    [("tcp", "tcp"), (" tcp ", "tcp"), (80, "80"), (80.0, "80"), ("80.0", "80"), (True, "true"), (0.5, "0.5"),
     (None, None), (float("nan"), None), ("", None), ("N/A", None), ("日本", "日本"), ("a=b", "a=b"), (1e400, "inf")],
)  # fmt: skip
def test_level_of_a_cell_or_a_json_value_is_its_text_or_none_if_it_is_missing(value: object, level: str | None) -> None:
    assert read_level(value) == level


def test_log_probabilities_of_levels_equal_those_of_a_softmax_of_each_category() -> None:
    logits = 30.0 * torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    found = Categories(SIZES).double()(logits)

    expected = torch.cat((logits[:, :3].log_softmax(dim=1), logits[:, 3:].log_softmax(dim=1)), dim=1)
    torch.testing.assert_close(found, expected)


def test_likelihood_of_a_mixed_row_equals_the_product_of_scipy_densities_and_level_probabilities() -> None:
    random = np.random.RandomState(0)
    numbers, variance = random.randn(8, 2), np.array([0.5, 2.0])
    levels = np.column_stack((random.randint(3, size=8), random.randint(2, size=8)))
    output = random.randn(8, 7)
    x = np.column_stack((numbers, np.eye(3)[levels[:, 0]], np.eye(2)[levels[:, 1]]))
    likelihood = MixedLikelihood(SIZES, torch.tensor(variance)).double()

    found = likelihood.log_prob(torch.tensor(x), torch.tensor(output)).detach().numpy()

    expected = stats.norm.logpdf(numbers, output[:, :2], np.sqrt(variance)).sum(axis=1)
    for logits, level in ((output[:, 2:5], levels[:, 0]), (output[:, 5:], levels[:, 1])):
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        expected += np.log(shares[np.arange(8), level])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_loss_of_an_autoencoder_with_categories_is_minus_twice_the_log_density_up_to_a_constant() -> None:
    shift, scale = torch.tensor([1.0, 0.0, 0.2, 0.3, 0.5, 0.4, 0.6]), torch.tensor([2.0, 1.0, 0.4, 0.5, 0.7, 0.6, 0.8])
    head, output = LevelSoftmax(SIZES, shift, scale), torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    raw = torch.tensor([[3.0, -1.0, 0.0, 1.0, 0.0, 1.0, 0.0]]).repeat(4, 1)
    x = (raw - shift) / scale

    x_hat = head(output)

    likelihood = MixedLikelihood(SIZES, torch.ones(1))
    density = likelihood.log_prob(torch.cat((x[:, :2], raw[:, 2:]), dim=1), output)
    constant = 2.0 * np.log(2.0 * np.pi)
    torch.testing.assert_close(head.loss(x, x_hat), -2.0 * density - constant, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((x_hat * scale + shift)[:, 2:].sum(dim=1), 2.0 * torch.ones(4))


def test_drawn_levels_have_their_decoded_probabilities() -> None:
    ones = torch.ones(6)
    observation = MixedObservation(SIZES, torch.zeros(6), -ones, ones, torch.zeros(6, dtype=torch.bool))
    decoded = torch.tensor([0.5, 0.2, 0.7, 0.1, 0.9, 0.1]).repeat(20_000, 1)

    rows = observation(decoded, torch.randn(decoded.shape, generator=torch.Generator().manual_seed(0)))

    assert torch.equal(rows[:, 1:4].sum(dim=1), torch.ones(20_000))
    assert torch.equal(rows[:, 4:].sum(dim=1), torch.ones(20_000))
    np.testing.assert_allclose(rows.mean(dim=0), decoded[0], atol=0.015)  # four standard errors
    without_noise = observation(torch.full((1, 6), 0.5), torch.zeros(1, 6))
    assert without_noise[0, 1:].tolist() == [1, 0, 0, 1, 0]  # of equal levels, the first


def test_category_without_exactly_one_level_is_outside_of_its_valid_range() -> None:
    ones = torch.ones(6)
    policy = LevelPolicy(
        SIZES, 0 * ones, ones, torch.eye(6), 0 * ones, 0 * ones, -torch.inf * ones, torch.inf * ones, ones < 0
    )
    rows = torch.tensor(
        [[9, 1, 0, 0, 0, 1], [9, 0, 0, 0, 0, 1], [9, 1, 1, 0, 1, 0], [9, torch.nan, torch.nan, torch.nan, 1, 0],
         [9, 0.2, 0.5, 0.3, 1, 0]]
    )  # fmt: skip

    outside = policy.outside(rows)

    expected = [[0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0] * 6, [0] * 6]
    assert outside.tolist() == expected
    assert columns_of_features(6, SIZES).tolist() == [0, 1, 1, 1, 2, 2]


def columns() -> CategoryColumns:
    categories = [("protocol", ["tcp", "udp", OTHER_LEVEL], ["sctp"]), ("zone", ["a", "b"], [])]
    return CategoryColumns(["count"], categories, [True])


def test_features_of_a_level_are_one_hot_and_an_unknown_level_is_reported() -> None:
    assert columns().code("protocol", "udp") == ([0, 1, 0], None)
    assert columns().code("protocol", "sctp") == ([0, 0, 1], None)
    assert columns().code("protocol", None) == (None, None)
    features, unseen = columns().code("zone", "x" * 500)
    assert features == [0, 0]
    assert unseen == ("zone", "x" * 100, ["a", "b"])


def test_records_have_the_most_probable_levels_and_rounded_whole_numbers() -> None:
    rows = np.array([[3.4, 0.2, 0.7, 0.1, 0.6, 0.4]], np.float32)

    assert columns().records(rows) == [{"count": 3, "protocol": "udp", "zone": "a"}]
    missing = np.array([[False, True, True, True, False, False]])
    assert columns().probabilities(rows, missing) == [{"protocol": {"tcp": 0.2, "udp": 0.7, OTHER_LEVEL: 0.1}}]
    np.testing.assert_allclose(columns().contributions(np.array([[4, 1, 2, 6, 0, 8]], np.float32)), [[4, 3, 4]])


@pytest.mark.parametrize(
    ("levels", "rare", "message"),
    [(["a", "a"], [], "one twice"), (["a\n"], [], "that print"), (["a"], ["b"], OTHER_LEVEL), ([], [], "at least 1")],
)
def test_manifest_refuses_a_category_with_invalid_levels(levels: list[str], rare: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        Category(name="protocol", levels=levels, rare=rare, first=0)
