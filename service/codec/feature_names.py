"""Which feature a measurement means: by its name, and where a feature's name selects labels, by these."""

import re
from collections.abc import Iterable, Mapping

Labels = Mapping[str, str]
_SELECTOR = re.compile(r'([^{}"]+)\{((?:\s*\w+\s*=\s*"[^"]*"\s*,?)+)\}')
_LABEL = re.compile(r'(\w+)\s*=\s*"([^"]*)"')


class Selectors:
    """Features by selector: a plain name, or one like `node_load{host="a"}`, as Prometheus writes it.

    Args:
        selectors: of each feature, by the feature's name.
    """

    def __init__(self, selectors: Mapping[str, str]) -> None:
        self._found: dict[str, list[tuple[dict[str, str], str]]] = {}
        for feature, selector in selectors.items():
            match = _SELECTOR.fullmatch(selector.strip())
            name, labels = (match[1].strip(), dict(_LABEL.findall(match[2]))) if match else (selector.strip(), {})
            self._found.setdefault(name, []).append((labels, feature))
        for choices in self._found.values():
            choices.sort(key=lambda choice: -len(choice[0]))

    def find(self, names: Iterable[str], labels: Labels) -> str | None:
        """The feature that is meant by the first of `names` that any has, the one that selects most of `labels`."""
        for name in names:
            for wanted, feature in self._found.get(name, ()):
                if wanted.items() <= labels.items():
                    return feature
        return None
