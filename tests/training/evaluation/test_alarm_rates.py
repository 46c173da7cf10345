"""Which numbers of alarms chance explains, compared with a simulation of calibration and test rows."""

import functools

import numpy as np
import pytest

from training.evaluation.alarm_rates import MAX_PROBABILITY, alarm_rate


@pytest.mark.slow
@pytest.mark.parametrize(("calibration_rows", "rows", "alpha"), [(200, 300, 0.05), (1000, 50, 0.1), (99, 1000, 0.01)])
def test_alarms_on_exchangeable_rows_rarely_exceed_the_limit(calibration_rows: int, rows: int, alpha: float) -> None:
    random = np.random.RandomState(0)
    trials, exceeded = 4000, 0

    @functools.cache  # few numbers of alarms occur
    def is_too_high(flagged: int) -> bool:
        return alarm_rate(flagged, rows, calibration_rows, alpha).is_too_high

    for _ in range(trials):
        scores, new = random.standard_normal(calibration_rows), random.standard_normal(rows)
        at_least_as_high = calibration_rows - np.searchsorted(np.sort(scores), new)
        flagged = int(((1 + at_least_as_high) / (calibration_rows + 1) <= alpha + 1e-9).sum())
        exceeded += is_too_high(flagged)
    assert exceeded <= 4 * MAX_PROBABILITY * trials


def test_limit_is_close_to_alpha_for_many_rows_and_far_above_it_for_few() -> None:
    assert alarm_rate(0, 10**5, 50_000, 0.05).limit == pytest.approx(0.05, rel=0.1)
    assert alarm_rate(0, 20, 20, 0.05).limit > 0.2


def test_rate_at_an_alpha_below_the_smallest_p_value_is_judged_too() -> None:
    assert alarm_rate(40, 100, 20, 0.01).is_too_high
    assert not alarm_rate(1, 100, 20, 0.01).is_too_high
