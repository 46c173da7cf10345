"""Compressed bodies, a bounded piece at a time: gzip for all, and snappy, in which Prometheus writes."""

import zlib
from collections.abc import Iterator

import cramjam

from service.errors import BodyTooLarge, InvalidEncoding, UnsupportedMediaType

PIECE = 64 * 1024  # bytes that are unpacked at once
GZIP = ("gzip", "x-gzip")
_GZIP_WRAPPER = 31  # for zlib: a window of 32 KiB, and gzip's header and checksum


class Gunzip:
    """Unpacks gzip as it comes, in pieces of at most PIECE bytes; several members are one stream (RFC 1952, 2.2)."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_GZIP_WRAPPER)
        self._begun = False

    def feed(self, packed: bytes) -> Iterator[bytes]:
        """What `packed` adds. Raises InvalidEncoding."""
        while packed:
            if self._member.eof:
                self._member = zlib.decompressobj(_GZIP_WRAPPER)
            self._begun = True
            try:
                yield self._member.decompress(packed, PIECE)
            except zlib.error as error:
                raise InvalidEncoding(f"the body is no gzip: {error}", expected="gzip", hint="see its header") from None
            packed = self._member.unconsumed_tail or self._member.unused_data

    def end(self) -> None:
        """Raise InvalidEncoding if the stream is not whole."""
        if self._begun and not self._member.eof:
            raise InvalidEncoding(
                "the gzip body ends before its last block", expected="a whole gzip stream", hint="send it again, whole"
            )


def gzipped(content_encoding: str) -> bool:
    """Whether a Content-Encoding header says gzip rather than nothing. Raises UnsupportedMediaType for others."""
    encoding = content_encoding.strip().lower()
    if encoding in ("", "identity"):
        return False
    if encoding in GZIP:
        return True
    raise UnsupportedMediaType(
        f"the body is encoded as {encoding[:40]}", expected="gzip or nothing", got=encoding[:40],
        headers={"Accept-Encoding": "gzip"},
    )  # fmt: skip


def gunzip(body: bytes, most: int) -> bytes:
    """`body` unpacked. Raises InvalidEncoding, and BodyTooLarge as soon as it exceeds `most` bytes."""
    stream, pieces, size = Gunzip(), [], 0
    for piece in stream.feed(body):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise _too_large(most, "more")
    stream.end()
    return b"".join(pieces)


def unsnap(body: bytes, most: int) -> bytes:
    """A snappy block unpacked. Its first bytes say how large it gets: more than `most` is not begun with.

    Raises InvalidEncoding, BodyTooLarge.
    """
    try:
        size = cramjam.snappy.decompress_raw_len(body)
        if size > most:
            raise _too_large(most, f"{size} bytes")
        return bytes(cramjam.snappy.decompress_raw(body))
    except cramjam.DecompressionError as error:
        raise InvalidEncoding(f"the body is no snappy block: {error}", expected="snappy, in its block format") from None


def _too_large(most: int, got: str) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body may unpack to {most} bytes, got {got}", expected=f"at most {most} bytes", got=got,
        hint="send fewer rows at a time",
    )  # fmt: skip
