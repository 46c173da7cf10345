"""The rules for the code in an artifact, each with the smallest code that breaks it, and code that keeps all of them.

`test_hostile_artifacts.py` loads whole artifacts. Here, only the check runs, which takes a millisecond per case.
"""

import textwrap
from pathlib import Path
from typing import Any

import pytest

from models.code_check import MAX_CALLS, MAX_DEPTH, Code, check_code
from models.errors import ArtifactUnsafe
from models.pickle_check import PickledObject, PickledTensor

MODULE = "__torch__.models.m"
HEAD = "class M(Module):\n  __parameters__ = []\n  __buffers__ = []\n"
FIELDS = f"  training : bool\n  mean : Tensor\n  inner : {MODULE}.Inner\n"
ENCODE = f"  def encode(self: {MODULE}.M,\n    x: Tensor) -> Tensor:\n"
HELPER = f"  def helper(self: {MODULE}.M, x: Tensor, n: int=2) -> Tensor:\n    return torch.add(x, n)\n"
INNER = (
    f"class Inner(Module):\n  scale : float\n  def forward(self: {MODULE}.Inner, x: Tensor) -> Tensor:\n    return x\n"
)
FUNCTION = "def double(x: Tensor) -> Tensor:\n  return torch.add(x, x)\n"


def check(source: str, member: str = "code/__torch__/models/m.py") -> Code:
    """Return the code of a member whose methods keep every rule."""
    code = check_code({member: source.encode()}, Path("model.pt"))
    code.check_methods(f"{MODULE}.M", ["encode", "decode"])
    return code


def method_with(lines: str) -> str:
    """Return the code of a model whose method `encode` begins with `lines`."""
    return FUNCTION + HEAD + FIELDS + ENCODE + textwrap.indent(lines, "    ") + "    return x\n" + HELPER + INNER


@pytest.mark.parametrize(
    "lines",
    [
        "k = torch.add(x, self.mean)\nx = (self).helper(k, 3, )\n",
        "x = (self).helper(x, )\n",
        "x = __torch__.models.m.double(x, )\n",
        "inner = self.inner\nx = (inner).forward(x, )\n",
        "for i in range(torch.len(self.mean)):\n  x = torch.add(x, i)\n",
        "t = (x, 3)\na, b = t\nx = torch.add(t[0], t[1])\n",
        "n = int((torch.size(x))[0])\nx = torch.reshape(x, [n, -1])\n",
        "if torch.eq((torch.size(x))[0], 7):\n  x = torch.add(x, 1)\nelse:\n  pass\n",
        "if self.training:\n  x = torch.relu_(x)\nelse:\n  pass\n",
        's = getattr(self, "mean")\nx = torch.mul(x, s)\n',
    ],
)
def test_code_that_keeps_every_rule_is_accepted(lines: str) -> None:
    code = check(method_with(lines))
    assert f"{MODULE}.M" in code.classes
    assert f"{MODULE}.double" in code.functions


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1\n", "has the statement x = 1 outside of a class"),
        (HEAD + HEAD, "defines M twice"),
        (HEAD + FUNCTION.replace("double", "M"), "defines M twice"),
        (HEAD + HELPER + HELPER, "defines M.helper twice"),
        (HEAD + "  a : int\n  a : int\n", "declares the attribute a twice"),
        (HEAD + '  __annotations__["a"] = int\n  a : int\n', "declares the attribute a twice"),
        (HEAD + "  __a : int\n", "declares the attribute __a"),
        (HEAD + "  a : Device\n", "has the type Device"),
        (HEAD + "  a : Dict[str, int]\n", "has the type Dict[str, int]"),
        (HEAD + "  pass\n", "has the statement pass in the class M"),
        ("class M(Module, Module):\n  pass\n", "whose base is not Module"),
        ("def __reduce__(x: Tensor) -> Tensor:\n  return x\n", "defines __reduce__"),
        ("def f(*x) -> Tensor:\n  return x\n", "with decorators or special arguments"),
        ("@f\ndef f(x: Tensor) -> Tensor:\n  return x\n", "with decorators or special arguments"),
        ("def f(x: Tensor):\n  return x\n", "without a type of its result"),
        ("def f(x: Device) -> Tensor:\n  return x\n", "has the type Device"),
        (
            "def f(x: Tensor) -> Tensor:\n  def g(x: Tensor) -> Tensor:\n    return x\n  return x\n",
            "defines g inside of",
        ),
        ("def f(x: Tensor) -> Tensor:\n  y : Device = x\n  return x\n", "has the type Device"),
        ("def f(x: Tensor, y: int=x) -> Tensor:\n  return x\n", "has the value x where only numbers and texts"),
        ('def f(x: Tensor) -> Tensor:\n  y = ""\n  return x\n', "has two quotation marks in a row"),
        ("def f(x: Tensor) -> Tensor:\n  return torch.add(x, 1j)\n", "has the constant 1j"),
        ("def f(x: Tensor) -> Tensor:\n  return ...\n", "has the constant ..."),
        ("def f(x: Tensor) -> Tensor:\n  return torch.add(x\n", "cannot be parsed (SyntaxError)"),
        (" " * (2 * MAX_DEPTH) + "x\n", "has blocks nested more than"),
        ("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1) + "\n", "has brackets nested more than"),
        ("def f(x: Tensor) -> Tensor:\n  return x + x\n", "has x + x, a BinOp"),
        ("def f(x: Tensor) -> Tensor:\n  return lambda: x\n", "has lambda: x, a Lambda"),
        (FUNCTION + "# a comment\n", "has the character '#'"),
        ("def f(x: Tensor) -> Tensor:\n  return torch.from_file(x)\n", "calls torch.from_file"),
        ("def f(x: Tensor) -> Tensor:\n  return open(x)\n", "calls open"),
    ],
)
def test_definition_that_no_artifact_has_is_refused(source: str, reason: str) -> None:
    with pytest.raises(ArtifactUnsafe) as refusal:
        check(source)
    assert reason in str(refusal.value)
    assert str(refusal.value).startswith("model.pt: the code in code/__torch__/models/m.py ")


def test_class_that_replaces_a_class_of_torch_is_refused() -> None:
    for member in ("code/__torch__/torch/classes.py", "code/__torch__/torch/classes/rnn.py"):
        with pytest.raises(ArtifactUnsafe, match=r"defines a class of torch\.classes"):
            check(INNER, member)


FOR_7_ROWS = "if torch.eq((torch.size(x))[0], 7):\n  {}\nelse:\n  pass\n"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (FOR_7_ROWS.format("return x"), "returns from within a loop or a branch"),
        ("for i in range(2):\n  return x\n", "returns from within a loop or a branch"),
        ("for i in range(2):\n  pass\nelse:\n  pass\n", "has the statement for i in range(2)"),
        ("for i in [1]:\n  pass\n", "has a loop over [1]"),
        ("torch = x\n", "assigns to torch"),
        ("inf = x\n", "assigns to inf"),
        ("x[0] = x\n", "assigns to x[0]"),
        ("m = self\nm = self.inner\n", "assigns another module or function to m"),
        (FOR_7_ROWS.format("m = self"), "assigns another module or function to m"),
        ("m = self\nm = x\n", "assigns a value to m, which is a module or a text"),
        ("k = -x\n", "has the expression -x"),
        ("k = nothing\n", "uses the name nothing"),
        ("k = self.nothing\n", "uses the attribute nothing, which __torch__.models.m.M does not declare"),
        ("k = x.mean\n", "uses .mean of something that is not a module"),
        ("k = __torch__.models.m.nothing\n", "uses __torch__.models.m.nothing"),
        ("k = (x[0])(x)\n", "calls x[0]"),
        ("k = (self).nothing(x, )\n", "calls nothing, which __torch__.models.m.M does not define"),
        ("k = getattr(self, x)\n", "calls getattr(self, x)"),
        ("k = range(3)\n", "calls range(3)"),
        ("k = int(3, 4)\n", "calls int(3, 4)"),
        ("k = (self).helper(x=x)\n", "calls helper with named arguments"),
        (FOR_7_ROWS.format("k = (self).helper(x)"), "in only some requests"),
        ("k = (self).helper(x, 1, 2, )\n", "calls helper with 4 arguments, it has 3"),
        ("k = (self).helper()\n", "calls helper with 1 arguments, it has 3"),
        ("k = (self).helper(x, torch.sum(x), )\n", "gives helper the number n, which depends on the values of a row"),
        ("k = torch.add()\n", "without arguments"),
        ("k = torch.add(x, self)\n", "uses a module, a function or a text as a value"),
        ("k = (torch.size(x))[torch.sum(x)]\n", "takes an element at a place that depends on the values of a row"),
        ("t = (x, x)\nk = t[2]\n", "takes element 2 of 2"),
        ("k = torch.relu_(x)\n", "would change a weight or a row"),
        ("k = (self).encode(x, )\n", "calls encode from itself"),
        ("for i in range((torch.size(x))[0]):\n  pass\n", "whose length is not that of a weight"),
        (FOR_7_ROWS.format("for i in range(2):\n    pass"), "has the loop over range(2) in only some requests"),
        ("if torch.eq(x, 7):\n  pass\nelse:\n  pass\n", "which depends on the values of a row"),
        ("k = _0(x)\n", "calls _0"),
        ("k = unchecked_cast(Tensor, x)\n", "only List[int] may follow unchecked_cast"),
        ("k = int(x)\n", "which needs numbers that do not depend on the values of a row"),
        (FOR_7_ROWS.format("k = torch.cat([x, x])"), "in only some requests"),
        ("k = torch.reshape(x, [int(torch.sum(x)), 1])\n", "numbers that do not depend on the values of a row"),
        ("k = torch.add(x, x, out=x)\n", "with the argument out"),
        ("k = torch.append([1], 2)\n", "for a list that is not empty at first"),
        ("k = torch.where(x)\n", "with a size that depends on the values of a row"),
        ("k = torch.index(x, [x])\n", "with places that are not those of torch.searchsorted"),
        ("k = torch.floordiv(3, -1)\n", "which does not divide by a positive number"),
        ('k = torch.format(torch.format("a", 1), 2)\n', "with a text that torch.format has made"),
    ],
)
def test_statement_that_no_artifact_has_is_refused(lines: str, reason: str) -> None:
    with pytest.raises(ArtifactUnsafe) as refusal:
        check(method_with(lines))
    assert reason in str(refusal.value)


def methods_that_call(levels: int) -> str:
    """Return methods f0 to f`levels`: f0 runs 10 operators, and each other one calls the one before it 10 times.

    A call counts as an operator, so f1 runs 110 operators, f2 1,110 and f3 11,110.
    """
    bodies = ["    x = torch.add(x, 1)\n"] + [f"    x = (self).f{n}(x, )\n" for n in range(levels)]
    return "".join(
        f"  def f{n}(self: {MODULE}.M, x: Tensor) -> Tensor:\n{body * 10}    return x\n"
        for n, body in enumerate(bodies)
    )


def test_method_whose_calls_multiply_is_refused() -> None:
    with pytest.raises(ArtifactUnsafe, match=f"runs more than {MAX_CALLS} operators"):
        check(HEAD + ENCODE + "    return (self).f9(x, )\n" + methods_that_call(9))


@pytest.mark.parametrize(("extra", "is_allowed"), [(1, True), (2, False)])
def test_method_with_too_many_operators_is_refused(extra: int, is_allowed: bool) -> None:
    lines = "    x = (self).f3(x, )\n" + "    x = (self).f2(x, )\n" * 8 + "    x = torch.add(x, 1)\n" * extra
    source = HEAD + ENCODE + lines + "    return x\n" + methods_that_call(3)
    count = 11_111 + 8 * 1_111 + extra
    assert (count <= MAX_CALLS) == is_allowed
    if is_allowed:
        check(source)
    else:
        with pytest.raises(ArtifactUnsafe, match=f"runs {count} operators in the method encode, in loops 0 deep"):
            check(source)


def test_attribute_whose_class_is_not_in_the_code_is_refused() -> None:
    source = HEAD + "  inner : __torch__.models.other.Other\n" + ENCODE + "    k = self.inner\n    return x\n"
    with pytest.raises(
        ArtifactUnsafe, match=r"the type __torch__\.models\.other\.Other, which the code does not define"
    ):
        check(source)


def test_model_whose_class_is_not_in_the_code_is_refused() -> None:
    with pytest.raises(ArtifactUnsafe, match=r"has a model of the class __torch__\.models\.m\.M, which the code does"):
        check(INNER)


@pytest.mark.parametrize(("depth", "is_allowed"), [(MAX_DEPTH - 1, True), (MAX_DEPTH + 2, False)])
def test_too_deeply_nested_calls_are_refused(depth: int, is_allowed: bool) -> None:
    methods = f"  def f0(self: {MODULE}.M, x: Tensor) -> Tensor:\n    return x\n" + "".join(
        f"  def f{n}(self: {MODULE}.M, x: Tensor) -> Tensor:\n    return (self).f{n - 1}(x, )\n"
        for n in range(1, depth)
    )
    source = HEAD + ENCODE + f"    return (self).f{depth - 1}(x, )\n" + methods
    if is_allowed:
        check(source)
    else:
        with pytest.raises(ArtifactUnsafe, match=f"nests calls more than {MAX_DEPTH} deep"):
            check(source)


def pickled(type_: str, state: Any) -> PickledObject:
    found = PickledObject()
    found.type = f"{MODULE}.{type_}"
    found.state = state
    return found


TENSOR = PickledTensor()
DECLARED = HEAD + (
    "  n : int\n  f : Final[float] = 0.5\n  o : Optional[Tensor]\n  l : List[int]\n  t : Tuple[Tensor, int]\n"
    f"  none : NoneType\n  nil : None\n  inner : {MODULE}.Inner\n"
)
STATE = {
    "n": 1, "o": None, "l": [1, 2], "t": (TENSOR, 3), "none": None, "nil": None,
    "inner": pickled("Inner", {"scale": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"o": TENSOR}, None),
        ({"l": []}, None),
        ({"n": True}, "declares the type int for __torch__.models.m.M.n, but the pickle has another type"),
        ({"o": 1}, "declares the type Tensor"),
        ({"l": (1, 2)}, "declares the type List[int]"),
        ({"l": [1, 2.0]}, "declares the type int"),
        ({"t": (TENSOR,)}, "declares the type Tuple[Tensor, int]"),
        ({"t": (TENSOR, TENSOR)}, "declares the type int"),
        ({"none": 0}, "declares the type NoneType"),
        ({"nil": 0}, "declares the type None for"),
        ({"inner": pickled("M", {})}, "declares the type __torch__.models.m.Inner"),
        ({"inner": pickled("Inner", {"scale": 1})}, "declares the type float for __torch__.models.m.Inner.scale"),
        ({"inner": pickled("Inner", None)}, "declares the attribute scale, which the pickle lacks"),
    ],
)
def test_attribute_in_the_pickle_must_have_the_declared_type(changes: dict[str, Any], reason: str | None) -> None:
    code = check_code({"code/__torch__/models/m.py": (DECLARED + INNER).encode()}, Path("model.pt"))
    model = pickled("M", STATE | changes)
    if reason is None:
        code.check_attributes(model)
    else:
        with pytest.raises(ArtifactUnsafe) as refusal:
            code.check_attributes(model)
        assert reason in str(refusal.value)
