"""The promise names its condition, and the figures about alpha follow from theory and from a simulation."""

import math
import re

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import beta

from service.anomaly.smoothing import RunningMean
from service.settings import Settings
from tests.data import ROOT
from tests.service.hosts import host_table
from tests.training.manifests import manifest_of
from training.reports.model_card import card

PAGE = (ROOT / "docs" / "how-to" / "choose-alpha.md").read_text()
DAY = 86_400
SETTINGS = Settings()


def table(first_column: str) -> list[list[str]]:
    """Return the cells of the table whose first column has this title, without its header."""
    lines = PAGE[PAGE.index(f"| {first_column} | ") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def is_abnormal(severity: np.ndarray) -> np.ndarray:
    """Return after which rows the mean severity of a group is above 1, like `RunningMean`, but for millions of rows."""
    decay = 2 ** (-1 / SETTINGS.alert_half_life)
    total, weight = (lfilter([1], [1, -decay], values) for values in (severity, np.ones(len(severity))))
    return np.asarray(total > weight)


def alerts_per_day(alpha: float, seconds: float, rows: int = 6_000_000) -> float:
    """Simulate independent normal rows; return how many alerts begin per day."""
    severity = np.random.RandomState(0).exponential(size=rows) / -math.log(alpha)
    abnormal = np.flatnonzero(is_abnormal(severity))
    begin = 1 + (np.diff(abnormal) * seconds >= SETTINGS.alert_calm_seconds).sum() if len(abnormal) else 0
    return float(begin / (rows * seconds / DAY))


def test_simulation_counts_the_same_rows_as_the_server() -> None:
    severity = np.random.RandomState(1).exponential(size=20_000) / 1.5
    count = RunningMean(SETTINGS.alert_half_life).count_above_one(severity.tolist())
    assert count == is_abnormal(severity).sum() > 100


@pytest.mark.slow
@pytest.mark.parametrize("row", table("alpha"), ids=lambda row: row[0])
def test_flagged_rows_and_alerts_per_day_are_those_of_the_page(row: list[str]) -> None:
    alpha, *figures = (float(cell) for cell in row)
    for seconds, flagged, alerts in ((15, *figures[:2]), (60, *figures[2:])):
        assert flagged == pytest.approx(alpha * DAY / seconds, rel=0.05)
        assert alerts_per_day(alpha, seconds) == pytest.approx(alerts, rel=0.15, abs=0.001)


@pytest.mark.parametrize("row", table("calibration rows"), ids=lambda row: row[0])
def test_ranges_of_the_false_alarm_rate_are_the_quantiles_of_a_beta_distribution(row: list[str]) -> None:
    """Vovk, "Conditional validity of inductive conformal predictors", 2012: the rate follows Beta(k, n + 1 - k)."""
    rows, total = (int(cell.replace(",", "")) for cell in row[:2])
    assert total == 5 * rows
    for alpha, cell in zip((0.05, 0.01, 0.001), row[2:], strict=True):
        k = math.floor(alpha * (rows + 1) + 1e-9)
        if k == 0:
            assert cell == "below the floor"
            continue
        low, high = (float(number) / 100 for number in re.fullmatch(r"(\S+) % to (\S+) %", cell).groups())  # type: ignore[union-attr] # a cell that does not match must fail
        assert (low, high) == pytest.approx(beta(k, rows + 1 - k).ppf([0.05, 0.95]), rel=0.06, abs=5e-5)


def test_readme_and_card_state_the_false_alarm_rate_only_with_its_condition() -> None:
    texts = {
        "README": (ROOT / "README.md").read_text(),
        "card": card(manifest_of(host_table()), 1, [], []).replace("\n", " "),
    }
    for name, text in texts.items():
        promise = text[text.index("at most 5 %") - 100 :][:500]
        assert "alpha 0.05" in promise, name
        assert "exchangeable" in promise, name
