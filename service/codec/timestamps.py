"""Convert timestamps in any common form to Unix seconds."""

import math
from datetime import UTC, datetime
from typing import Any

# Pairs of a limit and the number of units per second. The first limit above the absolute value of a timestamp
# determines the unit of the timestamp: s, ms, us or ns. The unit is unambiguous for every moment from March 1973 to the
# year 5138.
_UNITS = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (math.inf, 1e9))


def to_unix_seconds(value: Any) -> float:
    """Return a timestamp as Unix seconds. Return NaN if `value` is not a timestamp.

    A timestamp is a number in s, ms, us or ns, a text that contains such a number, or a text in ISO 8601. An ISO 8601
    text without a time zone is in UTC.
    """
    if isinstance(value, str):
        number = _parse_number(value)
        return _parse_iso8601(value) if math.isnan(number) else _scale(number)
    return _scale(float(value)) if type(value) in (int, float) else math.nan


def _parse_iso8601(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return math.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _scale(number: float) -> float:
    """Return a number in s, ms, us or ns as seconds."""
    if not math.isfinite(number):
        return math.nan
    return number / next(unit for limit, unit in _UNITS if abs(number) < limit)
