"""Log the names of metrics that belong to no feature, each name once per model.

Remote write and Telegraf send many metrics that no model needs, so such a metric is not an error. If a metric was
renamed, however, the log is where the operator finds out.
"""

import logging
from collections.abc import Iterable

from service.codec.feature_names import containing
from service.inference.served_model import ServedModel

MAX_NAMES = 1000  # per model; further names are not logged, because clients may send any number of names
MAX_NAMES_PER_LINE = 50
MAX_NAME = 200  # characters

log = logging.getLogger("elbo.receiver")


class UnknownMetricsLog:
    """Remembers, for each model, which names it has logged."""

    def __init__(self) -> None:
        self._logged: dict[str, set[str]] = {}

    def report(self, served: ServedModel, names: Iterable[str]) -> None:
        """Log the names that have not been logged for this model, and a feature whose name each of them contains."""
        logged = self._logged.setdefault(served.name, set())
        new: list[str] = []
        for name in names:
            short = name[:MAX_NAME]
            if short not in logged and len(logged) < MAX_NAMES:
                logged.add(short)
                new.append(short)
        for start in range(0, len(new), MAX_NAMES_PER_LINE):
            listed = new[start : start + MAX_NAMES_PER_LINE]
            similar = containing(listed, served.row_schema.names)
            fields = {"model": served.name, "version": served.version, "names": listed, "similar_features": similar}
            log.info("metrics that are not features of the model are ignored", extra={"fields": fields})
