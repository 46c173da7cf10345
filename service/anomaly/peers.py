"""Compare groups with their peers at one moment, to find the host that differs from all others.

`service.anomaly.online_calibration` compares a group with its own past. A row that is usual for this past can still be
strange at this moment: for example, one host is as busy at night as by day, while all others are idle. Here, the
newest row of each group is compared with the newest rows of all groups.

A deviation is (number - median) / spread, over the compared groups. The spread is 1.4826 times the median absolute
deviation, which estimates the standard deviation of normal numbers (Rousseeuw & Croux, "Alternatives to the median
absolute deviation", 1993). Strange groups spoil neither the median nor the spread, as long as they are fewer than half.

Two numbers of a group are compared:

- Its adjusted score.
- If rows are scaled by group, the distance of its features from the median features of all groups. It is the logarithm
  of the root of the mean squared deviation of the features.

If no group differs, the rows are exchangeable between groups. Each of the G groups then has each rank with the same
probability 1 / G, so the first rank alone says nothing. If the two numbers are also about normally distributed,
the largest deviation is above `limit_by_chance` at no more than about 5 % of the moments. Numbers with heavier tails
exceed it more often.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from service.anomaly.streams import NewestRow, Rules
from service.codec.long_work import pause_if_due
from service.errors import TooFewPeers

MIN_GROUPS = 5  # fewer groups are not compared
FRESH_STEPS = 3  # usual steps; a newest row that is further from the compared moment is left out
TO_DEVIATION = 1.4826  # standard deviation of normal numbers, divided by their median absolute deviation
MIN_SPREAD = 0.25  # the least spread, so that groups that are nearly alike do not get large deviations
CHANCE = 0.05  # probability that some group is above the limit although no group differs
SMALL_SAMPLE = 5.5  # see `limit_by_chance`
MAX_DEVIATION = 1e6  # larger ones are clipped, so that squares stay finite
MAX_NUMBER = float(np.finfo(np.float32).max)  # stands for infinity

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PeerFeature:
    """A feature in which a group differs from its peers.

    Args:
        index: the index of the feature.
        deviation: the deviation of the group in this feature.
        value: the value of the feature, in raw units.
        peers: the value that is usual among its peers, in raw units.
    """

    index: int
    deviation: float
    value: float
    peers: float


@dataclass(frozen=True)
class Peer:
    """One compared group.

    Args:
        group: its name.
        newest: its newest judged row.
        rank: 1 for the group with the largest deviation.
        deviation: the larger one of the two deviations that follow.
        score_deviation: the deviation of its adjusted score.
        feature_deviation: the deviation of the distance of its features; None if rows are not scaled by group.
        features: the features that differ most, most first.
    """

    group: str
    newest: NewestRow
    rank: int
    deviation: float
    score_deviation: float
    feature_deviation: float | None
    features: list[PeerFeature]


@dataclass(frozen=True)
class Comparison:
    """The comparison of G groups at one moment.

    Args:
        time: the time of the newest compared row, in seconds.
        compared: G.
        others: the number of groups whose newest row is of another time.
        limit: if no group differs, some deviation is above this limit with a probability of about CHANCE.
        peers: the groups that deviate most, most first.
    """

    time: float
    compared: int
    others: int
    limit: float
    peers: list[Peer]


def compare(rules: Rules, newest: Mapping[str, NewestRow], count: int, explain: int) -> Comparison:
    """Return how the groups differ from their peers.

    It may take long: call it in a thread.

    Args:
        rules: the rules of the model.
        newest: the newest judged row of each group.
        count: the largest number of groups to return.
        explain: the largest number of features to return for each of them.

    Raises:
        TooFewPeers: fewer than MIN_GROUPS groups have a newest row of about the same time.
    """
    names, rows = list(newest), list(newest.values())
    fresh = _fresh(rules, rows)
    if len(fresh) < MIN_GROUPS:
        raise TooFewPeers(
            f"{len(fresh)} of {len(rows)} remembered groups have a judged row of about the same time, but a comparison "
            f"needs at least {MIN_GROUPS} such groups",
            expected=f"{MIN_GROUPS} groups",
            got=str(len(fresh)),
            hint="post rows of more groups to /anomaly, with the times and the groups of the rows",
        )
    others = len(rows) - len(fresh)
    names, rows = [names[place] for place in fresh], [rows[place] for place in fresh]
    by_score = _deviations(np.array([row.score for row in rows], np.float64))  # [G]
    features = _Features(rules, names, rows)
    by_feature = features.deviations_of_groups()  # [G], or None
    largest = by_score if by_feature is None else np.fmax(by_score, by_feature)
    peers = [
        Peer(
            group=names[place],
            newest=rows[place],
            rank=rank,
            deviation=float(largest[place]),
            score_deviation=float(by_score[place]),
            feature_deviation=None if by_feature is None else float(by_feature[place]),
            features=features.most_different(place, explain),
        )
        for rank, place in enumerate(np.argsort(-largest, kind="stable")[:count].tolist(), 1)
    ]
    numbers = len(rows) * (1 if by_feature is None else 2)
    limit = limit_by_chance(len(rows), numbers)
    return Comparison(max(row.time for row in rows), len(rows), others, limit, peers)


def limit_by_chance(groups: int, numbers: int) -> float:
    """Return the limit that the largest deviation exceeds with a probability of about CHANCE, if no group differs.

    The largest of `numbers` standard normal numbers exceeds z with the probability CHANCE. The limit is z times a
    factor above 1, because the spread of few groups is uncertain. The factor was fitted to simulations with 5 to 5,000
    groups.
    """
    return NormalDist().inv_cdf((1 - CHANCE) ** (1 / numbers)) * (1 + SMALL_SAMPLE / (groups - 2))


def _fresh(rules: Rules, rows: Sequence[NewestRow]) -> list[int]:
    """Return the indices of the rows that are of about the same time.

    This time is the MIN_GROUPS-th newest one, so that a few groups whose clocks are fast do not determine it.
    """
    if len(rows) < MIN_GROUPS:
        return list(range(len(rows)))
    times = np.array([row.time for row in rows])  # [G]
    steps = np.array([row.step for row in rows])
    steps = steps[steps > 0.0]
    usual_step = max(rules.usual_step or 0.0, float(np.median(steps)) if len(steps) else 0.0)
    furthest = FRESH_STEPS * usual_step or math.inf
    moment = np.sort(times)[-MIN_GROUPS]
    fresh: list[int] = np.flatnonzero(np.abs(times - moment) <= furthest).tolist()
    return fresh


def _deviations(numbers: Doubles) -> Doubles:
    """Return the deviations [G] of numbers [G]. The deviation of NaN is NaN.

    If fewer than MIN_GROUPS numbers are known (not NaN), all deviations are NaN.
    """
    numbers = np.clip(numbers, -MAX_NUMBER, MAX_NUMBER)
    known = numbers[~np.isnan(numbers)]
    if len(known) < MIN_GROUPS:
        return np.full(len(numbers), np.nan)
    median = np.median(known)
    spread = max(TO_DEVIATION * float(np.median(np.abs(known - median))), MIN_SPREAD)
    return np.clip((numbers - median) / spread, -MAX_DEVIATION, MAX_DEVIATION)


class _Features:
    """The D features of G compared groups.

    If rows are scaled by group, the values of groups can be compared, and a feature can deviate upwards or downwards.
    Otherwise the values of a large host and of a small one are not comparable. Then the distances of the values from
    those that the model expects are compared, and a feature differs only if its distance is larger than that of the
    peers.

    Args:
        rules: the rules of the model.
        names: the groups, [G].
        rows: their newest rows, [G].
    """

    def __init__(self, rules: Rules, names: Sequence[str], rows: Sequence[NewestRow]) -> None:
        self._rules, self._names, self._rows = rules, names, rows
        self._values = np.stack([row.values for row in rows]).astype(np.float64)  # [G, D], NaN if missing
        if rules.features is not None:
            self._centre = rules.features.location[-1, :, 0].astype(np.float64)  # [D], of the pool
            self._unit = rules.features.scale[-1].astype(np.float64)  # [D]
            compared = (self._values - self._centre) / self._unit
        else:
            contribution = np.stack([row.contribution for row in rows]).astype(np.float64)
            compared = np.where(np.isnan(self._values), np.nan, np.sqrt(np.maximum(contribution, 0.0)))
        self._deviations = np.empty_like(compared)  # [G, D]
        self._medians = np.full(compared.shape[1], np.nan)  # of the values, [D]; NaN if no group has the feature
        for feature in range(compared.shape[1]):
            pause_if_due()
            self._deviations[:, feature] = _deviations(compared[:, feature])
            known = self._values[~np.isnan(self._values[:, feature]), feature]
            if len(known):
                self._medians[feature] = np.median(known)

    def deviations_of_groups(self) -> Doubles | None:
        """Return the deviations of the distances of the groups, [G]; None if rows are not scaled by group.

        A group has the deviation NaN if no feature of it can be compared.
        """
        if self._rules.features is None:
            return None
        squares = np.square(self._deviations)
        is_known = ~np.isnan(squares)
        count = is_known.sum(axis=1)  # [G]
        mean = np.where(is_known, squares, 0.0).sum(axis=1) / np.maximum(count, 1)
        return _deviations(np.where(count > 0, np.log(mean + MIN_SPREAD**2) / 2, np.nan))

    def most_different(self, place: int, explain: int) -> list[PeerFeature]:
        """Return at most `explain` features in which the group at `place` differs most, most first."""
        pause_if_due()
        deviations = self._deviations[place]
        sizes = deviations if self._rules.features is None else np.abs(deviations)
        order = np.argsort(-np.nan_to_num(sizes, nan=-1.0), kind="stable")[:explain]
        order = order[sizes[order] > 0.0]  # False for NaN
        if not len(order):
            return []
        values, peers = self._values[place], self._medians
        if self._rules.features is not None:
            values, peers = self._in_raw_units(place, np.stack((values, peers)))
        values, peers = np.clip((values, peers), -MAX_NUMBER, MAX_NUMBER)
        return [
            PeerFeature(index, float(deviations[index]), float(values[index]), float(peers[index]))
            for index in order.tolist()
        ]

    def _in_raw_units(self, place: int, rows: Doubles) -> Doubles:
        """Convert rows [2, D] from the units of the pool to raw units: those of the group at `place`, at its time."""
        features, baseline = self._rules.features, self._rules.baseline
        assert features is not None
        assert baseline is not None
        group = np.full(2, baseline.find(self._names[place]))
        return features.from_pool(rows.astype(np.float32), group, np.full(2, self._rows[place].time)).astype(np.float64)
