"""Decompress request bodies up to a maximum size: gzip for every endpoint, snappy for Prometheus."""

import io
import zlib
from collections.abc import Iterator
from typing import Any

import cramjam
import numpy as np

from service.codec.budget import NO_LIMIT, Budget
from service.errors import BodyTooLarge, InvalidEncoding, UnsupportedMediaType

CHUNK_BYTES = 64 * 1024  # maximum size of a decompressed chunk
# zlib copies the rest of its input after each member. With little input per call, the time to decompress many small
# members does not grow with the square of their number.
INPUT_BYTES = 4 * 1024
# A gzip file may consist of many members, but each costs time, even if it is empty.
FREE_MEMBERS = 1000
MIN_MEMBER_BYTES = 64  # minimum of the mean decompressed size of the members beyond FREE_MEMBERS
GZIP_NAMES = ("gzip", "x-gzip")
_GZIP_WBITS = 31  # zlib's value for the gzip format: a window of 32 KiB, a gzip header and a gzip checksum


class GzipDecompressor:
    """Decompresses a gzip stream in chunks of at most CHUNK_BYTES.

    A stream may consist of several gzip members, one after another (RFC 1952, 2.2).
    """

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_GZIP_WBITS)
        self._started = False
        self._members = 0  # number of complete members
        self._unpacked = 0  # bytes decompressed so far

    def feed(self, compressed: bytes) -> Iterator[bytes]:
        """Decompress `compressed`, the next part of the stream, and yield the chunks.

        Raises:
            InvalidEncoding: the data are not gzip, or they consist of too many small members.
        """
        chunks: list[bytes] = []
        size = 0
        for start in range(0, len(compressed), INPUT_BYTES):
            for chunk in self._feed_piece(compressed[start : start + INPUT_BYTES]):
                if size + len(chunk) > CHUNK_BYTES:
                    yield b"".join(chunks)
                    chunks, size = [], 0
                chunks.append(chunk)
                size += len(chunk)
        if size:
            yield b"".join(chunks)

    def _feed_piece(self, compressed: bytes) -> Iterator[bytes]:
        while compressed:
            if self._member.eof:
                self._count_member()
                self._member = zlib.decompressobj(_GZIP_WBITS)
            self._started = True
            try:
                chunk = self._member.decompress(compressed, CHUNK_BYTES)
            except zlib.error as error:
                raise InvalidEncoding(
                    f"the body is not valid gzip: {error}",
                    expected="gzip",
                    hint="compress the body, or leave out the header Content-Encoding",
                ) from None
            if chunk:
                self._unpacked += len(chunk)
                yield chunk
            compressed = self._member.unconsumed_tail or self._member.unused_data

    def _count_member(self) -> None:
        self._members += 1
        if self._members > FREE_MEMBERS + self._unpacked // MIN_MEMBER_BYTES:
            raise InvalidEncoding(
                f"the gzip body consists of many small members: {self._members} with {self._unpacked} bytes in all",
                expected=f"at most {FREE_MEMBERS} members, and one more for every {MIN_MEMBER_BYTES} bytes",
                got=f"{self._members} members",
                hint="compress the body as a whole",
            )

    def finish(self) -> None:
        """Raise InvalidEncoding if the stream is incomplete."""
        if self._started and not self._member.eof:
            raise InvalidEncoding(
                "the gzip body is cut off", expected="a complete gzip stream", hint="send the whole body again"
            )


def is_gzip(content_encoding: str) -> bool:
    """Return True if a Content-Encoding header means gzip, or False if it means no encoding.

    Raises UnsupportedMediaType for any other encoding.
    """
    encoding = content_encoding.strip().lower()
    if encoding in ("", "identity"):
        return False
    if encoding in GZIP_NAMES:
        return True
    raise UnsupportedMediaType(
        f"the Content-Encoding {encoding[:40]} is not supported",
        expected="gzip, or no Content-Encoding",
        got=encoding[:40],
        headers={"Accept-Encoding": "gzip"},
    )


def decompress_gzip(body: bytes, max_bytes: int, budget: Budget = NO_LIMIT) -> bytes:
    """Return the decompressed `body`.

    Raises:
        InvalidEncoding: `body` is not gzip.
        BodyTooLarge: the decompressed size exceeds `max_bytes`. The rest is then not decompressed.
        BodyTooLarge, Overloaded, DeadlineExceeded: see `Budget`.
    """
    stream, content, size = GzipDecompressor(), io.BytesIO(), 0
    for chunk in stream.feed(body):
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes, f"more than {max_bytes} bytes")
        budget.take_bytes(len(chunk))
        budget.check_time()
        content.write(chunk)
    stream.finish()
    return content.getvalue()  # not a copy


def decompress_snappy(body: bytes, max_bytes: int, budget: Budget = NO_LIMIT) -> memoryview:
    """Return the decompressed content of a snappy block.

    A block begins with its decompressed size. If that size is above `max_bytes`, the block is not decompressed. cramjam
    writes into an array of NumPy, because it would create and free its own buffers while it keeps the interpreter lock.

    Raises InvalidEncoding, BodyTooLarge, and the errors of `Budget.take_bytes`.
    """
    try:
        size = cramjam.snappy.decompress_raw_len(body)
        if size > max_bytes:
            raise _too_large(max_bytes, f"{size} bytes")
        budget.take_bytes(size)
        if not size:
            return memoryview(bytes(cramjam.snappy.decompress_raw(body)))
        content: Any = np.empty(size, np.uint8)  # mypy knows no buffer protocol before Python 3.12
        cramjam.snappy.decompress_raw_into(body, content)
        return memoryview(content)
    except cramjam.DecompressionError as error:
        raise InvalidEncoding(
            f"the body is not a valid snappy block: {error}", expected="snappy, in its block format"
        ) from None


def _too_large(max_bytes: int, got: str) -> BodyTooLarge:
    return BodyTooLarge(
        f"the decompressed body may have at most {max_bytes} bytes, got {got}",
        expected=f"at most {max_bytes} bytes",
        got=got,
        hint="send fewer rows per request",
    )
