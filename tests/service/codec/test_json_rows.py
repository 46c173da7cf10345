"""A large JSON document is read in pieces, with the same result as if it were read as a whole."""

import json
import random
from time import perf_counter
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codec import json_rows, simdjson_rows
from service.codec.budget import PIECE_BYTES, Budget
from service.codec.json_rows import JsonRows
from service.codec.request_body import read_fields, read_json
from service.codec.row_lists import parse_valid_rows
from service.codec.row_schema import RowSchema
from service.errors import BodyTooLarge, InvalidJson, TooManyRows

SPACE = " " * 50


def budget_of(max_rows: int = 10_000, width: int = 4, max_bytes: int = 2**27) -> Budget:
    return Budget(
        max_bytes=max_bytes,
        max_rows=max_rows,
        width=width,
        deadline=perf_counter() + 60,
        hold=lambda _: None,
        release=lambda _: None,
    )


def read(body: bytes, **options: Any) -> dict[str, Any]:
    """Return the fields of a JSON body, with lists in place of the rows that are read in pieces."""
    fields = read_json(body, budget_of(**options)).values
    return {name: list(value) if isinstance(value, JsonRows) else value for name, value in fields.items()}


STRINGS = ["", "a", '"', "\\", "\\\\", '\\"', "[", "]}", "{", "},{", "é", "😀", "\n", 'x\\"],[', '"' * 9, "\\" * 9]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(STRINGS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(STRINGS), inner, max_size=3),
    max_leaves=6,
)


@given(rows=st.lists(VALUES, max_size=12), other=VALUES, first=st.booleans(), space=st.sampled_from(["", " ", "\n\t"]))
@pytest.mark.parametrize("piece", [1, 7, 40])
@pytest.mark.parametrize("scan", [1, 2, 13])
def test_document_in_pieces_of_any_size_has_the_same_fields(
    piece: int, scan: int, rows: list[Any], other: Any, first: bool, space: str
) -> None:
    document = {"other": other, "inputs": rows} if first else {"inputs": rows, "other": other}
    body = json.dumps(document, separators=(space + "," + space, space + ":" + space)).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "PIECE_BYTES", piece)
        patch.setattr("service.codec.request_body.PIECE_BYTES", 1)
        patch.setattr(json_rows, "SCAN_BYTES", scan)
        assert read(body) == document


def record(index: int) -> dict[str, Any]:
    return {"cpu": index / 7, "load": -1e-5, "host": f'web "{index}" [\\]', "tags": [[index], {"a": []}]}


@pytest.mark.parametrize("indent", [None, 1])
def test_large_records_are_read_in_pieces(indent: int | None) -> None:
    document = {"alpha": 0.1, "records": [record(index) for index in range(3000)], "detail": "none"}
    body = json.dumps(document, indent=indent, ensure_ascii=False).encode()
    fields = read_json(body, budget_of())
    assert isinstance(fields.values["records"], JsonRows)
    assert fields.may_contain_non_floats
    assert read(body) == document
    assert read(b"\xef\xbb\xbf" + body) == document


def test_large_body_with_rows_of_numbers_is_read_as_one_array() -> None:
    rows = np.random.default_rng(1).normal(size=(9000, 20)).astype(np.float32)
    body = orjson.dumps({"alpha": 0.1, "inputs": rows, "explain": 2}, option=orjson.OPT_SERIALIZE_NUMPY)
    assert len(body) > 2 * simdjson_rows.MAX_WHOLE_BYTES
    fields = read_fields("application/json", body, "inputs", 20, budget=budget_of(width=20)).values
    np.testing.assert_array_equal(fields["inputs"], rows)
    assert fields["inputs"].dtype == np.float32
    assert (fields["alpha"], fields["explain"]) == (0.1, 2)


@pytest.mark.parametrize("space", ["", " ", "\n" + SPACE, " " * 300])
def test_white_space_between_the_rows_of_a_large_body_makes_no_difference(space: str) -> None:
    rows = [[index, 0.5] for index in range(9000)]
    text = json.dumps(rows, separators=(space + ",", ":")).replace("[[", f"[{space}[").replace("]]", f"]{space}]")
    body = f'{{"inputs":{text}{space}}}'.encode() + b" " * simdjson_rows.MAX_WHOLE_BYTES
    values = read_fields("application/json", body, "inputs", 2, budget=budget_of(width=2)).values["inputs"]
    np.testing.assert_array_equal(np.array(list(values)), rows)


GOOD = b"[1,2]," * 40_000
FAULTS = {
    "a comma after the last row": b'{"inputs":[%b]}' % GOOD,
    "a comma after the last row, and space": b'{"inputs":[%b  ]}' % GOOD,
    "two commas": b'{"inputs":[%b,[1,2]]}' % GOOD,
    "no comma": b'{"inputs":[%b[1,2] [1,2]]}' % GOOD,
    "a colon": b'{"inputs":[%b[1,2]:[1,2]]}' % GOOD,
    "another bracket": b'{"inputs":[%b[1,2}]}' % GOOD,
    "brackets crossed": b'{"inputs":[%b[1,2]}]' % GOOD,
    "no end": b'{"inputs":[%b[1,2]' % GOOD,
    "an end too many": b'{"inputs":[%b[1,2]]}]' % GOOD,
    "a string without end": b'{"inputs":[%b["a]]}' % GOOD,
    "text after the object": b'{"inputs":[%b[1,2]]} x' % GOOD,
    "a key without a value": b'{"inputs":[%b[1,2]],"x"}' % GOOD,
    "a duplicate key": b'{"inputs":[%b[1,2]],"inputs":1}' % GOOD,
    "a duplicate key in a row": b'{"inputs":[%b{"a":1,"a":2}]}' % GOOD,
    "a list": b"[%b[1,2]]" % GOOD,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("width", [2, 3])
def test_fault_in_a_large_body_is_found(fault: str, width: int) -> None:
    with pytest.raises(InvalidJson):
        read_json(FAULTS[fault])  # as a whole
    with pytest.raises(InvalidJson):
        read_inputs(FAULTS[fault], width)


def read_inputs(body: bytes, width: int) -> list[Any]:
    budget = budget_of(max_rows=50_000, width=width)
    return list(read_fields("application/json", body, "inputs", width, budget=budget).values["inputs"])


def test_more_rows_than_a_request_may_have_are_refused_before_they_are_parsed() -> None:
    for element in (b"[],", b"{},", b"[[]],", b'{"a":"]"},'):
        body = b'{"inputs":[%b%b]}' % (element * 100_000, element[:-1])
        with pytest.raises(TooManyRows):
            read_fields("application/json", body, "inputs", 4, budget=budget_of(max_rows=20_000))


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs":[[%b1]]}' % (b"1," * 10**6),
        b'{"inputs":[%b1]}' % (b"1," * 10**6),
        b'{"inputs":[["%b"]]}' % (b"x" * 2 * 10**6),
        b'{"x":"%b"}' % (b"x" * 3 * 10**6),
        b"{%b}" % b",".join(b'"k%d":1' % index for index in range(300_000)),
    ],
)
def test_row_or_field_that_is_longer_than_any_row_is_refused(body: bytes) -> None:
    with pytest.raises(BodyTooLarge):
        read_json(body, budget_of())


@pytest.mark.parametrize("value", ["[]", "{}", "1", "[[]]"])
def test_row_with_more_values_than_any_row_needs_is_refused(value: str) -> None:
    row = "[" + ",".join([value] * (900_000 // (len(value) + 1))) + "]"
    with pytest.raises(InvalidJson, match="more than a row needs"):
        list(read_json(f'{{"inputs":[{row}]}}'.encode(), budget_of()).values["inputs"])


def test_row_of_a_wide_model_may_be_long() -> None:
    row = [round(random.Random(1).uniform(0, 1), 6)] * 200_000
    body = json.dumps({"inputs": [row, row]}).encode()
    assert read(body, width=200_000) == {"inputs": [row, row]}
    with pytest.raises(BodyTooLarge):
        read(body, width=4)


def test_small_array_of_a_large_body_is_a_list() -> None:
    body = json.dumps({"inputs": [[1, 2]], "records": [[3]] * PIECE_BYTES}).encode()
    fields = read_json(body, budget_of(max_rows=10**6)).values
    assert fields["inputs"] == [[1, 2]]
    assert isinstance(fields["records"], JsonRows)


def test_rows_count_once_if_the_fast_reader_fails_at_the_last_row() -> None:
    row = b"[" + b",".join([b"0.123456"] * 20) + b"]"
    body = b'{"inputs":[' + b",".join([row] * 9999 + [b'["x"]']) + b"]}"
    budget = budget_of(max_rows=10_000, width=20)
    rows = read_fields("application/json", body, "inputs", 20, budget=budget).values["inputs"]
    parsed = parse_valid_rows(RowSchema([20]), rows, "/inputs", False, budget)
    assert len(parsed.rows) == 9999
    assert [error.row for error in parsed.errors] == [9999]
    assert budget.rows == 10_000
