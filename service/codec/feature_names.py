"""The mapping from metric names and labels to the model's features."""

import re
from collections.abc import Iterable, Mapping

Labels = Mapping[str, str]
_SELECTOR = re.compile(r'([^{}"]+)\{((?:\s*\w+\s*=\s*"[^"]*"\s*,?)+)\}')
_LABEL = re.compile(r'(\w+)\s*=\s*"([^"]*)"')


class FeatureSelectors:
    """Finds the feature that a metric with labels belongs to.

    Args:
        selectors: for each feature name, a metric name or a Prometheus selector such as `node_load{host="a"}`.
    """

    def __init__(self, selectors: Mapping[str, str]) -> None:
        self._by_metric: dict[str, list[tuple[dict[str, str], str]]] = {}  # by metric name: required labels, feature
        for feature, selector in selectors.items():
            match = _SELECTOR.fullmatch(selector.strip())
            name, labels = (match[1].strip(), dict(_LABEL.findall(match[2]))) if match else (selector.strip(), {})
            self._by_metric.setdefault(name, []).append((labels, feature))
        for candidates in self._by_metric.values():
            candidates.sort(key=lambda candidate: -len(candidate[0]))

    def find(self, names: Iterable[str], labels: Labels) -> str | None:
        """Return the feature for the first name in `names` that matches a selector, or None if no name matches.

        If several selectors match the name, the selector that requires the most labels determines the feature.
        """
        for name in names:
            for required, feature in self._by_metric.get(name, ()):
                if required.items() <= labels.items():
                    return feature
        return None
