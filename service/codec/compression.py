"""Decompress request bodies up to a maximum size: gzip for every endpoint, snappy for Prometheus."""

import zlib
from collections.abc import Iterator

import cramjam

from service.errors import BodyTooLarge, InvalidEncoding, UnsupportedMediaType

CHUNK_BYTES = 64 * 1024  # maximum size of a decompressed chunk, and of the input that zlib gets at once
GZIP_NAMES = ("gzip", "x-gzip")
_GZIP_WBITS = 31  # zlib's value for the gzip format: a window of 32 KiB, a gzip header and a gzip checksum


class GzipDecompressor:
    """Decompresses a gzip stream in chunks of at most CHUNK_BYTES.

    A stream may consist of several gzip members, one after another (RFC 1952, 2.2).
    """

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_GZIP_WBITS)
        self._started = False

    def feed(self, compressed: bytes) -> Iterator[bytes]:
        """Decompress `compressed`, the next part of the stream, and yield the chunks. Raises InvalidEncoding."""
        # zlib copies the input that is left after each chunk, so a large input would be copied a thousand times.
        for start in range(0, len(compressed), CHUNK_BYTES):
            yield from self._feed_piece(compressed[start : start + CHUNK_BYTES])

    def _feed_piece(self, compressed: bytes) -> Iterator[bytes]:
        while compressed:
            if self._member.eof:
                self._member = zlib.decompressobj(_GZIP_WBITS)
            self._started = True
            try:
                yield self._member.decompress(compressed, CHUNK_BYTES)
            except zlib.error as error:
                raise InvalidEncoding(
                    f"the body is not valid gzip: {error}",
                    expected="gzip",
                    hint="compress the body, or leave out the header Content-Encoding",
                ) from None
            compressed = self._member.unconsumed_tail or self._member.unused_data

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


def decompress_gzip(body: bytes, max_bytes: int) -> bytes:
    """Return the decompressed `body`.

    Raises InvalidEncoding, or BodyTooLarge as soon as the decompressed size exceeds `max_bytes`.
    """
    stream, chunks, size = GzipDecompressor(), [], 0
    for chunk in stream.feed(body):
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes, f"more than {max_bytes} bytes")
    stream.finish()
    return b"".join(chunks)


def decompress_snappy(body: bytes, max_bytes: int) -> bytes:
    """Return the decompressed content of a snappy block.

    A block begins with its decompressed size. If that size is above `max_bytes`, the block is not decompressed.

    Raises InvalidEncoding, BodyTooLarge.
    """
    try:
        size = cramjam.snappy.decompress_raw_len(body)
        if size > max_bytes:
            raise _too_large(max_bytes, f"{size} bytes")
        return bytes(cramjam.snappy.decompress_raw(body))
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
