"""Convert timestamps in any common form to Unix seconds."""

import math
from datetime import UTC, datetime
from typing import Any

# Pairs of a limit and the number of units per second. The first limit above the absolute value of a timestamp
# determines the unit of the timestamp: s, ms, us or ns. The unit is unambiguous for every moment from March 1973 to the
# year 5138. A number above all limits is not a timestamp.
_UNITS = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (1e20, 1e9))


def to_unix_seconds(value: Any) -> float:
    """Return a timestamp as Unix seconds. Return NaN if `value` is not a timestamp.

    A timestamp is a number in s, ms, us or ns, a text that contains such a number, or a text in ISO 8601. An ISO 8601
    text without a time zone is in UTC.
    """
    if isinstance(value, str):
        number = _parse_number(value)
        return _parse_iso8601(value) if number is None else _scale(number)
    return _scale(value) if type(value) in (int, float) else math.nan


def _parse_iso8601(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip().upper())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return math.nan


def _parse_number(text: str) -> float | None:
    """Return the number in `text`, or None if `text` is not a number. Python also reads 1_000; a timestamp must not."""
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None


def _scale(number: float) -> float:
    """Return a number in s, ms, us or ns as seconds; NaN if it is too large or not finite."""
    size = abs(number)
    return next((number / unit for limit, unit in _UNITS if size < limit), math.nan)
