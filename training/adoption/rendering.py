"""Write a traced graph as straight-line TorchScript, with flat names for the weights.

The code that torch's tracer leaves behind names the classes and files of the user, keeps every weight of the module,
and fixes the device. The code that this module writes has one method per function, only the weights that the functions
use, and no device. Whatever does not depend on the rows is computed once, here.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from models.allowed_code import OPERATORS
from training.adoption import decompositions
from training.adoption.decompositions import Text
from training.adoption.user_code import shown_line
from training.errors import AdoptionError

FLOAT, BOOLEAN = 6, 11  # torch.float32 and torch.bool, as TorchScript numbers them
# Operators whose result may share memory with their argument.
VIEWS = frozenset({
    "view", "reshape", "select", "slice", "narrow", "transpose", "permute", "squeeze", "unsqueeze", "expand",
    "expand_as", "t", "numpy_T", "mT", "flatten", "unflatten", "split", "chunk", "unbind", "split_with_sizes",
    "alias", "detach", "unfold", "diagonal", "movedim", "swapaxes", "view_as", "reshape_as",
})  # fmt: skip
# Operators that return their first argument as it is in evaluation mode. `contiguous` changes only the memory layout.
IDENTITIES = frozenset({
    "contiguous", "clone", "detach", "alias", "requires_grad_", "lift_fresh", "lift_fresh_copy", "resolve_conj",
})  # fmt: skip
DROPOUTS = frozenset(["dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "dropout_"])
RENAMED = {"view": "reshape", "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose",
           "moveaxis": "movedim", "multiply": "mul", "divide": "div", "subtract": "sub", "true_divide": "div",
           "negative": "neg", "absolute": "abs", "swish": "silu",
           "greater": "gt", "less": "lt", "arctan": "atan", "special_expit": "sigmoid", "_reshape_alias": "reshape",
           "unsafe_split": "split", "split_with_sizes": "split", "unsafe_chunk": "chunk",
           "_softmax": "softmax", "rsub": "sub"}  # fmt: skip
CONVERSIONS = frozenset({
    "prim::NumToTensor", "aten::Int", "aten::item", "aten::IntImplicit", "aten::FloatImplicit", "aten::Float",
    "aten::ScalarImplicit", "prim::unchecked_cast",
})  # fmt: skip
OF_BOOLEANS = {"bitwise_not": "logical_not", "bitwise_and": "logical_and", "bitwise_or": "logical_or",
               "__and__": "logical_and", "__or__": "logical_or"}  # fmt: skip
NEW = {"zeros": "new_zeros", "ones": "new_ones", "full": "new_full", "empty": "new_zeros"}
ARITHMETIC = {"add": "+", "sub": "-", "rsub": "-", "mul": "*", "floor_divide": "//", "floordiv": "//", "div": "//"}
RESHAPES = frozenset({"view", "reshape", "unflatten", "flatten", "_reshape_alias", "view_as", "reshape_as"})
DECOMPOSED = frozenset({
    "batch_norm", "scaled_dot_product_attention", "upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d",
    "upsample_bilinear2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "upsample_bicubic2d",
    "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_trilinear3d", "einsum", "_pad_circular",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", *decompositions.RECURRENT, *decompositions.CELLS,
})  # fmt: skip
FIXED_KEYWORDS = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking", "requires_grad"})
LINE = re.compile(r"^(?P<file>[^\n(]+)\((?P<line>\d+)\)", re.MULTILINE)


@dataclass
class Code:
    """Straight-line TorchScript, and the tensors that it uses.

    Attributes:
        methods: the source of each method, by name.
        weights: the tensors, by the names that the source has for them.
    """

    methods: dict[str, str] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)  # by the identity of the tensor
    _kept: list[Tensor] = field(default_factory=list)  # keeps the tensors alive, so that no identity is used twice

    def weight(self, tensor: Tensor, path: str) -> str:
        """Return the name of `tensor` in the source; `path` is its name in the module, or a word that describes it."""
        name = self._names.get(id(tensor))
        if name is None:
            stem = re.sub(r"[^A-Za-z0-9_]", "_", path).strip("_")[:80] or "weight"
            stem = f"w_{stem}" if stem[0].isdigit() else stem
            name, number = stem, 1
            while name in self.weights or name in ("training", "encode", "decode", "reconstruct", "forward"):
                name, number = f"{stem}_{number}", number + 1
            self._names[id(tensor)] = name
            self._kept.append(tensor)
            # A buffer of its own: views of one tensor would share, and keep, the memory of all of it.
            self.weights[name] = tensor.detach().clone().contiguous()
        return name


@dataclass(frozen=True)
class Known:
    """A value that does not depend on the rows."""

    value: Any
    path: str = ""  # the name of a weight in its module


@dataclass(frozen=True)
class Computed:
    """A value that depends on the rows: a name or an expression of the source."""

    text: str
    is_fresh: bool = True  # whether no other value may share its memory
    is_number: bool = False  # whether it is a size, and not a tensor
    is_zero: bool = False  # whether it is a tensor of zeros


class Parts(tuple[Any, ...]):
    """A tuple or a list of values."""


Value = Known | Computed | Parts
Shape = Sequence[int | None]


class Renderer:
    """Writes one graph as one method.

    Args:
        code: receives the source and the weights.
        root: the module that was traced; its attributes are the weights.
        shapes: the shapes of the tensors in the graph by name; None stands for a size that depends on the number of
            rows.
        rows: the number of rows with which the module was traced.
    """

    def __init__(self, code: Code, root: Any, shapes: Mapping[str, Shape], rows: int) -> None:
        self._code, self._root, self._shapes, self._rows = code, root, shapes, rows
        self._values: dict[str, Value] = {}
        self._modules: dict[str, tuple[Any, str]] = {}
        self._lines: list[str] = []
        self._reference = ""
        self._count = 0

    def render(self, name: str, graph: Any) -> None:
        """Add the method `name` to the code.

        Raises:
            AdoptionError: the graph has something that an artifact may not have, with its line in the user's code.
        """
        inputs = list(graph.inputs())
        self._modules[inputs[0].debugName()] = self._root, ""
        self._reference = "x"
        self._values[inputs[1].debugName()] = Computed("x", is_fresh=False)
        for node in _needed(graph):
            self._node(node)
        outputs = [self._values[output.debugName()] for output in graph.outputs()]
        outputs = list(outputs[0]) if len(outputs) == 1 and isinstance(outputs[0], Parts) else outputs
        type_ = "Tensor" if len(outputs) == 1 else f"Tuple[{', '.join(['Tensor'] * len(outputs))}]"
        result = ", ".join(self._text(output, "constant") for output in outputs)
        body = "\n".join([*self._lines, f"return {result}"])
        self._code.methods[name] = f"def {name}(self, x: Tensor) -> {type_}:\n" + textwrap.indent(body, "    ") + "\n"

    def _node(self, node: Any) -> None:
        kind = node.kind()
        match kind:
            case "prim::Constant":
                self._set(node, Known(node.output().toIValue()))
            case "prim::GetAttr":
                self._attribute(node)
            case "prim::ListConstruct" | "prim::TupleConstruct":
                self._set(node, Parts(self._value(each) for each in node.inputs()))
            case "prim::ListUnpack" | "prim::TupleUnpack":
                self._unpack(node)
            case "prim::device":
                self._set(node, Known(None))
            case "prim::dtype":
                self._set(node, Known(_scalar_type(next(node.inputs()))))
            case _ if kind in CONVERSIONS:
                self._set(node, _as_number(self._value(next(node.inputs()))))
            case _ if kind.startswith("aten::"):
                self._operator(node, kind.removeprefix("aten::"))
            case _:
                self._refuse(node, kind)

    @staticmethod
    def _refuse(node: Any, kind: str) -> NoReturn:
        if kind in ("prim::If", "prim::Loop"):
            what = "a branch" if kind == "prim::If" else "a loop"
            raise AdoptionError(
                f"{place_of(node)} has {what} that an artifact cannot have, because it may depend on the values of a "
                "row: compute both branches and choose with torch.where, or repeat a fixed number of times"
            )
        raise AdoptionError(
            f"{place_of(node)} uses {kind}, which an artifact cannot have: expected operators of torch on tensors; "
            "write it with these"
        )

    def _set(self, node: Any, value: Value) -> None:
        self._values[node.output().debugName()] = value

    def _value(self, value: Any) -> Value:
        return self._values[value.debugName()]

    def _attribute(self, node: Any) -> None:
        owner, path = self._modules[node.input().debugName()]
        name = node.s("name")
        found = getattr(owner, name)
        path = f"{path}.{name}" if path else name
        if isinstance(found, torch.jit.ScriptModule | torch.nn.Module):
            self._modules[node.output().debugName()] = found, path
        else:
            self._set(node, Known(found, path))

    def _unpack(self, node: Any) -> None:
        given, outputs = self._value(node.input()), list(node.outputs())
        if isinstance(given, Known):
            parts: Sequence[Value] = [Known(each) for each in given.value]
        elif isinstance(given, Parts):
            parts = given
        else:
            names = [self._new_name() for _ in outputs]
            self._lines.append(f"{', '.join(names)}{',' if len(names) == 1 else ''} = {given.text}")
            parts = [Computed(name, is_fresh=given.is_fresh) for name in names]
        for output, part in zip(outputs, parts, strict=True):
            self._values[output.debugName()] = part

    def _operator(self, node: Any, name: str) -> None:
        values = [self._value(each) for each in node.inputs()]
        if name.endswith("_") and not name.endswith("__"):
            name, values = self._without_writing(node, name, values)
        arguments = _arguments(node.schema())
        given = dict(zip((argument.name for argument in arguments), values, strict=True))
        self._refuse_random(node, name, given)
        if _is_identity(node, name):
            self._set(node, values[0])
        elif name == "size" and (size := self._constant_size(node, values)) is not None:
            self._set(node, Known(size))
        elif name == "numel" and (count := self._count_of_numbers(node)) is not None:
            self._set(node, count)
        elif any(isinstance(value, Computed) and value.is_number for value in values) and name in ARITHMETIC:
            self._arithmetic(node, name, values)
        elif name in NEW and all(map(_is_known, values)) and (sizes := self._sizes_by_rows(node)):
            more = [given["fill_value"]] if name == "full" else []
            self._emit(node, NEW[name], [Computed(self._reference), sizes, *more], _dtype(given))
        elif all(map(_is_known, values)):
            self._compute(node, name, arguments, values)
        elif _is_decomposed(name, given):
            self._decompose(node, name, given)
        else:
            self._emit(node, *self._rewritten(node, name, arguments, given))

    def _rewritten(
        self, node: Any, name: str, arguments: Sequence[Any], given: Mapping[str, Value]
    ) -> tuple[str, Sequence[Value], Mapping[str, Value]]:
        """Return the operator, with its arguments, that an artifact has in place of `name`."""
        values = list(given.values())
        shape = self._shapes.get(node.output().debugName(), ()) if node.outputsSize() == 1 else ()
        # The ONNX export of a squeeze may have a branch, which the twin of an artifact may not have.
        if name in (*RESHAPES, "squeeze") and shape.count(None) == 1:
            return "reshape", [values[0], Known([-1 if size is None else size for size in shape])], {}
        if name in ("_convolution", "_convolution_mode"):
            return _convolution(given)
        if name in NEW:
            more = [given["fill_value"]] if name == "full" else []
            return NEW[name], [Computed(self._reference), values[0], *more], _dtype(given)
        if name in ("chunk", "unsafe_chunk") and (step := self._chunk_size(node, given)):
            return "split", [values[0], Known(step), given["dim"]], {}
        if name in ("to", "type_as"):
            return "to", [values[0], Known(_scalar_type(node.output()))], {}
        if name == "rsub":
            return "sub", [values[1], values[0]], {}
        if name == "pad":
            return _padding_operator(node, given)
        if name == "instance_norm" and _is_on(given["use_input_stats"]):
            return _instance_norm(given, self._shapes[node.inputsAt(0).debugName()])
        if name in OF_BOOLEANS and _scalar_type(node.output()) == BOOLEAN:
            return OF_BOOLEANS[name], values, {}
        return RENAMED.get(name, name), *_split(arguments, values, node)

    def _sizes_by_rows(self, node: Any) -> Value | None:
        """Return the sizes of a new tensor, one of which is a multiple of the number of rows; None if none is.

        The number of rows was a number when the module was traced, as in a program of torch.export.
        """
        shape, sizes = self._shapes.get(node.output().debugName(), ()), node.output().type().sizes()
        if list(shape).count(None) != 1 or sizes is None:
            return None
        place = list(shape).index(None)
        if sizes[place] % self._rows:
            return None
        factor, count = sizes[place] // self._rows, self._new_name()
        self._lines.append(f"{count} = torch.ops.aten.size({self._reference}, 0){f' * {factor}' if factor > 1 else ''}")
        return Parts(
            Computed(count, is_number=True) if index == place else Known(size) for index, size in enumerate(shape)
        )

    def _chunk_size(self, node: Any, given: Mapping[str, Value]) -> int | None:
        """Return the size of the parts into which `chunk` divides a tensor; None if it depends on the number of rows.

        The ONNX export of a chunk divides whole numbers, which the twin of an artifact may not do.
        """
        shape, dim = self._shapes.get(node.inputsAt(0).debugName(), ()), _plain(given["dim"])
        size = shape[dim] if -len(shape) <= dim < len(shape) else None
        return None if not size else -(-size // _plain(given["chunks"]))

    def _without_writing(self, node: Any, name: str, values: list[Value]) -> tuple[str, list[Value]]:
        """Return the operator that computes what `name` writes into its first argument."""
        target = values[0]
        if not _is_known(target) and not (isinstance(target, Computed) and target.is_fresh):
            raise AdoptionError(
                f"{place_of(node)} writes into a part of a tensor ({name}), which an artifact cannot do: put the parts "
                "together with torch.stack or torch.cat"
            )
        if name in ("zero_", "fill_"):
            value = values[1] if name == "fill_" else Known(0.0)
            return "full_like", [target, value]
        return name.removesuffix("_"), values

    def _refuse_random(self, node: Any, name: str, given: Mapping[str, Value]) -> None:
        is_on = _is_on(given.get("train")) or _is_on(given.get("training"))
        if name in DROPOUTS and is_on:
            raise AdoptionError(
                f"{place_of(node)} uses dropout in evaluation mode: pass training=self.training to it, or use "
                "torch.nn.Dropout"
            )
        if name == "batch_norm" and is_on:
            raise AdoptionError(
                f"{place_of(node)} normalises by the rows of the batch in evaluation mode, so a row's result depends "
                "on other rows: train the batch norm with track_running_stats=True, or pass training=self.training"
            )
        dropout = given.get("dropout", given.get("dropout_p"))
        if isinstance(dropout, Known) and dropout.value and ((name != "lstm" and name != "gru") or is_on):
            raise AdoptionError(
                f"{place_of(node)} uses dropout in evaluation mode ({name} with dropout {dropout.value}): pass 0.0 "
                "unless self.training"
            )

    def _compute(self, node: Any, name: str, arguments: Sequence[Any], values: Sequence[Value]) -> None:
        """Set the results of an operator that does not depend on the rows."""
        positional, named = _split(arguments, values, node)
        function = getattr(torch.ops.aten, RENAMED.get(name, name) if name != "view" else "reshape")
        with torch.no_grad():
            result = function(*map(_plain, positional), **{key: _plain(value) for key, value in named.items()})
        outputs = list(node.outputs())
        for output, part in zip(outputs, [result] if len(outputs) == 1 else result, strict=True):
            self._values[output.debugName()] = Known(part)

    def _constant_size(self, node: Any, values: Sequence[Value]) -> int | None:
        """Return the size that `node` asks for, if it does not depend on the number of rows."""
        shape = self._shapes.get(node.inputsAt(0).debugName(), ())
        place = values[1].value if len(values) > 1 and isinstance(values[1], Known) else None
        return shape[place] if place is not None and -len(shape) <= place < len(shape) else None

    def _count_of_numbers(self, node: Any) -> Value | None:
        """Return the number of numbers in the tensor that `node` asks for; None if more than one size is unknown."""
        name = node.inputsAt(0).debugName()
        shape = self._shapes.get(name)
        if shape is None or list(shape).count(None) > 1:
            return None
        product = math.prod(size for size in shape if size is not None)
        if None not in shape:
            return Known(product)
        count, tensor = self._new_name(), self._text(self._values[name], "constant")
        self._lines.append(f"{count} = torch.ops.aten.size({tensor}, {list(shape).index(None)}) * {product}")
        return Computed(count, is_number=True)

    def _decompose(self, node: Any, name: str, given: Mapping[str, Value]) -> None:
        """Write the operators of `training.adoption.decompositions` that replace `name`."""
        known = {key: _as_argument(value) for key, value in given.items()}
        sizes: Any = None if name == "einsum" else next(node.inputs()).type().sizes()
        try:
            if name == "gelu":
                results = [decompositions.gelu_by_tanh(self, known)]
            elif name in ("batch_norm", "instance_norm"):
                results = [decompositions.batch_norm(self, known, sizes)]
            elif name == "scaled_dot_product_attention":
                results = [decompositions.attention(self, known, sizes, node.inputsAt(1).type().sizes())]
            elif name == "einsum":
                results = [decompositions.einsum(self, known["equation"], known["tensors"], self._shapes_of_list(node))]
            elif "pad" in name:
                mode = known.get("mode") or ("circular" if "circular" in name else "replicate")
                amounts = known["pad"] if "pad" in known else known["padding"]
                results = [decompositions.pad(self, mode, known["self"], amounts, sizes)]
            elif "upsample" in name:
                results = [decompositions.resize(self, name, known, sizes, node.output().type().sizes())]
            elif name in decompositions.CELLS:
                weights = [known[key] for key in ("w_ih", "w_hh", "b_ih", "b_hh") if known[key] is not None]
                gates = self.call("linear", known["input"], weights[0], *weights[2:3])
                states = known["hx"] if name == "lstm_cell" else [known["hx"]]
                results = decompositions.cell(self, name, gates, states, weights)
            else:
                results = decompositions.recurrent(self, name, known, sizes)
        except AdoptionError as error:
            raise AdoptionError(f"{place_of(node)} {error}") from error
        for output, result in zip(node.outputs(), results, strict=True):
            self._values[output.debugName()] = Computed(result)

    def _shapes_of_list(self, node: Any) -> list[Shape]:
        """Return the shapes of the tensors in the list that is the second argument of `node`."""
        names = [each.debugName() for each in node.inputsAt(1).node().inputs()]
        known = [self._values[name] for name in names]
        return [
            tuple(value.value.shape) if isinstance(value, Known) else self._shapes[name]
            for name, value in zip(names, known, strict=True)
        ]

    def call(self, name: str, *arguments: Any) -> Text:
        """Write the call of `name` and return its result. See `training.adoption.decompositions.Writer`."""
        return self.unpack(name, 0, *arguments)[0]

    def unpack(self, name: str, count: int, *arguments: Any) -> list[Text]:
        """Write the call of `name`. Return the `count` tensors of the list that it returns; 0 for a single tensor."""
        texts = [self._argument(argument) for argument in arguments]
        names = [Text(self._new_name()) for _ in range(max(1, count))]
        self._lines.append(f"{', '.join(names)} = torch.ops.aten.{name}({', '.join(texts)})")
        return names

    def _argument(self, argument: Any) -> str:
        if isinstance(argument, Text):
            return str(argument)
        if isinstance(argument, list):
            return f"[{', '.join(map(self._argument, argument))}]"
        return self._text(Known(argument), "constant")

    def _new_name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def _arithmetic(self, node: Any, name: str, values: Sequence[Value]) -> None:
        """Set the result of arithmetic with the number of rows."""
        texts = [str(int(_plain(value))) if _is_known(value) else self._text(value, "") for value in values[:2]]
        if name == "rsub":
            texts.reverse()
        result = self._new_name()
        self._lines.append(f"{result} = {f' {ARITHMETIC[name]} '.join(texts)}")
        self._set(node, Computed(result, is_number=True))

    def _refuse_unknown(self, node: Any, name: str) -> None:
        if f"torch.{name}" not in OPERATORS:
            raise AdoptionError(
                f"{place_of(node)} uses the operator {name}, which is not among the reviewed operators of an artifact: "
                "write it with others, or ask for its review"
            )

    def _emit(self, node: Any, name: str, positional: Sequence[Value], named: Mapping[str, Value]) -> None:
        self._refuse_unknown(node, name)
        texts = [self._text(value, "constant") for value in positional]
        texts += [f"{key}={self._text(value, 'constant')}" for key, value in named.items()]
        call = f"torch.ops.aten.{name}({', '.join(texts)})"
        outputs = list(node.outputs())
        names = [self._new_name() for _ in outputs]
        self._lines.append(f"{', '.join(names)} = {call}")
        for output, result in zip(outputs, names, strict=True):
            is_size, is_view = name == "size", node.kind().removeprefix("aten::") in VIEWS
            self._values[output.debugName()] = Computed(
                result, is_fresh=not is_view, is_number=is_size, is_zero=name in ("new_zeros", "zeros_like")
            )
        if name in VIEWS:  # from now on, a write into the viewed tensor would change the view
            viewed = next(node.inputs()).debugName()
            if isinstance(known := self._values.get(viewed), Computed):
                self._values[viewed] = Computed(known.text, is_fresh=False)

    def _text(self, value: Value, word: str) -> str:
        """Return the expression of `value`. A tensor that does not depend on the rows becomes a weight."""
        if isinstance(value, Computed):
            return value.text
        if isinstance(value, Parts):
            return f"[{', '.join(self._text(each, word) for each in value)}]"
        plain = value.value
        if isinstance(plain, Tensor):
            return f"self.{self._code.weight(plain, value.path or word)}"
        if isinstance(plain, list | tuple):
            if not plain:
                return "torch.jit.annotate(List[int], [])"
            return f"[{', '.join(self._text(Known(each), word) for each in plain)}]"
        if isinstance(plain, float) and plain in (float("inf"), float("-inf")):
            return "float('inf')" if plain > 0 else "-float('inf')"
        return repr(plain)


def _needed(graph: Any) -> list[Any]:
    """Return the nodes on which the results depend, in order. The others, such as those of a loss, are left out.

    A node that writes into a tensor may change a result in a way that the graph does not show, so it is needed too.
    """
    nodes = list(graph.nodes())
    wanted = {output.debugName() for output in graph.outputs()}
    found = []
    for node in reversed(nodes):
        writes = node.kind().startswith("aten::") and node.kind().endswith("_") and not node.kind().endswith("__")
        if writes or any(output.debugName() in wanted for output in node.outputs()):
            wanted.update(each.debugName() for each in node.inputs())
            found.append(node)
    return found[::-1]


def place_of(node: Any) -> str:
    """Return the line of the user's code that made `node`, as file:line and the line itself."""
    return describe_line(node.sourceRange())


def describe_line(text: str) -> str:
    """Return the innermost line outside of torch in a call stack as torch's tracer writes it."""
    for match in LINE.finditer(text):
        if shown := shown_line(match["file"].strip(), int(match["line"])):
            return shown
    return "the module"


@cache
def _arguments(schema: str) -> Sequence[Any]:
    arguments: Sequence[Any] = torch._C.parse_schema(schema).arguments
    return arguments


def _split(arguments: Sequence[Any], values: Sequence[Value], node: Any) -> tuple[list[Value], dict[str, Value]]:
    """Return the arguments that are given by place, and those by name, without those that have their default value."""
    positional: list[Value] = []
    named: dict[str, Value] = {}
    for argument, value in zip(arguments, values, strict=False):
        is_fixed = argument.name in FIXED_KEYWORDS or (argument.name == "dtype" and _type_is_usual(value, node))
        if is_fixed or _is_default(argument, value):
            if not argument.kwarg_only and not is_fixed:
                positional.append(value)
            continue
        if argument.kwarg_only:
            named[argument.name] = value
        else:
            positional.append(value)
    while positional and _is_default(arguments[len(positional) - 1], positional[-1]):
        positional.pop()
    return positional, named


def _type_is_usual(value: Value, node: Any) -> bool:
    """Return whether the argument dtype is float32, or None, which may be left out."""
    return isinstance(value, Known) and value.value in (None, FLOAT) and node.outputsSize() == 1


def _is_default(argument: Any, value: Value) -> bool:
    if not argument.has_default_value() or not isinstance(value, Known) or isinstance(value.value, Tensor):
        return False
    return type(argument.default_value) is type(value.value) and argument.default_value == value.value


def _dtype(given: Mapping[str, Value]) -> dict[str, Value]:
    value = given.get("dtype")
    return {} if not isinstance(value, Known) or value.value in (None, FLOAT) else {"dtype": value}


def _is_known(value: Value) -> bool:
    return isinstance(value, Known) or (isinstance(value, Parts) and all(map(_is_known, value)))


def _plain(value: Value) -> Any:
    if isinstance(value, Known):
        return value.value
    assert isinstance(value, Parts)
    return [_plain(each) for each in value]


def _as_argument(value: Value) -> Any:
    """Return what a decomposition takes in place of `value`: None in place of a state of zeros."""
    if isinstance(value, Computed):
        return None if value.is_zero else Text(value.text)
    if isinstance(value, Parts):
        return [_as_argument(each) for each in value]
    return value.value


def _as_number(value: Value) -> Value:
    """Return the number in place of a tensor of one number that does not depend on the rows."""
    if isinstance(value, Known) and isinstance(value.value, Tensor) and value.value.numel() == 1:
        return Known(value.value.item())
    return value


def _is_on(value: Value | None) -> bool:
    return isinstance(value, Known) and value.value is True


def _scalar_type(value: Any) -> int | None:
    """Return the type of the numbers of a traced tensor, as TorchScript numbers it; None if it is unknown."""
    name = value.type().scalarType() if hasattr(value.type(), "scalarType") else None
    return {"Float": 6, "Double": 7, "Half": 5, "Long": 4, "Int": 3, "Bool": 11, "Byte": 0}.get(name or "")


def _is_identity(node: Any, name: str) -> bool:
    """Return whether the operator returns its first argument in evaluation mode."""
    if name in DROPOUTS or name in IDENTITIES:
        return True
    if name in ("to", "type_as"):
        return _keeps_type(node)
    return name == "broadcast_tensors" and _have_equal_shapes(node)


def _have_equal_shapes(node: Any) -> bool:
    """Return whether all tensors in the list that `node` takes have the same shape, as in a loss."""
    tensors = list(node.inputsAt(0).node().inputs())
    return len({tuple(each.type().sizes() or (id(each),)) for each in tensors}) == 1


def _keeps_type(node: Any) -> bool:
    return _scalar_type(next(node.inputs())) == _scalar_type(node.output())


def _convolution(given: Mapping[str, Value]) -> tuple[str, list[Value], dict[str, Value]]:
    """Return the call of the public operator that computes what the inner operator `_convolution` computes."""
    stride = _plain(given["stride"])
    is_transposed = _is_on(given.get("transposed"))
    name = f"conv_transpose{len(stride)}d" if is_transposed else f"conv{len(stride)}d"
    first: list[Value] = [given[key] for key in ("input", "weight", "bias", "stride")]
    padding = given["padding"]
    if isinstance(padding, Known) and isinstance(padding.value, str):
        padding = Known(_padding(padding.value, _plain(given["weight"]).shape[2:], _plain(given["dilation"])))
    if is_transposed:
        return name, [*first, padding, given["output_padding"], given["groups"], given["dilation"]], {}
    return name, [*first, padding, given["dilation"], given["groups"]], {}


def _instance_norm(given: Mapping[str, Value], shape: Shape) -> tuple[str, list[Value], dict[str, Value]]:
    """Return the call of group normalisation with one channel per group. `shape` is that of the input, [B, C, ...]."""
    return "group_norm", [given["input"], Known(shape[1]), *(given[key] for key in ("weight", "bias", "eps"))], {}


def _is_decomposed(name: str, given: Mapping[str, Value]) -> bool:
    """Return whether `training.adoption.decompositions` writes the operator with others."""
    if name == "gelu":
        return bool(_plain(given["approximate"]) == "tanh")
    if name == "instance_norm":  # by the statistics of the training
        return not _is_on(given["use_input_stats"])
    if name == "pad":
        mode, pad = _plain(given["mode"]), _plain(given["pad"])
        return mode in ("replicate", "circular") or (mode == "reflect" and len(pad) > 4)
    return name in DECOMPOSED


def _padding_operator(node: Any, given: Mapping[str, Value]) -> tuple[str, list[Value], dict[str, Value]]:
    """Return the call of the operator that pads in the mode that `pad` names."""
    mode, pad, value = (_plain(given[key]) for key in ("mode", "pad", "value"))
    if mode == "constant":
        return "constant_pad_nd", [given["self"], Known(pad), Known(float(value or 0.0))], {}
    if mode == "reflect":
        return f"reflection_pad{len(pad) // 2}d", [given["self"], Known(pad)], {}
    raise AdoptionError(
        f"{place_of(node)} pads in the mode {mode}: expected constant, reflect, replicate or circular; write it with "
        "torch.cat"
    )


def _padding(mode: str, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return the numbers of zeros at each end of each axis that the name of a padding stands for."""
    if mode == "valid":
        return [0 for _ in kernel]
    total = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    if any(zeros % 2 for zeros in total):
        raise AdoptionError(
            "a convolution has padding='same' and a kernel of even size, which pads one end more than the other: give "
            "it a kernel of odd size, or pad the rows with torch.nn.functional.pad"
        )
    return [zeros // 2 for zeros in total]
