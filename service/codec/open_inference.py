"""Inference requests and responses of the Open Inference Protocol, version 2, over HTTP.

A body is a JSON object that describes tensors. The numbers of a tensor are in the object, or follow it in binary form,
little-endian and in C order. The header Inference-Header-Content-Length then says how long the object is.

Protocol: https://github.com/kserve/open-inference-protocol (inference_rest.md), and its extension for binary data:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from service.codec.array_shape import MAX_DIMENSIONS, is_possible
from service.codec.budget import NO_LIMIT, PIECE_BYTES, Budget
from service.codec.float32 import as_float32
from service.codec.json_rows import DEPTH_CHANGE, brackets, require_few_values
from service.codec.json_values import describe_value
from service.codec.long_work import LargeContent, join, pause_if_due
from service.codec.request_body import loads_value
from service.codec.response_body import PIECE_NUMBERS, require_finite, write_array
from service.errors import InvalidField, InvalidJson, TooManyRows

JSON = "application/json"
BINARY = "application/octet-stream"
HEADER_LENGTH = b"inference-header-content-length"
MAX_TENSORS = 100  # in the lists `inputs` and `outputs` of a request
MAX_CACHED_BYTES = 1024  # of a JSON object before binary numbers
DATA_DEPTH = 4  # depth of the list `data` in the object, in a list, in an object
_DATATYPES = {
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT8": "|i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "UINT8": "|u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "BF16": "<u2",
}  # fmt: skip
BYTES = "BYTES"  # the datatype of texts
FLOAT32_BYTES = 4
LENGTH_BYTES = 4  # before each text in binary form
TEXT_BYTES = 256  # memory of a short text, and of its place in the condition of a row
CHECKED_TEXTS = 1024  # the time is checked after this many texts
_OUTPUT_DATATYPES = {"float32": "FP32", "bool": "BOOL"}

Numbers = npt.NDArray[Any]


class RequestedOutput(NamedTuple):
    """An output that a request asks for, and whether its numbers shall be binary."""

    name: str
    is_binary: bool


class InferenceRequest(NamedTuple):
    """A request for inference.

    Args:
        id: the request's id, which the response repeats; None if it has none.
        parameters: the parameters of the request.
        inputs: the inputs of numbers by name, of any real dtype.
        outputs: the requested outputs; None if the request names none, and so asks for all.
        is_binary: whether the outputs shall be binary if the request does not say so for each.
    """

    id: str | None
    parameters: dict[str, Any]
    inputs: dict[str, Numbers]
    outputs: tuple[RequestedOutput, ...] | None
    is_binary: bool
    texts: "dict[str, Texts]" = {}  # noqa: RUF012 - nobody changes it; the inputs of the datatype BYTES, by name


@dataclass
class _Source:
    """Where the values of the inputs are.

    Args:
        text: the JSON object of the body.
        body: the whole body.
        places: the contents of long lists in `text`, by the strings that stand for them in the parsed object.
        budget: what reading may cost.
        offset: where the binary values of the next input begin in `body`.
    """

    text: bytes
    body: bytes
    places: Mapping[str, slice]
    budget: Budget
    offset: int


class Texts(NamedTuple):
    """An input of texts: one for each row, or one for all rows. `pointer` is its place in the request."""

    values: list[str]
    shape: list[int]
    pointer: str


class RequestObject(NamedTuple):
    """The JSON object of a request. Nobody changes it, because it may be cached.

    Args:
        id: the request's id; None if it has none.
        parameters: the parameters of the request.
        outputs: the requested outputs; None if the request names none.
        is_binary: whether the outputs shall be binary if the request does not say so for each.
        document: the object.
        data: the places of long lists of numbers, see `_Source`.
    """

    id: str | None
    parameters: dict[str, Any]
    outputs: tuple[RequestedOutput, ...] | None
    is_binary: bool
    document: dict[str, Any]
    data: Mapping[str, slice]


def read_request(body: bytes, header_length: bytes | None, budget: Budget = NO_LIMIT) -> InferenceRequest:
    """Return the request in `body`. Binary numbers are views of `body`.

    Args:
        body: the body, decompressed.
        header_length: the value of the header Inference-Header-Content-Length; None if the request has none.
        budget: what reading may cost.

    Raises:
        InvalidJson: the JSON is not valid, or not an object.
        InvalidField: a field does not fit the protocol, or the numbers of a tensor do not fit its shape.
        TooManyRows: an input has more rows than a request may have.
        BodyTooLarge, Overloaded, DeadlineExceeded: see `Budget`.
    """
    length = _json_length(header_length, len(body))
    text = body if length == len(body) else body[:length]
    if length <= MAX_CACHED_BYTES and header_length is not None:
        asked = read_short_object(text)
    else:
        document, data = _read_object(text, budget)
        asked = _read_fields(document, data)
    request_id, parameters, outputs, is_binary, document, data = asked
    inputs: dict[str, Numbers] = {}
    texts: dict[str, Texts] = {}
    source = _Source(text, body, data, budget, offset=length)
    for index, (name, tensor) in enumerate(_tensors(document, "inputs")):
        pointer = f"/inputs/{index}"
        if name in inputs or name in texts:
            raise InvalidField(f"the input {name!r} is given twice", pointer=pointer, expected="each input once")
        if tensor.get("datatype") == BYTES:
            texts[name] = _read_texts(tensor, pointer, source)
        else:
            inputs[name] = _read_tensor(tensor, pointer, source)
    if source.offset != len(body):
        raise InvalidField(
            f"{len(body) - source.offset} bytes follow the last binary input",
            expected=f"a body of {source.offset} bytes",
            got=f"{len(body)} bytes",
            hint="the sum of all binary_data_size must be the number of bytes after the JSON object",
        )
    return InferenceRequest(request_id, parameters, inputs, outputs, is_binary, texts)


def _read_fields(document: dict[str, Any], data: Mapping[str, slice]) -> RequestObject:
    """Return what the JSON object says besides its inputs. Raises InvalidField."""
    parameters = dict(_object(document.get("parameters"), "/parameters"))
    is_binary = _flag(parameters.pop("binary_data_output", None), "/parameters/binary_data_output")
    request_id = document.get("id")
    if request_id is not None and type(request_id) is not str:
        raise _wrong("/id", "a string", request_id)
    outputs = None if document.get("outputs") in (None, []) else _read_outputs(document, is_binary)
    return RequestObject(request_id, parameters, outputs, is_binary, document, data)


@lru_cache(maxsize=64)
def read_short_object(text: bytes) -> RequestObject:
    """Return what a JSON object of at most MAX_CACHED_BYTES says. Clients send the same object again and again.

    Raises:
        InvalidJson, InvalidField: see `read_request`.
    """
    return _read_fields(*_read_object(text, NO_LIMIT))


def binary_float32_input(asked: RequestObject) -> tuple[str, list[int]] | None:
    """Return the name and the shape of the only input if its numbers are binary FP32; otherwise None.

    Raises:
        InvalidField, TooManyRows: see `read_request`.
    """
    tensors = list(_tensors(asked.document, "inputs"))
    if len(tensors) != 1 or tensors[0][1].get("datatype") != "FP32":
        return None
    name, tensor = tensors[0]
    shape, _, size = _read_place(tensor, "/inputs/0", NO_LIMIT)
    return (name, shape) if type(size) is int and size == math.prod(shape) * FLOAT32_BYTES else None


def _json_length(header_length: bytes | None, size: int) -> int:
    """Return the number of bytes of the JSON object. Raises InvalidField."""
    if header_length is None:
        return size
    if len(header_length) > 20 or not header_length.isdigit() or not 0 < int(header_length) <= size:
        got = header_length.decode("latin-1")[:40]
        raise InvalidField(
            f"the header Inference-Header-Content-Length should be the length of the JSON object, got {got}",
            expected=f"a number from 1 to {size}",
            got=got,
        )
    return int(header_length)


def _read_object(text: bytes, budget: Budget) -> tuple[dict[str, Any], Mapping[str, slice]]:
    """Return the JSON object, and the place in `text` of each long list `data`.

    In the object, a random string is in place of such a list.
    """
    places: dict[str, slice] = {}
    rest = text
    if len(text) > PIECE_BYTES and budget is not NO_LIMIT:
        rest, places = _take_out_data(text, budget)
        require_few_values(rest, budget)
    document = loads_value(rest) if rest else None
    if type(document) is not dict:
        got = "nothing" if not rest else describe_value(document)
        raise InvalidJson(f"expected a JSON object, got {got}", pointer="", expected="an object", got=got)
    return document, places


def _take_out_data(text: bytes, budget: Budget) -> tuple[bytes, dict[str, slice]]:
    """Return `text` with a string in place of each long list at DATA_DEPTH, and the places of their contents."""
    opened: list[int] = []
    closed: list[int] = []
    depth = 0
    for _, places, characters in brackets(text, budget):
        change = DEPTH_CHANGE[characters]
        depths = depth + np.cumsum(change)
        if not len(depths):
            continue
        depth = int(depths[-1])
        opened += places[(depths == DATA_DEPTH) & (change > 0)].tolist()
        closed += places[(depths == DATA_DEPTH - 1) & (change < 0)].tolist()
        if len(opened) > 4 * MAX_TENSORS:
            raise InvalidField(
                f"the request has more than {MAX_TENSORS} inputs or outputs", expected=f"at most {MAX_TENSORS}"
            )
    if depth or len(opened) != len(closed):
        raise InvalidJson(
            "invalid JSON: its brackets do not match", expected="a JSON object", hint="check the brackets and commas"
        )
    rest: list[bytes] = []
    found: dict[str, slice] = {}
    done = 0
    for start, end in zip(opened, closed, strict=True):
        if text[start] == ord("[") and end - start > PIECE_BYTES:
            name = os.urandom(16).hex()
            found[name] = slice(start + 1, end)
            rest += [text[done:start], f'"{name}"'.encode()]
            done = end + 1
    rest.append(text[done:])
    return b"".join(rest), found


def _tensors(document: dict[str, Any], field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the object of each tensor in a list of the request. Raises InvalidField."""
    tensors = document.get(field)
    if type(tensors) is not list or len(tensors) > MAX_TENSORS:
        raise _wrong(f"/{field}", f"a list of at most {MAX_TENSORS} objects", tensors)
    for index, tensor in enumerate(tensors):
        if type(tensor) is not dict:
            raise _wrong(f"/{field}/{index}", "an object", tensor)
        name = tensor.get("name")
        if type(name) is not str:
            raise _wrong(f"/{field}/{index}/name", "a string", name)
        yield name, tensor


def _read_tensor(tensor: dict[str, Any], pointer: str, source: _Source) -> Numbers:
    """Return the numbers of an input. Raises InvalidField."""
    datatype = tensor.get("datatype")
    if type(datatype) is not str or datatype not in _DATATYPES:
        raise _wrong(f"{pointer}/datatype", f"one of {', '.join((*_DATATYPES, BYTES))}", datatype)
    shape, data, size = _read_place(tensor, pointer, source.budget)
    if data is None:
        return _binary_numbers(shape, datatype, size, pointer, source)
    if datatype == "BF16":
        raise InvalidField("BF16 numbers must be binary", pointer=f"{pointer}/data", expected="binary_data_size")
    pointer = f"{pointer}/data"
    if type(data) is str and data in source.places:
        return _read_long_list(source.text, source.places[data], shape, pointer, source.budget)
    return _shaped(_numbers(data, pointer), shape, pointer)


def _read_place(tensor: dict[str, Any], pointer: str, budget: Budget) -> tuple[list[int], Any, Any]:
    """Return the shape of an input, and its field `data` or its parameter `binary_data_size`.

    Raises:
        InvalidField: the shape is not valid, or the input has none or both of the two.
        TooManyRows: the input has more rows than a request may have.
    """
    shape = tensor.get("shape")
    if type(shape) is not list or not is_possible(shape):
        raise _wrong(f"{pointer}/shape", f"a list of at most {MAX_DIMENSIONS} lengths", shape)
    parameters = _object(tensor.get("parameters"), f"{pointer}/parameters")
    if "shared_memory_region" in parameters:
        raise InvalidField(
            "the server does not read shared memory", pointer=f"{pointer}/parameters", hint="send the numbers"
        )
    if shape and shape[0] > budget.max_rows:
        raise TooManyRows(
            f"a request may have at most {budget.max_rows} rows (ELBO_MAX_ROWS), got {shape[0]}",
            pointer=f"{pointer}/shape",
            expected=f"at most {budget.max_rows} rows",
            got=str(shape[0]),
            hint="split the rows over several requests",
        )
    data, size = tensor.get("data"), parameters.get("binary_data_size")
    if (data is None) == (size is None):
        raise InvalidField(
            f"an input needs either data or binary_data_size, got {'neither' if data is None else 'both'}",
            pointer=pointer,
            expected="data or binary_data_size",
        )
    return shape, data, size


def _read_texts(tensor: dict[str, Any], pointer: str, source: _Source) -> Texts:
    """Return the texts of an input. Raises InvalidField."""
    shape, data, size = _read_place(tensor, pointer, source.budget)
    if len(shape) > 2 or shape[1:] not in ([], [1]):
        raise _wrong(f"{pointer}/shape", "[N] or [N, 1]", shape)
    count = math.prod(shape)
    source.budget.take_bytes(TEXT_BYTES * count)
    if data is None:
        return Texts(_binary_texts(count, size, pointer, source), shape, pointer)
    place, pointer = pointer, f"{pointer}/data"
    if type(data) is str and data in source.places:
        data = _read_long_texts(source.text[source.places[data]], shape, pointer, source.budget)
    given: list[Any] = data if type(data) is list else [data]
    while given and type(given[0]) is list and all(type(value) is list for value in given):
        given = list(chain.from_iterable(given))
    for value in given:
        if type(value) is not str:
            raise _wrong(pointer, "a list of texts", value)
    if len(given) != count:
        raise _wrong_count(shape, len(given), pointer)
    return Texts(given, shape, place)


def _read_long_texts(content: bytes, shape: list[int], pointer: str, budget: Budget) -> list[Any]:
    """Return the elements of a long list, read in pieces of about PIECE_BYTES. `content`: the list, without brackets.

    Raises InvalidField, before an element is read, if there are more commas outside of texts than `shape` needs.
    """
    ends: list[npt.NDArray[np.int64]] = []  # the commas between elements
    commas = lists = depth = 0
    for _, places, characters in brackets(content, budget, with_commas=True):
        change = DEPTH_CHANGE[characters]
        depths = depth + np.cumsum(change)
        depth = int(depths[-1]) if len(depths) else depth
        commas += int(np.count_nonzero(change == 0))
        lists += int(np.count_nonzero(change > 0))
        ends.append(places[(change == 0) & (depths == 0)])
    if commas + 1 != math.prod(shape) or lists > commas + 1:
        raise _wrong_count(shape, commas + 1, pointer)
    values: list[Any] = []
    start = 0
    all_ends = np.append(np.concatenate(ends), len(content))
    while start < len(content):
        budget.check_time()
        index = int(np.searchsorted(all_ends, start + PIECE_BYTES))
        end = int(all_ends[min(index, len(all_ends) - 1)])
        values += loads_value(b"[%b]" % content[start:end])
        start = end + 1
    return values


def _wrong_count(shape: list[int], found: int, pointer: str) -> InvalidField:
    return InvalidField(
        f"the shape is {shape}, but data has {found} texts",
        pointer=pointer,
        expected=f"{math.prod(shape)} texts",
        got=str(found),
    )


def _binary_texts(count: int, size: Any, pointer: str, source: _Source) -> list[str]:
    """Return `count` texts that begin at the offset of `source`. Each follows its length, 4 bytes little-endian.

    Raises:
        InvalidField: they do not have `size` bytes, or are not UTF-8.
    """
    body, place = source.body, source.offset
    end = place + size if type(size) is int and size >= 0 else -1
    values: list[str] = []
    while len(values) < count and place + LENGTH_BYTES <= end <= len(body):
        if len(values) % CHECKED_TEXTS == 0:
            source.budget.check_time()
        start = place + LENGTH_BYTES
        place = start + int.from_bytes(body[place:start], "little")
        if place > end:
            break
        try:
            values.append(body[start:place].decode())
        except UnicodeDecodeError as error:
            raise InvalidField(f"text {len(values)} is not UTF-8", pointer=pointer, expected="UTF-8") from error
    if len(values) != count or place != end:
        raise InvalidField(
            f"the {describe_value(size)} bytes of the input are not {count} texts",
            pointer=f"{pointer}/parameters/binary_data_size",
            expected=f"{count} texts, each after its length in {LENGTH_BYTES} bytes",
            got=f"{len(values)} texts",
        )
    source.offset = end
    return values


def _binary_numbers(shape: list[int], datatype: str, size: Any, pointer: str, source: _Source) -> Numbers:
    """Return the `size` bytes at the offset of `source` as an array of `shape`. Raises InvalidField."""
    dtype = np.dtype(_DATATYPES[datatype])
    count = math.prod(shape)
    if type(size) is not int or size != count * dtype.itemsize:
        raise InvalidField(
            f"the shape {shape} of {datatype} is {count * dtype.itemsize} bytes, but binary_data_size is "
            f"{describe_value(size)}",
            pointer=f"{pointer}/parameters/binary_data_size",
            expected=str(count * dtype.itemsize),
            got=describe_value(size),
        )
    left = len(source.body) - source.offset
    if size > left:
        raise InvalidField(
            f"binary_data_size is {size}, but only {left} bytes are left in the body",
            pointer=f"{pointer}/parameters/binary_data_size",
            expected=f"{size} bytes",
            got=f"{left} bytes",
            hint="the body may be cut off, or the header Inference-Header-Content-Length is missing or wrong",
        )
    array = np.frombuffer(source.body, dtype, count, source.offset).reshape(shape)
    source.offset += size
    if datatype == "BF16":  # the upper 16 bits of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def _numbers(values: Any, pointer: str) -> npt.NDArray[np.float64]:
    """Return a JSON list of numbers, flat or nested evenly, as an array. null becomes NaN. Raises InvalidField."""
    shape: list[int] = []
    level = [values]
    while level and type(level[0]) is list and len(shape) <= MAX_DIMENSIONS:
        length = len(level[0])
        if not all(type(part) is list and len(part) == length for part in level):
            raise InvalidField("the nested lists have different lengths", pointer=pointer, expected="even lists")
        shape.append(length)
        level = level[0] if len(level) == 1 else list(chain.from_iterable(level))
    others = set(map(type, level)) - {float, int, type(None)}
    if not shape or others:
        got = values if not shape else next(value for value in level if type(value) in others)
        raise _wrong(pointer, "a list of numbers", got)
    try:
        return np.array(level, np.float64).reshape(shape)
    except OverflowError as error:
        raise InvalidField("a number overflows float64", pointer=pointer, expected="numbers in float32") from error


def _shaped(array: Numbers, shape: list[int], pointer: str) -> Numbers:
    """Return an array that is flat, or has `shape`, in this shape. Raises InvalidField."""
    if list(array.shape) == shape or (array.ndim == 1 and array.size == math.prod(shape)):
        return array.reshape(shape)
    raise InvalidField(
        f"the shape is {shape}, but data has the shape {list(array.shape)}",
        pointer=pointer,
        expected=f"{math.prod(shape)} numbers, flat or nested as {shape}",
        got=str(list(array.shape)),
    )


def _read_long_list(text: bytes, place: slice, shape: list[int], pointer: str, budget: Budget) -> Numbers:
    """Return a long list of numbers, flat or nested, as float32 in `shape`, read in pieces of about PIECE_BYTES."""
    is_nested = text[place.start : place.start + PIECE_BYTES].lstrip().startswith(b"[")
    numbers = bytearray()
    for piece in _pieces(text, place, is_nested, budget):
        budget.check_time()
        part = _numbers(loads_value(b"[%b]" % piece), pointer)
        if part.shape[1:] != (tuple(shape[1:]) if is_nested else ()):
            raise InvalidField(
                f"the shape is {shape}, but data has parts of the shape {list(part.shape[1:])}",
                pointer=pointer,
                expected=f"numbers, flat or nested as {shape}",
            )
        x, _ = as_float32(part)
        budget.take_bytes(x.nbytes)
        numbers += x.data.cast("B") if x.size else b""
    return _shaped(np.frombuffer(numbers, np.float32), shape, pointer)


def _pieces(text: bytes, place: slice, is_nested: bool, budget: Budget) -> Iterator[bytes]:
    """Yield the parts of a list between commas, each of about PIECE_BYTES. In a nested list, a part ends at depth 0."""
    start = place.start
    ends = _row_ends(text, place, budget) if is_nested else None
    while start < place.stop:
        if ends is None:
            end = text.find(b",", start + PIECE_BYTES, place.stop)
        else:
            index = int(np.searchsorted(ends, start + PIECE_BYTES))
            end = text.find(b",", int(ends[index]), place.stop) if index < len(ends) else -1
        end = place.stop if end < 0 else end
        if end - start > budget.max_row_bytes + PIECE_BYTES:
            raise InvalidField("a row of data is too long", expected=f"at most {budget.max_row_bytes} bytes")
        yield text[start:end]
        start = end + 1
        if start == place.stop:
            raise InvalidJson("invalid JSON: a list ends with a comma", expected="a JSON object in UTF-8")


def _row_ends(text: bytes, place: slice, budget: Budget) -> npt.NDArray[np.int64]:
    """Return the places where the inner lists of a list end."""
    found: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    depth = 0
    for _, places, characters in brackets(text[place], budget):
        change = DEPTH_CHANGE[characters]
        depths = depth + np.cumsum(change)
        if len(depths):
            depth = int(depths[-1])
            found.append(places[(depths == 0) & (change < 0)] + place.start)
    return np.concatenate(found)


def _read_outputs(document: dict[str, Any], is_binary: bool) -> tuple[RequestedOutput, ...]:
    """Return the outputs that the request names. Raises InvalidField."""
    outputs: dict[str, RequestedOutput] = {}
    for index, (name, output) in enumerate(_tensors(document, "outputs")):
        pointer = f"/outputs/{index}"
        if name in outputs:
            raise InvalidField(f"the output {name!r} is given twice", pointer=pointer, expected="each output once")
        parameters = _object(output.get("parameters"), f"{pointer}/parameters")
        for unsupported in ("classification", "shared_memory_region"):
            if unsupported in parameters:
                raise InvalidField(
                    f"the server does not support {unsupported}", pointer=f"{pointer}/parameters/{unsupported}"
                )
        wanted = parameters.get("binary_data")
        is_wanted = is_binary if wanted is None else _flag(wanted, f"{pointer}/parameters/binary_data")
        outputs[name] = RequestedOutput(name, is_wanted)
    return tuple(outputs.values())


def _object(value: Any, pointer: str) -> dict[str, Any]:
    if value is None:
        return {}
    if type(value) is not dict:
        raise _wrong(pointer, "an object", value)
    return value


def _flag(value: Any, pointer: str) -> bool:
    if value is not None and type(value) is not bool:
        raise _wrong(pointer, "true or false", value)
    return bool(value)


def _wrong(pointer: str, expected: str, value: Any) -> InvalidField:
    got = "nothing" if value is None else describe_value(value)
    if type(value) is list and len(value) <= MAX_DIMENSIONS:
        got = f"[{', '.join(map(describe_value, value))}]"[:80]
    name = pointer.rpartition("/")[2]
    name = f"{pointer.split('/')[1]}[{name}]" if name.isdigit() else name
    return InvalidField(f"{name} should be {expected}, got {got}", pointer=pointer, expected=expected, got=got)


def output_datatype(array: Numbers) -> str:
    """Return the protocol's name for the dtype of an output."""
    return _OUTPUT_DATATYPES[array.dtype.name]


def write_response(
    fields: dict[str, Any], outputs: Sequence[tuple[str, Numbers, bool]]
) -> tuple[bytes | memoryview, int | None]:
    """Return the body of a response, and the length of its JSON object if binary numbers follow the object.

    Args:
        fields: the fields of the object besides `outputs`.
        outputs: the name of each output, its numbers [N, ...] in C order, and whether they are binary.

    Raises:
        OverflowInModel: a number is not finite.
    """
    for name, array, _ in outputs:
        if array.dtype == np.float32:
            require_finite(name, array)
    described = [_describe(name, array, is_binary) for name, array, is_binary in outputs]
    texts = [array for _, array, is_binary in outputs if not is_binary]
    text: bytes | memoryview
    if sum(array.size for array in texts) > PIECE_NUMBERS:
        text = _write_in_pieces(fields, described, outputs)
    else:
        for tensor, (_, array, is_binary) in zip(described, outputs, strict=True):
            if not is_binary:
                tensor["data"] = array.reshape(-1)
        text = orjson.dumps({**fields, "outputs": described}, option=orjson.OPT_SERIALIZE_NUMPY)
    if len(texts) == len(outputs):
        return text, None
    binary = [array.data.cast("B") for _, array, is_binary in outputs if is_binary]
    return join([text, *binary]), len(text)


def write_object(fields: dict[str, Any], outputs: Sequence[tuple[str, Numbers]]) -> bytes:
    """Return the JSON object of a response whose outputs are all binary. The numbers of the outputs do not matter."""
    described = [_describe(name, array, is_binary=True) for name, array in outputs]
    return orjson.dumps({**fields, "outputs": described})


def _describe(name: str, array: Numbers, is_binary: bool) -> dict[str, Any]:
    """Return the description of an output, without its numbers."""
    tensor: dict[str, Any] = {"name": name, "shape": array.shape, "datatype": output_datatype(array)}
    return {**tensor, "parameters": {"binary_data_size": array.nbytes}} if is_binary else tensor


def _write_in_pieces(
    fields: dict[str, Any], described: Sequence[dict[str, Any]], outputs: Sequence[tuple[str, Numbers, bool]]
) -> memoryview:
    """Return the JSON object of a response with many numbers, which are written in pieces."""
    written = LargeContent()
    written.write(orjson.dumps(fields)[:-1] + b',"outputs":[')
    before = b""
    for tensor, (_, array, is_binary) in zip(described, outputs, strict=True):
        written.write(before + orjson.dumps(tensor)[:-1])
        if not is_binary:
            written.write(b',"data":')
            write_array(array.reshape(-1), written)
        written.write(b"}")
        before = b","
        pause_if_due()
    written.write(b"]}")
    return written.view()
