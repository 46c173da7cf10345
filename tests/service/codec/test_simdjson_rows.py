"""The fast JSON reader: it agrees with orjson, and returns None for bodies that are not plain rows of numbers."""

import json
import math
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codec import simdjson_rows
from service.codec.budget import Budget

numbers = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, -0.0, 5e-324]),
)


@given(st.integers(1, 5).flatmap(lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1)))
def test_rows_of_numbers_are_read_as_orjson_reads_them(rows: list[list[float]]) -> None:
    body = json.dumps({"alpha": 0.05, "inputs": rows, "sample": True}).encode()
    fields = simdjson_rows.read_fields(body, "inputs", len(rows[0]))
    assert fields is not None
    np.testing.assert_array_equal(fields.pop("inputs"), np.array(orjson.loads(body)["inputs"], np.float64))
    assert fields == {"alpha": 0.05, "sample": True}


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": [[1, [2]], [3, 4]]}',  # simdjson would flatten the nested list
        b'{"inputs": [[1, []], [3, 4]]}',
        b'{"inputs": [' + b"[1, 2], " * simdjson_rows.MAX_SEARCHES + b"[1, [2]]]}",
        b'{"inputs": [[[1, 2]], [[3, 4]]]}',
        b'{"inputs": [[1, 2], 3, [4]]}',
        b'{"inputs": [[1, 2, 3]]}',
        b'{"inputs": [[1]]}',
        b'{"inputs": [1, 2]}',
        b'{"inputs": [[1, true]]}',
        b'{"inputs": [[1, null]]}',
        b'{"inputs": [[1, "2"]]}',
        b'{"inputs": [[1, {"a": 2}]]}',
        b'{"inputs": [[1, NaN]]}',
        b'{"inputs": [[1, 1e999]]}',
        b'{"inputs": [[1, 123456789012345678901234567890]]}',
        b'{"inputs": [[1, 2]], "inputs": [[3, 4]]}',
        b'{"inputs": [[1, 2]], "inputs": 3}',
        b'{"inputs": [[1, 2]], "seed": "3"}',
        b'{"inputs": [[1, 2]], "start": {"input": 3}}',
        b'{"inputs": [[1, 2]], "fdr": null}',
        b'{"inputs": [[1, 2]]',
        b'{"latents": [[1, 2]]}',
        b'{"inputs": 3}',
        b"[[1, 2]]",
        b"3",
        b"",
        b"\xff",
    ],
)
def test_reader_returns_none_if_the_body_is_not_plain_rows_of_numbers(body: bytes) -> None:
    assert simdjson_rows.read_fields(body, "inputs", 2) is None


def test_rows_stay_valid_after_the_next_document_is_parsed() -> None:
    first: Any = simdjson_rows.read_fields(b'{"inputs": [[1, 2]]}', "inputs", 2)
    simdjson_rows.read_fields(b'{"inputs": [[3, 4]]}', "inputs", 2)
    np.testing.assert_array_equal(first["inputs"], [[1, 2]])


MANY = b"[1, 2], " * (simdjson_rows.MAX_WHOLE_BYTES // 8)  # so many rows that the reader reads them in pieces


def test_large_body_gives_its_rows_as_float32_and_its_other_fields() -> None:
    body = b'{"alpha": 0.5, "inputs": [' + MANY + b"[3, 0.1]" + b'], "sample": true}'
    fields: Any = simdjson_rows.read_fields(body, "inputs", 2)
    expected = np.array(orjson.loads(body)["inputs"], np.float32)
    assert fields["inputs"].dtype == np.float32
    np.testing.assert_array_equal(fields.pop("inputs"), expected)
    assert fields == {"alpha": 0.5, "sample": True}


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": [' + MANY + b"[1, [2]]]}",
        b'{"inputs": [' + MANY + b"[1, 2, 3]]}",
        b'{"inputs": [' + MANY + b'[1, "2"]]}',
        b'{"inputs": [' + MANY + b"[1, 1e39]]}",  # beyond float32
        b'{"inputs": [' + MANY + b"[1, 2],]}",
        b'{"inputs": [' + MANY + b"[1, 2] [3, 4]]}",
        b'{"inputs": [' + MANY.replace(b", [", b"  [") + b"[1, 2]]}",
        b'{"inputs": [' + MANY + b"[1, " + b"2" * 2 * simdjson_rows.LARGE_PIECE_BYTES + b"]]}",
        b'{"inputs": [' + MANY + b'[1, 2]], "seed": "3"}',
        b'{"inputs": [' + MANY + b'[1, 2]], "start": {}}',
        b'{"inputs": [' + MANY + b'[1, 2]], "alpha": 1, "alpha": 2}',
        b'{"inputs": [' + MANY + b'[1, 2]], "note": ' + b" " * simdjson_rows.MAX_REST_BYTES + b"1}",
        b'{"latents": [' + MANY + b"[1, 2]]}",
        b"[" + MANY + b"[1, 2]]",
        b'{"inputs": ' + b" " * simdjson_rows.MAX_WHOLE_BYTES + b"3}",
    ],
)
def test_reader_returns_none_if_a_large_body_is_not_plain_rows_of_numbers(body: bytes) -> None:
    budget = Budget(
        max_bytes=2**30, max_rows=2**20, width=2, deadline=math.inf, hold=lambda _: None, release=lambda _: None
    )
    assert simdjson_rows.read_fields(body, "inputs", 2, budget) is None
    assert budget.usage == (0, 0)  # the other reader counts the body again
