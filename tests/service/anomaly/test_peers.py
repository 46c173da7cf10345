"""The comparison of groups with their peers, against a direct computation and against theory."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from models.baseline import START_ROWS, Baseline
from service.anomaly.peers import CHANCE, MIN_GROUPS, Comparison, compare, limit_by_chance
from service.anomaly.streams import (
    Group,
    NewestRow,
    Rules,
    StartSet,
    join_rows,
    judge,
    read_newest,
    remember_newest,
)
from service.errors import TooFewPeers

Doubles = npt.NDArray[np.float64]
WIDTH = 4
STEP = 60.0
RULES = Rules(rows=1, least_rows=1, width=WIDTH, usual_step=STEP)


def newest(**fields: Any) -> NewestRow:
    row: dict[str, Any] = {"time": 0.0, "step": STEP, "score": 0.0, "p_value": 0.5}
    row |= {"values": np.zeros(WIDTH, np.float32), "contribution": np.ones(WIDTH, np.float32)}
    return NewestRow(**{**row, **fields})


def groups_of(scores: Doubles, values: Doubles, contribution: Doubles) -> dict[str, NewestRow]:
    rows = zip(scores.tolist(), values.astype(np.float32), contribution.astype(np.float32), strict=True)
    return {
        f"host-{index}": newest(score=score, values=value, contribution=parts)
        for index, (score, value, parts) in enumerate(rows)
    }


def scaled_rules(centre: Doubles, scale: Doubles) -> Rules:
    """Return the rules of a model that scales rows by group. `centre` and `scale`: [G + 1, D]; the last is the pool."""
    count = len(centre) - 1
    arrays = {
        "coefficients": np.ones((count + 1, 2, 1), np.float32),
        "start_sets": np.zeros((count + 2, START_ROWS), np.float32),
        "has_start_set": np.ones(count + 1, bool),
        "moments": np.zeros(0),
        "offsets": np.zeros(1),
        "shift": np.array(0.0),
        "smallest": np.array(1.0),
        "feature_location": centre[:, :, None].astype(np.float32),
        "feature_scale": scale.astype(np.float32),
    }
    baseline = Baseline([f"host-{index}" for index in range(count)], (), arrays)
    return Rules(1, 1, centre.shape[1], STEP, baseline=baseline, features=baseline.features)


def expected_deviations(numbers: Doubles) -> Doubles:
    """Return the deviations along the first axis, as a person would compute them."""
    centred = numbers - np.nanmedian(numbers, axis=0)
    return centred / np.maximum(1.4826 * np.nanmedian(np.abs(centred), axis=0), 0.25)


def by_group(comparison: Comparison) -> dict[str, dict[int, float]]:
    return {peer.group: {feature.index: feature.deviation for feature in peer.features} for peer in comparison.peers}


def test_scores_and_contributions_are_compared_by_their_median_and_median_absolute_deviation() -> None:
    random = np.random.default_rng(0)
    scores, values = random.normal(size=41), random.normal(50.0, 9.0, (41, WIDTH))
    contribution = random.chisquare(1, (41, WIDTH))
    comparison = compare(RULES, groups_of(scores, values, contribution), 41, WIDTH)
    order = np.argsort(-scores)
    assert [peer.group for peer in comparison.peers] == [f"host-{index}" for index in order]
    assert [peer.rank for peer in comparison.peers] == list(range(1, 42))
    found = [peer.score_deviation for peer in comparison.peers]
    np.testing.assert_allclose(found, expected_deviations(scores)[order], rtol=1e-9)
    assert [peer.deviation for peer in comparison.peers] == found
    assert {peer.feature_deviation for peer in comparison.peers} == {None}
    expected = expected_deviations(np.sqrt(contribution.astype(np.float32)).astype(np.float64))
    for index, peer in enumerate(comparison.peers):
        of_group = expected[order[index]]
        ranked = [feature for feature in np.argsort(-of_group).tolist() if of_group[feature] > 0]
        assert [feature.index for feature in peer.features] == ranked
        np.testing.assert_allclose([feature.deviation for feature in peer.features], of_group[ranked], rtol=1e-5)
        usual = np.median(values.astype(np.float32), axis=0)[ranked]
        np.testing.assert_allclose([feature.peers for feature in peer.features], usual, rtol=1e-6)
        of_host = values[order[index], ranked]
        np.testing.assert_allclose([feature.value for feature in peer.features], of_host, rtol=1e-6)


def test_features_of_rows_that_are_scaled_by_group_are_compared_in_the_units_of_the_pool() -> None:
    random = np.random.default_rng(1)
    centre, scale = random.normal(0, 100, (13, WIDTH)), random.uniform(1, 20, (13, WIDTH))
    usual = random.normal(size=(12, WIDTH))  # in standard deviations
    usual[3] += (0.0, -25.0, 3.0, 0.0)
    values = usual * scale[-1] + centre[-1]
    rules = scaled_rules(centre, scale)
    comparison = compare(rules, groups_of(np.zeros(12), values, np.ones((12, WIDTH))), 12, 2)
    expected = expected_deviations(usual)
    distances = np.log(np.square(expected).mean(axis=1) + 0.25**2) / 2
    of_groups = dict(zip((f"host-{index}" for index in range(12)), expected_deviations(distances), strict=True))
    for peer in comparison.peers:
        assert peer.feature_deviation == pytest.approx(of_groups[peer.group], rel=1e-3, abs=1e-3)
        assert peer.feature_deviation is not None
        assert (peer.score_deviation, peer.deviation) == (0.0, max(peer.feature_deviation, 0.0))
    first = comparison.peers[0]
    assert (first.group, first.rank) == ("host-3", 1)
    assert first.deviation > comparison.limit
    feature = first.features[0]
    assert feature.index == 1
    assert feature.deviation == pytest.approx(expected[3, 1], rel=1e-3)
    # In the raw units of this group: the value of its feature, and the median of the peers.
    assert feature.value == pytest.approx(usual[3, 1] * scale[3, 1] + centre[3, 1], rel=1e-3)
    assert feature.peers == pytest.approx(np.median(usual[:, 1]) * scale[3, 1] + centre[3, 1], rel=1e-3)
    assert comparison.limit == limit_by_chance(12, 24)


@pytest.mark.parametrize("groups", [5, 8, 20, 200])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_limit_is_exceeded_at_no_more_than_about_five_percent_of_moments_if_groups_are_exchangeable(
    groups: int, is_scaled: bool
) -> None:
    random = np.random.default_rng(groups)
    rules = scaled_rules(np.zeros((1, WIDTH)), np.ones((1, WIDTH))) if is_scaled else RULES
    moments, above = 500, 0
    for _ in range(moments):  # of normally distributed scores and features, which depend on each other
        common = random.normal(size=WIDTH)  # the season, which all groups share
        values = common + random.normal(size=(groups, WIDTH)) + random.normal(size=(groups, 1))
        newest_rows = groups_of(random.normal(size=groups) + common[0], values, np.ones((groups, WIDTH)))
        comparison = compare(rules, newest_rows, 1, 0)
        above += comparison.peers[0].deviation > comparison.limit
    # At most two standard errors above CHANCE. A limit that is never exceeded would be useless.
    assert 0.005 < above / moments < CHANCE + 2 * math.sqrt(CHANCE / moments)


def test_limit_is_exact_for_many_groups() -> None:
    largest = np.random.default_rng(4).normal(size=(2000, 2000)).max(axis=1)
    above = (largest > limit_by_chance(2000, 2000)).mean()
    assert above == pytest.approx(CHANCE, abs=2.5 * math.sqrt(CHANCE / 2000))


def test_group_has_each_rank_equally_often_if_groups_are_exchangeable() -> None:
    random = np.random.default_rng(2)
    ranks = np.zeros(8)
    for _ in range(800):
        rows = groups_of(random.gumbel(size=8), np.zeros((8, WIDTH)), np.ones((8, WIDTH)))
        ranks[next(peer.rank for peer in compare(RULES, rows, 8, 0).peers if peer.group == "host-0") - 1] += 1
    assert np.square(ranks - 100).sum() / 100 < 24.3  # chi-square with 7 degrees of freedom, p = 0.001


def test_groups_whose_newest_row_is_of_another_time_are_not_compared() -> None:
    rows = {f"host-{index}": newest(time=1000.0 + 40 * index, score=float(index)) for index in range(6)}
    rows["stopped"] = newest(time=1000.0 - 20 * STEP, score=99.0)
    rows["fast-clock"] = newest(time=1e9, score=99.0)
    comparison = compare(RULES, rows, 10, 0)
    assert sorted(peer.group for peer in comparison.peers) == [f"host-{index}" for index in range(6)]
    assert (comparison.compared, comparison.others, comparison.time) == (6, 2, 1200.0)


@pytest.mark.parametrize(("usual_step", "step"), [(None, 300.0), (60.0, 300.0), (300.0, 60.0), (300.0, math.nan)])
def test_row_is_compared_if_it_is_within_three_usual_steps_of_the_moment(usual_step: float | None, step: float) -> None:
    rules = Rules(rows=1, least_rows=1, width=WIDTH, usual_step=usual_step)
    rows = {f"host-{index}": newest(time=800.0 + 20 * index, step=step) for index in range(5)}
    rows |= {"inside": newest(time=0.0, step=step), "outside": newest(time=-150.0, step=step)}
    found = {peer.group for peer in compare(rules, rows, 10, 0).peers}
    assert found == {*rows} - {"outside"}


def test_missing_values_are_not_compared() -> None:
    random = np.random.default_rng(3)
    values, contribution = random.normal(size=(9, WIDTH)), random.chisquare(1, (9, WIDTH))
    values[0, 1] = np.nan  # one host lacks a feature
    values[: 9 - MIN_GROUPS + 1, 2] = np.nan  # too few hosts have this feature
    values[4] = np.nan  # one host lacks all features
    for rules in (RULES, scaled_rules(np.zeros((1, WIDTH)), np.ones((1, WIDTH)))):
        comparison = compare(rules, groups_of(np.zeros(9), values, contribution), 9, WIDTH)
        found = by_group(comparison)
        assert all(2 not in features for features in found.values())
        assert 1 not in found["host-0"]
        assert found["host-4"] == {}
        compared = values if rules.features else np.where(np.isnan(values), np.nan, np.sqrt(contribution))
        expected = expected_deviations(compared)
        for name, features in found.items():
            for index, deviation in features.items():
                assert deviation == pytest.approx(expected[int(name[5:]), index], rel=1e-4)
        assert all(math.isfinite(peer.deviation) for peer in comparison.peers)


def test_groups_that_hardly_differ_do_not_deviate() -> None:
    scores = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.01, -0.01])
    comparison = compare(RULES, groups_of(scores, np.zeros((7, WIDTH)), np.ones((7, WIDTH))), 7, WIDTH)
    assert [peer.deviation for peer in comparison.peers] == pytest.approx([0.04, 0, 0, 0, 0, 0, -0.04])
    assert set(map(len, by_group(comparison).values())) == {0}


@pytest.mark.parametrize("extreme", [np.inf, np.finfo(np.float32).max])
def test_extreme_numbers_give_finite_deviations(extreme: float) -> None:
    values, contribution = np.zeros((6, WIDTH)), np.ones((6, WIDTH))
    values[0], contribution[0] = extreme, extreme
    contribution[:, 3] = extreme  # of all hosts
    scores = np.array([float(np.finfo(np.float32).max), 0, 0, 0, 0, 0])
    for rules in (RULES, scaled_rules(np.zeros((1, WIDTH)), np.full((1, WIDTH), 1e-3))):
        first = compare(rules, groups_of(scores, values, contribution), 6, WIDTH).peers[0]
        assert first.group == "host-0"
        numbers = [first.deviation, *(x for feature in first.features for x in (feature.value, feature.deviation))]
        assert all(map(math.isfinite, numbers))
        assert len(first.features) >= 3


@pytest.mark.parametrize("count", [0, 1, MIN_GROUPS - 1])
def test_comparison_of_too_few_groups_is_refused_with_the_number_of_groups(count: int) -> None:
    with pytest.raises(TooFewPeers, match=f"^{count} of {count} remembered groups"):
        compare(RULES, {f"host-{index}": newest() for index in range(count)}, 10, 3)


def test_group_remembers_its_newest_row_that_is_judged_and_not_silenced() -> None:
    group = Group(RULES, b"", StartSet(np.arange(100.0).tolist(), True))
    x = np.arange(5 * WIDTH, dtype=np.float32).reshape(5, WIDTH)
    time = np.array([60.0, 240.0, 180.0, 300.0, 360.0])  # rows are judged in order of time
    silenced, usable = np.array([0, 0, 0, 1, 0], bool), np.array([1, 1, 1, 1, 0], bool)
    missing = np.zeros((5, WIDTH), bool)
    missing[1, 2] = True
    score, fixed = np.array([10, 20, 30, 40, 50], np.float32), (np.ones(5, np.float32), np.zeros(5, np.float32))

    def send(part: slice) -> NewestRow:
        rows = x[part]
        joined = join_rows(RULES, rows, time[part], None, {"": group})
        judged = judge(
            joined, RULES, score[part], usable[part], time[part], (fixed[0][part], fixed[1][part]), 0.05, False,
            silenced=silenced[part],
        )  # fmt: skip
        remember_newest(joined, judged, rows + 100, time[part], missing[part])
        found = read_newest(RULES, group.dump(joined.pool))
        assert found is not None
        return found

    assert (first := send(slice(0, 1))).time == 60.0
    assert math.isnan(first.step)
    found = send(slice(1, 5))
    assert (found.time, found.step, found.score) == (240.0, 60.0, 20.0)
    # The score is 20. The calibration scores are 0, 1, ..., 99, and those of two rows that the group has learnt since.
    assert found.p_value == pytest.approx(82 / 102, abs=0.02)
    np.testing.assert_array_equal(found.values, [4, 5, np.nan, 7])
    np.testing.assert_array_equal(found.contribution, [104, 105, 106, 107])


@pytest.mark.parametrize("damage", [b"", b"\0" * 7, b"\xff" * 40])
def test_payload_without_a_newest_row_has_none(damage: bytes) -> None:
    assert read_newest(RULES, damage) is None
