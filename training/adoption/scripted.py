"""Run TorchScript operator by operator in Python, so that torch's tracer records straight-line code with all shapes.

TorchScript may have branches and loops. Here, a branch on a constant, such as `if self.training`, runs one side, and a
loop with a constant number of steps runs. A branch or a loop that depends on the values of a tensor is refused.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.adoption.rendering import place_of
from training.errors import AdoptionError

TYPES = {0: torch.uint8, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32, 7: torch.float64,
         11: torch.bool, 15: torch.bfloat16}  # fmt: skip
RANDOM = frozenset({"randn", "randn_like", "normal", "normal_", "rand", "rand_like", "randint", "bernoulli", "uniform_",
                    "dropout", "multinomial", "randperm", "exponential_"})  # fmt: skip
LEFT_OUT = frozenset({"device", "layout", "pin_memory", "memory_format", "generator"})
ON_NUMBERS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "floordiv": operator.floordiv, "remainder": operator.mod, "pow": operator.pow, "eq": operator.eq,
    "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "__not__":
    operator.not_, "__is__": operator.is_, "__isnot__": operator.is_not, "__getitem__": operator.getitem,
    "__contains__": operator.contains, "__and__": operator.and_, "__or__": operator.or_, "append": list.append,
    "len": len, "Int": int, "Float": float, "Bool": bool, "str": str, "list": list, "sqrt": lambda x: x**0.5,
    "__range_length": lambda first, last, step: len(range(first, last, step)), "__derive_index":
    lambda index, first, step: first + index * step, "warn": lambda *_: None, "format": str.format,
}  # fmt: skip
ON_TENSORS: dict[str, Callable[..., Any]] = {
    "size": lambda tensor, *axes: tensor.size(*axes) if axes else list(tensor.size()),
    "dim": lambda tensor: tensor.dim(),
    "broadcast_tensors": lambda tensors: list(torch.broadcast_tensors(*tensors)),
}
PRIMITIVES: dict[str, Callable[..., Any]] = {
    "ListConstruct": lambda *parts: list(parts), "TupleConstruct": lambda *parts: tuple(parts), "dtype":
    lambda tensor: tensor.dtype, "device": lambda tensor: tensor.device, "NumToTensor": lambda number: number,
    "unchecked_cast": lambda value: value, "Uninitialized": lambda: None, "Print": lambda *_: None,
    "min": min, "max": max, "is_cuda": lambda _: False,
    "TupleIndex": operator.getitem,
}  # fmt: skip


class Interpreted(nn.Module):
    """A module that runs the methods of a scripted module in Python.

    Args:
        script: the scripted module, on the CPU and in evaluation mode.
    """

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.script = script
        for name in script._c._method_names():
            if name not in ("forward", "__getstate__", "__setstate__"):
                setattr(self, name, self._runner(name))

    def forward(self, *inputs: Any) -> Any:
        """Return what the forward of the scripted module returns."""
        return self._runner("forward")(*inputs)

    def _runner(self, name: str) -> Callable[..., Any]:
        return lambda *inputs: run_method(self.script, name, self.script, *inputs)


def run_method(script: torch.jit.ScriptModule, name: str, owner: Any, *inputs: Any) -> Any:
    """Run a method of `script` in Python, with `owner` as the module whose weights and parts it uses."""
    graph = getattr(script, name).inlined_graph
    given = list(inputs)
    expected = len(list(graph.inputs())) - 1
    # The graph does not have the defaults of arguments. None is the most frequent one.
    given += [None] * (expected - len(given))
    names = [each.debugName() for each in graph.inputs()]
    found = _run(graph, dict(zip(names, [owner, *given], strict=True)))
    return found[0] if len(found) == 1 else tuple(found)


def _run(block: Any, values: dict[str, Any]) -> list[Any]:
    """Run the nodes of a graph or a block; return its results."""
    for node in block.nodes():
        results = _results(node, values)
        for output, result in zip(node.outputs(), results, strict=True):
            values[output.debugName()] = result
    return [values[output.debugName()] for output in block.outputs()]


def _results(node: Any, values: dict[str, Any]) -> Sequence[Any]:
    kind = node.kind()
    if kind == "prim::Constant":
        return [node.output().toIValue()]
    given = [values[each.debugName()] for each in node.inputs()]
    if kind == "prim::GetAttr":
        return [getattr(given[0], node.s("name"))]
    if kind == "prim::If":
        blocks = list(node.blocks())
        return _run(blocks[0] if _decided(node, given[0]) else blocks[1], values)
    if kind == "prim::Loop":
        return _loop(node, given, values)
    if kind in ("prim::ListUnpack", "prim::TupleUnpack"):
        return list(given[0])
    if kind == "prim::DictConstruct":
        return [dict(zip(given[::2], given[1::2], strict=True))]
    if kind == "prim::RaiseException":
        raise ValueError(f"{place_of(node)} raises an error for the rows given: {given[0]}")
    name = kind.partition("::")[2]
    if kind.startswith("prim::") and name in PRIMITIVES:
        return [PRIMITIVES[name](*given)]
    if not kind.startswith("aten::"):
        raise AdoptionError(f"{place_of(node)} uses {kind}, which an artifact cannot have: write it with operators")
    found = _call(node, name, given)
    return [] if node.outputsSize() == 0 else [found] if node.outputsSize() == 1 else list(found)


def _decided(node: Any, condition: Any) -> bool:
    # While torch traces, sizes are tensors too. The module has run without the tracer before, and was refused then.
    if isinstance(condition, Tensor) and torch._C._get_tracing_state() is None:
        raise AdoptionError(
            f"{place_of(node)} has a branch or a loop that depends on the values of a tensor, which an artifact cannot "
            "have: choose with torch.where, which computes both branches"
        )
    return bool(condition)


def _loop(node: Any, given: list[Any], values: dict[str, Any]) -> Sequence[Any]:
    (block,) = node.blocks()
    count, goes_on, *carried = given
    inputs = [each.debugName() for each in block.inputs()]
    if isinstance(count, Tensor):
        _decided(node, count)
    for step in range(count):
        if not _decided(node, goes_on):
            break
        values.update(zip(inputs, [step, *carried], strict=True))
        goes_on, *carried = _run(block, values)
    return carried


def _call(node: Any, name: str, given: list[Any]) -> Any:
    """Call an operator by its name in Python, which the tracer follows."""
    first: Any = given[0] if given else None
    if name in ON_TENSORS:
        return ON_TENSORS[name](*given)
    if name == "len" and isinstance(first, Tensor):
        return first.size(0)
    if name == "to" and isinstance(given[1], torch.dtype | int):
        # torch.export cannot choose among the overloads of torch.ops.aten.to.
        return first.to(TYPES[given[1]] if isinstance(given[1], int) else given[1])
    if name in ("Bool", "Int", "Float", "item", "ScalarImplicit", "IntImplicit") and isinstance(first, Tensor):
        _decided(node, first)
        return first  # the size of a tensor, of which the tracer makes a tensor
    if name in ON_NUMBERS and not isinstance(first, Tensor):
        return ON_NUMBERS[name](*given)
    positional, named = _arguments(node.schema(), given)
    if name not in RANDOM and not any(map(_has_traced_size, positional)):
        return getattr(torch.ops.aten, name)(*positional, **named)
    # `training.adoption.draws` replaces the draws of functions of Python. These also follow sizes that the tracer has
    # made tensors; those of torch.ops would fix them.
    for owner in (Tensor if isinstance(first, Tensor) else None, torch, torch._C._nn):
        function = getattr(owner, name, None)
        if callable(function):
            return function(*positional, **named)
    raise AdoptionError(
        f"{place_of(node)} gives a size to {name}, which cannot be followed: use torch.reshape or expand"
    )


def _has_traced_size(value: Any) -> bool:
    """Return whether a list of sizes has one that depends on the number of rows."""
    return isinstance(value, list) and any(isinstance(each, Tensor) and each.dim() == 0 for each in value)


def _arguments(schema: str, given: list[Any]) -> tuple[list[Any], Mapping[str, Any]]:
    """Return the arguments by place and by name, without those that have their default."""
    arguments = torch._C.parse_schema(schema).arguments
    positional, named = [], {}
    for argument, value in zip(arguments, given, strict=True):
        converted = TYPES[value] if argument.name == "dtype" and type(value) is int else value
        if argument.name in LEFT_OUT:
            continue
        if argument.kwarg_only or argument.name == "dtype":
            if converted is not None:
                named[argument.name] = converted
        else:
            positional.append(converted)
    while positional and len(positional) > 1:
        argument = arguments[len(positional) - 1]
        if not argument.has_default_value() or isinstance(positional[-1], Tensor):
            break
        if positional[-1] != argument.default_value:
            break
        positional.pop()
    return positional, named
