"""Timestamps as senders write them, to Unix seconds."""

import math
from datetime import UTC, datetime
from typing import Any

# A number's size tells its unit for every moment from March 1973 to the year 5138.
_UNITS = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (math.inf, 1e9))


def seconds(value: Any) -> float:
    """Unix seconds of a number, whose unit (s, ms, us or ns) its size tells, or of an ISO 8601 text; else NaN.

    A text without a zone is UTC.
    """
    if isinstance(value, str):
        number = _number(value)
        return _of_text(value) if math.isnan(number) else _of_number(number)
    return _of_number(float(value)) if type(value) in (int, float) else math.nan


def _of_text(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return math.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _of_number(value: float) -> float:
    if not math.isfinite(value):
        return math.nan
    return value / next(unit for limit, unit in _UNITS if abs(value) < limit)
