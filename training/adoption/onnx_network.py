"""A network that runs the graph of an ONNX file in torch, so that it can be compiled into an artifact.

Sizes are Python numbers, or numbers that torch's tracer follows, so that the compiled network takes any number of rows.
onnx2torch 1.5.15 is not used: it installs torchvision, and it has no LSTM and no GRU.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.nn import functional

from models.float64 import Float64Module
from training.errors import AdoptionError

# A value in the graph: a tensor, a number (a scalar of integers), a list of numbers (a vector of integers), or None for
# an optional input that is not given.
Value = Any
DRAWS = ("RandomNormalLike", "RandomNormal")
SCALER = ("ai.onnx.ml", "Scaler")  # skl2onnx writes it for scalers of scikit-learn
INTEGERS = {2, 3, 4, 5, 6, 7, 12, 13}  # types of tensors, as ONNX numbers them
TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64}


@dataclass(frozen=True)
class Node:
    """One node of the graph. The values of its attributes are numbers, texts, lists of these, and arrays."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int

    def get(self, name: str, default: Any = None) -> Any:
        """Return the attribute `name`, or `default` if the node does not have it."""
        return self.attributes.get(name, default)

    def refuse(self, reason: str) -> AdoptionError:
        """Return the error for a node that cannot be converted."""
        named = f" ({self.name})" if self.name else ""
        return AdoptionError(f"the ONNX graph has the operator {self.operator}{named} {reason}")


class OnnxNetwork(Float64Module):
    """The graph of an ONNX file as a torch module, whose `forward` returns the outputs of the graph.

    Args:
        nodes: the nodes, in an order in which they can run.
        constants: the weights and other constants, by name.
        input_name: the name of the only input, the rows.
        outputs: the names of the outputs.
        input_shape: the shape of a row, with None for a size that the file does not fix. If the file fixes all sizes,
            rows of another shape are reshaped.
        input_type: the type of the input.
        fixed_batch: the number of rows for which the graph was exported; None if it takes any number.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        constants: Mapping[str, np.ndarray[Any, Any]],
        input_name: str,
        outputs: Sequence[str],
        input_shape: Sequence[int | None],
        input_type: torch.dtype,
        fixed_batch: int | None,
    ) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        self._nodes = tuple(map(_without_weights, nodes))
        self._input, self._outputs = input_name, tuple(outputs)
        self._type, self._fixed_batch = input_type, fixed_batch
        self._sizes: dict[str, Value] = {}
        self._buffer_names: dict[str, str] = {}
        self.recurrent = nn.ModuleDict()
        recurrent = [node for node in nodes if node.operator in ("LSTM", "GRU")]
        for number, node in enumerate(recurrent):
            self.recurrent[str(number)] = _recurrent_layer(node, constants)
        self._layers = {node.outputs: str(number) for number, node in enumerate(recurrent)}
        used = {name for node in self._nodes for name in node.inputs} | set(outputs)
        for name in sorted(used & constants.keys()):
            self._add_constant(name, constants[name])

    def _add_constant(self, name: str, array: np.ndarray[Any, Any]) -> None:
        if np.issubdtype(array.dtype, np.integer) and array.ndim <= 1:
            self._sizes[name] = array.tolist()
            return
        buffer = f"constant_{len(self._buffer_names)}"
        self._buffer_names[name] = buffer
        self.register_buffer(buffer, torch.from_numpy(np.array(array)))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs of the graph, [B, ...], for rows x [B, ...]."""
        results = self.run({self._input: self._rows(x)}, self._outputs)
        floats = [result.to(torch.float32) for result in results]
        return floats[0] if len(floats) == 1 else tuple(floats)

    def _rows(self, x: Tensor) -> Tensor:
        """Return rows x [B, ...] in the shape and the type of the input of the graph."""
        fixed = [size for size in self.input_shape if size is not None]
        rows = x.reshape(x.shape[0], *fixed) if len(fixed) == len(self.input_shape) else x
        return rows.to(self._type)

    def run(self, given: Mapping[str, Value], wanted: Sequence[str]) -> list[Tensor]:
        """Return the values with the names `wanted`, computed from the values `given`."""
        values: dict[str, Value] = {**self._sizes, "": None}
        values |= {name: getattr(self, buffer) for name, buffer in self._buffer_names.items()}
        values |= given
        with _sizes_are_constant():
            for node in _needed(self._nodes, values.keys(), wanted):
                outputs = self._run_node(node, [values[name] for name in node.inputs])
                values.update(zip(node.outputs, outputs, strict=False))
        return [values[name] for name in wanted]

    def _run_node(self, node: Node, inputs: list[Value]) -> Sequence[Value]:
        if node.outputs in self._layers:
            return _recurrent(node, self.recurrent[self._layers[node.outputs]], inputs)
        if node.operator == "Reshape" and self._fixed_batch is not None:
            inputs = [inputs[0], _for_any_batch(_ints(inputs[1]), self._fixed_batch)]
        try:
            found = OPERATORS[node.operator](node, *inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise node.refuse(
                f"that Elbo cannot run ({reason}): export the network again with a dynamic batch"
            ) from error
        return found if isinstance(found, tuple) else (found,)


class CodedOnnxNetwork(OnnxNetwork):
    """An OnnxNetwork of which one value is the code: `encode` computes it, and `decode` continues from it.

    Args:
        code: the name of the value that is the code.
        arguments: see `OnnxNetwork`.
    """

    def __init__(self, code: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._code = code

    def encode(self, x: Tensor) -> Tensor:
        """Return the code [B, ...] of rows x [B, ...]."""
        found = self.run({self._input: self._rows(x)}, [self._code])[0]
        return found.to(torch.float32)

    def decode(self, z: Tensor) -> Tensor:
        """Return the first output of the graph for codes z."""
        return self.run({self._code: z.to(self._type)}, self._outputs[:1])[0].to(torch.float32)


def read_network(model: Any, code: str | None = None) -> OnnxNetwork:
    """Return the network of an ONNX model.

    A draw of normal numbers becomes its mean. Other draws are refused.

    Args:
        model: an `onnx.ModelProto`, with its weights.
        code: the name of the value that is the code of a row; None if the graph is not divided.

    Raises:
        AdoptionError: the graph has an operator that Elbo does not know, with its name, or no value with the name
            `code`.
    """
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for proto in graph.node:
        node = _read_node(proto, opsets.get("", 0))
        if node.operator == "Constant":
            constants[node.outputs[0]] = _constant(node)
        else:
            nodes.append(node)
    _refuse_unknown(nodes)
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs)
        raise AdoptionError(f"the ONNX graph has {len(inputs)} inputs ({names}): expected one, the rows")
    tensor_type = inputs[0].type.tensor_type
    if tensor_type.elem_type not in (TensorProto.FLOAT, TensorProto.DOUBLE):
        kind = TensorProto.DataType.Name(tensor_type.elem_type).lower()
        raise AdoptionError(f"the ONNX graph takes rows of the type {kind}: export the network in float32")
    sizes = [size.dim_value if size.HasField("dim_value") else None for size in tensor_type.shape.dim]
    arguments = (
        nodes,
        constants,
        inputs[0].name,
        [value.name for value in graph.output],
        sizes[1:],
        TYPES[tensor_type.elem_type],
        sizes[0] if sizes and sizes[0] else None,
    )
    if code is None:
        return OnnxNetwork(*arguments)
    known = {name for node in nodes for name in node.outputs}
    if code not in known:
        raise AdoptionError(
            f"the ONNX graph has no value {code!r} for the code: its values are {', '.join(sorted(known))[:300]}"
        )
    return CodedOnnxNetwork(code, *arguments)


def _refuse_unknown(nodes: Sequence[Node]) -> None:
    unknown = sorted({node.operator for node in nodes} - OPERATORS.keys())
    if unknown:
        raise AdoptionError(
            f"the ONNX graph has the operators {', '.join(unknown)}, which Elbo cannot convert: give the network as a "
            "torch module, a TorchScript file or a .pt2 file"
        )


def _read_node(proto: Any, opset: int) -> Node:
    from onnx import AttributeProto, helper

    if proto.domain not in ("", "ai.onnx") and (proto.domain, proto.op_type) != SCALER:
        raise AdoptionError(
            f"the ONNX graph has the operator {proto.op_type} of the domain {proto.domain}: expected ai.onnx"
        )
    attributes = {}
    for attribute in proto.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            raise AdoptionError(
                f"the ONNX graph has the operator {proto.op_type}, whose control flow Elbo cannot convert: export the "
                "network without branches and loops"
            )
        value = helper.get_attribute_value(attribute)
        attributes[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return Node(proto.op_type, proto.name, tuple(proto.input), tuple(proto.output), attributes, opset)


def _constant(node: Node) -> np.ndarray[Any, Any]:
    from onnx import numpy_helper

    if "value" in node.attributes:
        return np.asarray(numpy_helper.to_array(node.attributes["value"]))
    for name, kind in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64),
                       ("value_ints", np.int64)):  # fmt: skip
        if name in node.attributes:
            return np.asarray(node.attributes[name], kind)
    raise node.refuse("without a value of numbers")


def _needed(nodes: Sequence[Node], known: Any, wanted: Sequence[str]) -> list[Node]:
    """Return the nodes that compute `wanted` from the values in `known`, in the order of `nodes`."""
    missing, needed = set(wanted) - set(known), []
    for node in reversed(nodes):
        if missing.intersection(node.outputs):
            needed.append(node)
            missing = (missing - set(node.outputs)) | (set(node.inputs) - set(known))
    if missing:
        raise AdoptionError(
            f"the ONNX graph does not compute the output from the code alone: it also needs {min(missing)}"
        )
    return needed[::-1]


def _for_any_batch(shape: list[Any], batch: int) -> list[Any]:
    """Return the shape of a reshape with -1 for the number of rows, which the exporter has fixed to `batch`."""
    if (
        len(shape) > 1
        and type(shape[0]) is int
        and shape[0] == batch
        and not any(type(size) is int and size < 0 for size in shape[1:])
    ):
        return [-1, *shape[1:]]
    return shape


@contextmanager
def _sizes_are_constant() -> Iterator[None]:
    """Silence the tracer, which warns of sizes that become Python numbers. They are the same for all batches.

    The graph has no branches and loops, so the values of a row decide nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        yield


def _sizes(x: Tensor) -> list[int]:
    return [int(size) for size in x.shape]


def _ints(value: Value) -> list[Any]:
    """Return the numbers of a vector, a scalar or a constant tensor."""
    if isinstance(value, list):
        return value
    if isinstance(value, Tensor) and value.dim() == 1:
        return [int(one) for one in value]
    return [value]


def _is_size(value: Value) -> bool:
    return isinstance(value, list | int) or (isinstance(value, Tensor) and value.dim() == 0 and _is_integer(value))


def _is_integer(value: Tensor) -> bool:
    return not value.is_floating_point() and value.dtype != torch.bool


def _tensor(value: Value, like: Tensor | None = None) -> Tensor:
    """Return a list or a number as a tensor of integers."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list) and any(isinstance(one, Tensor) for one in value):
        return torch.stack([torch.as_tensor(one) for one in value])
    return torch.tensor(value, dtype=torch.int64 if like is None else like.dtype)


def _axes(node: Node, given: Value) -> list[int] | None:
    """Return the axes of a node, which old opsets have as an attribute and new ones as an input."""
    axes = _ints(given) if given is not None else node.get("axes")
    return None if axes is None else [int(axis) for axis in axes]


# Arithmetic. Sizes stay Python numbers, or 0-dimensional tensors that the tracer follows.


def _arithmetic(of_tensors: Callable[[Any, Any], Any]) -> Callable[..., Value]:
    def run(node: Node, a: Value, b: Value) -> Value:
        if _is_size(a) and _is_size(b):
            return _of_sizes(of_tensors, a, b)
        return of_tensors(a if isinstance(a, Tensor) else _tensor(a, b), b if isinstance(b, Tensor) else _tensor(b, a))

    return run


def _of_sizes(function: Callable[[Any, Any], Any], a: Value, b: Value) -> Value:
    if not isinstance(a, list) and not isinstance(b, list):
        return function(a, b)
    first, second = a if isinstance(a, list) else [a], b if isinstance(b, list) else [b]
    length = max(len(first), len(second))
    first, second = (one * length if len(one) == 1 else one for one in (first, second))
    return [function(x, y) for x, y in zip(first, second, strict=True)]


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and a.is_floating_point():
        return a / b
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.div(torch.as_tensor(a), b, rounding_mode="trunc")
    return a // b if a % b == 0 or (a >= 0) == (b > 0) else -(-a // b)


def _equal(node: Node, a: Value, b: Value) -> Value:
    if _is_size(a) and _is_size(b):
        return _of_sizes(lambda x, y: bool(x == y), a, b)
    return _tensor(a) == _tensor(b)


def _where(node: Node, condition: Value, a: Value, b: Value) -> Value:
    if isinstance(condition, list | bool):
        conditions = condition if isinstance(condition, list) else [condition]
        first, second = (_ints(value) * (len(conditions) if len(_ints(value)) == 1 else 1) for value in (a, b))
        return [x if chosen else y for chosen, x, y in zip(conditions, first, second, strict=True)]
    return torch.where(condition, a, b)


def _variadic(function: Callable[[Any, Any], Any]) -> Callable[..., Value]:
    def run(node: Node, first: Value, *others: Value) -> Value:
        for other in others:
            first = function(first, other)
        return first

    return run


def _clip(node: Node, x: Tensor, low: Value = None, high: Value = None) -> Tensor:
    low, high = (float(value) if value is not None else node.get(name) for value, name in ((low, "min"), (high, "max")))
    return x if low is None and high is None else x.clamp(low, high)


# Shapes


def _shape(node: Node, x: Value) -> Value:
    sizes: list[Any] = list(x.shape) if isinstance(x, Tensor) else [len(x)]
    # The sizes besides the number of rows are the same for all batches.
    fixed = _sizes(x) if isinstance(x, Tensor) else sizes
    found = [sizes[0] if axis == 0 else fixed[axis] for axis in range(len(sizes))]
    return found[node.get("start", 0) : node.get("end")]


def _reshape(node: Node, x: Value, shape: Value) -> Value:
    sizes = _ints(shape)
    if not isinstance(x, Tensor):
        if len(sizes) <= 1:
            return x if isinstance(x, list) else [x]
        x = _tensor(x)
    if not node.get("allowzero", 0):
        sizes = [x.shape[place] if type(size) is int and size == 0 else size for place, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.get("axis", 1) % x.dim()
    if axis == 0:
        return x.reshape(1, -1)
    return x.flatten(1) if axis == 1 else x.flatten(axis).flatten(0, axis - 1)


def _squeeze(node: Node, x: Value, axes: Value = None) -> Value:
    places = _axes(node, axes)
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x[0] if isinstance(x, list) and len(x) == 1 else x
    if places is None:
        places = [axis for axis, size in enumerate(_sizes(x)) if size == 1 and axis]
    for axis in sorted((axis % x.dim() for axis in places), reverse=True):
        x = x.squeeze(axis)
    return x


def _unsqueeze(node: Node, x: Value, axes: Value = None) -> Value:
    places = _axes(node, axes) or []
    if _is_size(x):
        return x if isinstance(x, list) else [x]
    rank = x.dim() + len(places)
    for axis in sorted(axis % rank for axis in places):
        x = x.unsqueeze(axis)
    return x


def _concat(node: Node, *values: Value) -> Value:
    if all(_is_size(value) for value in values):
        return [one for value in values for one in _ints(value)]
    return torch.cat([_tensor(value) for value in values], dim=node.get("axis"))


def _slice(node: Node, x: Value, *bounds: Value) -> Value:
    if node.opset < 10:
        starts, ends, axes, steps = node.get("starts"), node.get("ends"), node.get("axes"), None
    else:
        given = [*bounds, None, None]
        starts, ends = _ints(given[0]), _ints(given[1])
        axes, steps = (None if value is None else _ints(value) for value in given[2:4])
    axes = axes or list(range(len(starts)))
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        if isinstance(x, list):
            x = x[start:end:step]
        elif step < 0:
            x = _reversed(node, x, axis, start, end, step)
        else:
            x = x[(slice(None),) * (axis % x.dim()) + (slice(start, end, step),)]
    return x


def _reversed(node: Node, x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    if step != -1 or start not in (-1, _sizes(x)[axis] - 1) or end > -_sizes(x)[axis]:
        raise node.refuse("with a negative step, which Elbo can only convert for a whole axis")
    return x.flip(axis)


def _split(node: Node, x: Tensor, sizes: Value = None) -> Any:
    axis = node.get("axis", 0)
    parts = _ints(sizes) if sizes is not None else node.get("split")
    if parts is None:
        width, count = _sizes(x)[axis], len(node.outputs)
        largest = -(-width // count)
        parts = [min(largest, width - largest * number) for number in range(count)]
    return tuple(x.split([int(part) for part in parts], dim=axis))


def _gather(node: Node, x: Value, places: Value) -> Value:
    axis = node.get("axis", 0)
    if isinstance(x, list):
        return x[places] if isinstance(places, int) else [x[place] for place in _ints(places)]
    if isinstance(places, int):
        return x.select(axis, places)
    return _gather_tensor(x, axis, _tensor(places))


def _gather_tensor(x: Tensor, axis: int, places: Tensor) -> Tensor:
    found: Tensor = x[(slice(None),) * (axis % x.dim()) + (places,)]
    return found


def _expand(node: Node, x: Tensor, shape: Value) -> Tensor:
    sizes = _ints(shape)
    missing = len(sizes) - x.dim()
    found = list(x.shape)
    wanted = [-1 if place >= missing and type(size) is int and size == 1 else size for place, size in enumerate(sizes)]
    return x.expand([*wanted]) if missing >= 0 else x.expand([*found[: x.dim() - len(sizes)], *wanted])


def _constant_of_shape(node: Node, shape: Value) -> Value:
    from onnx import numpy_helper

    proto = node.get("value")
    fill = np.zeros(1, np.float32) if proto is None else numpy_helper.to_array(proto)
    sizes = _ints(shape)
    if np.issubdtype(fill.dtype, np.integer) and len(sizes) == 1 and type(sizes[0]) is int:
        return [int(fill[0])] * sizes[0]
    kind = torch.float32 if proto is None else TYPES[proto.data_type]
    return torch.full(sizes, fill[0].item(), dtype=kind)


def _cast(node: Node, x: Value) -> Value:
    if not isinstance(x, Tensor):
        if node.get("to") in INTEGERS:
            return x
        return _tensor(x).to(TYPES.get(node.get("to"), torch.float32))
    return x if x.dim() == 0 and _is_integer(x) and node.get("to") in INTEGERS else x.to(TYPES[node.get("to")])


def _pad(node: Node, x: Tensor, pads: Value = None, fill: Value = None, axes: Value = None) -> Tensor:
    amounts = _ints(pads) if pads is not None else node.get("pads")
    value = float(fill) if fill is not None else node.get("value", 0.0)
    if axes is not None:
        raise node.refuse("with axes, which Elbo cannot convert")
    pairs = list(zip(amounts[: x.dim()], amounts[x.dim() :], strict=True))
    while pairs and pairs[0] == (0, 0):
        pairs.pop(0)
    flat = [int(amount) for pair in reversed(pairs) for amount in pair]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(node.get("mode", "constant"))
    if mode is None:
        raise node.refuse(f"with the mode {node.get('mode')}")
    return functional.pad(x, flat, mode, value) if mode == "constant" else functional.pad(x, flat, mode)


# Reductions and activations


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Value]:
    def run(node: Node, x: Value, axes: Value = None) -> Value:
        if isinstance(x, list):
            if node.operator != "ReduceProd":
                raise node.refuse("of sizes")
            product = x[0]
            for size in x[1:]:
                product = product * size
            return [product] if node.get("keepdims", 1) else product
        places = _axes(node, axes)
        if places is None:
            if node.get("noop_with_empty_axes", 0):
                return x
            places = list(range(x.dim()))
        return function(x, places, bool(node.get("keepdims", 1)))

    return run


def _softmax(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(node: Node, x: Tensor) -> Tensor:
        axis = node.get("axis", -1 if node.opset >= 13 else 1)
        if node.opset < 13 and axis % x.dim() != x.dim() - 1:
            raise node.refuse("of an opset before 13, over several axes: export the network with opset 13 or later")
        return function(x, axis)

    return run


def _gelu(node: Node, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=node.get("approximate", "none"))


def _prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x >= 0, x, x * slope)


def _scaler(node: Node, x: Tensor) -> Tensor:
    """Return (x - offset) * scale. Both have one number for each feature, or one for all."""
    offset, scale = (torch.tensor(node.get(name, [default])) for name, default in (("offset", 0.0), ("scale", 1.0)))
    return (x - offset.to(x)) * scale.to(x)


# Layers


def _gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    a = a.transpose(0, 1) if node.get("transA", 0) else a
    if alpha == beta == 1.0 and node.get("transB", 0) and c is not None and c.dim() == 1:
        return functional.linear(a, b, c)
    product = a @ (b.transpose(0, 1) if node.get("transB", 0) else b)
    product = product if alpha == 1.0 else alpha * product
    return product if c is None else product + (c if beta == 1.0 else beta * c)


def _pads(node: Node, x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Return the padding before each axis, and then after each axis."""
    mode, rank = node.get("auto_pad", "NOTSET"), len(kernel)
    if mode in ("NOTSET", ""):
        return list(node.get("pads") or [0] * 2 * rank)
    if mode == "VALID":
        return [0] * 2 * rank
    before, after = [], []
    for size, length, stride, dilation in zip(_sizes(x)[2:], kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (length - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        before.append(large if mode == "SAME_LOWER" else small)
        after.append(small if mode == "SAME_LOWER" else large)
    return before + after


def _padded(x: Tensor, pads: Sequence[int], fill: float) -> tuple[Tensor, list[int]]:
    """Return x and the padding that the layer itself adds, the same before and after each axis."""
    rank = len(pads) // 2
    before, after = list(pads[:rank]), list(pads[rank:])
    if before == after:
        return x, before
    flat = [amount for pair in zip(reversed(before), reversed(after), strict=True) for amount in pair]
    return functional.pad(x, flat, value=fill), [0] * rank


def _conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.dim() - 2
    strides, dilations = node.get("strides") or [1] * rank, node.get("dilations") or [1] * rank
    x, padding = _padded(x, _pads(node, x, weight.shape[2:], strides, dilations), 0.0)
    function: Any = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[rank]
    result: Tensor = function(x, weight, bias, list(strides), padding, list(dilations), node.get("group", 1))
    return result


def _conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = weight.dim() - 2
    strides, dilations = node.get("strides") or [1] * rank, node.get("dilations") or [1] * rank
    if node.get("output_shape") or node.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise node.refuse("with an output shape or automatic padding, which Elbo cannot convert")
    pads, extra = node.get("pads") or [0] * 2 * rank, list(node.get("output_padding") or [0] * rank)
    before, after = list(pads[:rank]), list(pads[rank:])
    function: Any = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}[
        rank
    ]
    # Padding that differs before and after an axis is cut off the result; so is padding that torch would refuse.
    is_same = before == after
    padding = before if is_same else [0] * rank
    result: Tensor = function(x, weight, bias, list(strides), padding, extra, node.get("group", 1), list(dilations))
    if not is_same:
        for axis, (first, last) in enumerate(zip(before, after, strict=True), start=2):
            result = result.narrow(axis, first, _sizes(result)[axis] - first - last)
    return result


def _max_pool(node: Node, x: Tensor) -> Tensor:
    kernel = node.get("kernel_shape")
    rank = len(kernel)
    strides, dilations = node.get("strides") or [1] * rank, node.get("dilations") or [1] * rank
    if len(node.outputs) > 1 and node.outputs[1]:
        raise node.refuse("with places as a second output, which Elbo cannot convert")
    x, padding = _padded(x, _pads(node, x, kernel, strides, dilations), -math.inf)
    function: Any = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}[rank]
    result: Tensor = function(x, kernel, strides, padding, dilations, bool(node.get("ceil_mode", 0)))
    return result


def _average_pool(node: Node, x: Tensor) -> Tensor:
    kernel = node.get("kernel_shape")
    rank = len(kernel)
    strides = node.get("strides") or [1] * rank
    pads = _pads(node, x, kernel, strides, [1] * rank)
    if pads[:rank] != pads[rank:]:
        raise node.refuse("with different padding before and after, which Elbo cannot convert")
    function: Any = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}[rank]
    result: Tensor = function(
        x, kernel, strides, pads[:rank], bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0))
    )
    return result


def _batch_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.get("training_mode", 0):
        raise node.refuse("in training mode: export the network in evaluation mode (module.eval())")
    return functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, node.get("epsilon", 1e-5))


def _layer_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = node.get("axis", -1) % x.dim()
    return functional.layer_norm(x, _sizes(x)[axis:], weight, bias, node.get("epsilon", 1e-5))


def _instance_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.instance_norm(x, weight=weight, bias=bias, eps=node.get("epsilon", 1e-5))


def _resize(node: Node, x: Tensor, *given: Value) -> Tensor:
    """Return x with other sizes. Only the modes and coordinates that torch also has are converted."""
    sizes = given[2] if len(given) > 2 else None
    scales = given[1] if len(given) > 1 else given[0] if given else node.get("scales")
    places = node.get("coordinate_transformation_mode", "half_pixel" if node.operator == "Resize" else "asymmetric")
    mode = node.get("mode", "nearest")
    target = [int(size) for size in _ints(sizes)[2:]] if sizes is not None else None
    if target is None:
        factors = [float(scale) for scale in (scales.tolist() if isinstance(scales, Tensor) else scales)][2:]
        target = [math.floor(size * factor) for size, factor in zip(_sizes(x)[2:], factors, strict=True)]
    is_whole = all(new % old == 0 for new, old in zip(target, _sizes(x)[2:], strict=True))
    if mode == "nearest" and (is_whole or (places == "asymmetric" and node.get("nearest_mode") == "floor")):
        return functional.interpolate(x, size=target, mode="nearest")
    if mode == "linear" and places in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        name = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()]
        return functional.interpolate(x, size=target, mode=name, align_corners=places == "align_corners")
    raise node.refuse(f"with the mode {mode} and the coordinates {places}, which Elbo cannot convert")


def _recurrent_layer(node: Node, constants: Mapping[str, np.ndarray[Any, Any]]) -> nn.Module:
    """Return the LSTM or GRU of a node, with its weights."""
    kind: Any = nn.LSTM if node.operator == "LSTM" else nn.GRU
    order = (0, 2, 3, 1) if node.operator == "LSTM" else (1, 0, 2)  # of the gates: iofc -> ifco, zrh -> rzh
    _refuse_unusual_recurrent(node)
    weight, recurrence = (constants.get(name) for name in node.inputs[1:3])
    if weight is None or recurrence is None:
        raise node.refuse("whose weights are computed by the graph: export the network without quantisation")
    bias = constants.get(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else None
    hidden = int(node.get("hidden_size") or recurrence.shape[2])
    both = weight.shape[0] == 2
    layer: nn.Module = kind(weight.shape[2], hidden, bidirectional=both)
    layer = layer.to(torch.from_numpy(np.array(weight)).dtype)
    gates = len(order)
    biases = np.zeros((weight.shape[0], 2 * gates * hidden), weight.dtype) if bias is None else bias
    state = {}
    for direction, suffix in enumerate(("_l0", "_l0_reverse")[: weight.shape[0]]):
        halves = biases[direction].reshape(2, gates * hidden)
        parts = {"weight_ih": weight[direction], "weight_hh": recurrence[direction], "bias_ih": halves[0],
                 "bias_hh": halves[1]}  # fmt: skip
        for name, array in parts.items():
            blocks = np.split(np.asarray(array), gates)
            state[name + suffix] = torch.from_numpy(np.concatenate([blocks[gate] for gate in order]))
    layer.load_state_dict(state)
    return layer.eval().requires_grad_(False)


def _without_weights(node: Node) -> Node:
    """Return a node without the weights that `_recurrent_layer` has put into a layer."""
    if node.operator not in ("LSTM", "GRU"):
        return node
    return replace(node, inputs=(node.inputs[0], "", "", "", *node.inputs[4:]))


def _refuse_unusual_recurrent(node: Node) -> None:
    usual = ["sigmoid", "tanh", "tanh"] if node.operator == "LSTM" else ["sigmoid", "tanh"]
    names = [(name.decode() if isinstance(name, bytes) else name).lower() for name in node.get("activations", usual)]
    if names != usual * (len(names) // len(usual)) or node.get("clip") or node.get("input_forget", 0):
        raise node.refuse(f"with the activations {', '.join(names)} or a clip: expected {', '.join(usual)}")
    if node.operator == "GRU" and not node.get("linear_before_reset", 0):
        raise node.refuse("with linear_before_reset=0, which torch does not have (Keras: reset_after=True)")
    if node.get("layout", 0):
        raise node.refuse("with layout=1, which Elbo cannot convert")
    if len(node.inputs) > 4 and node.inputs[4]:
        raise node.refuse("with lengths of sequences, which Elbo cannot convert")
    if len(node.inputs) > 7 and node.inputs[7]:
        raise node.refuse("with peepholes, which torch does not have")


def _recurrent(node: Node, layer: Any, inputs: list[Value]) -> tuple[Tensor | None, ...]:
    """Return Y [T, directions, B, H], and the last states [directions, B, H], for x [T, B, I]."""
    x, *others = inputs
    others = [*others, *[None] * 7]
    hidden, cell = others[4], others[5]
    is_reverse = node.get("direction", "forward") == "reverse"
    directions = 2 if layer.bidirectional else 1
    if hidden is None:
        hidden = torch.zeros(directions, x.shape[1], layer.hidden_size, dtype=x.dtype)
    if is_reverse:
        x = x.flip(0)
    if node.operator == "LSTM":
        cell = torch.zeros_like(hidden) if cell is None else cell
        y, (last, last_cell) = layer(x, (hidden, cell))
        states: tuple[Tensor, Tensor | None] = (last, last_cell)
    else:
        y, last = layer(x, hidden)
        states = (last, None)
    if is_reverse:
        y = y.flip(0)
    steps, rows = y.shape[0], y.shape[1]
    return (y.reshape(steps, rows, directions, layer.hidden_size).permute(0, 2, 1, 3), *states)


def _mean_of_draw(node: Node, x: Value = None) -> Tensor:
    """Return the mean of the normal numbers that the node draws."""
    mean = node.get("mean", 0.0)
    if isinstance(x, Tensor):
        return torch.zeros_like(x) + mean if mean else torch.zeros_like(x)
    return torch.full([int(size) for size in node.get("shape")], mean)


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[..., Value]:
    return lambda node, x: function(x)


OPERATORS: dict[str, Callable[..., Value]] = {
    "Add": _arithmetic(lambda a, b: a + b),
    "Sub": _arithmetic(lambda a, b: a - b),
    "Mul": _arithmetic(lambda a, b: a * b),
    "Div": _arithmetic(_divide),
    "Mod": _arithmetic(lambda a, b: a % b),
    "Pow": _arithmetic(lambda a, b: a**b),
    "Equal": _equal,
    "Greater": _arithmetic(lambda a, b: a > b),
    "GreaterOrEqual": _arithmetic(lambda a, b: a >= b),
    "Less": _arithmetic(lambda a, b: a < b),
    "LessOrEqual": _arithmetic(lambda a, b: a <= b),
    "Where": _where,
    "Max": _variadic(torch.maximum),
    "Min": _variadic(torch.minimum),
    "Sum": _variadic(torch.add),
    "Neg": _unary(torch.neg),
    "Abs": _unary(torch.abs),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sqrt": _unary(torch.sqrt),
    "Reciprocal": _unary(torch.reciprocal),
    "Erf": _unary(torch.erf),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Not": _unary(torch.logical_not),
    "Relu": _unary(torch.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "Softplus": _unary(functional.softplus),
    "Softsign": _unary(functional.softsign),
    "HardSwish": _unary(functional.hardswish),
    "Mish": _unary(functional.mish),
    "LeakyRelu": lambda node, x: functional.leaky_relu(x, node.get("alpha", 0.01)),
    "Elu": lambda node, x: functional.elu(x, node.get("alpha", 1.0)),
    "Celu": lambda node, x: functional.celu(x, node.get("alpha", 1.0)),
    "Selu": _unary(functional.selu),
    "HardSigmoid": lambda node, x: (node.get("alpha", 0.2) * x + node.get("beta", 0.5)).clamp(0.0, 1.0),
    "Gelu": _gelu,
    "PRelu": _prelu,
    "Clip": _clip,
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Identity": lambda node, x: x,
    "Dropout": lambda node, x, *others: x,
    "Cast": _cast,
    "Shape": _shape,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda node, x: x.permute(node.get("perm") or list(range(x.dim()))[::-1]),
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Expand": _expand,
    "Tile": lambda node, x, repeats: x.repeat(_ints(repeats)),
    "ConstantOfShape": _constant_of_shape,
    "Pad": _pad,
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
    "ReduceProd": _reduce(lambda x, axes, keep: x.prod(axes[0], keep)),
    "Scaler": _scaler,
    "MatMul": lambda node, a, b: a @ b,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda node, x: x.mean(list(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda node, x: x.amax(list(range(2, x.dim())), keepdim=True),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "InstanceNormalization": _instance_norm,
    "Resize": _resize,
    "Upsample": _resize,
    "RandomNormalLike": _mean_of_draw,
    "RandomNormal": _mean_of_draw,
    "LSTM": _recurrent,
    "GRU": _recurrent,
}
