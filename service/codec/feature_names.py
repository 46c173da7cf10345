"""Find the feature that a client means: by the title of a column, or by the name and labels of a metric."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice

from models.columns import parse_title
from service.errors import InvalidRows, escape

MAX_CACHED_TITLES = 1000  # per model
MAX_TITLE = 200  # characters; a longer title is neither cached nor quoted in full, because clients choose it
MAX_COMPARED = 50  # maximum number of features that a title is compared with
SHORTLIST = 3  # number of features whose similarity to a title `closest` computes
MIN_SHARED = 3  # characters; shorter names are not similar to a name only because it contains them
Labels = Mapping[str, str]
_SELECTOR = re.compile(r'([^{}"]+)\{((?:\s*\w+\s*=\s*"[^"]*"\s*,?)+)\}')
_LABEL = re.compile(r'(\w+)\s*=\s*"([^"]*)"')


class FeatureSelectors:
    """Finds the feature for the name and labels of a metric.

    Args:
        selectors: for each feature name, a metric name or a Prometheus selector such as `node_load{host="a"}`.
    """

    def __init__(self, selectors: Mapping[str, str]) -> None:
        # For each metric name: pairs of the labels that a selector requires and the feature that it selects.
        self._by_metric: dict[str, list[tuple[dict[str, str], str]]] = {}
        for feature, selector in selectors.items():
            match = _SELECTOR.fullmatch(selector.strip())
            name, labels = (match[1].strip(), dict(_LABEL.findall(match[2]))) if match else (selector.strip(), {})
            self._by_metric.setdefault(name, []).append((labels, feature))
        for candidates in self._by_metric.values():
            candidates.sort(key=lambda candidate: -len(candidate[0]))

    def find(self, names: Iterable[str], labels: Labels) -> str | None:
        """Return the feature whose selector matches `labels` and one of `names`, or None if no selector matches.

        The first name that matches takes precedence. Among the selectors of that name, the selector that requires the
        most labels takes precedence.
        """
        for name in names:
            for required, feature in self._by_metric.get(name, ()):
                if required.items() <= labels.items():
                    return feature
        return None


class FeatureTitles:
    """Finds the feature for a title: the name of a feature, optionally with its unit, such as `temp [°C]`.

    Names and units are compared after Unicode normalisation (NFKC), so `µs` is the same unit whichever of the two
    characters for micro it contains.

    Args:
        names: the names of the features.
        units: the units of the features; None where unknown.
    """

    def __init__(self, names: Sequence[str], units: Sequence[str | None]) -> None:
        self._units = dict(zip(names, units, strict=True))
        normal = [_normalise(name) for name in names]
        counts = Counter(normal)
        self._by_normal_name = {key: name for key, name in zip(normal, names, strict=True) if counts[key] == 1}
        self._cache: dict[str, str | None] = {}

    def find(self, title: str) -> str | None:
        """Return the name of the feature that `title` means, or None if it means no feature.

        Raises:
            InvalidRows: `title` has another unit than the feature.
        """
        if title in self._units:
            return title
        if title in self._cache:
            return self._cache[title]
        feature = self._find(title)
        if len(self._cache) < MAX_CACHED_TITLES and len(title) <= MAX_TITLE:
            self._cache[title] = feature
        return feature

    def _find(self, title: str) -> str | None:
        whole = self._by_normal_name.get(_normalise(title))
        if whole is not None:
            return whole
        name, unit = parse_title(title)
        feature = self._by_normal_name.get(_normalise(name))
        if feature is None or unit is None:
            return feature
        expected = self._units[feature]
        if expected is not None and _normalise(unit) != _normalise(expected):
            short, short_unit = title[:MAX_TITLE], unit[:MAX_TITLE]
            raise InvalidRows(
                f"{short!r} is in {short_unit}, but the model takes {feature} in {expected}: convert the values",
                pointer=f"/{escape(title)}",
                expected=f"{feature} [{expected}]",
                got=short,
                hint="GET /models/{name} lists the features and their units",
            )
        return feature


def closest(title: str, features: Iterable[str]) -> str | None:
    """Return the feature whose name is most similar to `title`, or None if no name is similar.

    Upper and lower case, and a unit in the title, make no difference. At most MAX_COMPARED features are compared. The
    similarity of two names is slow to compute, so a quick comparison of their letters selects a few names first.
    """
    features = list(islice(features, MAX_COMPARED))
    name, by_name = _comparable(title), {_comparable(feature): feature for feature in reversed(features)}
    pieces = _pieces(name)
    shortlist = sorted(by_name, key=lambda other: len(pieces ^ _pieces(other)))[:SHORTLIST]
    matches = get_close_matches(name, shortlist, n=1)
    return by_name[matches[0]] if matches else containing([title], features).get(title)


def containing(titles: Iterable[str], features: Iterable[str]) -> dict[str, str]:
    """Return, for each title, the first feature whose name it contains or is contained in, if there is one.

    At most MAX_COMPARED features are compared.
    """
    names = [(_comparable(feature), feature) for feature in islice(features, MAX_COMPARED)]
    names = [(name, feature) for name, feature in names if len(name) >= MIN_SHARED]
    found: dict[str, str] = {}
    for title in titles:
        text = _comparable(title)
        for name, feature in names:
            if name in text or (text in name and len(text) >= MIN_SHARED):
                found[title] = feature
                break
    return found


def _comparable(title: str) -> str:
    """Return the name in `title` in lower case, without its unit and at most MAX_TITLE long."""
    return parse_title(title[:MAX_TITLE]).name.casefold()


def _pieces(name: str) -> set[str]:
    """Return the letters of `name`, and its pairs of adjacent letters."""
    return {*name, *(name[index : index + 2] for index in range(len(name) - 1))}


def _normalise(text: str) -> str:
    return unicodedata.normalize("NFKC", " ".join(text.split()))
