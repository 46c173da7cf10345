"""Reading JSON rows, records and arrays as float32 rows, compared with json.loads and numpy."""

import json
import math
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.codec.budget import Budget, TurnOver
from service.codec.request_body import read_fields
from service.codec.row_arrays import parse_array, parse_valid_array_rows
from service.codec.row_lists import parse_rows, parse_valid_rows
from service.codec.row_records import parse_valid_records
from service.codec.row_schema import RowSchema
from service.errors import InvalidRows

FLAT = RowSchema([4])
NESTED = RowSchema([2, 3])
MAX_FLOAT32 = float(np.finfo(np.float32).max)


def read(schema: RowSchema, text: str) -> Any:
    """Parse the rows in the JSON `text` as the service does; return the rows."""
    fields = read_fields("application/json", f'{{"inputs": {text}}}'.encode(), "inputs")
    return parse_rows(schema, fields.values["inputs"], "/inputs", fields.may_contain_non_floats)


def refusal(schema: RowSchema, text: str) -> InvalidRows:
    with pytest.raises(InvalidRows) as caught:
        read(schema, text)
    return caught.value


numbers = st.one_of(
    st.floats(-MAX_FLOAT32, MAX_FLOAT32, allow_nan=False),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.integers(-(2**53), 2**53),
)


@given(st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1, max_size=5))
def test_finite_numbers_are_rounded_as_numpy_rounds_them(rows: list[list[float]]) -> None:
    text = json.dumps(rows)
    expected = np.array(json.loads(text), dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(read(FLAT, text), expected)


@given(st.lists(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=2, max_size=2), min_size=1, max_size=4))
def test_nested_rows_are_read_like_flat_rows(rows: list[list[list[float]]]) -> None:
    flat = [[value for line in row for value in line] for row in rows]
    np.testing.assert_array_equal(read(NESTED, json.dumps(rows)), read(NESTED, json.dumps(flat)))


def test_flat_and_nested_rows_may_be_mixed() -> None:
    x = read(NESTED, "[[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]]")
    np.testing.assert_array_equal(x[0], x[1])


not_numbers = st.sampled_from(
    [
        "null",
        "true",
        "false",
        '"1"',
        '""',
        "[]",
        "[1]",
        "{}",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e39",
        "-4e38",
        "1e999",
        "1" + "0" * 400,
    ]
)


@given(bad=not_numbers, row=st.integers(0, 3), column=st.integers(0, 3))
@settings(max_examples=200)
def test_value_that_is_not_a_finite_float32_is_refused_with_its_pointer(bad: str, row: int, column: int) -> None:
    cells = [["1.5"] * 4 for _ in range(4)]
    cells[row][column] = bad
    error = refusal(FLAT, "[" + ",".join("[" + ",".join(line) + "]" for line in cells) + "]")
    assert error.pointer == f"/inputs/{row}/{column}"
    assert error.got is not None
    assert error.expected is not None


@given(bad=not_numbers, row=st.integers(0, 2), i=st.integers(0, 1), j=st.integers(0, 2))
def test_bad_value_in_a_nested_row_has_a_nested_pointer(bad: str, row: int, i: int, j: int) -> None:
    cells = [[["0"] * 3 for _ in range(2)] for _ in range(3)]
    cells[row][i][j] = bad
    lines = ["[" + ",".join("[" + ",".join(line) + "]" for line in one) + "]" for one in cells]
    assert refusal(NESTED, "[" + ",".join(lines) + "]").pointer == f"/inputs/{row}/{i}/{j}"


def test_first_of_several_bad_values_is_reported() -> None:
    assert refusal(FLAT, '[[1,2,3,4],[1,null,"x",true],[null,1,1,1]]').pointer == "/inputs/1/1"


@pytest.mark.parametrize("value", [MAX_FLOAT32, -MAX_FLOAT32, MAX_FLOAT32 * (1 + 2**-26), 1e-46, -0.0, 2**-149])
def test_values_at_the_bounds_of_float32_are_rounded_as_ieee_754_requires(value: float) -> None:
    x = read(FLAT, json.dumps([[value, 0, 0, 0]]))
    assert x[0, 0] == np.float64(value).astype(np.float32)
    assert math.copysign(1, x[0, 0]) == math.copysign(1, value)


def test_value_half_a_step_beyond_the_largest_float32_overflows() -> None:
    beyond = MAX_FLOAT32 + 2.0**103  # IEEE 754 rounds this number to infinity
    with np.errstate(over="ignore"):
        assert np.isinf(np.float64(beyond).astype(np.float32))
    assert "overflows float32" in refusal(FLAT, json.dumps([[0, 0, beyond, 0]])).detail


@pytest.mark.parametrize(
    ("schema", "text", "pointer", "word"),
    [
        (FLAT, "[]", "/inputs", "no rows"),
        (FLAT, "null", "/inputs", "null"),
        (FLAT, "3", "/inputs", "3"),
        (FLAT, '"abcd"', "/inputs", "abcd"),
        (FLAT, "{}", "/inputs", "an object"),
        (FLAT, "[[]]", "/inputs/0", "an empty list"),
        (FLAT, "[[1,2,3]]", "/inputs/0", "a list of 3"),
        (FLAT, "[[1,2,3,4],[1,2,3,4,5]]", "/inputs/1", "a list of 5"),
        (FLAT, "[[1,2,3,4],7]", "/inputs/1", "got 7"),
        (FLAT, '["abcd"]', "/inputs/0", "abcd"),
        (FLAT, "[{}]", "/inputs/0", "an object"),
        (FLAT, '[{"a":1,"b":2,"c":3,"d":4}]', "/inputs/0", "an object"),
        (FLAT, "[[[1,2,3,4]]]", "/inputs/0", "a list of 1"),
        (NESTED, "[[[1,2,3]]]", "/inputs/0", "a list of 1"),
        (NESTED, "[[[1,2,3],[4,5]]]", "/inputs/0/1", "a list of 2"),
        (NESTED, "[[[1,2,3],4]]", "/inputs/0/1", "got 4"),
        (NESTED, "[[1,2,3,4,5]]", "/inputs/0", "a list of 5"),
        (NESTED, "[[[[1,2,3]],[[4,5,6]]]]", "/inputs/0/0", "a list of 1"),
    ],
)
def test_row_of_the_wrong_shape_is_refused_with_the_expected_and_actual_shapes(
    schema: RowSchema, text: str, pointer: str, word: str
) -> None:
    error = refusal(schema, text)
    assert error.pointer == pointer
    assert word in error.detail or word in str(error.got)
    assert error.expected


@pytest.mark.parametrize(
    ("schema", "text"), [(FLAT, "[1,2,3,4]"), (NESTED, "[1,2,3,4,5,6]"), (NESTED, "[[1,2,3],[4,5,6]]")]
)
def test_single_row_that_is_not_in_a_list_gets_a_hint(schema: RowSchema, text: str) -> None:
    error = refusal(schema, text)
    assert error.got == "one row"
    assert error.hint == "put the row into a list: [[...]]"


def test_bad_row_among_valid_rows_fails_alone() -> None:
    rows = [[1, 2, 3, 4], [1, None, 3, 4], "x", [5, 6, 7, 8], [1, 2]]
    parsed = parse_valid_rows(FLAT, rows, "/inputs", False)
    np.testing.assert_array_equal(parsed.x, [[1, 2, 3, 4], [5, 6, 7, 8]])
    assert parsed.rows == [0, 3]
    assert [(error.row, error.error.pointer) for error in parsed.errors] == [
        (1, "/inputs/1/1"), (2, "/inputs/2"), (4, "/inputs/4")
    ]  # fmt: skip


def test_first_error_is_raised_if_no_row_is_valid() -> None:
    with pytest.raises(InvalidRows) as caught:
        parse_valid_rows(FLAT, [[None] * 4, []], "/inputs", False)
    assert caught.value.pointer == "/inputs/0/0"


NAMED = RowSchema([3], ["a", "b/c", "d~"])


def test_record_values_are_ordered_by_name() -> None:
    records = [{"d~": 3, "a": 1, "b/c": 2}, {"a": 4, "b/c": 5, "d~": 6, "host": "x", "t": None}]
    parsed = parse_valid_records(NAMED, records, "/records", may_contain_non_floats=False)
    np.testing.assert_array_equal(parsed.x, [[1, 2, 3], [4, 5, 6]])


def test_bad_record_is_reported_with_its_pointer_and_its_missing_features() -> None:
    records = [
        {"a": 1, "b/c": 2, "d~": 3},
        {"a": 1, "d~": 3},
        {"a": 1, "b/c": "x", "d~": 3},
        5,
        {"a": 1, "b/c": 1, "d~": True},
    ]
    parsed = parse_valid_records(NAMED, records, "/records", may_contain_non_floats=True)
    assert parsed.rows == [0]
    assert [error.error.pointer for error in parsed.errors] == [
        "/records/1", "/records/2/b~1c", "/records/3", "/records/4/d~0"
    ]  # fmt: skip
    assert "no value for b/c" in parsed.errors[0].error.detail


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", "i1", "<i4", ">i8", "u1", "<u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_array_of_any_real_dtype_and_memory_order_becomes_float32(dtype: str, order: str) -> None:
    values = np.arange(12).reshape(2, 6)
    array = np.array(values, dtype=dtype, order=order)  # type: ignore[call-overload] # an order that is a str
    x = parse_array(NESTED, array, "/inputs")
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    assert x.flags.writeable
    np.testing.assert_array_equal(x, values)
    np.testing.assert_array_equal(parse_array(NESTED, array.reshape(2, 2, 3), "/inputs"), values)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (0, 6), (2, 5), (2, 3, 2), (2, 6, 1), ()])
def test_array_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRows, match="expected an array"):
        parse_array(NESTED, np.zeros(shape, np.float32), "/inputs")


@pytest.mark.parametrize(("value", "word"), [(np.nan, "nan"), (np.inf, "inf"), (-1e300, "overflows")])
def test_array_value_that_is_not_a_finite_float32_is_refused_with_its_pointer(value: float, word: str) -> None:
    array = np.zeros((3, 2, 3))
    array[2, 1, 0] = value
    with pytest.raises(InvalidRows, match=word) as caught:
        parse_array(NESTED, array, "/inputs")
    assert caught.value.pointer == "/inputs/2/1/0"
    parsed = parse_valid_array_rows(NESTED, array, "/inputs")
    assert parsed.rows == [0, 1]
    assert parsed.errors[0].row == 2


def test_describing_many_invalid_rows_of_an_array_moves_to_a_thread() -> None:
    rows = np.full((20_000, 2), np.inf, np.float32)
    rows[0] = 1
    budget = Budget(
        max_bytes=2**30, max_rows=10**6, deadline=perf_counter() + 60, hold=lambda _: None, release=lambda _: None
    )
    budget.start(in_event_loop=True)
    with pytest.raises(TurnOver):
        parse_valid_array_rows(RowSchema([2]), rows, "/inputs", budget)
    budget.start(in_event_loop=False)
    parsed = parse_valid_array_rows(RowSchema([2]), rows, "/inputs", budget)
    assert (parsed.rows, len(parsed.errors)) == ([0], 19_999)
