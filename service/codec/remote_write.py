"""Prometheus remote write, version 1: a snappy block of the protobuf message prometheus.WriteRequest, to series.

Only the fields that are needed are declared; protobuf skips the others (exemplars, histograms, metadata).
"""

import struct
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from service.codec import compression
from service.errors import InvalidProtobuf, UnsupportedMediaType

MEDIA_TYPE = "application/x-protobuf"
MESSAGE = "prometheus.WriteRequest"
ENCODING = "snappy"
STALE = 0x7FF0000000000002  # the bits of the NaN by which Prometheus says that a series has ended
NAME = "__name__"

Series = tuple[tuple[tuple[str, str], ...], list[tuple[int, float]]]  # labels; samples: milliseconds and value

_FIELDS = {  # of each message: name, number, type, label
    "Label": (("name", 1, "STRING", "OPTIONAL"), ("value", 2, "STRING", "OPTIONAL")),
    "Sample": (("value", 1, "DOUBLE", "OPTIONAL"), ("timestamp", 2, "INT64", "OPTIONAL")),
    "TimeSeries": (("labels", 1, "Label", "REPEATED"), ("samples", 2, "Sample", "REPEATED")),
    "WriteRequest": (("timeseries", 1, "TimeSeries", "REPEATED"),),
}


def _write_request() -> Any:
    """The message class, in a pool of our own: other libraries may declare the same names in the common one."""
    file = descriptor_pb2.FileDescriptorProto(name="elbo/remote_write.proto", package="prometheus", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _FIELDS.items():
        declared = file.message_type.add(name=name)
        for field, number, kind, label in fields:
            nested = kind in _FIELDS
            declared.field.add(
                name=field,
                number=number,
                label=getattr(kinds, f"LABEL_{label}"),
                type=kinds.TYPE_MESSAGE if nested else getattr(kinds, f"TYPE_{kind}"),
                type_name=f".prometheus.{kind}" if nested else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(MESSAGE))


WriteRequest = _write_request()


def require(content_type: str, content_encoding: str) -> None:
    """Raise UnsupportedMediaType unless the headers say version 1, in snappy."""
    media_type, *parameters = (part.strip().lower() for part in content_type.split(";"))
    proto = next((p.partition("=")[2].strip('"') for p in parameters if p.startswith("proto=")), MESSAGE.lower())
    if media_type != MEDIA_TYPE or proto != MESSAGE.lower():
        expected = f"{MEDIA_TYPE};proto={MESSAGE}"
        raise UnsupportedMediaType(
            f"expected {expected}, remote write of version 1, got {content_type[:100]}",
            expected=expected, got=content_type[:100], hint="leave protobuf_message of remote_write at its default",
        )  # fmt: skip
    if content_encoding.strip().lower() != ENCODING:
        raise UnsupportedMediaType(
            f"expected a body in {ENCODING}, got {content_encoding[:40] or 'none'}",
            expected=f"Content-Encoding: {ENCODING}", got=content_encoding[:40],
            headers={"Accept-Encoding": ENCODING},
        )  # fmt: skip


def read(body: bytes, most: int) -> Iterator[Series]:
    """The series in `body`, which may unpack to `most` bytes.

    Raises InvalidEncoding, BodyTooLarge, InvalidProtobuf: all before the first series is given.
    """
    try:
        request = WriteRequest.FromString(compression.unsnap(body, most))
    except message.DecodeError as error:
        raise InvalidProtobuf(f"the body is no {MESSAGE}: {error}", expected=MESSAGE) from None
    return (
        (
            tuple((label.name, label.value) for label in series.labels),
            [(sample.timestamp, sample.value) for sample in series.samples],
        )
        for series in request.timeseries
    )


def write(series: list[Series]) -> bytes:
    """The body that says `series`."""
    import cramjam

    request = WriteRequest()
    for labels, samples in series:
        one = request.timeseries.add()
        for name, text in labels:
            one.labels.add(name=name, value=text)
        for timestamp, value in samples:
            one.samples.add(timestamp=timestamp, value=value)
    return bytes(cramjam.snappy.compress_raw(request.SerializeToString()))


def is_stale(value: float) -> bool:
    """Whether a value is not one, but the end of its series."""
    return value != value and struct.unpack("<Q", struct.pack("<d", value))[0] == STALE
