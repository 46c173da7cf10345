"""Compile the functions of a module: from Python that runs once to straight-line TorchScript for any number of rows."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from models.adopted import Network
from models.artifact import define_module, trace_methods
from training.adoption.copying import weights_of
from training.adoption.draws import without_noise
from training.adoption.inspection import Functions
from training.adoption.rendering import Code, Renderer, Shape
from training.adoption.user_code import line_of_error, shown_line
from training.errors import AdoptionError, RowsMadeConstant

TRACED_ROWS = (3, 5)  # a size that is the same for both numbers of rows does not depend on this number
OTHER_ROWS = (1, 2, 7, 16)  # numbers of rows with which the compiled functions are compared
TOLERANCE = 1e-6  # relative to the largest output


class _Traced(nn.Module):
    """The functions of a module in the form in which an artifact has them."""

    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self.module = functions.module
        self._functions = functions

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean [B, K] and the standard deviation [B, K] for x [B, D]."""
        mean, spread = self._functions.encode_rows(x)
        if spread is None:
            return mean, torch.zeros_like(mean)
        return mean, torch.exp(0.5 * spread) if self._functions.spread == "log_variance" else spread

    def decode(self, z: Tensor) -> Tensor:
        """Return the reconstruction [B, D] for z [B, K]."""
        return self._functions.decode_rows(z)

    def reconstruct(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the reconstruction [B, D], and the latents [B, K] if there are any, for x [B, D]."""
        x_hat, code = self._functions.reconstruct_rows(x)
        return x_hat if code is None else (x_hat, code)


def compile_functions(functions: Functions, rows: Tensor) -> tuple[torch.jit.ScriptModule, list[str]]:
    """Return a module with the compiled functions, and notes.

    The compiled module has `encode` and `decode`, or `reconstruct` if the module has no latents that it decodes.

    Args:
        functions: the functions of the user's module.
        rows: rows in model units, [N, D]; the compiled functions are compared with the module on all of them.

    Raises:
        AdoptionError: a function cannot be compiled, draws random numbers, or gives other results than the module.
    """
    traced = _Traced(functions)
    names = ("encode", "decode") if functions.encode is not None else ("reconstruct",)
    notes = _check_eager(traced, names, rows)
    with without_noise():
        examples, others = (_examples(traced, names, rows[:count]) for count in TRACED_ROWS)
    found, lines = _trace(traced, examples, others)
    _compare(traced, found, names, rows, lines)
    return found, notes


def _examples(traced: _Traced, names: tuple[str, ...], rows: Tensor) -> dict[str, Tensor]:
    """Return the inputs of each function for `rows` [B, D]."""
    if "decode" not in names:
        return {"reconstruct": rows}
    return {"encode": rows, "decode": traced.encode(rows)[0].clone()}


def _check_eager(traced: _Traced, names: tuple[str, ...], rows: Tensor) -> list[str]:
    """Check that the functions are deterministic and depend on values in no way that an artifact cannot have.

    Return notes on noise that was left out.
    """
    rows = rows[: max(OTHER_ROWS)]
    with without_noise(weights_of(traced), checks_reads=True) as mode, _errors_of_user("run"):
        inputs = _examples(traced, names, rows)
        together = {name: _as_tuple(getattr(traced, name)(inputs[name])) for name in names}
        again = {name: _as_tuple(getattr(traced, name)(inputs[name])) for name in names}
        alone = {
            name: [_as_tuple(getattr(traced, name)(inputs[name][row : row + 1])) for row in range(len(rows))]
            for name in names
        }
    for name in names:
        for place, output in enumerate(together[name]):
            _require_finite(name, output)  # before comparisons: NaN differs from itself
            if not torch.equal(output, again[name][place]):
                raise AdoptionError(
                    f"{name} gives two results for the same rows, even in evaluation mode: leave out what it changes "
                    "or draws when it runs"
                )
            single = torch.cat([parts[place] for parts in alone[name]])
            if not (error := _relative_error(single, output)) <= TOLERANCE:  # `not <=`, so that NaN is refused too
                raise AdoptionError(
                    f"{name} gives a row another result alone than among {len(rows)} rows (relative difference "
                    f"{error:.2g}): a row's result must not depend on other rows; call eval() on all parts, and leave "
                    "out statistics of the batch"
                )
    lines = list(dict.fromkeys(mode.lines))
    return [f"{line} draws normal noise: the artifact has its mean" for line in lines]


def _trace(
    traced: _Traced, examples: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> tuple[torch.jit.ScriptModule, list[str]]:
    """Return the compiled functions, and the lines at which the tracer made a constant of a number."""
    with without_noise() as mode, warnings.catch_warnings(record=True) as caught, _errors_of_user("trace"):
        warnings.simplefilter("always")
        script, other = (trace_methods(traced, dict(each)) for each in (examples, others))
    shown = (shown_line(each.filename, each.lineno) for each in caught if issubclass(each.category, TracerWarning))
    code = Code()
    for name in examples:
        graph, other_graph = (getattr(each, name).inlined_graph for each in (script, other))
        shapes = _constant_sizes(graph, other_graph)
        Renderer(code, script, shapes, TRACED_ROWS[0]).render(name, graph)
    return define_module(Network(), code.weights, code.methods), [
        line for line in dict.fromkeys([*mode.constants, *shown]) if line
    ]


def _constant_sizes(graph: Any, other: Any) -> dict[str, Shape]:
    """Return the shapes of all tensors in `graph` by name. None stands for a size that depends on the number of rows.

    Args:
        graph: a trace.
        other: a trace of the same function with another number of rows.
    """
    # torch keeps equal constants as one, and the number of rows may equal another number.
    nodes, others = ([node for node in each.nodes() if node.kind() != "prim::Constant"] for each in (graph, other))
    if [node.kind() for node in nodes] != [node.kind() for node in others]:
        raise AdoptionError(
            "the module runs other operators for another number of rows: leave out branches and loops that depend on "
            "the number of rows"
        )
    values = list(zip(graph.inputs(), other.inputs(), strict=True))
    for node, same in zip(nodes, others, strict=True):
        values += zip(node.outputs(), same.outputs(), strict=True)
    found: dict[str, Shape] = {}
    for value, other_value in values:
        sizes, other_sizes = _sizes_of(value), _sizes_of(other_value)
        if sizes is not None and other_sizes is not None and len(sizes) == len(other_sizes):
            pairs = zip(sizes, other_sizes, strict=True)
            found[value.debugName()] = [one if one == two else None for one, two in pairs]
    return found


def _sizes_of(value: Any) -> list[int] | None:
    sizes: list[int] | None = value.type().sizes() if isinstance(value.type(), torch._C.TensorType) else None
    return sizes


def _compare(
    traced: _Traced, compiled: torch.jit.ScriptModule, names: tuple[str, ...], rows: Tensor, lines: list[str]
) -> None:
    """Compare the compiled functions with those of the module, for several numbers of rows. Raises AdoptionError."""
    where = f" at {lines[0]}" if lines else ""
    for count in (*OTHER_ROWS, len(rows)):
        some = rows[:count]
        with without_noise():
            inputs = _examples(traced, names, some)
            expected = {name: _as_tuple(getattr(traced, name)(inputs[name])) for name in names}
            try:
                found = {name: _as_tuple(getattr(compiled, name)(inputs[name])) for name in names}
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1][:150]
                raise RowsMadeConstant(
                    f"the compiled module fails on {count} rows ({reason}): the number of rows was made a "
                    f"constant{where}; use x.shape[0] or -1 instead of len(x), int(...) or a fixed number of rows"
                ) from error
        for name in names:
            for ours, theirs in zip(found[name], expected[name], strict=True):
                _require_finite(name, theirs)
                is_other = ours.shape != theirs.shape
                difference = math.inf if is_other else _relative_error(ours, theirs)
                if is_other:
                    raise RowsMadeConstant(
                        f"{name} gives another shape on {count} rows when compiled: the number of rows was made a "
                        f"constant{where}; use x.shape[0] or -1 instead of len(x), int(...) or a fixed number of rows"
                    )
                if not difference <= TOLERANCE:  # `not <=`, so that NaN is refused too
                    detail = f"relative difference {difference:.2g}"
                    raise AdoptionError(
                        f"{name} gives other results when compiled than in Python, on {count} rows ({detail}): a "
                        f"number was made a constant{where}; leave out what depends on the number or the values of rows"
                    )


def _require_finite(name: str, output: Tensor) -> None:
    """Raise AdoptionError if an output of the function `name` of the module has NaN or infinite values."""
    finite = output.isfinite()
    if not bool(finite.all()):
        row = int((~finite.reshape(len(output), -1).all(dim=1)).nonzero()[0])
        what = "NaN" if bool(output[row].isnan().any()) else "infinite values"
        raise AdoptionError(
            f"{name} gives {what} for {int((~finite.reshape(len(output), -1).all(dim=1)).sum())} of the {len(output)} "
            "rows given: check the rows and the scaler, or limit the values in the module, as with torch.clamp"
        )


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest number in `expected`."""
    scale = max(float(expected.abs().max()), 1e-6) if expected.numel() else 1.0
    return float((found - expected).abs().max()) / scale if expected.numel() else 0.0


def _as_tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@contextmanager
def _errors_of_user(what: str) -> Iterator[None]:
    """Raise AdoptionError in place of an error of the user's code or of the tracer."""
    try:
        yield
    except AdoptionError:
        raise
    except Exception as error:
        line = line_of_error(error.__traceback__)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        place = f" at {line}" if line else ""
        raise AdoptionError(f"cannot {what} the module{place}: {reason}; write it with operators on tensors") from error
