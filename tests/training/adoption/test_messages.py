"""Messages name options on the command line, and arguments in Python."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from torch import nn

import elbo
from elbo.cli import app
from training.adoption import arguments
from training.adoption.adopt import adopt
from training.adoption.arguments import OPTIONS, named_as_options
from training.errors import AdoptionError

FOLDER = Path(arguments.__file__).parent
ROWS = np.random.default_rng(0).normal(size=(90, 6)).astype(np.float32)
IN_PYTHON = re.compile(r"\b(" + "|".join([*OPTIONS, "images"]) + r")=")
ON_THE_COMMAND_LINE = re.compile(r"(?<![\w-])--[a-z]")


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the texts of a module that are neither docstrings nor arguments of `by_interface`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "by_interface":
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        yield from texts(node)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_no_message_names_an_argument_for_one_interface_only(path: Path) -> None:
    if path.stem == "arguments":
        return
    found = list(texts(ast.parse(path.read_text())))
    assert [text for text in found if IN_PYTHON.search(text) or ON_THE_COMMAND_LINE.search(text)] == []


def test_names_are_those_of_the_interfaces() -> None:
    assert set(OPTIONS) - set(inspect.signature(elbo.adopt).parameters) == {"weights"}
    command: Any = typer.main.get_command(app)
    known = {option for parameter in command.commands["adopt"].params for option in parameter.opts}
    assert {word for text in OPTIONS.values() for word in text.split() if word.startswith("--")} <= known


class Projection(nn.Module):
    """A module without an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        return self.layer(x)


CASES: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "few rows": (ROWS[:30], {}, "calibration_rows has 30", "--calibrate has 30"),
    "no fit rows": (ROWS[:30], {}, "as fit_rows=", "as --fit-rows"),
    "shape": (ROWS, {"shape": (2, 2)}, "shape=[2, 2] has 4", "--shape 2x2 has 4"),
    "fit rows": (ROWS, {"fit_rows": ROWS[:, :4]}, "fit_rows have rows", "--fit-rows have rows"),
    "prior": (ROWS, {"prior": "standard"}, "leave prior= out", "leave --prior out"),
    "one name": (ROWS, {"encode": "layer"}, "encode= is given without decode=", "--encode is given without --decode"),
    "unknown": (ROWS, {"encode": "no", "decode": "layer"}, "encode='no': Projection", "--encode no: Projection"),
}


@pytest.mark.parametrize("case", CASES)
def test_refusal_names_the_option_on_the_command_line_and_the_argument_in_python(case: str, tmp_path: Path) -> None:
    rows, options, in_python, on_the_command_line = CASES[case]
    with pytest.raises(AdoptionError) as error:
        adopt(Projection(), rows, name="m", artifacts=tmp_path, **options)
    assert in_python in str(error.value)
    with named_as_options(), pytest.raises(AdoptionError) as error:
        adopt(Projection(), rows, name="m", artifacts=tmp_path, **options)
    assert on_the_command_line in str(error.value)
    assert not IN_PYTHON.search(str(error.value))
