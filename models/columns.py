"""Titles, cells and quotations of CSV: one set of rules for training files and for requests.

A title is a name, optionally followed by a unit in brackets: `temp [°C]`. The manifest of an artifact stores the two
parts separately, so training and serving must take titles apart in the same way.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

# Cells in lower case, without the spaces around them.
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
TRUE = frozenset({"true", "yes"})
FALSE = frozenset({"false", "no"})
_UNIT = re.compile(r"(?P<name>.*\S)\s+\[(?P<unit>[^\[\]]+)\]")


class Title(NamedTuple):
    """The two parts of a column's title."""

    name: str
    unit: str | None


def parse_title(title: str) -> Title:
    """Return the name and the unit in `title`: `load [%]` is the name "load" with the unit "%".

    Each run of white space counts as one space, and spaces around the title do not count.
    """
    text = " ".join(title.split())
    match = _UNIT.fullmatch(text)
    return Title(match["name"], match["unit"].strip()) if match else Title(text, None)


def parse_cell(cell: str) -> float | bool | str:
    """Return the number in `cell`, NaN for a missing value, or a boolean for true, yes, false and no.

    Return `cell` itself if it is none of these. Training reads a boolean as 1 or 0, but only in a column without any
    other number.
    """
    text = cell.strip()
    try:
        value = float(text)
    except ValueError:
        word = text.lower()
        if word in MISSING:
            return math.nan
        return word in TRUE if word in TRUE or word in FALSE else cell
    # Python reads 1_000 and digits of other scripts, but polars, which reads training files, does not.
    return value if text.isascii() and "_" not in text else cell


def read_level(value: Any) -> str | None:
    """Return the level of a category that a cell or a JSON value means; None if it means a missing value.

    Spaces around a text do not count. A whole number has one form, `80` for 80.0 and for "80.0", and a truth value is
    `true` or `false`.
    """
    if value is None or value != value:  # only NaN differs from itself
        return None
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    try:
        number = float(text)
    except ValueError:
        return None if text.lower() in MISSING else text
    if math.isnan(number):
        return None
    return str(int(number)) if number.is_integer() else text


def swallows_lines(record: Sequence[str], lines: Sequence[str]) -> bool:
    """Return whether the `lines` that `record` was read from are probably several records.

    If they are, a quotation mark that is not doubled has opened a quotation in the first line, and another one has
    closed it in the last line. The lines count as several records if the first and the last line look like records, or
    if any line between them does. A line looks like a record if it has as many values as `record`, and numbers or
    missing values in the columns where `record` has numbers. If `record` has no numbers, the columns in which its
    values are missing are compared instead.
    """
    numeric = [index for index, cell in enumerate(record) if is_number(cell)]
    numeric = numeric or [index for index, cell in enumerate(record) if _is_missing(cell)]

    def looks_like_record(line: str) -> bool:
        cells = line.split(",")
        return len(cells) == len(record) and all(is_number(cells[i]) or _is_missing(cells[i]) for i in numeric)

    if len(lines) < 2:
        return False
    first, *between, last = lines
    return bool(numeric) and (
        (looks_like_record(first) and looks_like_record(last)) or any(map(looks_like_record, between))
    )


def _is_missing(cell: str) -> bool:
    return cell.strip().lower() in MISSING


def is_number(text: str) -> bool:
    """Return whether Python reads `text` as a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
