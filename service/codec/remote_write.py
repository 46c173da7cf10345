"""Prometheus remote write, version 1: a protobuf message prometheus.WriteRequest in a snappy block.

Only the fields that Elbo reads are declared; protobuf skips all others (exemplars, histograms, metadata).
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
STALE_BITS = 0x7FF0000000000002  # bits of the NaN with which Prometheus marks the end of a series
METRIC_NAME_LABEL = "__name__"

# The labels as pairs (name, value), and the samples as pairs (milliseconds, value).
Series = tuple[tuple[tuple[str, str], ...], list[tuple[int, float]]]

_FIELDS = {  # for each message: the name, number, type and label of each of its fields
    "Label": (("name", 1, "STRING", "OPTIONAL"), ("value", 2, "STRING", "OPTIONAL")),
    "Sample": (("value", 1, "DOUBLE", "OPTIONAL"), ("timestamp", 2, "INT64", "OPTIONAL")),
    "TimeSeries": (("labels", 1, "Label", "REPEATED"), ("samples", 2, "Sample", "REPEATED")),
    "WriteRequest": (("timeseries", 1, "TimeSeries", "REPEATED"),),
}


def _write_request() -> Any:
    """Return the class of the message.

    The class has its own descriptor pool, because other libraries may declare a message of the same name.
    """
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


def require_version_1(content_type: str, content_encoding: str) -> None:
    """Raise UnsupportedMediaType unless the headers announce remote write version 1 with snappy compression."""
    media_type, *parameters = (part.strip().lower() for part in content_type.split(";"))
    proto = next((p.partition("=")[2].strip('"') for p in parameters if p.startswith("proto=")), MESSAGE.lower())
    if media_type != MEDIA_TYPE or proto != MESSAGE.lower():
        expected = f"{MEDIA_TYPE};proto={MESSAGE}"
        raise UnsupportedMediaType(
            f"expected {expected}, which is remote write version 1, got {content_type[:100]}",
            expected=expected,
            got=content_type[:100],
            hint="leave protobuf_message of remote_write in Prometheus at its default",
        )
    if content_encoding.strip().lower() != ENCODING:
        raise UnsupportedMediaType(
            f"expected the Content-Encoding {ENCODING}, got {content_encoding[:40] or 'none'}",
            expected=f"Content-Encoding: {ENCODING}",
            got=content_encoding[:40],
            headers={"Accept-Encoding": ENCODING},
        )


def loads(body: bytes, max_bytes: int) -> Iterator[Series]:
    """Return the series in `body`, whose decompressed size may be at most `max_bytes`.

    Raises InvalidEncoding, BodyTooLarge or InvalidProtobuf immediately, not while the caller iterates.
    """
    try:
        request = WriteRequest.FromString(compression.decompress_snappy(body, max_bytes))
    except message.DecodeError as error:
        raise InvalidProtobuf(f"the body is not a valid {MESSAGE}: {error}", expected=MESSAGE) from None
    return (
        (
            tuple((label.name, label.value) for label in series.labels),
            [(sample.timestamp, sample.value) for sample in series.samples],
        )
        for series in request.timeseries
    )


def dumps(series: list[Series]) -> bytes:
    """Return a request body with `series`."""
    import cramjam

    request = WriteRequest()
    for labels, samples in series:
        added = request.timeseries.add()
        for name, text in labels:
            added.labels.add(name=name, value=text)
        for timestamp, value in samples:
            added.samples.add(timestamp=timestamp, value=value)
    return bytes(cramjam.snappy.compress_raw(request.SerializeToString()))


def is_stale(value: float) -> bool:
    """Return whether a value marks the end of its series."""
    return value != value and struct.unpack("<Q", struct.pack("<d", value))[0] == STALE_BITS
