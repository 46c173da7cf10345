"""Check the code in an artifact before torch sees it. This module does not import torch.

TorchScript code is a small part of Python. `check_code` parses it with `ast` and refuses everything that is not in
`models.allowed_code`. It then follows the calls from the methods of the model, and checks that neither a branch nor a
loop nor the size of a tensor depends on the values of a row. If a model has kept the limits on time and
memory for some rows, it therefore keeps them for any other rows of the same number.

torch has its own parser. Both read the code alike, because only the characters in CHARACTERS are allowed: the code has
no comments, no escapes and no line continuations.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from models.allowed_code import (
    CLASS_FIELDS,
    CONSTANTS,
    GENERIC_TYPES,
    KEYWORDS,
    NEVER_REACHED,
    OPERATORS,
    SPECIAL_METHODS,
    TYPES,
    WORDS,
)
from models.errors import ArtifactUnsafe, printable
from models.pickle_check import PickledObject, PickledTensor

PYTHON_TYPES: dict[str, type] = {
    "Tensor": PickledTensor, "int": int, "float": float, "bool": bool, "str": str, "NoneType": type(None),
}  # fmt: skip
CHARACTERS = re.compile(r'[A-Za-z0-9_ "(),.:=>\[\]{}\n-]*', re.ASCII)
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
MAX_DEPTH = 60  # levels of nested blocks and brackets; the parser of torch calls itself once for each
MAX_CALLS = 20_000  # operators that one method of the model may run, without repetitions by loops
MAX_LOOPS = 1  # loops within loops, including those of called functions
CAST_TYPE = "List[int]"  # the only type that `unchecked_cast` may name
TEXT_OPERATORS = frozenset({"torch.format", "ops.prim.RaiseException"})
BRACKETS = re.compile(r"[()\[\]{}]")
NODES = {
    ast.Module, ast.ClassDef, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.AnnAssign, ast.If, ast.For,
    ast.Return, ast.Expr, ast.Pass, ast.Call, ast.keyword, ast.Attribute, ast.Subscript, ast.Name, ast.Constant,
    ast.List, ast.Tuple, ast.UnaryOp, ast.USub, ast.Load, ast.Store,
}  # fmt: skip

# What a value depends on. A tuple of values is a tuple of these.
FILE = 0  # on the artifact alone
ROWS = 1  # on the artifact, the number of rows and alpha
VALUES = 2  # on the values of the rows
LEVELS = 3  # bit mask that selects FILE, ROWS or VALUES from a value
LIST = 4  # added to FILE or ROWS if the value is a list of numbers
NEW_LIST = 8  # added if the value is a list that the code has created empty; only such a list may grow
POSITIONS = 16  # added if the value is a result of `torch.searchsorted`, or a list of such results
Value = Any  # one of these numbers, a tuple of values, a _Constant, a _Text, an _Object or a _Function


class _Text:
    """A text. It may only become a part of an error message."""


TEXT = _Text()  # a text that stands in the code
MESSAGE = _Text()  # the result of torch.format, which may be longer than the code


@dataclass(frozen=True)
class _Constant:
    """True, False or None, if the check knows which. It has its own class, because Python's False is equal to FILE."""

    value: bool | None


NONE = _Constant(None)


class _Forbidden(Exception):
    """The code does something that no artifact needs."""


@dataclass(frozen=True)
class _Class:
    """A class in the archive."""

    name: str
    attributes: dict[str, ast.expr] = field(default_factory=dict)  # the types of the attributes, by name
    constants: set[str] = field(default_factory=set)  # the names of the attributes whose values are in the code
    methods: dict[str, ast.FunctionDef] = field(default_factory=dict)


@dataclass(frozen=True)
class _Object:
    """A module, whose class is in the archive."""

    class_: str


@dataclass(frozen=True)
class _Function:
    """A function in the archive, by its full name."""

    name: str


@dataclass(frozen=True)
class _Result:
    """What a function returns, and its cost: the operators that it runs, and how deep its loops are nested."""

    value: Value
    calls: int
    loops: int


def check_code(sources: Mapping[str, bytes], path: Path) -> "Code":
    """Parse the code members of an artifact, and check every name.

    Args:
        sources: the code by the name of the member, such as `code/__torch__/models/pca.py`.
        path: the path of the artifact, for messages.

    Raises:
        ArtifactUnsafe: a name, an operator or a construct that no artifact has, with the name and the member.
    """
    code = Code(path)
    for member, source in sources.items():
        try:
            code.add(member, source)
        except _Forbidden as error:
            _refuse(path, member, str(error))
    return code


class Code:
    """The parsed code of an artifact.

    Attributes:
        classes: the classes by full name, such as `__torch__.models.pca.PCA`.
        functions: the functions by full name.
        members: the member that contains each class and function.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.classes: dict[str, _Class] = {}
        self.functions: dict[str, ast.FunctionDef] = {}
        self.members: dict[str, str] = {}

    def add(self, member: str, source: bytes) -> None:
        """Parse and check one member. Raises _Forbidden."""
        text = _decode(source)
        tree = _parse(text)
        module = member.removeprefix("code/").removesuffix(".py").replace("/", ".")
        if module == "__torch__.torch.classes" or module.startswith("__torch__.torch.classes."):
            raise _Forbidden("defines a class of torch.classes, which torch implements itself")
        for node in tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                raise _Forbidden(f"has the statement {_shown(node)} outside of a class")
            _check_identifier(node.name)
            name = f"{module}.{node.name}"
            if name in self.members:
                raise _Forbidden(f"defines {node.name} twice")
            self.members[name] = member
            if isinstance(node, ast.ClassDef):
                self.classes[name] = _read_class(name, node)
            else:
                _check_function(node)
                self.functions[name] = node
        _check_characters(text)  # last, because a message about a forbidden name says more

    def check_attributes(self, model: Any) -> None:
        """Check that every attribute in the pickle of the model has the type that its class declares.

        torch does not check this. If a tuple or an object were shorter than declared, torch would read beyond its end.

        Args:
            model: the object in the pickle, as `models.pickle_check.check_pickle` returns it.

        Raises:
            ArtifactUnsafe: an attribute is missing or has another type.
        """
        name = model.type if isinstance(model, PickledObject) else ""
        try:
            self._check_value(model, ast.parse(name or "model", mode="eval").body, "model", set())
        except (_Forbidden, RecursionError) as error:
            _refuse(self._path, self.members.get(name, "data.pkl"), str(error))

    def _check_value(self, value: Any, declared: ast.expr, place: str, checked: set[tuple[int, str]]) -> None:
        """Check that `value` has the type `declared`.

        Args:
            value: a value in the pickle.
            declared: a type.
            place: the name of the value, for messages.
            checked: the identities of the objects that have been checked, with the names of their classes.
        """
        parts: list[tuple[Any, ast.expr]] = []
        match declared:
            case ast.Name(id=name) if name in PYTHON_TYPES:
                fits = type(value) is PYTHON_TYPES[name]
            case ast.Constant(value=None):
                fits = value is None
            case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
                fits, parts = True, [] if value is None else [(value, inner)]
            case ast.Subscript(value=ast.Name(id="List"), slice=inner):
                fits = type(value) is list
                parts = [(element, inner) for element in value] if fits else []
            case ast.Subscript(value=ast.Name(id="Tuple"), slice=inner):
                types = inner.elts if isinstance(inner, ast.Tuple) else [inner]
                fits = type(value) is tuple and len(value) == len(types)
                parts = list(zip(value, types, strict=True)) if fits else []
            case _:
                name = _dotted(declared) or ""
                fits = isinstance(value, PickledObject) and value.type == name and name in self.classes
                if fits and (id(value), name) not in checked:
                    checked.add((id(value), name))
                    self._check_object(value, self.classes[name], checked)
        if not fits:
            raise _Forbidden(f"declares the type {_shown(declared)} for {place}, but the pickle has another type")
        for part, type_ in parts:
            self._check_value(part, type_, place, checked)

    def _check_object(self, value: PickledObject, class_: _Class, checked: set[tuple[int, str]]) -> None:
        state = value.state if isinstance(value.state, dict) else {}
        for attribute, declared in class_.attributes.items():
            if attribute in class_.constants:
                continue
            if attribute not in state:
                raise _Forbidden(f"declares the attribute {attribute}, which the pickle lacks")
            self._check_value(state[attribute], declared, f"{class_.name}.{attribute}", checked)

    def check_methods(self, root: str, methods: Sequence[str]) -> None:
        """Follow the calls from `methods` of the class `root`, the class of the model.

        Raises:
            ArtifactUnsafe: a call of something that is not there, a loop or branch or size that depends on the values
                of a row, or too many calls.
        """
        if root not in self.classes:
            _refuse(self._path, "data.pkl", f"has a model of the class {root}, which the code does not define")
        walk = _Walk(self)
        for method in methods:
            definition = self.classes[root].methods.get(method)
            if definition is None:
                continue
            arguments = [_entry_value(argument) for argument in definition.args.args[1:]]
            try:
                cost = walk.call(root, method, definition, [_Object(root), *arguments])
            except _Forbidden as error:
                _refuse(self._path, self.members[walk.place or root], str(error))
            if cost.calls > MAX_CALLS or cost.loops > MAX_LOOPS:
                _refuse(
                    self._path,
                    self.members[root],
                    f"runs {cost.calls} operators in the method {method}, in loops {cost.loops} deep; {MAX_CALLS} "
                    f"operators and {MAX_LOOPS} level of loops are allowed",
                )


def _decode(source: bytes) -> str:
    try:
        return source.decode("ascii")
    except UnicodeDecodeError as error:
        raise _Forbidden("has characters outside of ASCII") from error


def _check_characters(text: str) -> None:
    found = CHARACTERS.match(text)
    end = found.end() if found else 0
    if end != len(text):
        raise _Forbidden(f"has the character {text[end]!r}")
    if '""' in text:
        raise _Forbidden("has two quotation marks in a row")


def _parse(text: str) -> ast.Module:
    _check_depth(text)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _Forbidden(f"cannot be parsed ({type(error).__name__})") from error
    for node in _nodes_of(tree):
        if type(node) not in NODES:
            raise _Forbidden(f"has {_shown(node)}, a {type(node).__name__}")
        if isinstance(node, ast.Constant) and type(node.value) not in (int, float, str, bool, type(None)):
            raise _Forbidden(f"has the constant {_shown(node)}")
    return tree


def _nodes_of(tree: ast.AST) -> Iterator[ast.AST]:
    """Return all nodes of `tree`, in the order of `ast.walk`, which takes three times as long."""
    nodes = [tree]
    for node in nodes:  # the list grows during the loop
        yield node
        for name in node._fields:
            child = getattr(node, name, None)
            if isinstance(child, ast.AST):
                nodes.append(child)
            elif type(child) is list:
                nodes.extend([each for each in child if isinstance(each, ast.AST)])


def _check_depth(text: str) -> None:
    """Check that neither brackets nor blocks are nested deeply."""
    depth = 0
    for bracket in BRACKETS.findall(text):
        depth += 1 if bracket in "([{" else -1
        if depth > MAX_DEPTH:
            raise _Forbidden(f"has brackets nested more than {MAX_DEPTH} deep")
    if any(line.startswith(" " * (2 * MAX_DEPTH)) for line in text.splitlines()):
        raise _Forbidden(f"has blocks nested more than {MAX_DEPTH} deep")


def _read_class(name: str, node: ast.ClassDef) -> _Class:
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    if bases != ["Module"] or len(node.bases) != 1 or node.keywords or node.decorator_list:
        raise _Forbidden(f"has the class {node.name}, whose base is not Module")
    found = _Class(name)
    for statement in node.body:
        match statement:
            case ast.FunctionDef():
                if statement.name in found.methods:
                    raise _Forbidden(f"defines {node.name}.{statement.name} twice")
                _check_function(statement)
                found.methods[statement.name] = statement
            case ast.AnnAssign(target=ast.Name(id=attribute), value=value):
                if value is not None:
                    _check_literal(value)  # torch runs this code when it loads the class
                    found.constants.add(attribute)
                _add_attribute(found, attribute, statement.annotation)
            case ast.Assign(
                targets=[ast.Subscript(value=ast.Name(id="__annotations__"), slice=ast.Constant(value=str(attribute)))]
            ):
                _add_attribute(found, attribute, statement.value)
            case ast.Assign(targets=[ast.Name(id=label)], value=ast.List() as names) if label in CLASS_FIELDS:
                _check_literal(names)
            case _:
                raise _Forbidden(f"has the statement {_shown(statement)} in the class {node.name}")
    return found


def _add_attribute(found: _Class, attribute: str, annotation: ast.expr) -> None:
    if attribute in found.attributes:
        raise _Forbidden(f"declares the attribute {attribute} twice")
    if attribute.startswith("__"):
        raise _Forbidden(f"declares the attribute {attribute}")
    _check_type(annotation)
    found.attributes[attribute] = annotation


def _check_identifier(name: str) -> None:
    if not IDENTIFIER.fullmatch(name) or (name.startswith("__") and name not in SPECIAL_METHODS):
        raise _Forbidden(f"defines {name}")


def _check_function(node: ast.FunctionDef) -> None:
    """Check every name in a function, whether it is reached or not."""
    _check_identifier(node.name)
    arguments = node.args
    if node.decorator_list or arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
        raise _Forbidden(f"has the function {node.name} with decorators or special arguments")
    for argument in arguments.args:
        if argument.annotation is not None:
            _check_type(argument.annotation)
    for default in arguments.defaults:
        _check_literal(default)
    if node.returns is None:
        raise _Forbidden(f"has the function {node.name} without a type of its result")
    _check_type(node.returns)
    for part in _nodes_of(node):
        if isinstance(part, ast.Call):
            _check_operator(part)
        elif isinstance(part, ast.AnnAssign):
            _check_type(part.annotation)
        elif isinstance(part, ast.FunctionDef | ast.ClassDef) and part is not node:
            raise _Forbidden(f"defines {part.name} inside of a function")


def _check_operator(call: ast.Call) -> None:
    """Check the name of an operator or of a word of the language. `_Walk` checks calls of methods and functions."""
    name = _dotted(call.func)
    root = name.partition(".")[0] if name else ""
    if root in ("torch", "ops"):
        if name not in OPERATORS and name not in NEVER_REACHED:
            raise _Forbidden(f"calls {name}")
    elif isinstance(call.func, ast.Name) and not re.fullmatch(r"_[0-9]+", call.func.id) and call.func.id not in WORDS:
        raise _Forbidden(f"calls {call.func.id}")


def _check_literal(node: ast.expr) -> None:
    """Check that `node` is a number, a text, or a list or tuple of these: there is nothing to run."""
    match node:
        case ast.Constant() | ast.UnaryOp(operand=ast.Constant()):
            return
        case ast.Name(id=name) if name in CONSTANTS:
            return
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            for element in elements:
                _check_literal(element)
            return
    raise _Forbidden(f"has the value {_shown(node)} where only numbers and texts may stand")


def _check_type(annotation: ast.expr) -> None:
    match annotation:
        case ast.Constant(value=None):
            return
        case ast.Name(id=name) if name in TYPES:
            return
        case ast.Attribute() if (_dotted(annotation) or "").startswith("__torch__."):
            return
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in GENERIC_TYPES:
            for part in inner.elts if isinstance(inner, ast.Tuple) else [inner]:
                _check_type(part)
            return
    raise _Forbidden(f"has the type {_shown(annotation)}")


class _Walk:
    """Follows the calls from the methods of the model, and finds what each value depends on.

    Attributes:
        place: the class or function that is being checked, or that was refused.
    """

    def __init__(self, code: Code) -> None:
        self._code = code
        self._results: dict[tuple[Any, ...], _Result] = {}
        self._active: set[tuple[str, str]] = set()
        self.place: str | None = None

    def call(self, place: str, name: str, definition: ast.FunctionDef, arguments: list[Value]) -> _Result:
        """Return the result of a function for `arguments`, by what they depend on."""
        key = (place, name, tuple(arguments))
        if key in self._results:
            return self._results[key]
        if (place, name) in self._active:
            raise _Forbidden(f"calls {name} from itself")
        if len(self._active) > MAX_DEPTH:
            raise _Forbidden(f"nests calls more than {MAX_DEPTH} deep")
        self._active.add((place, name))
        caller, self.place = self.place, place
        result = _Body(self, self._code, definition, arguments).run()
        self.place = caller
        self._active.discard((place, name))
        self._results[key] = result
        return result


class _Body:
    """One run through the body of a function."""

    def __init__(self, walk: _Walk, code: Code, definition: ast.FunctionDef, arguments: list[Value]) -> None:
        self._walk = walk
        self._code = code
        self._definition = definition
        self._names = dict(zip(_parameters(definition), arguments, strict=True))
        self._returned: list[Value] = []
        self._calls = 0
        self._loops = 0  # deepest nesting so far
        self._depth = 0  # loops around the present statement
        self._condition = FILE  # what the branches and loops around the present statement depend on

    def run(self) -> _Result:
        """Check every statement that is reached."""
        self._block(self._definition.body)
        value = self._returned[0] if len(self._returned) == 1 else max(map(_level, self._returned), default=FILE)
        return _Result(value, self._calls, self._loops)

    def _block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Pass():
                pass
            case ast.Expr(value=value):
                self._value(value)
            case ast.Return(value=value):
                if self._condition or self._depth:
                    raise _Forbidden("returns from within a loop or a branch")
                self._returned.append(FILE if value is None else self._value(value))
            case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value):
                self._bind(target, self._value(value))
            case ast.If():
                self._branch(statement)
            case ast.For(target=ast.Name(), orelse=[]):
                self._loop(statement)
            case _:
                raise _Forbidden(f"has the statement {_shown(statement)}")

    def _bind(self, target: ast.expr, value: Value) -> None:
        match target:
            case ast.Name(id=name):
                if not IDENTIFIER.fullmatch(name) or name in WORDS | CONSTANTS | {"self", "torch", "ops", "__torch__"}:
                    raise _Forbidden(f"assigns to {name}")
                self._names[name] = self._joined(name, value)
            case ast.Tuple(elts=targets):
                parts = value if isinstance(value, tuple) and len(value) == len(targets) else None
                for index, one in enumerate(targets):
                    self._bind(one, parts[index] if parts else _level(value))
            case _:
                raise _Forbidden(f"assigns to {_shown(target)}")

    def _joined(self, name: str, value: Value) -> Value:
        """Return what the variable `name` depends on after an assignment of `value` that some requests may skip."""
        if isinstance(value, _Object | _Function | _Text):
            if (self._condition and not isinstance(value, _Text)) or self._names.get(name, value) != value:
                raise _Forbidden(f"assigns another module or function to {name}")
            return value
        previous = self._names.get(name)
        if isinstance(previous, _Object | _Function | _Text):
            raise _Forbidden(f"assigns a value to {name}, which is a module or a text")
        if self._condition == FILE and previous in (None, value):
            return value
        joined = max(_level(value), FILE if previous is None else _level(previous), self._condition)
        return joined | (LIST if _has(LIST, value) or _has(LIST, previous) else 0)

    def _branch(self, statement: ast.If) -> None:
        test = self._value(statement.test)
        if isinstance(test, _Constant):
            self._block(statement.body if test.value else statement.orelse)
            return
        self._block_if(test, f"if {_shown(statement.test)}", statement.body)
        self._block_if(test, f"if {_shown(statement.test)}", statement.orelse)

    def _loop(self, statement: ast.For) -> None:
        match statement.iter:
            case ast.Call(func=ast.Name(id="range"), args=[bound], keywords=[]):
                count = self._value(bound)
            case _:
                raise _Forbidden(f"has a loop over {_shown(statement.iter)}")
        if _level(count) > FILE:
            raise _Forbidden(f"has the loop over {_shown(statement.iter)}, whose length is not that of a weight")
        if self._condition:
            raise _Forbidden(f"has the loop over {_shown(statement.iter)} in only some requests")
        self._depth += 1
        self._loops = max(self._loops, self._depth)
        for _ in range(3):  # repetitions can raise what a variable depends on twice: FILE, ROWS, VALUES
            self._bind(statement.target, _level(count))
            self._block_if(_level(count), f"for {_shown(statement.iter)}", statement.body)
        self._depth -= 1

    def _block_if(self, test: Value, shown: str, statements: Sequence[ast.stmt]) -> None:
        """Check the body of a branch or a loop. `test` says what its condition or number of repetitions depends on."""
        level = _level(test)
        if level == VALUES:
            raise _Forbidden(f"has the branch {shown}, which depends on the values of a row")
        outer, self._condition = self._condition, max(self._condition, level)
        self._block(statements)
        self._condition = outer

    def _value(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant() | ast.Name() | ast.UnaryOp(operand=ast.Constant()):
                return self._simple(node)
            case ast.List(elts=elements):
                return self._list(elements)
            case ast.Tuple(elts=elements):
                return tuple(self._value(element) for element in elements)
            case ast.Subscript(value=value, slice=place):
                return _element(self._value(value), place, self._value(place))
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in self._names:
                return self._attribute(self._names[name], attribute)
            case ast.Attribute():
                return self._function(node)
            case ast.Call():
                return self._call(node)
        raise _Forbidden(f"has the expression {_shown(node)}")

    def _simple(self, node: ast.expr) -> Value:
        match node:
            case ast.Constant(value=bool() | None as value):
                return _Constant(value)
            case ast.Constant(value=str()):
                return TEXT
            case ast.Name(id=name) if name in self._names:
                return self._names[name]
            case ast.Name(id=name) if name not in CONSTANTS:
                raise _Forbidden(f"uses the name {name}")
        return FILE

    def _list(self, elements: Sequence[ast.expr]) -> Value:
        if not elements:
            return ROWS | LIST | NEW_LIST  # the numbers that the code appends may depend on the number of rows
        values = list(map(self._value, elements))
        level = max(map(_level, values))
        places = POSITIONS if all(_level(value) < VALUES or _has(POSITIONS, value) for value in values) else 0
        return (level if level == VALUES else level | LIST) | places

    def _attribute(self, owner: Value, attribute: str) -> Value:
        class_ = self._class_of(owner, attribute)
        annotation = class_.attributes.get(attribute)
        if annotation is None:
            raise _Forbidden(f"uses the attribute {attribute}, which {class_.name} does not declare")
        if attribute == "training" and ast.unparse(annotation) == "bool":
            return _Constant(False)  # `models.artifact.load` switches training off
        name = _dotted(annotation) or ""
        if not name.startswith("__torch__."):
            return _value_of_type(annotation)
        if name not in self._code.classes:
            raise _Forbidden(f"has the type {name}, which the code does not define")
        return _Object(name)

    def _class_of(self, owner: Value, attribute: str) -> _Class:
        if not isinstance(owner, _Object):
            raise _Forbidden(f"uses .{attribute} of something that is not a module")
        return self._code.classes[owner.class_]

    def _function(self, node: ast.expr) -> Value:
        name = _dotted(node)
        if name is None or name not in self._code.functions:
            raise _Forbidden(f"uses {name or _shown(node)}")
        return _Function(name)

    def _call(self, node: ast.Call) -> Value:
        name = _dotted(node.func) or ""
        if name.partition(".")[0] in ("torch", "ops"):
            return self._operator(name, node)
        match node.func:
            case ast.Name(id="getattr"):
                return self._getattr(node)
            case ast.Name(id=word) if word in WORDS:
                return self._word(word, node)
            case ast.Name(id=word) if word not in self._names:
                raise _Forbidden(f"calls {word}")
            case ast.Attribute(value=ast.Name(id=owner), attr=method) if owner in self._names:
                return self._method(self._names[owner], method, node)
        function = self._value(node.func)
        if not isinstance(function, _Function):
            raise _Forbidden(f"calls {_shown(node.func)}")
        return self._own(function.name, function.name, self._code.functions[function.name], [], node)

    def _getattr(self, node: ast.Call) -> Value:
        match node.args:
            case [ast.Name(id=owner), ast.Constant(value=str(attribute))] if owner in self._names:
                return self._attribute(self._names[owner], attribute)
        raise _Forbidden(f"calls {_shown(node)}")

    def _word(self, word: str, node: ast.Call) -> Value:
        if node.keywords or word == "range":
            raise _Forbidden(f"calls {_shown(node)}")
        if word in ("annotate", "unchecked_cast") and len(node.args) == 2:
            _check_type(node.args[0])
            # torch does not check the type of the value, and would read beyond the end of a tuple that is too short.
            if word == "unchecked_cast" and ast.unparse(node.args[0]) != CAST_TYPE:
                raise _Forbidden(f"calls {_shown(node)}: only {CAST_TYPE} may follow unchecked_cast")
            return self._value(node.args[1])
        if word == "int" and len(node.args) == 1 and _level(value := self._value(node.args[0])) < VALUES:
            return _level(value)
        raise _Forbidden(f"calls {_shown(node)}, which needs numbers that do not depend on the values of a row")

    def _method(self, owner: Value, method: str, node: ast.Call) -> Value:
        class_ = self._class_of(owner, method)
        definition = class_.methods.get(method)
        if definition is None:
            raise _Forbidden(f"calls {method}, which {class_.name} does not define")
        return self._own(class_.name, method, definition, [owner], node)

    def _own(self, place: str, name: str, definition: ast.FunctionDef, first: list[Value], node: ast.Call) -> Value:
        """Return the result of a function or method of the archive's code."""
        if node.keywords or self._condition:
            raise _Forbidden(f"calls {name} with named arguments, or in only some requests")
        given = [*first, *map(self._value, node.args)]
        count, defaults = len(definition.args.args), definition.args.defaults
        missing = count - len(given)
        if missing < 0 or missing > len(defaults):
            raise _Forbidden(f"calls {name} with {len(given)} arguments, it has {count}")
        given += [self._value(default) for default in defaults[len(defaults) - missing :] if missing]
        for argument, value in list(zip(definition.args.args, given, strict=True))[len(first) :]:
            if argument.annotation is not None and not _takes_tensor(argument.annotation) and _level(value) == VALUES:
                raise _Forbidden(f"gives {name} the number {argument.arg}, which depends on the values of a row")
        result = self._walk.call(place, name, definition, given)
        self._calls += 1 + result.calls
        if self._calls > 10 * MAX_CALLS:
            raise _Forbidden(f"runs more than {MAX_CALLS} operators")
        self._loops = max(self._loops, self._depth + result.loops)
        return result.value

    def _operator(self, name: str, node: ast.Call) -> Value:
        if name in NEVER_REACHED:
            raise _Forbidden(f"calls {name}, which would change a weight or a row")
        rule = OPERATORS[name]
        self._calls += 1
        values = [self._value(argument) for argument in (*node.args, *(keyword.value for keyword in node.keywords))]
        self._check_arguments(name, node, values)
        if name in TEXT_OPERATORS:
            values = [value for value in values if not isinstance(value, _Text)]
        levels, has_list = list(map(_level, values)), any(_has(LIST, value) for value in values)
        if self._condition and (rule.grows or (has_list and name in ("torch.add", "torch.mul"))):
            raise _Forbidden(f"calls {_shown(node)} in only some requests")
        numbers = (
            *levels[rule.tensors :],
            *levels[len(node.args) :],
            *(levels[place] for place in rule.sizes if place < len(levels)),
        )
        if VALUES in numbers:
            raise _Forbidden(f"calls {_shown(node)} with a size that depends on the values of a row")
        if name in TEXT_OPERATORS:
            return MESSAGE
        level = max(levels, default=FILE)
        if name == "torch.searchsorted":
            return level | POSITIONS
        if name in ("torch.__is__", "torch.__isnot__") and values == [NONE, NONE]:
            return _Constant(name == "torch.__is__")
        if rule.numbers:
            return min(level, ROWS) | (LIST if name == "torch.size" and len(node.args) == 1 else FILE)
        return level if level == VALUES or not has_list else level | LIST

    def _check_arguments(self, name: str, node: ast.Call, values: list[Value]) -> None:
        """Check that the operator `name` may be called with these arguments."""
        for keyword in node.keywords:
            if keyword.arg not in KEYWORDS.get(name, ()):
                raise _Forbidden(f"calls {_shown(node)} with the argument {keyword.arg}")
        if not values:
            raise _Forbidden(f"calls {_shown(node)} without arguments")
        match name:
            case "torch.format" if MESSAGE in values:
                raise _Forbidden(f"calls {_shown(node)} with a text that torch.format has made")
            case "torch.append" if not _has(NEW_LIST, values[0]):
                raise _Forbidden(f"calls {_shown(node)} for a list that is not empty at first")
            case "torch.where" if len(values) != 3:
                # With one argument, the size of the result is the number of true elements.
                raise _Forbidden(f"calls {_shown(node)} with a size that depends on the values of a row")
            case "torch.index" if len(values) != 2 or (_level(values[1]) == VALUES and not _has(POSITIONS, values[1])):
                # With a mask as the index, the size of the result would be the number of true elements in the mask.
                raise _Forbidden(f"calls {_shown(node)} with places that are not those of torch.searchsorted")
            case "torch.floordiv" if not node.args or not _is_positive(
                node.args[-1]
            ):  # -2^63 // -1 ends the process with SIGFPE
                raise _Forbidden(f"calls {_shown(node)}, which does not divide by a positive number")


def _is_positive(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value > 0


def _entry_value(argument: ast.arg) -> Value:
    """Return VALUES for an argument that is a tensor, such as the rows or the noise, and ROWS for one such as alpha."""
    is_tensor = argument.annotation is None or _takes_tensor(argument.annotation)
    return VALUES if is_tensor else ROWS


def _takes_tensor(annotation: ast.expr) -> bool:
    return any(isinstance(part, ast.Name) and part.id == "Tensor" for part in ast.walk(annotation))


def _parameters(definition: ast.FunctionDef) -> Iterator[str]:
    return (argument.arg for argument in definition.args.args)


def _level(value: Value) -> int:
    """Return what all parts of `value` depend on together."""
    if isinstance(value, _Constant):
        return FILE
    if isinstance(value, tuple):
        return max(map(_level, value), default=FILE)
    if isinstance(value, int):
        return value & LEVELS
    raise _Forbidden("uses a module, a function or a text as a value")


def _has(flag: int, value: Value) -> bool:
    """Return whether `flag`, such as LIST, was added to `value`."""
    return type(value) is int and bool(value & flag)


def _value_of_type(annotation: ast.expr) -> Value:
    """Return what is known of an attribute of the type `annotation`. Its value depends on the artifact alone."""
    names = {part.id for part in ast.walk(annotation) if isinstance(part, ast.Name)}
    if "str" in names:
        return TEXT
    return FILE | LIST if names & {"List", "Tuple"} and "Tensor" not in names else FILE


def _element(value: Value, place: ast.expr, index: Value) -> Value:
    if _level(index) == VALUES:
        raise _Forbidden("takes an element at a place that depends on the values of a row")
    if isinstance(value, tuple) and isinstance(place, ast.Constant) and type(place.value) is int:
        if not 0 <= place.value < len(value):
            raise _Forbidden(f"takes element {place.value} of {len(value)}")
        return value[place.value]
    return max(_level(value), _level(index))


def _dotted(node: ast.expr) -> str | None:
    """Return the name that `node` spells, such as `torch.add`; None if it is no name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _shown(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:80]


def _refuse(path: Path, member: str, reason: str) -> NoReturn:
    raise ArtifactUnsafe(f"{path}: the code in {member} {printable(reason)}; no artifact of Elbo does")
