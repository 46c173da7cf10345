"""Records with categories: put the features of a level in the place of its text."""

from typing import Any

from models.categories import CategoryColumns, UnseenLevel
from models.errors import join_names
from service.codec.json_values import describe_value
from service.errors import InvalidRows, escape

MAX_LISTED = 20  # levels that an error lists
NO_UNSEEN: tuple[UnseenLevel, ...] = ()


def expand_record(
    columns: CategoryColumns, record: dict[str, Any], optional: frozenset[str], *, partial: bool = False
) -> tuple[dict[str, Any], tuple[UnseenLevel, ...]]:
    """Return `record` with the features of the levels in place of the levels, and the levels that are not known.

    A record may have the features of the levels, such as `protocol=tcp`, instead of the level.

    Args:
        columns: the columns of the model.
        record: an object by column.
        optional: the categories that may be missing.
        partial: whether every column may be missing.

    Raises:
        InvalidRows: a category is missing although it must not be, or its value is a list or an object.
    """
    expanded = dict(record)
    unseen = NO_UNSEEN
    for name in columns.categories:
        features = columns.features_of(name)
        if name not in expanded:
            if expanded.keys().isdisjoint(features):
                _require_optional(name, optional, is_absent=True, partial=partial)
                expanded.update(dict.fromkeys(features))
            continue
        value = expanded.pop(name)
        if type(value) in (list, dict):
            got = describe_value(value)
            raise InvalidRows(
                f"expected a level of {name}, got {got}", pointer=f"/{escape(name)}", expected="text", got=got
            )
        levels, unknown = columns.code(name, value)
        if levels is None:
            _require_optional(name, optional, is_absent=False, partial=partial)
        elif unknown is not None:
            unseen = (*unseen, unknown)
        expanded.update(dict.fromkeys(features) if levels is None else zip(features, levels, strict=True))
    return expanded, unseen


def require_known(unseen: tuple[UnseenLevel, ...]) -> None:
    """Raise InvalidRows if there is a level that the model does not know."""
    for level in unseen:
        raise InvalidRows(
            f"the model does not know the level {level.got!r} of {level.feature}",
            pointer=f"/{escape(level.feature)}",
            expected=join_names([repr(known) for known in level.known], MAX_LISTED),
            got=level.got,
            hint="POST /anomaly takes rows with unknown levels: such rows are anomalous",
        )


def _require_optional(name: str, optional: frozenset[str], *, is_absent: bool, partial: bool) -> None:
    """Raise InvalidRows unless the category `name` may be missing."""
    if partial or name in optional:
        return
    got = "a record without it" if is_absent else "null"
    raise InvalidRows(
        f"the record has no value for {name}",
        pointer="" if is_absent else f"/{escape(name)}",
        expected=f"a level of {name}",
        got=got,
        hint="only columns with missing values in the training data may lack one",
    )
