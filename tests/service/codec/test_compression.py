"""Decompression of bodies that are complete, cut off, corrupt, or far larger than their compressed size."""

import gzip
import json
import os
import time
import zlib
from contextlib import suppress

import cramjam
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codec.compression import CHUNK_BYTES, FREE_MEMBERS, decompress_gzip, decompress_snappy
from service.errors import BodyTooLarge, InvalidEncoding

ROW = [0.5] * 64
BODY = json.dumps({"inputs": [ROW]}).encode()
GZIP = {"content-type": "application/json", "content-encoding": "gzip"}


@pytest.mark.parametrize("path", ["/encode", "/reconstruct", "/anomaly"])
def test_gzip_body_gets_the_same_response_as_the_plain_body(client: httpx.Client, path: str) -> None:
    plain = client.post(path, content=BODY, headers={"content-type": "application/json"})
    compressed = client.post(path, content=gzip.compress(BODY), headers=GZIP)
    assert compressed.status_code == 200
    assert compressed.json() == plain.json()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (gzip.compress(BODY)[:-9], 422, "invalid_encoding"),
        (gzip.compress(BODY)[:30], 422, "invalid_encoding"),
        (BODY, 422, "invalid_encoding"),
        (gzip.compress(bytes(2**25)), 413, "body_too_large"),
        (gzip.compress(b"{"), 422, "invalid_json"),
    ],
    ids=["half", "head", "plain", "bomb", "invalid JSON"],
)
def test_body_that_cannot_be_decompressed_is_refused(client: httpx.Client, body: bytes, status: int, code: str) -> None:
    response = client.post("/anomaly", content=body, headers=GZIP)
    assert (response.status_code, response.json()["code"]) == (status, code)
    pending = client.get("/metrics").text
    assert "elbo_pending_bytes 0.0" in pending


def test_other_content_encodings_are_refused_with_an_accept_encoding_header(client: httpx.Client) -> None:
    response = client.post("/anomaly", content=BODY, headers=GZIP | {"content-encoding": "br"})
    assert response.status_code == 415
    assert response.headers["accept-encoding"] == "gzip"
    assert client.post("/anomaly", content=BODY, headers=GZIP | {"content-encoding": "identity"}).status_code == 200


@given(st.lists(st.binary(max_size=500), min_size=1, max_size=4))
def test_several_gzip_members_are_decompressed_as_one_stream(parts: list[bytes]) -> None:
    assert decompress_gzip(b"".join(map(gzip.compress, parts)), 2**20) == b"".join(parts)


@pytest.mark.parametrize("size", [CHUNK_BYTES // 2, CHUNK_BYTES - 100, CHUNK_BYTES, 3 * CHUNK_BYTES + 1])
def test_large_gzip_members_are_decompressed_as_one_stream(size: int) -> None:
    part = os.urandom(size)
    assert decompress_gzip(gzip.compress(part) * 3, 2**20) == part * 3


def test_time_to_decompress_small_gzip_members_is_proportional_to_their_number() -> None:
    """If zlib got the whole body at once, it would copy the rest of the body after each of the 100,000 members."""
    member = bytes(64)
    body = gzip.compress(member) * 100_000
    started = time.thread_time()
    assert decompress_gzip(body, 2**23) == member * 100_000
    assert time.thread_time() - started < 5  # seconds; about 0.6 s, or 12 s if zlib copies the rest


@pytest.mark.parametrize("content", [b"", b"x", bytes(63)])
def test_gzip_body_of_many_small_members_is_refused(content: bytes) -> None:
    member = gzip.compress(content)
    assert decompress_gzip(member * FREE_MEMBERS, 2**23) == content * FREE_MEMBERS
    with pytest.raises(InvalidEncoding, match="many small members"):
        decompress_gzip(member * 100_000, 2**23)


@pytest.mark.slow
def test_gzip_bomb_is_decompressed_only_up_to_the_limit() -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    compressed = b"".join(bomb.compress(bytes(2**20)) for _ in range(256)) + bomb.flush()
    with pytest.raises(BodyTooLarge):
        decompress_gzip(compressed, 2**20)


def test_snappy_block_that_declares_a_large_size_is_refused() -> None:
    body = bytes(cramjam.snappy.compress_raw(bytes(2**20)))
    assert decompress_snappy(body, 2**20) == bytes(2**20)
    with pytest.raises(BodyTooLarge):
        decompress_snappy(body, 2**20 - 1)
    with pytest.raises(BodyTooLarge):
        decompress_snappy(b"\xff\xff\xff\xff\x0f", 2**20)  # 4 GiB in five bytes


@given(st.binary(max_size=100))
def test_any_bytes_are_decompressed_up_to_the_limit_or_refused(body: bytes) -> None:
    for decompress in (decompress_gzip, decompress_snappy):
        with suppress(InvalidEncoding, BodyTooLarge):
            assert len(decompress(body, 2**16)) <= 2**16


def test_snappy_block_is_refused_if_it_is_cut_off_anywhere() -> None:
    body = bytes(cramjam.snappy.compress_raw(os.urandom(50) + bytes(50)))
    for cut in range(len(body)):
        with pytest.raises(InvalidEncoding):
            decompress_snappy(body[:cut], 2**16)
