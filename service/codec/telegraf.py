"""Telegraf's JSON format: turn a batch of metrics into one record per group and timestamp."""

import math
from dataclasses import replace
from typing import Any

from models.timestamps import to_unix_seconds
from service.codec.budget import NO_LIMIT, Budget
from service.codec.feature_names import FeatureSelectors, FeatureTitles
from service.codec.json_rows import JsonRows
from service.codec.json_values import describe_value
from service.codec.row_errors import MalformedRow, not_a_timestamp
from service.errors import InvalidRows

Record = dict[str, Any]
MAX_UNKNOWN_METRICS = 1000  # maximum number of names remembered per batch
MAX_LOGGED_NAME = 200  # characters remembered of the name of a metric, and of the name of its field
MAX_NAME = 4096  # characters of the names of a metric and a field together; longer names match no feature
RECORD_BYTES = 1024  # memory that is counted for one record
METRIC_SHAPE = "an object with name, tags, fields and timestamp"


class TelegrafBatch:
    """Groups metrics into records. Metrics that have no feature form no record.

    Args:
        selectors: finds the feature for a field of a metric.
        titles: finds the feature for a field whose name contains a unit.
        time: the key of the timestamp in a record.
        group: the name of the tag that identifies the group, such as the host; also the key of the group in a record.
        budget: limits the memory for the records, and the time.
    """

    def __init__(
        self, selectors: FeatureSelectors, titles: FeatureTitles, time: str, group: str, budget: Budget = NO_LIMIT
    ) -> None:
        self._selectors, self._titles, self._time, self._group = selectors, titles, time, group
        self._budget = budget
        self._records: dict[Any, Record | MalformedRow] = {}
        self._first_metrics: list[int] = []  # for each record, the index of its first metric in the batch
        self.unknown_fields = 0
        self.unknown_metrics: dict[str, None] = {}  # the names of fields that belong to no feature, in order

    @property
    def records(self) -> list[Record | MalformedRow]:
        """The records, in the order of their first metrics."""
        return list(self._records.values())

    def pointer(self, row: int, record: Record | MalformedRow) -> str:
        """Return the JSON pointer to the first metric of record number `row`, or to the invalid part of that metric."""
        inside = record.pointer if isinstance(record, MalformedRow) else ""
        return f"/metrics/{self._first_metrics[row]}{inside}"

    def add(self, metrics: Any) -> None:
        """Add a list of metrics. An invalid metric becomes a `MalformedRow`. Raises InvalidRows for an empty list."""
        if not isinstance(metrics, list | JsonRows) or not len(metrics):
            got = describe_value(metrics)
            raise InvalidRows("there are no metrics", pointer="/metrics", expected="a list of metrics", got=got)
        for index, metric in enumerate(metrics):
            self._budget.check_time()
            parts = _parts(metric)
            if isinstance(parts, MalformedRow):
                self._budget.take_bytes(RECORD_BYTES)
                self._records[index] = parts
                self._first_metrics.append(index)
                continue
            self._add(index, *parts)

    def _add(self, index: int, name: str, tags: Record, fields: Record, time: Any) -> None:
        """Add the features of one metric to the record of its group and time. Without a feature, add no record."""
        key = (tags.get(self._group), time)
        for field, value in fields.items():
            self._budget.check_time()
            try:
                feature = self._feature(name, field, tags)
            except InvalidRows as error:
                self._record(index, key)
                self._records[key] = replace(MalformedRow.of(error), pointer="")  # the pointer is not into a metric
                continue
            if feature is None:
                self.unknown_fields += 1
                if len(self.unknown_metrics) < MAX_UNKNOWN_METRICS:
                    short_name, short_field = name[:MAX_LOGGED_NAME], field[:MAX_LOGGED_NAME]
                    self.unknown_metrics[f"{short_name}_{short_field}" if name else short_field] = None
                continue
            record = self._record(index, key)
            if isinstance(record, dict) and not _is_same(record.setdefault(feature, value), value):
                self._records[key] = _ambiguous(feature, record[feature], value)

    def _record(self, index: int, key: tuple[str | None, Any]) -> Record | MalformedRow:
        """Return the record of a group and time. If there is none yet, begin it at metric number `index`."""
        record = self._records.get(key)
        if record is None:
            self._budget.take_bytes(RECORD_BYTES)
            group, time = key
            record = {self._time: time} if time is not None else {}
            if group is not None:
                record[self._group] = group
            self._records[key] = record
            self._first_metrics.append(index)
        return record

    def _feature(self, name: str, field: str, tags: Record) -> str | None:
        """Return the feature for a field of the metric `name`, or None. Raises InvalidRows if its unit is wrong."""
        if len(name) + len(field) > MAX_NAME:  # do not copy a long name for each of many fields
            return None
        feature = self._selectors.find((f"{name}_{field}", f"{name}.{field}", f"{name}/{field}", field), tags)
        return self._titles.find(field) if feature is None else feature


def _parts(metric: Any) -> tuple[str, Record, Record, Any] | MalformedRow:
    """Return the name, tags, fields and timestamp of a metric, or a `MalformedRow` if the metric is invalid."""
    if type(metric) is not dict:
        return MalformedRow(f"expected a metric, got {describe_value(metric)}", METRIC_SHAPE, describe_value(metric))
    name, tags, fields = metric.get("name", ""), metric.get("tags") or {}, metric.get("fields")
    if type(name) is not str or type(tags) is not dict or type(fields) is not dict:
        return MalformedRow("the metric is not in Telegraf's JSON format", METRIC_SHAPE, describe_value(metric))
    time = metric.get("timestamp")
    if time is not None and math.isnan(to_unix_seconds(time)):
        return MalformedRow.of(not_a_timestamp("timestamp", time))
    if any(type(value) is not str for value in tags.values()):
        return MalformedRow("the value of a tag is not text", METRIC_SHAPE, describe_value(tags))
    return name, tags, fields, time


def _is_same(first: Any, second: Any) -> bool:
    """Return whether two values of a field are equal. Lists and objects never are: comparing them could recurse."""
    return type(second) not in (list, dict) and bool(first == second)


def _ambiguous(feature: str, first: Any, second: Any) -> MalformedRow:
    are_numbers = type(first) in (int, float) and type(second) in (int, float)
    return MalformedRow(
        f"several metrics of one host and timestamp have different values for {feature}: "
        f'name the feature {feature}{{tag="value"}}, or configure Telegraf to send one of them',
        expected="one value per feature",
        got=f"{describe_value(first)} and {describe_value(second)}",
        is_partial=are_numbers,
    )
