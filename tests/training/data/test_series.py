"""Whether the rows of a file are in the order of time, without knowing their times."""

import numpy as np
import numpy.typing as npt
import pytest

from models.manifest import SERIES_CORRELATION
from tests.training.series import host_metrics
from training.data.row_store import RowStore
from training.data.series import Resemblance, find_resemblance, neighbour_correlations

Rows = npt.NDArray[np.float64]


def resemblance(rows: Rows, labels: npt.NDArray[np.int64] | None = None) -> Resemblance:
    return find_resemblance(RowStore(rows.astype(np.float32)), np.arange(len(rows)), labels)


def largest_of_a_column(rows: Rows) -> float:
    return float(neighbour_correlations(RowStore(rows.astype(np.float32)), np.arange(len(rows))).max())


def random_walk(rows: int, seed: int) -> Rows:
    return np.cumsum(np.random.RandomState(seed).standard_normal(rows))


def test_series_is_found_in_many_noisy_columns_of_which_none_alone_shows_it() -> None:
    load = random_walk(2000, 0)
    rows = load[:, None] / load.std() + 2 * np.random.RandomState(1).standard_normal((2000, 40))
    assert largest_of_a_column(rows) < SERIES_CORRELATION
    found = resemblance(rows)
    assert found.correlation > 0.8


@pytest.mark.parametrize("hosts", [2, 3, 7, 10])
def test_row_resembles_the_previous_row_of_its_host_if_hosts_alternate(hosts: int) -> None:
    rows = np.column_stack([random_walk(400, seed) - random_walk(400, seed).mean() for seed in range(hosts)]).reshape(
        -1
    )
    mixed = np.column_stack((rows, np.random.RandomState(2).standard_normal(len(rows))))
    assert largest_of_a_column(mixed) < SERIES_CORRELATION
    found = resemblance(mixed)
    assert found.lag == hosts
    assert found.correlation > SERIES_CORRELATION


def independent(kind: str, random: np.random.RandomState) -> Rows:
    rows, width = random.randint(60, 400), random.randint(1, 20)
    normal = random.standard_normal((rows, width))
    return {
        "gaussian": normal,
        "heavy tails": np.tan(np.pi * (random.uniform(size=(rows, width)) - 0.5)),
        "few values": np.round(normal),
        "correlated": normal @ random.standard_normal((width, width)),
        "mostly zero": normal * (random.uniform(size=(rows, width)) < 0.1),
    }[kind]


@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "few values", "correlated", "mostly zero"])
def test_no_resemblance_is_found_in_forty_tables_of_independent_rows(kind: str) -> None:
    random = np.random.RandomState(0)
    found = [resemblance(independent(kind, random)).correlation for _ in range(40)]
    assert found == [0.0] * 40


def test_correlations_of_independent_rows_are_gaussian_in_units_of_the_standard_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.data.series.SIGNIFICANCE", 0.0)
    random = np.random.RandomState(1)
    largest = []
    for _ in range(100):
        rows = random.standard_normal((200, 5))
        largest.append(resemblance(rows).correlation * np.sqrt(190))
    # The largest of 100 independent standard Gaussian values is below 3.08 with a probability of 90 %.
    assert 0.8 < np.mean(np.array(largest) < 3.08) < 0.98
    assert np.max(largest) < 5


def test_file_sorted_by_class_is_not_in_the_order_of_time() -> None:
    random = np.random.RandomState(0)
    labels = np.repeat([0, 1, 2], 300)
    rows = labels[:, None] * 3 + random.standard_normal((900, 6))
    assert resemblance(rows).correlation > SERIES_CORRELATION
    assert resemblance(rows, labels).correlation < SERIES_CORRELATION


def test_shuffled_series_is_not_in_order() -> None:
    rows = host_metrics(400).sample(fraction=1.0, shuffle=True, seed=1).select("cpu", "mem", "disk").to_numpy()
    assert resemblance(rows) == (0.0, 0)
