"""Convert timestamps in any common form to Unix seconds, or exactly to nanoseconds."""

import math
import re
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple

# Pairs of a limit and the number of units per second. The first limit above the absolute value of a timestamp
# determines the unit of the timestamp: s, ms, us or ns. The unit is unambiguous for every moment from March 1973 to the
# year 5138. A number above all limits is not a timestamp.
_UNITS = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (1e20, 1e9))
# The same limits for exact times, each with the unit and the length of the unit in nanoseconds
NUMBER_UNITS: "tuple[tuple[int, NumberForm, int], ...]" = (
    (10**11, "s", 10**9),
    (10**14, "ms", 10**6),
    (10**17, "us", 10**3),
    (10**20, "ns", 1),
)
MAX_NANOSECONDS = 2**63 - 1  # largest distance from 1970: a moment lies between the years 1677 and 2262
_BEYOND_MICROSECONDS = re.compile(r"[.,]\d{6}(\d{1,3})")  # `datetime` drops the seventh to ninth decimal of a second
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

NumberForm = Literal["s", "ms", "us", "ns"]
Form = NumberForm | Literal["zone", "no zone"]


class Moment(NamedTuple):
    """A moment, and how the timestamp was written: as a number in a unit, or as text with or without a time zone."""

    nanoseconds: int  # since 1970 in UTC
    form: Form


def to_unix_seconds(value: Any) -> float:
    """Return a timestamp as Unix seconds. Return NaN if `value` is not a timestamp.

    A timestamp is a number in s, ms, us or ns, a text that contains such a number, or a text in ISO 8601. An ISO 8601
    text without a time zone is in UTC.
    """
    if isinstance(value, str):
        number = _parse_number(value)
        return _parse_iso8601(value) if number is None else _scale(number)
    return _scale(value) if type(value) in (int, float) else math.nan


def to_moment(value: Any) -> Moment | None:
    """Return the moment of a timestamp, exact to the nanosecond. Return None if `value` is not a timestamp.

    The forms are those of `to_unix_seconds`. A moment more than MAX_NANOSECONDS from 1970 is not a
    timestamp.
    """
    if isinstance(value, str):
        number = _parse_exact_number(value)
        moment = _parse_iso8601_exactly(value) if number is None else _scale_exactly(number)
    elif type(value) in (int, float):
        moment = _scale_exactly(Decimal(repr(value)))
    else:
        return None
    return moment if moment is not None and abs(moment.nanoseconds) <= MAX_NANOSECONDS else None


def _parse_exact_number(text: str) -> Decimal | None:
    try:
        return Decimal(text.strip()) if "_" not in text else None
    except InvalidOperation:
        return None


def _scale_exactly(number: Decimal) -> Moment | None:
    if not number.is_finite():
        return None
    found = ((form, length) for limit, form, length in NUMBER_UNITS if number.copy_abs() < limit)
    form, length = next(found, (None, 0))
    return None if form is None else Moment(round(number * length), form)


def _parse_iso8601_exactly(text: str) -> Moment | None:
    try:
        moment = datetime.fromisoformat(text.strip().upper())
        since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    except (ValueError, OverflowError):
        return None
    more = _BEYOND_MICROSECONDS.search(text)
    nanoseconds = (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1000
    return Moment(
        nanoseconds + (int(more[1].ljust(3, "0")) if more else 0), "no zone" if moment.tzinfo is None else "zone"
    )


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
