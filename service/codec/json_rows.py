"""Read a large JSON document in pieces.

orjson holds the interpreter lock until it has read its whole input, and creates objects that take up to 80 times as
much memory as the text. A large document is therefore taken apart first: `take_apart` finds the rows, which are the
elements of the arrays in its fields, without creating an object per row. Then the rows are parsed in pieces, while the
caller iterates over them.

numpy searches the document for brackets and quotation marks, which takes a third of the time of parsing.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from service.codec.budget import PIECE_BYTES, Budget
from service.errors import BodyTooLarge, InvalidJson, TooManyRows

SCAN_BYTES = 128 * 1024  # number of bytes of a document that are scanned between two checks of the time limit
MAX_FIELDS = 1000  # maximum number of fields of a large document that are arrays or objects
# A row or a field is parsed as a whole, so it may have at most this many values and lists, plus those that the width of
# a row needs. orjson holds Python's lock while it parses them.
FREE_VALUES = 50_000
FREE_LISTS = 20_000
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_IS_SPECIAL = np.isin(np.arange(256), [ord(character) for character in '[]{}"\\'])
_IS_SPECIAL_OR_COMMA = _IS_SPECIAL | (np.arange(256) == ord(","))
DEPTH_CHANGE = np.zeros(256, np.int64)
DEPTH_CHANGE[[ord("["), ord("{")]] = 1
DEPTH_CHANGE[[ord("]"), ord("}")]] = -1
_WHITE_SPACE = b" \t\r\n"

Positions = npt.NDArray[np.int64]


class JsonRows:
    """The elements of a large array in a JSON document. They are parsed while the caller iterates.

    Args:
        body: the document.
        pieces: the places of the pieces in the document. Each piece but the first begins with the comma after the one
            before.
        count: how many of the elements are lists or objects.
        loads: parses JSON; raises InvalidJson.
        budget: limits the time.
    """

    def __init__(
        self, body: bytes, pieces: list[slice], count: int, loads: Callable[[bytes], Any], budget: Budget
    ) -> None:
        self._body = body
        self._pieces = pieces
        self._count = count
        self._loads = loads
        self._budget = budget

    def __len__(self) -> int:
        return self._count

    @property
    def text_length(self) -> int:
        """The length of the array in the document, in bytes."""
        return sum(piece.stop - piece.start for piece in self._pieces)

    def __iter__(self) -> Iterator[Any]:
        for index, piece in enumerate(self._pieces):
            self._budget.check_time()
            text = self._body[piece].strip(_WHITE_SPACE)
            if index and not text:
                continue  # only white space is left before the end of the array
            if index:
                if not text.startswith(b",") or len(text) == 1:
                    raise _invalid(f"expected a comma and a value at byte {piece.start}")
                text = text[1:]
            yield from self._loads(b"[%b]" % text)


class _Array(NamedTuple):
    """An array in a field of the document: the place of its content, and the ends of its lists and objects."""

    start: int
    end: int
    ends: Positions


def take_apart(body: bytes, loads: Callable[[bytes], Any], budget: Budget) -> tuple[bytes, dict[str, JsonRows]]:
    """Return the JSON object `body` with a string in place of each large array, and a dict from string to array.

    Raises:
        InvalidJson: the brackets do not match. Other faults of the arrays are found while their rows are read.
        TooManyRows: an array has more rows than a request may have.
        BodyTooLarge: a row is too long, or the document without its large arrays is longer than two rows may be.
    """
    arrays = [array for array in _arrays(body, budget) if array.end - array.start > PIECE_BYTES]
    rest: list[bytes] = []
    rows: dict[str, JsonRows] = {}
    done = 0
    for array in arrays:
        name = os.urandom(16).hex()
        rows[name] = JsonRows(body, _pieces(array, budget), len(array.ends), loads, budget)
        rest += [body[done : array.start - 1], f'"{name}"'.encode()]
        done = array.end + 1
    rest.append(body[done:])
    if sum(map(len, rest)) > 2 * budget.max_row_bytes:  # an interpolation has two rows that are in no list
        raise _too_long("the fields of the body that are not lists of rows have", 2 * budget.max_row_bytes)
    return b"".join(rest), rows


def require_few_values(text: bytes, budget: Budget) -> None:
    """Raise InvalidJson if `text` has so many values that parsing it would hold the interpreter lock for long."""
    if len(text) <= PIECE_BYTES:
        return
    characters = np.frombuffer(text, np.uint8)
    values, lists = (
        sum(int(np.count_nonzero(characters == ord(character))) for character in kind) for kind in (",", "[{")
    )
    if values > FREE_VALUES + 4 * budget.width or lists > FREE_LISTS + 2 * budget.width:
        raise InvalidJson(
            f"a row or a field has {values} commas and {lists} lists and objects, which are more than a row needs",
            expected=f"at most {FREE_VALUES + 4 * budget.width} commas and {FREE_LISTS + 2 * budget.width} lists",
            got=f"{values} and {lists}",
        )


def _arrays(body: bytes, budget: Budget) -> list[_Array]:
    """Return the arrays in the fields of the document."""
    opened: list[tuple[int, bool]] = []  # for each field that is an array or object: its place, whether it is an array
    closed: list[int] = []
    ends: list[Positions] = []
    count = depth = last = 0
    for part_end, places, characters in brackets(body, budget):
        if part_end - last > 2 * budget.max_row_bytes + SCAN_BYTES:
            raise _too_long("a row or a field of the body has", budget.max_row_bytes)
        change = DEPTH_CHANGE[characters]
        depths = depth + np.cumsum(change)
        if not len(depths):
            continue
        depth = int(depths[-1])
        at_two = depths == 2
        opening = places[at_two & (change > 0)]
        closing = places[(depths == 1) & (change < 0)]
        if len(opened) + len(opening) > MAX_FIELDS:
            raise InvalidJson(
                f"the body has more than {MAX_FIELDS} fields that are lists or objects, or is not a JSON object",
                expected="an object",
                got=f"more than {MAX_FIELDS} fields",
            )
        ends_here = places[at_two & (change < 0)]
        last = max([last, *(int(found[-1]) for found in (opening, closing, ends_here) if len(found))])
        opened += [(place, body[place] == ord("[")) for place in opening.tolist()]
        closed += closing.tolist()
        ends.append(ends_here)
        count += len(ends_here)
        if count > budget.max_rows + MAX_FIELDS:
            raise TooManyRows(
                f"a request may have at most {budget.max_rows} rows (ELBO_MAX_ROWS), got at least {count}",
                expected=f"at most {budget.max_rows} rows",
                got=f"at least {count}",
                hint="split the rows over several requests",
            )
        if len(closed) > len(opened):
            break
    if depth or len(closed) != len(opened):
        raise _invalid("its brackets do not match")
    all_ends = np.concatenate(ends) if ends else np.empty(0, np.int64)
    arrays = []
    for (start, is_array), end in zip(opened, closed, strict=True):
        if is_array:
            low, high = np.searchsorted(all_ends, [start, end])
            arrays.append(_Array(start + 1, end, all_ends[low:high] + 1))
    return arrays


def brackets(
    body: bytes, budget: Budget, *, with_commas: bool = False
) -> Iterator[tuple[int, Positions, npt.NDArray[np.uint8]]]:
    """Yield, for each part of `body`, its end, the places of the brackets outside of strings, and the brackets.

    Args:
        body: the document.
        budget: what reading may cost.
        with_commas: yield the commas outside of strings, too.
    """
    whole = np.frombuffer(body, np.uint8)
    is_special = _IS_SPECIAL_OR_COMMA if with_commas else _IS_SPECIAL
    in_string = 0  # 1 if the part begins inside a string
    is_escaped = False  # whether the part before ends with a backslash that escapes the next character
    for start in range(0, len(body), SCAN_BYTES):
        budget.check_time()
        part = whole[start : start + SCAN_BYTES]
        places = np.flatnonzero(is_special[part])
        characters = part[places]
        if is_escaped or (characters == _BACKSLASH).any():
            escaped = _escaped(places[characters == _BACKSLASH], len(part), is_escaped)
            is_escaped = bool(escaped[-1])
            kept = (characters != _BACKSLASH) & ~((characters == _QUOTE) & escaped[places])
            places, characters = places[kept], characters[kept]
        is_quote = characters == _QUOTE
        quotes = in_string + np.cumsum(is_quote)
        outside = ~is_quote & (quotes % 2 == 0)
        in_string = int(quotes[-1]) % 2 if len(quotes) else in_string
        yield start + len(part), places[outside] + start, characters[outside]


def _escaped(backslashes: Positions, length: int, is_escaped: bool) -> npt.NDArray[np.bool_]:
    """Return a mask [length + 1] of the characters that a backslash escapes; the last element is for the next part.

    Args:
        backslashes: the places of the backslashes.
        length: the number of characters.
        is_escaped: whether the first character is escaped by a backslash before the part.
    """
    index = np.arange(len(backslashes))
    begins_run = np.diff(backslashes, prepend=-2) != 1
    place_in_run = index - np.maximum.accumulate(np.where(begins_run, index, 0)) if len(index) else index
    if is_escaped and len(index) and backslashes[0] == 0:  # the run began in the part before
        place_in_run[np.logical_and.accumulate(backslashes == index)] += 1
    mask = np.zeros(length + 1, np.bool_)
    mask[0] = is_escaped
    mask[backslashes[place_in_run % 2 == 0] + 1] = True
    return mask


def _pieces(array: _Array, budget: Budget) -> list[slice]:
    """Divide the content of an array into pieces of about PIECE_BYTES, or of one row if a row is longer."""
    pieces: list[slice] = []
    start = array.start
    while start < array.end:
        index = int(np.searchsorted(array.ends, start + PIECE_BYTES, side="right"))
        if index == len(array.ends) or (index and array.ends[index - 1] > start):
            index -= 1
        end = int(array.ends[index]) if index >= 0 and array.ends[index] > start else array.end
        if end - start > budget.max_row_bytes:
            raise _too_long("a row of the body has", budget.max_row_bytes)
        pieces.append(slice(start, end))
        start = end
    return pieces


def _invalid(reason: str) -> InvalidJson:
    return InvalidJson(
        f"invalid JSON: {reason}", expected="a JSON object in UTF-8", hint="check the quotation marks and commas"
    )


def _too_long(what: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"{what} more than {limit} bytes", expected=f"at most {limit} bytes", got="more")
