"""Check the pickles of a TorchScript archive before torch reads them. This module does not import torch.

torch creates whatever object a pickle names, calls the `__setstate__` of classes, and believes the sizes that the
pickle gives for a tensor: a size that is too large makes torch read memory behind the weights. Here a pickle may only
name the classes of the archive's own code and the functions in FUNCTIONS, and every tensor must lie within its member.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from models.errors import ArtifactUnsafe, printable

OPCODES = frozenset({
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT",
    "BINGET", "LONG_BINGET",
})  # fmt: skip
INT_LIST = "torch.jit._pickle.build_intlist"
REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
FUNCTIONS = {  # functions that a pickle may call
    INT_LIST,
    REBUILD_TENSOR,
    "torch.jit._pickle.build_doublelist",
    "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_tensorlist",
    "collections.OrderedDict",  # the empty hooks of a tensor
}
ITEM_BYTES = {  # the types of tensors, and the bytes of one number
    "torch.FloatStorage": 4,
    "torch.DoubleStorage": 8,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
}
MAX_DIMENSIONS = 8
MAX_LONG_DIGITS = 20  # decimal digits of a 64-bit number and its sign


class PickledTensor:
    """Stands for a tensor that has been checked."""


class PickledObject:
    """Stands for an object of the archive's own code.

    Attributes:
        type: full name of its class.
        state: its attributes by name; in a damaged pickle, it may be anything.
    """

    type = ""
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        """Keep `state`, so that `models.code_check` can compare it with the types that the class declares."""
        self.state = state


class _Reader(pickle.Unpickler):
    """Reads a pickle without creating any object that it names.

    Args:
        content: the pickle.
        classes: the classes that the pickle may name.
        members: the sizes of the members with weights, in bytes, by name.
    """

    def __init__(self, content: bytes, classes: Collection[str], members: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(content))
        self._classes = classes
        self._members = members

    def find_class(self, module: str, name: str) -> Any:
        """Return a harmless stand-in for a class or a function. Raises _Forbidden for all others."""
        full = f"{module}.{name}"
        if full in self._classes:
            return type("Object", (PickledObject,), {"type": full})
        if full in ITEM_BYTES:
            return full
        if full == REBUILD_TENSOR:
            return _check_tensor
        if full in FUNCTIONS:
            return _return_argument
        raise _Forbidden(f"names {full}")

    def persistent_load(self, reference: Any) -> tuple[int, int]:
        """Return the number of items in the storage `reference`, and the bytes of one item."""
        match reference:
            case ("storage", str(kind), str(key), str(), int(items)) if kind in ITEM_BYTES:
                size = self._members.get(key)
                if size is None or items < 1 or items * ITEM_BYTES[kind] != size:
                    raise _Forbidden(f"has {items} numbers in weight {key!r}, but {size} bytes in its member")
                return items, ITEM_BYTES[kind]
        raise _Forbidden("has a weight that the archive does not contain")


class _Forbidden(Exception):
    """The pickle does something that no artifact needs."""


def check_pickle(content: bytes, name: str, path: Path, classes: Collection[str], members: Mapping[str, int]) -> Any:
    """Check the pickle `content` of the member `name`, and return what it contains, without any object of torch.

    Args:
        content: the pickle.
        name: name of the member, for the message.
        path: the path of the artifact, for the message.
        classes: the classes that the pickle may name, which are those of the archive's code.
        members: the sizes of the members with weights, in bytes, by the name that the pickle gives them.

    Raises:
        ArtifactUnsafe: an operation, a class, a function or a size that no artifact has.
    """
    check_operations(content, name, path, {*classes, *FUNCTIONS, *ITEM_BYTES})
    try:
        return _Reader(content, classes, members).load()
    except _Forbidden as error:
        _refuse(path, name, str(error))
    except Exception as error:  # noqa: BLE001 - `pickle` raises almost any exception on damaged bytes
        _refuse(path, name, f"is damaged ({type(error).__name__})", error)


def check_operations(content: bytes, name: str, path: Path, names: Collection[str]) -> None:
    """Check that the pickle `content` of the member `name` has only the operations in OPCODES and names only `names`.

    Raises:
        ArtifactUnsafe: an operation or a name that no artifact has.
    """
    end = 0
    try:
        for opcode, argument, position in pickletools.genops(content):
            if opcode.name not in OPCODES:
                _refuse(path, name, f"has the operation {opcode.name}")
            if opcode.name == "GLOBAL" and str(argument).replace(" ", ".", 1) not in names:
                _refuse(path, name, f"names {str(argument).replace(' ', '.', 1)}")
            if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(content):
                _refuse(path, name, "has a memo that is larger than the pickle")  # `pickle` would allocate it
            if opcode.name == "LONG1" and len(str(argument)) > MAX_LONG_DIGITS:
                _refuse(path, name, "has a number of more than 64 bits")
            end = (position or 0) + 1
    except ValueError as error:
        _refuse(path, name, "is damaged", error)
    if end != len(content):
        _refuse(path, name, "has bytes after its end")


def _check_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> PickledTensor:
    """Check that a tensor lies within its storage, and has no more numbers than the storage."""
    if not (isinstance(storage, tuple) and _are_counts(size) and _are_counts(stride) and _are_counts((offset,))):
        raise _Forbidden("has a tensor without a valid size")
    items, _ = storage
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise _Forbidden(f"has a tensor with {len(size)} dimensions")
    numbers = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if numbers < 1 or numbers > items or last >= items:
        raise _Forbidden(f"has a tensor of size {list(size)} in a weight of {items} numbers")
    return PickledTensor()


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _return_argument(argument: Any = None) -> Any:
    return argument


def _refuse(path: Path, name: str, reason: str, error: Exception | None = None) -> NoReturn:
    raise ArtifactUnsafe(f"{path}: the member {name} {printable(reason[:200])}; no artifact of Elbo does") from error
