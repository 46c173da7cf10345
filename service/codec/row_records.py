"""Parse records into float32 arrays. A record maps feature names to values, and comes from JSON, NDJSON or CSV."""

from collections.abc import Callable, Iterator
from typing import Any

from models.errors import join_names
from service.codec.budget import NO_LIMIT, Budget
from service.codec.json_values import describe_value
from service.codec.row_errors import MalformedRow
from service.codec.row_lists import RowPacker, append_valid_rows
from service.codec.row_schema import ParsedRows, RowSchema
from service.errors import InvalidRows


def parse_valid_records(
    schema: RowSchema,
    records: Any,
    pointer: str,
    *,
    may_contain_non_floats: bool,
    impute: bool = False,
    allow_lists: bool = False,
    minimum: int = 1,
    read: Callable[[Any], Any] = lambda record: record,
    budget: Budget = NO_LIMIT,
) -> ParsedRows:
    """Return the rows in the valid records, and an error for each invalid record.

    Args:
        schema: the schema of a row.
        records: a JSON value, which should be a list of objects, or an iterator over the records of a body. A
            `MalformedRow` may take the place of an object.
        pointer: the JSON pointer to `records`.
        may_contain_non_floats: whether values may be true, false, NaN or infinite.
        impute: whether up to half of the required values of a record may be missing.
        allow_lists: whether `records` may also contain lists. A list must contain every required value.
        minimum: the minimum number of valid records.
        read: called once with each record, in order; returns the record with the names of features as keys.
        budget: counts the records and their memory.

    Raises:
        InvalidRows: `records` is not a list of records, or fewer than `minimum` records are valid.
    """
    if not (isinstance(records, Iterator) or (isinstance(records, list) and records)):
        got = describe_value(records)
        raise InvalidRows("there are no records", pointer=pointer, expected="a list of objects", got=got)
    record_schema = schema.all_optional if impute else schema
    packer = RowPacker(schema.width, may_contain_non_floats)

    def append(record: Any) -> None:
        record = read(record)
        if allow_lists and type(record) is list:
            packer.append(record, schema)
        else:
            packer.append(_values_in_order(schema, record, impute), record_schema, keys=schema.names)

    return append_valid_rows(packer, records, pointer, append, minimum, budget)


def max_missing(schema: RowSchema, impute: bool) -> int:
    """Return the maximum number of required values that may be missing from a record."""
    return len(schema.required_record_names) // 2 if impute else 0


def _values_in_order(schema: RowSchema, record: Any, impute: bool) -> list[Any]:
    """Return the D values of a record, with None for a missing value. Raises InvalidRows if too many are missing."""
    if isinstance(record, MalformedRow):
        raise record.error()
    if type(record) is not dict:
        got = describe_value(record)
        raise InvalidRows(f"expected a record, got {got}", pointer="", expected="an object by feature name", got=got)
    try:
        values = [record[name] for name in schema.names]
        if not (impute and None in values):
            return values
    except KeyError:
        values = [record.get(name) for name in schema.names]
    required = schema.required_record_names
    missing = [name for name in schema.required_names if (record.get(name) is None if impute else name not in record)]
    if schema.columns is not None:  # a category counts once
        missing = list(dict.fromkeys(schema.columns.column_of[name] for name in missing))
    allowed = max_missing(schema, impute)
    if len(missing) <= allowed:
        return values
    how_many = f"at least {len(required) - allowed} of the" if allowed else "all"
    error = InvalidRows(
        f"the record has no value for {join_names(missing)}",
        pointer="",
        expected=f"numbers for {how_many} {len(required)} required features",
        got=f"{len(required) - len(missing)} of them",
        hint="GET /models/{name} lists the features",
    )
    error.is_partial = impute
    raise error
