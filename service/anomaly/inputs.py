"""Read the rows of /anomaly requests: JSON inputs, records, Telegraf metrics, NDJSON, CSV, npy, safetensors."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from models.categories import CategoryColumns, UnseenLevel
from models.errors import join_names
from service.anomaly.record_keys import RecordKeys
from service.codec import csv_rows, ndjson
from service.codec.budget import NO_LIMIT, Budget
from service.codec.conditions import Codes, no_conditions
from service.codec.json_rows import JsonRows
from service.codec.request_body import BodyReader, read_json
from service.codec.row_arrays import parse_valid_array_rows
from service.codec.row_lists import parse_valid_rows
from service.codec.row_records import max_missing, parse_valid_records
from service.codec.row_schema import ParsedRows, RowSchema
from service.codec.row_windows import are_windows, parse_valid_windows
from service.codec.telegraf import TelegrafBatch
from service.errors import InvalidField, InvalidRows
from service.inference.served_model import ServedModel
from service.schemas import AnomalyBody

ROW_FIELDS = ("inputs", "records", "metrics")  # a request body must have exactly one of these fields
PLAIN_TEXT = "text/plain"
HEADER_HINT = "the first line must name the columns; GET /models/{name} lists the features"
RECORD_READERS: Mapping[str, BodyReader] = {  # by media type
    **dict.fromkeys(ndjson.MEDIA_TYPES, ndjson.read_fields),
    csv_rows.MEDIA_TYPE: csv_rows.read_fields,
    PLAIN_TEXT: read_json,  # Telegraf sends its JSON with this type, unless its configuration sets another
}


class InputRows(NamedTuple):
    """The rows of a request, with their times and groups.

    Args:
        parsed: the G valid rows, and the errors of the invalid rows.
        rows_received: how many rows the request has, valid or not.
        unknown_fields: how many values belong to no feature.
        unknown_metrics: the names of metrics that belong to no feature, each once.
        time: [G], Unix seconds, with NaN for a row without a timestamp; None if no row has a timestamp.
        group: [G], with None for a row without a group; None instead of the list if no row has a group.
        windows: [G, N, D], the windows of the rows; None unless the request has windows.
        silenced: [G], whether a silence of the policy holds for the row; None if the policy has no silences.
        conditions: [G, J], the codes of the conditions of the rows; None if the model knows no conditions.
        columns: the columns of a model with categories; None for other models.
        unseen: [G], the levels of each row that the model does not know; None if it knows all of them.
    """

    parsed: ParsedRows
    rows_received: int
    unknown_fields: int = 0
    time: npt.NDArray[np.float64] | None = None
    group: list[str | None] | None = None
    unknown_metrics: Sequence[str] = ()
    windows: npt.NDArray[np.float32] | None = None
    silenced: npt.NDArray[np.bool_] | None = None
    conditions: Codes | None = None
    columns: CategoryColumns | None = None
    unseen: list[tuple[UnseenLevel, ...]] | None = None


def with_default_alpha(served: ServedModel, body: AnomalyBody) -> AnomalyBody:
    """Return `body` with the alpha that keeps the budget of the model's policy, unless it has an alpha."""
    if served.default_alpha is None or "alpha" in body.model_fields_set:
        return body
    return body.model_copy(update={"alpha": served.default_alpha})


def with_timeline_keys(served: ServedModel, body: AnomalyBody) -> AnomalyBody:
    """Return `body` with the columns of the training data as the keys of time and group, unless it names others."""
    timeline = served.manifest.timeline
    if timeline is None:
        return body
    columns = {"time": timeline.time_column, "group": timeline.group_column}
    given = body.model_fields_set
    update = {name: column for name, column in columns.items() if name not in given and column is not None}
    return body.model_copy(update=update) if update else body


def parse_input_rows(
    served: ServedModel, body: AnomalyBody, may_contain_non_floats: bool, budget: Budget = NO_LIMIT
) -> InputRows:
    """Return the rows of `body`. `budget` counts the rows and their memory.

    Raises:
        InvalidField: `body` does not have exactly one of ROW_FIELDS, or some of its fields conflict.
        InvalidRows: no row is valid; see `_require_row` for the exceptions.
    """
    given = [name for name in ROW_FIELDS if getattr(body, name) is not None]
    if len(given) != 1:
        expected, got = "inputs, records or metrics", " and ".join(given) or "none"
        raise InvalidField(
            f"expected one of the fields {expected}, got {got}",
            expected=expected,
            got=got,
            hint=None if given else "an NDJSON or CSV body needs at least one row",
        )
    if body.half_life is not None or body.half_life_rows is not None:
        _validate_smoothing(body)
    if body.condition is not None and served.conditions is None:
        raise no_conditions(served.name)
    body = with_timeline_keys(served, body)
    if body.metrics is not None:
        return _parse_metrics(served, body, budget)
    if body.records is not None:
        allows_partial = isinstance(body.records, ndjson.NdjsonRows) and _allows_unknown(body)
        input_rows = parse_record_rows(
            served.row_schema,
            body,
            body.records,
            may_contain_non_floats,
            minimum=0 if allows_partial else 1,
            budget=budget,
        )
        if allows_partial:
            _require_row(input_rows)
        return input_rows
    if served.window_schema is not None and are_windows(body.inputs):
        schema = served.window_schema
        parsed, windows = parse_valid_windows(schema, body.inputs, "/inputs", may_contain_non_floats, budget)
        return InputRows(parsed, len(parsed.rows) + len(parsed.errors), windows=windows)
    if isinstance(body.inputs, np.ndarray):
        parsed = parse_valid_array_rows(served.row_schema, body.inputs, "/inputs", budget)
    else:
        parsed = parse_valid_rows(served.row_schema, body.inputs, "/inputs", may_contain_non_floats, budget)
    count = len(parsed.rows) + len(parsed.errors)
    if served.conditions is None:
        return InputRows(parsed, count, columns=served.columns)
    return InputRows(parsed, count, conditions=served.conditions.read_all(body.condition, count, budget)[parsed.rows])


def parse_record_rows(
    schema: RowSchema,
    body: AnomalyBody,
    records: Any,
    may_contain_non_floats: bool,
    pointer: str = "/records",
    minimum: int = 1,
    budget: Budget = NO_LIMIT,
) -> InputRows:
    """Return the rows in `records`, which come from JSON, NDJSON or CSV. `budget` counts the rows and their memory.

    Raises InvalidRows if fewer than `minimum` records are valid.
    """
    allow_lists = isinstance(records, ndjson.NdjsonRows)
    condition = () if schema.conditions is None else schema.conditions.read(body.condition)
    keys = RecordKeys(
        schema,
        body.time,
        body.group,
        allow_unknown=_allows_unknown(body),
        budget=budget,
        condition=condition,
        impute=body.impute,
    )
    if isinstance(records, csv_rows.CsvRecords):
        names = keys.names(records.header)
        _validate_header(schema, names, body.impute, pointer, keys)
        records = records.with_values(names, schema.name_set, body.time)
    elif isinstance(records, ndjson.NdjsonRows | JsonRows):
        records = iter(records)

    parsed = parse_valid_records(
        schema,
        records,
        pointer,
        may_contain_non_floats=may_contain_non_floats,
        impute=body.impute,
        allow_lists=allow_lists,
        minimum=minimum,
        read=keys.reader(),
        budget=budget,
    )
    time = np.array([keys.times[row] for row in parsed.rows])
    group = [keys.groups[row] for row in parsed.rows]
    return InputRows(
        parsed,
        len(keys.groups),
        keys.unknown_fields,
        time=None if np.isnan(time).all() else time,
        group=group if any(name is not None for name in group) else None,
        conditions=np.array([keys.conditions[row] for row in parsed.rows], np.int64) if keys.conditions else None,
        columns=schema.columns,
        unseen=[keys.unseen[row] for row in parsed.rows] if any(keys.unseen) else None,
    )


def _allows_unknown(body: AnomalyBody) -> bool:
    """Return whether the request says `impute=true`: a record may then lack a feature and have unknown names."""
    return body.impute and "impute" in body.model_fields_set


def _parse_metrics(served: ServedModel, body: AnomalyBody, budget: Budget) -> InputRows:
    """Return the rows in the field `metrics`. Raises InvalidRows if no row is valid, unless all rows are partial."""
    schema = served.row_schema
    batch = TelegrafBatch(served.selectors, schema.titles, body.time, body.group, budget)
    batch.add(body.metrics)
    unknown_fields, unknown_metrics = batch.unknown_fields, list(batch.unknown_metrics)
    records = batch.records
    if not records:
        no_rows = ParsedRows(np.empty((0, schema.width), np.float32), [], [], None)
        return InputRows(no_rows, 0, unknown_fields, unknown_metrics=unknown_metrics)
    input_rows = parse_record_rows(
        schema, body, records, may_contain_non_floats=True, pointer="/metrics", minimum=0, budget=budget
    )
    for row_error in input_rows.parsed.errors:
        row_error.error.pointer = batch.pointer(row_error.row, records[row_error.row])
    _require_row(input_rows)
    return input_rows._replace(unknown_fields=unknown_fields, unknown_metrics=unknown_metrics)


def _require_row(input_rows: InputRows) -> None:
    """Raise InvalidRows if no row is valid, unless all rows are partial.

    A collector such as Telegraf sends a refused batch again and again, and keeps all later metrics back. Partial rows
    are normal in its batches: a batch may end in the middle of a row, and a metric may exist per core and in total.
    Such rows are only counted and listed.
    """
    refused = [failed.error for failed in input_rows.parsed.errors if not failed.error.is_partial]
    if refused and not input_rows.parsed.rows:
        raise refused[0]


def _validate_smoothing(body: AnomalyBody) -> None:
    """Raise InvalidField if the requested smoothing is impossible.

    Smoothing is impossible if it conflicts with another field, or if it needs timestamps, which rows in `inputs` do not
    have.
    """
    given = [name for name in ("half_life", "half_life_rows", "fdr") if getattr(body, name) is not None]
    if len(given) > 1:
        raise InvalidField(
            f"give only one of {' and '.join(given)}: each decides in its own way which rows are anomalous",
            pointer=f"/{given[0]}",
            expected="one of them",
            got=" and ".join(given),
        )
    if body.inputs is not None and body.half_life is not None:
        raise InvalidField(
            "half_life is in seconds, and inputs have no timestamps",
            pointer="/half_life",
            expected="rows with a timestamp: records, metrics, NDJSON or CSV",
            got="inputs",
            hint="use half_life_rows, which counts rows in the order of the request",
        )


def _validate_header(schema: RowSchema, header: list[str], impute: bool, pointer: str, keys: RecordKeys) -> None:
    """Raise InvalidRows if a CSV header lacks so many features that no line can be valid.

    Raise it also if the header lacks a feature and has an unknown name, unless the request allows that.
    """
    names = schema.record_names
    has_feature = not schema.record_name_set.isdisjoint(header)
    missing = [name for name in schema.required_record_names if name not in header]
    mismatch = keys.mismatch([name for name in names if name not in header], header)
    if has_feature and len(missing) <= max_missing(schema, impute) and not mismatch:
        return
    # Optional features count only if there is no other reason: a row needs at least one value, and no unknown name.
    missing = missing or [name for name in names if name not in header]
    columns = "column" if len(missing) == 1 else "columns"
    verb = "is" if len(missing) == 1 else "are"
    needed = join_names(names)
    raise InvalidRows(
        f"{columns} {join_names([repr(name) for name in missing])} {verb} missing from the CSV header: "
        f"the model needs {needed}",
        pointer=f"{pointer}/0" if has_feature else "",
        expected=needed,
        got=join_names(header),
        hint=f"{HEADER_HINT}; {mismatch}" if mismatch else HEADER_HINT,
    )
