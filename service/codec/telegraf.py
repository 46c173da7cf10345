"""A batch of Telegraf's JSON format: metrics, to records of one host and moment each."""

from typing import Any

from service.codec.feature_names import Selectors
from service.codec.rows import Unreadable, describe
from service.errors import InvalidRows

Record = dict[str, Any]


class Batch:
    """Metrics gathered to records.

    Args:
        selectors: of the features.
        time, group: what the records call the time and the tag that tells hosts apart.
    """

    def __init__(self, selectors: Selectors, time: str, group: str) -> None:
        self._selectors, self._time, self._group = selectors, time, group
        self._records: dict[Any, Record | Unreadable] = {}
        self.first: list[int] = []  # of each record: the place of its first metric
        self.unknown = 0

    @property
    def records(self) -> list[Record | Unreadable]:
        """In the order in which their first metrics came."""
        return list(self._records.values())

    def gather(self, metrics: Any) -> None:
        """Take in a list of metrics. One that is none becomes an unreadable record. Raises InvalidRows."""
        if type(metrics) is not list or not metrics:
            got = describe(metrics)
            raise InvalidRows("there are no metrics", pointer="/metrics", expected="a list of metrics", got=got)
        for index, metric in enumerate(metrics):
            parts = _parts(metric)
            if isinstance(parts, Unreadable):
                self._records[index] = parts
                self.first.append(index)
                continue
            self._add(index, *parts)

    def _add(self, index: int, name: str, tags: Record, fields: Record, time: Any) -> None:
        key = (tags.get(self._group), time)
        if key not in self._records:
            self.first.append(index)
            moment = {self._time: time} if time is not None else {}
            host = {self._group: key[0]} if key[0] is not None else {}
            self._records[key] = moment | host
        record = self._records[key]
        for field, value in fields.items():
            feature = self._selectors.find((f"{name}_{field}", f"{name}.{field}", f"{name}/{field}", field), tags)
            if feature is None:
                self.unknown += 1
            elif isinstance(record, dict) and record.setdefault(feature, value) != value:
                self._records[key] = record = _ambiguous(feature, record[feature], value)


def _parts(metric: Any) -> tuple[str, Record, Record, Any] | Unreadable:
    shape = "an object with name, tags, fields and timestamp"
    if type(metric) is not dict:
        return Unreadable("a metric is an object", shape, describe(metric))
    name, tags, fields = metric.get("name", ""), metric.get("tags") or {}, metric.get("fields")
    if type(name) is not str or type(tags) is not dict or type(fields) is not dict:
        return Unreadable("the metric is not as Telegraf writes it", shape, describe(metric))
    time = metric.get("timestamp")
    if type(time) in (list, dict):
        return Unreadable("the timestamp is no number", "a number", describe(time))
    if any(type(value) is not str for value in tags.values()):
        return Unreadable("a tag is no text", shape, describe(tags))
    return name, tags, fields, time


def _ambiguous(feature: str, first: Any, second: Any) -> Unreadable:
    return Unreadable(
        f'several metrics of one host and moment give {feature}: call the feature {feature}{{tag="value"}}, '
        "or let Telegraf send one of them",
        "one value a feature",
        f"{describe(first)} and {describe(second)}",
    )
