"""Every way in which rows come to be judged, to one form: inputs, records, Telegraf metrics, NDJSON, CSV, npy."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from service.codec import csv_rows, ndjson, timestamps
from service.codec.request_body import Fields
from service.codec.rows import ParsedRows, RowFormat
from service.codec.telegraf import Batch
from service.errors import InvalidField, InvalidRows
from service.inference.registry import ServedModel
from service.schemas import AnomalyBody

WAYS = ("inputs", "records", "metrics")
FORMATS: Mapping[str, Callable[[bytes], Fields]] = {
    **dict.fromkeys(ndjson.MEDIA_TYPES, ndjson.read),
    csv_rows.MEDIA_TYPE: csv_rows.read,
}  # beside JSON and npy: each gives the field `records`


class InputRows(NamedTuple):
    """Rows as they were read.

    Args:
        reading: the G rows that could be, NaN where a value was missing, and the errors of the others.
        sent: how many there were.
        unknown: how many values had a name that is no feature's.
        time: [G], Unix seconds, NaN where a row says none; None if no row does.
        group: [G], None where a row says none; None if no row does.
    """

    reading: ParsedRows
    sent: int
    unknown: int = 0
    time: npt.NDArray[np.float64] | None = None
    group: list[str | None] | None = None


def take(served: ServedModel, body: AnomalyBody, careful: bool) -> InputRows:
    """The rows of `body`. Raises InvalidField, and InvalidRows if none can be read."""
    if (body.inputs is not None) + (body.records is not None) + (body.metrics is not None) != 1:
        got = " and ".join([name for name in WAYS if getattr(body, name) is not None]) or "neither"
        expected = "inputs, records or metrics"
        raise InvalidField(f"give one of {expected}, got {got}", expected=expected, got=got)
    if body.half_life is not None or body.half_life_rows is not None:
        _require_sense(body)
    if body.metrics is not None:
        return _of_metrics(served, body)
    if body.records is not None:
        return of_records(served.rows, body, body.records, careful)
    rows, form = body.inputs, served.rows
    if isinstance(rows, np.ndarray):
        return InputRows(form.read_array_each(rows, "/inputs"), len(rows))
    return InputRows(form.read_each(rows, "/inputs", careful), len(rows))


def of_records(
    rows: RowFormat, body: AnomalyBody, records: Any, careful: bool, pointer: str = "/records", least: int = 1
) -> InputRows:
    """Records, of JSON, of lines, or of a table whose cells are text. Raises InvalidRows if not `least` can be read."""
    if isinstance(records, csv_rows.Cells):
        _require_columns(rows, records)
        records = records.numbers(rows.known)
    ignored = (body.time, body.group)
    reading, unknown = rows.read_records(records, pointer, careful, body.impute, ignored, least)
    whole = InputRows(reading, len(records), unknown)
    names = [name for name in ignored if name not in rows.known]
    kept = [records[row] for row in reading.rows]
    if not any(type(record) is dict and (body.time in record or body.group in record) for record in kept):
        return whole
    time = [timestamps.seconds(_value(record, body.time, names)) for record in kept]
    group = [_label(_value(record, body.group, names)) for record in kept]
    return whole._replace(time=_if_any(np.array(time)), group=group if any(g is not None for g in group) else None)


def _of_metrics(served: ServedModel, body: AnomalyBody) -> InputRows:
    batch = Batch(served.selectors, body.time, body.group)
    batch.gather(body.metrics)
    records = ndjson.Lines(batch.records)
    try:
        input_rows = of_records(served.rows, body, records, careful=True, pointer="/metrics")
    except InvalidRows as error:
        error.pointer = f"/metrics/{batch.first[0]}"
        raise
    for unread in input_rows.reading.errors:
        unread.error.pointer = f"/metrics/{batch.first[unread.row]}"
    return input_rows._replace(unknown=input_rows.unknown + batch.unknown)


def _require_sense(body: AnomalyBody) -> None:
    """Raise InvalidField if smoothing, which is asked for, cannot be had."""
    asked = [name for name in ("half_life", "half_life_rows", "fdr") if getattr(body, name) is not None]
    if len(asked) > 1:
        raise InvalidField(
            f"give one of {' and '.join(asked)}: each decides which rows are anomalous",
            pointer=f"/{asked[0]}", expected="one of them", got=" and ".join(asked),
        )  # fmt: skip
    if body.inputs is not None and body.half_life is not None:
        raise InvalidField(
            "inputs have no time: a half-life in seconds needs records, metrics, NDJSON or CSV",
            pointer="/half_life", expected="rows with a timestamp", got="inputs",
            hint="half_life_rows takes the rows in the order in which they stand",
        )  # fmt: skip


def _require_columns(rows: RowFormat, table: csv_rows.Cells) -> None:
    """Raise InvalidRows if no column of `table` is a feature."""
    header = table.header
    if header and not rows.known.intersection(header):
        raise InvalidRows(
            "no column of the CSV is called as a feature",
            pointer="",
            expected=_listed(rows.names),
            got=_listed(header),
            hint="the first line must name the columns: GET /models/{name} lists the features",
        )


def _listed(names: Any) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _value(record: Any, name: str, names: list[str]) -> Any:
    """What `record` says under `name`, unless a feature is called so."""
    return record.get(name) if type(record) is dict and name in names else None


def _label(value: Any) -> str | None:
    return None if value is None or type(value) in (list, dict) else str(value)


def _if_any(time: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    return None if np.isnan(time).all() else time
