"""Read rows that may lack any of their values: objects by feature name, and lists with null for what is missing."""

from collections.abc import Sequence
from typing import Any

from models.errors import join_names
from service.codec.budget import NO_LIMIT, Budget
from service.codec.category_records import expand_record, require_known
from service.codec.feature_names import MAX_TITLE, closest
from service.codec.json_rows import JsonRows
from service.codec.json_values import describe_value
from service.codec.row_lists import RowPacker, parse_row
from service.codec.row_schema import Array, RowSchema
from service.errors import InvalidRows, escape

MAX_LISTED = 20  # features that an error lists
NAMES_HINT = "GET /models/{name} lists the features"


def parse_partial_row(schema: RowSchema, row: Any, pointer: str, may_contain_non_floats: bool) -> Array:
    """Return `row`, an object or a list, as [1, D], with NaN for missing values.

    Args:
        schema: the schema of a complete row.
        row: an object by feature name, which lacks the missing values or has null for them, or a flat or nested list.
        pointer: the JSON pointer to `row`.
        may_contain_non_floats: whether values may be true, false, NaN or infinite.

    Raises:
        InvalidRows: a name is not a feature, a value is not a finite number, or all values are missing.
    """
    if type(row) is not dict:
        return parse_row(schema.all_optional, row, pointer, may_contain_non_floats)
    packer = RowPacker(schema.width, may_contain_non_floats)
    try:
        packer.append(_values_in_order(schema, row), schema.all_optional, keys=schema.names)
    except InvalidRows as error:
        error.pointer = f"{pointer}{error.pointer}"
        raise
    return packer.rows()


def parse_all_records(
    schema: RowSchema,
    records: Any,
    pointer: str,
    may_contain_non_floats: bool,
    budget: Budget = NO_LIMIT,
    *,
    partial: bool = False,
) -> Array:
    """Return `records`, a list of objects, as [N, D], with NaN for missing values. See `parse_partial_row`.

    Args:
        partial: whether every value may be missing. If not, only values that were missing in training may be.

    Raises:
        InvalidRows: `records` is not a list of objects, or an object is invalid. The error points to the first invalid
            one.
    """
    if not isinstance(records, JsonRows) and not (type(records) is list and records):
        got = describe_value(records)
        raise InvalidRows("there are no records", pointer=pointer, expected="a list of objects", got=got)
    packer = RowPacker(schema.width, may_contain_non_floats)
    of_rows = schema.all_optional if partial else schema
    counted = 0  # records that `budget` has counted
    for index, record in enumerate(records):
        if index >= counted:
            counted += budget.take_next_rows(packer.row_bytes)
        try:
            packer.append(_values_in_order(schema, record, partial=partial), of_rows, keys=schema.names)
        except InvalidRows as error:
            error.pointer = f"{pointer}/{index}{error.pointer}"
            raise
    return packer.rows()


def _values_in_order(schema: RowSchema, record: Any, *, partial: bool = True) -> list[Any]:
    """Return the D values of `record`, with None for a missing value. `partial`: whether every value may be missing."""
    if type(record) is not dict:
        got = describe_value(record)
        raise InvalidRows(f"expected a record, got {got}", pointer="", expected="an object by feature name", got=got)
    if schema.columns is not None:
        known = [each for each in schema.columns.categories if each in record]
        levels, unseen = expand_record(
            schema.columns, {name: record[name] for name in known}, schema.optional_categories, partial=partial
        )
        require_known(unseen)
        numbers = {name: value for name, value in record.items() if name not in known}
        record = {name: value for name, value in levels.items() if value is not None} | numbers
    if not record.keys() <= schema.name_set:
        record = _with_feature_names(schema, record)
    return [record.get(name) for name in schema.names]


def _with_feature_names(schema: RowSchema, record: dict[str, Any]) -> dict[str, Any]:
    """Return `record` with the names of features as keys. Raises InvalidRows for a name that is not a feature."""
    named: dict[str, Any] = {}
    for key, value in record.items():
        feature = schema.titles.find(key)
        if feature is None:
            raise unknown_feature(key, schema.record_names)
        if feature in named:
            raise InvalidRows(
                f"{feature} is given twice",
                pointer=f"/{escape(key)}",
                expected=f"one value for {feature}",
                got="two values",
                hint="remove or rename one of them",
            )
        named[feature] = value
    return named


def unknown_feature(key: str, names: Sequence[str]) -> InvalidRows:
    """Return the error for a key that is not a feature, with the feature that has the most similar name."""
    similar = closest(key, names)
    return InvalidRows(
        f"{key[:MAX_TITLE]!r} is not a feature of the model",
        pointer=f"/{escape(key[:MAX_TITLE])}",
        expected=join_names(names, MAX_LISTED),
        got=key[:MAX_TITLE],
        hint=f"did you mean {similar}?" if similar else NAMES_HINT,
    )
