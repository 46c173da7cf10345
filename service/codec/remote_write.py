"""Prometheus remote write, version 1: a protobuf message prometheus.WriteRequest in a snappy block.

Only the fields that Elbo reads are declared; protobuf skips all others (exemplars, histograms, metadata).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from service.codec import compression
from service.codec.budget import PIECE_BYTES, Budget
from service.errors import BodyTooLarge, InvalidProtobuf, UnsupportedMediaType

MEDIA_TYPE = "application/x-protobuf"
MESSAGE = "prometheus.WriteRequest"
ENCODING = "snappy"
STALE_BITS = 0x7FF0000000000002  # bits of the NaN with which Prometheus marks the end of a series
METRIC_NAME_LABEL = "__name__"
SERIES_FIELD = 1  # number of the field `timeseries` of a WriteRequest
# Sizes of Python objects in bytes, beside the text of labels.
SERIES_BYTES = 400
LABEL_BYTES = 200
SAMPLE_BYTES = 150
# Most series, labels and samples of one request. By default, Prometheus sends at most 2,000 samples with their labels.
MAX_OBJECTS = 500_000
SMALL_PART_BYTES = 4096  # in a part of a message of at most this size, the text of labels is not counted
MAX_LABELS_BYTES = PIECE_BYTES  # of the labels of one series, as objects

# The labels as pairs (name, value), and the samples as pairs (milliseconds, value).
Series = tuple[tuple[tuple[str, str], ...], list[tuple[int, float]]]

_FIELDS = {  # for each message: the name, number, type and label of each of its fields
    "Label": (("name", 1, "STRING", "OPTIONAL"), ("value", 2, "STRING", "OPTIONAL")),
    "Sample": (("value", 1, "DOUBLE", "OPTIONAL"), ("timestamp", 2, "INT64", "OPTIONAL")),
    "TimeSeries": (("labels", 1, "Label", "REPEATED"), ("samples", 2, "Sample", "REPEATED")),
    "WriteRequest": (("timeseries", 1, "TimeSeries", "REPEATED"),),
}


def _message_classes() -> tuple[Any, Any]:
    """Return the classes of WriteRequest and TimeSeries.

    They have their own descriptor pool, because other libraries may declare messages of the same names.
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
    find = pool.FindMessageTypeByName
    return message_factory.GetMessageClass(find(MESSAGE)), message_factory.GetMessageClass(
        find("prometheus.TimeSeries")
    )


WriteRequest, TimeSeries = _message_classes()


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


@dataclass
class _LargeSeries:
    """A series of more than PIECE_BYTES, which is read in parts.

    Args:
        end: the end of the series in the decompressed body.
        labels: the labels so far.
        labels_bytes: the memory for the labels so far.
        has_samples: whether a sample has been read.
    """

    end: int
    labels: tuple[tuple[str, str], ...] = ()
    labels_bytes: int = 0
    has_samples: bool = False


class SeriesReader:
    """Reads a request body in pieces, so that the objects of a large body are never all in memory.

    protobuf parses at most PIECE_BYTES at once, for two reasons: it holds the interpreter lock meanwhile, and every two
    bytes can become an object. Python objects are made only after `budget` has granted their memory. If a later piece
    is invalid, the series of earlier pieces may already be in use: the protocol allows this.

    Args:
        body: a snappy block.
        max_bytes: the maximum decompressed size of `body`.
        budget: the budget of the request.
    """

    def __init__(self, body: bytes, max_bytes: int, budget: Budget) -> None:
        self._body = body
        self._max_bytes = max_bytes
        self._budget = budget
        self._content: memoryview | None = None  # the decompressed body
        self._position = 0  # the first byte that is not read yet
        self._series: _LargeSeries | None = None  # the series that is being read in parts
        self._objects = 0  # number of fields, series, labels and samples so far

    @property
    def has_more(self) -> bool:
        """Whether a part of the body is not read yet."""
        return self._content is None or self._position < len(self._content)

    def read(self) -> list[Series]:
        """Return the series in the next piece that have samples. Read the same piece again after an error.

        Raises:
            InvalidEncoding, InvalidProtobuf: the body is not valid.
            BodyTooLarge: the decompressed body is too large, or has too many series, labels and samples, or the labels
                of a series are too large.
            ServiceError: see `Budget`.
        """
        if self._content is None:
            self._content = compression.decompress_snappy(self._body, self._max_bytes, self._budget)
        try:
            return self._read_part_of_series() if self._series else self._read_series()
        except message.DecodeError as error:
            raise _invalid(str(error)) from None

    def _read_series(self) -> list[Series]:
        """Return the next series. If the next one has more than PIECE_BYTES, begin to read it and return []."""
        assert self._content is not None
        content, start = self._content, self._position
        end, fields = _end_of_piece(content, start, len(content))
        objects = self._count(fields)
        found: list[Series] = []
        if end - start <= PIECE_BYTES:
            for series in WriteRequest.FromString(bytes(content[start:end])).timeseries:
                if series.samples:
                    objects = self._count(len(series.labels) + len(series.samples), objects)
                    found.append(self._objects_of(series))
        else:
            ((number, value_start, value_end),) = _fields(content, start, end)
            if number == SERIES_FIELD:
                self._series, end = _LargeSeries(value_end), value_start
        self._position, self._objects = end, objects
        return found

    def _read_part_of_series(self) -> list[Series]:
        """Return the samples in the next part of a series of more than PIECE_BYTES. Its labels must come first."""
        assert self._content is not None
        assert self._series is not None
        series, start = self._series, self._position
        end, fields = _end_of_piece(self._content, start, series.end)
        if end - start > PIECE_BYTES:  # one field: no sample is so large
            raise _labels_too_large(f"{end - start} bytes")
        objects = self._count(fields)
        part = TimeSeries.FromString(bytes(self._content[start:end]))
        if part.labels and series.has_samples:
            raise _invalid(f"in a series of more than {PIECE_BYTES} bytes, the labels must come before the samples")
        labels, samples = self._objects_of(part, series.labels_bytes)
        series.labels += labels
        series.labels_bytes += _bytes_of_labels(part)
        series.has_samples = series.has_samples or bool(samples)
        self._position, self._objects = end, objects
        if end == series.end:
            self._series = None
        return [(series.labels, samples)] if samples else []

    def _count(self, more: int, objects: int | None = None) -> int:
        """Return the number of objects with `more` new ones. Raises BodyTooLarge if it is above MAX_OBJECTS.

        `objects`: the number without the new ones; by default, the number at the start of the piece.
        """
        objects = (self._objects if objects is None else objects) + more
        if objects > MAX_OBJECTS:
            raise BodyTooLarge(
                f"a remote-write request may have at most {MAX_OBJECTS} series, labels and samples in all, got more",
                expected=f"at most {MAX_OBJECTS} series, labels and samples",
                got="more",
                hint="lower max_samples_per_send of remote_write in Prometheus",
            )
        return objects

    def _objects_of(self, part: Any, labels_bytes: int = 0) -> Series:
        """Return the labels and samples of a TimeSeries. `labels_bytes`: the size of the labels before `part`."""
        self._budget.check_time()
        if labels_bytes + _bytes_of_labels(part) > MAX_LABELS_BYTES:
            raise _labels_too_large("more")
        self._budget.take_bytes(SERIES_BYTES + len(part.labels) * LABEL_BYTES + len(part.samples) * SAMPLE_BYTES)
        labels = tuple((label.name, label.value) for label in part.labels)
        return labels, [(sample.timestamp, sample.value) for sample in part.samples]


def _bytes_of_labels(part: Any) -> int:
    """Return the memory for the labels of a TimeSeries. The text of few and short labels is not counted."""
    size: int = len(part.labels) * LABEL_BYTES
    if size > MAX_LABELS_BYTES or part.ByteSize() <= SMALL_PART_BYTES:
        return size
    texts: int = sum(label.ByteSize() for label in part.labels)
    return size + texts


def _end_of_piece(content: memoryview, start: int, end: int) -> tuple[int, int]:
    """Return the end of the piece that begins at `start`, and the number of its fields.

    A piece consists of whole fields. It has at most PIECE_BYTES, or one field that is larger.
    """
    position, count = start, 0
    for _, _, field_end in _fields(content, start, end):
        if field_end - start > PIECE_BYTES and count:
            break
        position, count = field_end, count + 1
    return position, count


def _fields(content: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each field of a protobuf message, and the start and the end of its value."""
    position = start
    while position < end:
        tag, position = _varint(content, position, end)
        kind = tag & 7
        value = position
        if kind == 2:
            length, value = _varint(content, position, end)
            position = value + length
        elif kind == 0:
            _, position = _varint(content, position, end)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise _invalid(f"wire type {kind} at byte {value}")
        if position > end:
            raise _invalid("a field is cut off")
        yield tag >> 3, value, position


def _varint(content: memoryview, position: int, end: int) -> tuple[int, int]:
    """Return the number that begins at `position`, and the position after it."""
    number = shift = 0
    while position < end and shift < 64:
        byte = content[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
        shift += 7
    raise _invalid("a number is cut off or too long")


def _invalid(reason: str) -> InvalidProtobuf:
    return InvalidProtobuf(f"the body is not a valid {MESSAGE}: {reason}", expected=MESSAGE)


def _labels_too_large(got: str) -> BodyTooLarge:
    return BodyTooLarge(
        f"the labels of a series may take at most {MAX_LABELS_BYTES} bytes, got {got}",
        expected=f"at most {MAX_LABELS_BYTES} bytes",
        got=got,
        hint="drop long labels with write_relabel_configs in Prometheus",
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
