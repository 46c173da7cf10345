"""Compressed bodies: whole, cut off, wrong, and far larger than they look."""

import gzip
import json
import os
import zlib
from contextlib import suppress

import cramjam
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.codec.compression import decompress_gzip, decompress_snappy
from service.errors import BodyTooLarge, InvalidEncoding

ROW = [0.5] * 64
BODY = json.dumps({"inputs": [ROW]}).encode()
GZIP = {"content-type": "application/json", "content-encoding": "gzip"}


@pytest.mark.parametrize("path", ["/encode", "/reconstruct", "/anomaly"])
def test_a_gzipped_body_is_answered_like_the_plain_one(client: httpx.Client, path: str) -> None:
    plain = client.post(path, content=BODY, headers={"content-type": "application/json"})
    packed = client.post(path, content=gzip.compress(BODY), headers=GZIP)
    assert packed.status_code == 200
    assert packed.json() == plain.json()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (gzip.compress(BODY)[:-9], 422, "invalid_encoding"),
        (gzip.compress(BODY)[:30], 422, "invalid_encoding"),
        (BODY, 422, "invalid_encoding"),
        (gzip.compress(bytes(2**25)), 413, "body_too_large"),
        (gzip.compress(b"{"), 422, "invalid_json"),
    ],
    ids=["half", "head", "plain", "bomb", "no JSON"],
)
def test_a_body_that_cannot_be_unpacked_is_refused(client: httpx.Client, body: bytes, status: int, code: str) -> None:
    response = client.post("/anomaly", content=body, headers=GZIP)
    assert (response.status_code, response.json()["code"]) == (status, code)
    pending = client.get("/metrics").text
    assert "elbo_pending_bytes 0.0" in pending


def test_other_encodings_are_refused_with_those_that_there_are(client: httpx.Client) -> None:
    response = client.post("/anomaly", content=BODY, headers=GZIP | {"content-encoding": "br"})
    assert response.status_code == 415
    assert response.headers["accept-encoding"] == "gzip"
    assert client.post("/anomaly", content=BODY, headers=GZIP | {"content-encoding": "identity"}).status_code == 200


@given(st.lists(st.binary(max_size=500), min_size=1, max_size=4))
def test_several_members_are_one_stream(parts: list[bytes]) -> None:
    assert decompress_gzip(b"".join(map(gzip.compress, parts)), 2**20) == b"".join(parts)


def test_a_bomb_is_not_unpacked_beyond_the_limit() -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = b"".join(bomb.compress(bytes(2**20)) for _ in range(256)) + bomb.flush()
    with pytest.raises(BodyTooLarge):
        decompress_gzip(packed, 2**20)


def test_a_snappy_block_that_says_it_is_large_is_not_begun_with() -> None:
    body = bytes(cramjam.snappy.compress_raw(bytes(2**20)))
    assert decompress_snappy(body, 2**20) == bytes(2**20)
    with pytest.raises(BodyTooLarge):
        decompress_snappy(body, 2**20 - 1)
    with pytest.raises(BodyTooLarge):
        decompress_snappy(b"\xff\xff\xff\xff\x0f", 2**20)  # 4 GiB in five bytes


@given(st.binary(max_size=100))
def test_no_bytes_break_the_unpacking(body: bytes) -> None:
    for unpack in (decompress_gzip, decompress_snappy):
        with suppress(InvalidEncoding, BodyTooLarge):
            assert len(unpack(body, 2**16)) <= 2**16


def test_every_cut_of_a_snappy_block_is_refused() -> None:
    body = bytes(cramjam.snappy.compress_raw(os.urandom(50) + bytes(50)))
    for cut in range(len(body)):
        with pytest.raises(InvalidEncoding):
            decompress_snappy(body[:cut], 2**16)
