"""Telegraf's JSON format: turn a batch of metrics into one record per group and timestamp."""

from typing import Any

from service.codec.feature_names import FeatureSelectors
from service.codec.row_errors import MalformedRow, describe_value
from service.errors import InvalidRows

Record = dict[str, Any]
METRIC_SHAPE = "an object with name, tags, fields and timestamp"


class TelegrafBatch:
    """Groups metrics into records.

    Args:
        selectors: finds the feature for a field of a metric.
        time: the key of the timestamp in a record.
        group: the name of the tag that identifies the group, such as the host; also the key of the group in a record.
    """

    def __init__(self, selectors: FeatureSelectors, time: str, group: str) -> None:
        self._selectors, self._time, self._group = selectors, time, group
        self._records: dict[Any, Record | MalformedRow] = {}
        self.first_metrics: list[int] = []  # for each record, the index of its first metric in the batch
        self.unknown_fields = 0

    @property
    def records(self) -> list[Record | MalformedRow]:
        """The records, in the order of their first metrics."""
        return list(self._records.values())

    def add(self, metrics: Any) -> None:
        """Add a list of metrics. An invalid metric becomes a `MalformedRow`. Raises InvalidRows for an empty list."""
        if type(metrics) is not list or not metrics:
            got = describe_value(metrics)
            raise InvalidRows("there are no metrics", pointer="/metrics", expected="a list of metrics", got=got)
        for index, metric in enumerate(metrics):
            parts = _parts(metric)
            if isinstance(parts, MalformedRow):
                self._records[index] = parts
                self.first_metrics.append(index)
                continue
            self._add(index, *parts)

    def _add(self, index: int, name: str, tags: Record, fields: Record, time: Any) -> None:
        key = (tags.get(self._group), time)
        if key not in self._records:
            self.first_metrics.append(index)
            timestamp = {self._time: time} if time is not None else {}
            host = {self._group: key[0]} if key[0] is not None else {}
            self._records[key] = timestamp | host
        record = self._records[key]
        for field, value in fields.items():
            feature = self._selectors.find((f"{name}_{field}", f"{name}.{field}", f"{name}/{field}", field), tags)
            if feature is None:
                self.unknown_fields += 1
            elif isinstance(record, dict) and record.setdefault(feature, value) != value:
                self._records[key] = record = _ambiguous(feature, record[feature], value)


def _parts(metric: Any) -> tuple[str, Record, Record, Any] | MalformedRow:
    """Return the name, tags, fields and timestamp of a metric, or a `MalformedRow` if the metric is invalid."""
    if type(metric) is not dict:
        return MalformedRow(f"expected a metric, got {describe_value(metric)}", METRIC_SHAPE, describe_value(metric))
    name, tags, fields = metric.get("name", ""), metric.get("tags") or {}, metric.get("fields")
    if type(name) is not str or type(tags) is not dict or type(fields) is not dict:
        return MalformedRow("the metric is not in Telegraf's JSON format", METRIC_SHAPE, describe_value(metric))
    time = metric.get("timestamp")
    if type(time) in (list, dict):
        return MalformedRow("the timestamp is not a number", "a number", describe_value(time))
    if any(type(value) is not str for value in tags.values()):
        return MalformedRow("the value of a tag is not text", METRIC_SHAPE, describe_value(tags))
    return name, tags, fields, time


def _ambiguous(feature: str, first: Any, second: Any) -> MalformedRow:
    return MalformedRow(
        f"several metrics of one host and timestamp have different values for {feature}: "
        f'name the feature {feature}{{tag="value"}}, or configure Telegraf to send one of them',
        expected="one value per feature",
        got=f"{describe_value(first)} and {describe_value(second)}",
    )
