"""The mapping from metric names and labels to the model's features."""

import re
from collections.abc import Iterable, Mapping

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
