"""Check the ONNX twin of an artifact before ONNX Runtime sees it, with a small reader of ONNX's protobuf format.

The twin is the copy of the networks for ONNX Runtime. ONNX Runtime opens every file that a graph names as external
data, so a graph that names any other file than PLACEHOLDER is refused. The reader refuses every field that the twins of
Elbo do not have: functions, graphs within nodes, other domains, sparse weights. As in `models.code_check`, the values
of a row may not decide the size of any result. This module imports neither onnx nor torch.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from models.errors import ArtifactUnsafe, printable

# Every operator that a twin may have, and the indices of those inputs that are sizes or positions instead of values.
OPERATORS: dict[str, tuple[int, ...]] = {
    # Arithmetic and comparison, element by element.
    "Add": (), "Sub": (), "Mul": (), "Div": (), "Mod": (), "Neg": (), "Exp": (), "Log": (), "Sqrt": (), "Pow": (),
    "Abs": (), "Max": (), "Min": (), "Clip": (), "Greater": (), "Less": (), "Equal": (), "Not": (), "And": (), "Or": (),
    "Where": (), "IsNaN": (), "Cast": (), "Identity": (),
    "Erf": (), "Reciprocal": (), "Sin": (), "Cos": (), "LessOrEqual": (), "GreaterOrEqual": (),
    # Activations.
    "Elu": (), "Celu": (), "Selu": (), "LeakyRelu": (), "PRelu": (), "HardSigmoid": (), "HardSwish": (), "Mish": (),
    "Softmax": (), "LogSoftmax": (),
    "Relu": (), "Sigmoid": (), "Softplus": (), "Tanh": (),
    # Sums over a dimension.
    "ReduceSum": (1,), "ReduceMean": (1,), "ReduceMin": (1,), "ReduceMax": (1,),
    # Layers.
    "MatMul": (), "Gemm": (), "Conv": (), "ConvTranspose": (), "LayerNormalization": (),
    "MaxPool": (), "AveragePool": (), "GlobalAveragePool": (), "Pad": (1, 2, 3), "InstanceNormalization": (),
    # Shapes and parts of tensors.
    "Constant": (), "ConstantOfShape": (0,), "Shape": (), "Concat": (), "Expand": (1,), "Flatten": (), "Gather": (),
    "Reshape": (1,), "Slice": (1, 2, 3, 4), "Split": (1,), "Tile": (1,), "Squeeze": (1,),
    "Transpose": (), "Unsqueeze": (1,),
}  # fmt: skip
INPUT = "rows"
PLACEHOLDER = "model.pt"  # the only file that a weight may name: the loader uses a weight of the module instead
EXTERNAL = 1  # TensorProto.data_location
MAX_NODES = 20_000
FLOAT_BYTES, DOUBLE_BYTES = 4, 8
FLOAT, INT64, BOOL = 1, 7, 9  # types of tensors, as ONNX numbers them
FLOATS = {FLOAT, 10, 11}  # 32, 16 and 64 bits

TwinWeight = tuple[int, tuple[int, ...]]  # type, as ONNX numbers it, and shape

_TEXT, _INT, _FLOAT, _BYTES, _MESSAGE = "text", "int", "float", "bytes", "message"


class _Field(NamedTuple):
    """A field of a protobuf message. If the field is a message itself, `fields` are the fields of that message."""

    name: str
    type: str
    fields: "Mapping[int, _Field]" = MappingProxyType({})
    repeated: bool = False


_ENTRY = {1: _Field("key", _TEXT), 2: _Field("value", _TEXT)}
_TENSOR = {
    1: _Field("dims", _INT, repeated=True),
    2: _Field("data_type", _INT),
    8: _Field("name", _TEXT),
    9: _Field("raw_data", _BYTES),
    13: _Field("external_data", _MESSAGE, _ENTRY, repeated=True),
    14: _Field("data_location", _INT),
}
_ATTRIBUTE = {
    1: _Field("name", _TEXT),
    2: _Field("f", _FLOAT),
    3: _Field("i", _INT),
    4: _Field("s", _BYTES),
    5: _Field("t", _MESSAGE, _TENSOR),
    7: _Field("floats", _FLOAT, repeated=True),
    8: _Field("ints", _INT, repeated=True),
    20: _Field("type", _INT),
}
_NODE = {
    1: _Field("input", _TEXT, repeated=True),
    2: _Field("output", _TEXT, repeated=True),
    3: _Field("name", _TEXT),
    4: _Field("op_type", _TEXT),
    5: _Field("attribute", _MESSAGE, _ATTRIBUTE, repeated=True),
    7: _Field("domain", _TEXT),
}
_VALUE_INFO = {1: _Field("name", _TEXT), 2: _Field("type", _BYTES)}
_GRAPH = {
    1: _Field("node", _MESSAGE, _NODE, repeated=True),
    2: _Field("name", _TEXT),
    5: _Field("initializer", _MESSAGE, _TENSOR, repeated=True),
    11: _Field("input", _MESSAGE, _VALUE_INFO, repeated=True),
    12: _Field("output", _MESSAGE, _VALUE_INFO, repeated=True),
    13: _Field("value_info", _MESSAGE, _VALUE_INFO, repeated=True),
}
_OPSET = {1: _Field("domain", _TEXT), 2: _Field("version", _INT)}
_MODEL = {
    1: _Field("ir_version", _INT),
    2: _Field("producer_name", _TEXT),
    3: _Field("producer_version", _TEXT),
    7: _Field("graph", _MESSAGE, _GRAPH),
    8: _Field("opset_import", _MESSAGE, _OPSET, repeated=True),
}


class _Forbidden(Exception):
    """The graph has something that no twin has."""


def check_twin(graph: bytes, weights: bytes, name: str, path: Path) -> dict[str, TwinWeight]:
    """Check one graph of a twin.

    Args:
        graph: the graph, as a serialised ModelProto.
        weights: a JSON list with the names of the module's weights that the graph uses.
        name: the name of the graph's member, for messages.
        path: the path of the artifact, for messages.

    Returns:
        the type (as ONNX numbers it) and the shape of every weight that the graph uses, by name.

    Raises:
        ArtifactUnsafe: the graph names a file, or has an operator or a field that no twin has.
    """
    try:
        names = json.loads(weights)
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise _Forbidden("has a list of weights that is no list of names")
        model = _parse(graph, _MODEL, "model")
        if any(opset.get("domain") for opset in model.get("opset_import", ())):
            raise _Forbidden("uses operators of another domain than ONNX's own")
        found = model.get("graph", {})
        weights_of_graph = found.get("initializer", ())
        used = {weight["name"]: _weight(weight) for weight in weights_of_graph if not _is_inside(weight)}
        if sorted(used) != sorted(names):
            raise _Forbidden("has weights that differ from those in its list")
        _check_nodes(found)
    except _Forbidden as error:
        _refuse(path, name, str(error))
    except (ValueError, KeyError, IndexError, RecursionError) as error:
        _refuse(path, name, f"is damaged ({type(error).__name__})", error)
    return used


def _is_inside(tensor: Mapping[str, Any]) -> bool:
    """Return whether the numbers of a tensor are in the graph itself."""
    return "external_data" not in tensor and "data_location" not in tensor


def _weight(tensor: Mapping[str, Any]) -> TwinWeight:
    if (
        "raw_data" in tensor
        or tensor.get("data_location") != EXTERNAL
        or tensor.get("external_data") != [{"key": "location", "value": PLACEHOLDER}]
    ):
        places = [entry.get("value") for entry in tensor.get("external_data", ())]
        raise _Forbidden(f"has the weight {tensor['name']} with data in {places}, expected a weight of the module")
    return tensor["data_type"], tuple(tensor.get("dims", ()))


def _check_nodes(graph: Mapping[str, Any]) -> None:
    nodes = graph.get("node", ())
    if len(nodes) > MAX_NODES:
        raise _Forbidden(f"has {len(nodes):,} nodes, at most {MAX_NODES:,} are allowed")
    inputs = [value["name"] for value in graph.get("input", ())]
    if inputs != [INPUT]:
        raise _Forbidden(f"has the inputs {inputs[:5]}, expected {[INPUT]}")
    of_values = {INPUT}  # the names of results that depend on the values of the rows
    types = {INPUT: FLOAT} | {weight["name"]: weight["data_type"] for weight in graph.get("initializer", ())}
    for node in nodes:
        operator = node["op_type"]
        if operator not in OPERATORS or node.get("domain"):
            raise _Forbidden(f"has the operator {node.get('domain') or ''}{operator}")
        for attribute in node.get("attribute", ()):
            _check_attribute(operator, attribute)
        given = node.get("input", [])
        if any(given[place] in of_values for place in OPERATORS[operator] if place < len(given)):
            raise _Forbidden(f"has the operator {operator} with a size that depends on the values of a row")
        if operator == "Div" and types.get(given[0]) not in FLOATS:
            # ONNX Runtime divides integers without a check: -2^63 / -1 ends the process with SIGFPE.
            raise _Forbidden("has the operator Div for numbers that are not floats")
        types.update(dict.fromkeys(node.get("output", ()), _type_of_result(node, types)))
        if operator != "Shape" and of_values.intersection(given):
            of_values.update(node.get("output", ()))


def _type_of_result(node: Mapping[str, Any], types: Mapping[str, int]) -> int | None:
    """Return the type of the results of `node`, given the types of earlier results; None if it is not known."""
    attributes = {attribute["name"]: attribute for attribute in node.get("attribute", ())}
    found: int | None
    match node["op_type"]:
        case "Cast":
            found = attributes.get("to", {}).get("i")
        case "Constant" | "ConstantOfShape":
            tensor = attributes.get("value", {}).get("t")
            found = FLOAT if tensor is None else tensor.get("data_type")
        case "Shape":
            found = INT64
        case "Greater" | "Less" | "Equal" | "Not" | "And" | "Or" | "IsNaN":
            found = BOOL
        case "Where":
            found = types.get(node["input"][1])
        case _:
            found = types.get(node["input"][0])
    return found


def _check_attribute(operator: str, attribute: Mapping[str, Any]) -> None:
    if not _is_inside(attribute.get("t", {})):
        raise _Forbidden(f"has the operator {operator} with data in a file")


def _parse(content: bytes, fields: Mapping[int, _Field], place: str) -> dict[str, Any]:
    """Return the message in `content`, field by field. Raises _Forbidden for a field that is not in `fields`."""
    found: dict[str, Any] = {}
    for number, wire, value in _read_fields(content):
        field = fields.get(number)
        if field is None:
            raise _Forbidden(f"has the field {number} in {place}")
        values = _convert(field, wire, value, place)
        if field.repeated:
            found.setdefault(field.name, []).extend(values)
        elif field.name in found or len(values) != 1:
            raise _Forbidden(f"has the field {field.name} of {place} more than once")
        else:
            found[field.name] = values[0]
    return found


def _convert(field: _Field, wire: int, value: Any, place: str) -> list[Any]:
    """Return the values of one field. Numbers of a repeated field may be packed together."""
    if field.type == _MESSAGE and wire == 2:
        return [_parse(value, field.fields, field.name)]
    if field.type == _TEXT and wire == 2:
        return [value.decode()]
    if field.type == _BYTES and wire == 2:
        return [value]
    if field.type == _INT and wire == 0:
        return [value]
    if field.type == _INT and wire == 2 and field.repeated:
        return list(_read_packed(value))
    if field.type == _FLOAT and (wire == 5 or (wire == 2 and field.repeated)):
        return [0.0]  # no check needs the value
    raise _Forbidden(f"has the field {field.name} of {place} in the wrong form")


def _read_fields(content: bytes) -> Iterator[tuple[int, int, Any]]:
    """Yield number, wire type and value of each field of a protobuf message."""
    position = 0
    while position < len(content):
        key, position = _read_varint(content, position)
        wire = key & 7
        value: int | bytes
        if wire == 0:
            value, position = _read_varint(content, position)
        else:
            size = {1: DOUBLE_BYTES, 5: FLOAT_BYTES}.get(wire)
            if wire == 2:
                size, position = _read_varint(content, position)
            if size is None or position + size > len(content):
                raise _Forbidden("is truncated")
            value, position = content[position : position + size], position + size
        yield key >> 3, wire, value


def _read_packed(content: bytes) -> Iterator[int]:
    position = 0
    while position < len(content):
        value, position = _read_varint(content, position)
        yield value


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Forbidden("has a number of more than 64 bits")


def _refuse(path: Path, name: str, reason: str, error: Exception | None = None) -> NoReturn:
    raise ArtifactUnsafe(f"{path}: the graph {name} {printable(reason[:200])}; no artifact of Elbo does") from error
