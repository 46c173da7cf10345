"""Reading request bodies: content types, invalid JSON, duplicate keys, non-finite numbers."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codec import ndjson, npy
from service.codec.request_body import read_fields
from service.errors import InvalidJson, UnsupportedMediaType


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.elbo+json"],
)
def test_json_content_types_are_read_as_json(content_type: str) -> None:
    assert read_fields(content_type, b'{"a": 1}', None).values == {"a": 1}


def test_body_without_content_type_is_refused_unless_it_is_empty() -> None:
    with pytest.raises(UnsupportedMediaType, match="got no Content-Type"):
        read_fields("", b'{"a": 1}', "inputs")
    assert read_fields("", b"", "inputs").values == {}


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "image/png", "nonsense"])
def test_unknown_content_type_is_refused_with_a_hint(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        read_fields(content_type, b'{"a": 1}', "inputs")
    assert caught.value.got == content_type
    assert "application/json" in str(caught.value.hint)


def test_npy_body_becomes_the_main_field() -> None:
    body = npy.dumps(np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(read_fields("application/x-npy", body, "inputs").values["inputs"], np.ones((2, 3)))
    with pytest.raises(UnsupportedMediaType):
        read_fields("application/x-npy", body, None)


@pytest.mark.parametrize("body", ['{"inputs": [[1, 2]]}', '{"a": "b"}', '{"inputs": [[NaN]]}', "{}", ""])
def test_byte_order_mark_is_not_part_of_the_json(body: str) -> None:
    values = [read_fields("application/json", body.encode(code), "inputs", 2).values for code in ("utf-8", "utf-8-sig")]
    np.testing.assert_equal(values[0], values[1])


def test_empty_body_has_no_fields() -> None:
    assert read_fields("application/json", b"", "inputs").values == {}


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[1,]", b"{'a': 1}", b'{"a": 1,}', b'{"a": nan}', b'{"a": 01}', b'{"a": .5}', b'{"a": 0x1}',
        b'{"a": 1} x', b"\xff\xfe", b'{"a": "\xff"}', b"\xef\xbb\xbf\xef\xbb\xbf{}", b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 5000, b"\x00",
        b'{"a": NaN', b'{"a": [NaN, "\\ud800"]}', b'{"a": Infinity, }', b"[" * 5000 + b"NaN" + b"]" * 5000,
        b'{"a": [NaN, ' + b"9" * 10_000 + b"]}",
    ],
)  # fmt: skip
def test_invalid_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJson):
        read_fields("application/json", body, "inputs")


@pytest.mark.parametrize("body", [b"[1]", b"3", b'"x"', b"null", b"true"])
def test_json_value_that_is_not_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJson, match="expected a JSON object"):
        read_fields("application/json", body, "inputs")


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ('{"seed": 1, "seed": 2}', "seed"),
        ('{"inputs": [[1]], "alpha": 0.1, "inputs": [[2]]}', "inputs"),
        ('{"start": {"latent": [1], "latent": [2]}}', "latent"),
        ('{"records": [{"cpu": 1}, {"cpu": 1, "cpu": 2}]}', "cpu"),
        (r'{"seed": 1, "\u0073eed": 2}', "seed"),
        ('{"": 1, "": 2}', "''"),
    ],
)
def test_duplicate_key_is_refused_and_named(body: str, key: str) -> None:
    with pytest.raises(InvalidJson, match="duplicate key") as caught:
        read_fields("application/json", body.encode(), "inputs")
    assert key in caught.value.detail


@pytest.mark.parametrize(
    "body",
    [
        '{"a": "say \\"hello\\""}',
        '{"a\\"": 1}',
        '{"a": [["x", "y"]]}',
        '{"a": "b", "b": "a"}',
        '{"a": {"a": {"a": 1}}}',
    ],
)
def test_repeated_or_quoted_strings_are_not_mistaken_for_duplicate_keys(body: str) -> None:
    assert read_fields("application/json", body.encode(), "inputs").values == json.loads(body)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**53), 2**53)
            | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), inner, max_size=3)
            ),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_result_for_any_object_equals_that_of_json_loads(document: dict[str, Any]) -> None:
    for text in (json.dumps(document), json.dumps(document, ensure_ascii=False, indent=2)):
        assert read_fields("application/json", text.encode(), "inputs").values == document


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"inputs": [[1.5, -2e3]]}', False),
        ('{"latents": [[1.5]], "seed": 3}', False),
        ('{"records": [{"cpu": 1}]}', False),
        ('{"inputs": [[true]]}', True),
        ('{"inputs": [[false]]}', True),
        ('{"inputs": [[1]], "sample": true}', False),
        ('{"inputs": [[true]], "sample": true}', True),
        ('{"inputs": [[1]], "method": "true"}', True),
        ('{"inputs": [[NaN]]}', True),
        ('{"inputs": [[1e999]]}', True),
    ],
)
def test_body_is_marked_if_it_may_contain_nested_booleans_or_non_finite_numbers(body: str, expected: bool) -> None:
    assert read_fields("application/json", body.encode(), "inputs").may_contain_non_floats is expected


def test_ndjson_whose_first_line_is_null_keeps_all_lines() -> None:
    fields = ndjson.read_fields(b'\nnull\n{"cpu":1}\n')
    assert list(fields.values["records"]) == [None, {"cpu": 1}]


def test_ndjson_of_blank_lines_has_no_fields() -> None:
    assert ndjson.read_fields(b"\n \n").values == {}
