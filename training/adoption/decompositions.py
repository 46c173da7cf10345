"""Operators of torch that an artifact may not have, written with operators that it may have.

An artifact may come from anywhere, and some operators of torch do not check their arguments: see
`models.allowed_code.ADOPTED`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from training.errors import AdoptionError

Shape = Sequence[int]


class Text(str):
    """An expression of the source, as opposed to a string that is an argument."""

    __slots__ = ()


class Writer(Protocol):
    """Writes calls of operators. A result is the expression of a value in the source."""

    def call(self, name: str, *arguments: Any) -> Text:
        """Write the call of `name` and return its result. Arguments are expressions, numbers, tensors or lists."""

    def unpack(self, name: str, count: int, *arguments: Any) -> list[Text]:
        """Write the call of `name`, which returns a list of `count` tensors, and return them."""


def batch_norm(write: Writer, given: Mapping[str, Any], sizes: Shape) -> Text:
    """Write batch normalisation in evaluation mode, which is an affine map of each channel."""
    mean, variance, weight, bias = (given[key] for key in ("running_mean", "running_var", "weight", "bias"))
    factor = (variance.double() + given["eps"]).rsqrt()
    factor = factor if weight is None else factor * weight.double()
    offset = -mean.double() * factor
    offset = offset if bias is None else offset + bias.double()
    shape = [-1, *[1] * (len(sizes) - 2)]
    scaled = write.call("mul", given["input"], factor.float().reshape(shape))
    return write.call("add", scaled, offset.float().reshape(shape))


def gelu_by_tanh(write: Writer, given: Mapping[str, Any]) -> Text:
    """Write the approximation of GELU by tanh (Hendrycks & Gimpel 2016, "Gaussian error linear units", section 2)."""
    x = given["self"]
    cubic = write.call("mul", write.call("mul", write.call("mul", x, x), x), 0.044715)
    inner = write.call("tanh", write.call("mul", write.call("add", x, cubic), math.sqrt(2.0 / math.pi)))
    return write.call("mul", write.call("mul", x, 0.5), write.call("add", inner, 1.0))


def attention(write: Writer, given: Mapping[str, Any], sizes: Shape, key_sizes: Shape) -> Text:
    """Write scaled dot-product attention (Vaswani et al. 2017, "Attention is all you need", eq. 1).

    Args:
        sizes: the sizes of the queries, [..., L, E].
        key_sizes: the sizes of the keys, [..., S, E].
    """
    scale = given["scale"] or 1.0 / math.sqrt(sizes[-1])
    scores = write.call(
        "matmul", write.call("mul", given["query"], scale), write.call("transpose", given["key"], -2, -1)
    )
    mask = given["attn_mask"]
    if given["is_causal"]:
        mask = torch.ones(sizes[-2], key_sizes[-2], dtype=torch.bool).tril()
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    if mask is not None:
        scores = write.call("add", scores, mask)
    return write.call("matmul", write.call("softmax", scores, -1), given["value"])


def resize(write: Writer, name: str, given: Mapping[str, Any], sizes: Shape, target: Shape) -> Text:
    """Write an upsampling: each axis is multiplied by a matrix, which is the upsampled unit matrix."""
    mode = next((word for word in ("exact", "nearest", "cubic", "linear") if word in name), "")
    axes = len(sizes) - 2
    factors = given.get("scale_factors") or [given.get(key) for key in ("scales_d", "scales_h", "scales_w")[-axes:]]
    factors = [given["scales"]] if "scales" in given else list(factors)
    found = given["input"] if "input" in given else given["self"]
    for axis, (size, result) in enumerate(zip(sizes[2:], target[2:], strict=True), start=2):
        matrix = _resizing_matrix(mode, size, result, factors[axis - 2], bool(given.get("align_corners")))
        if axis == len(sizes) - 1:
            found = write.call("matmul", found, matrix)
        elif axis == len(sizes) - 2:
            found = write.call("matmul", matrix.T.contiguous(), found)
        else:
            last = write.call("matmul", write.call("transpose", found, axis, -1), matrix)
            found = write.call("transpose", last, axis, -1)
    return Text(found)


def _resizing_matrix(mode: str, size: int, result: int, factor: float | None, corners: bool) -> Tensor:
    """Return the matrix [size, result] by which an axis of `size` values is multiplied in order to resize it."""
    kind = {"exact": "nearest-exact", "nearest": "nearest", "cubic": "bicubic", "linear": "bilinear"}[mode]
    to: dict[str, Any] = {"size": (size, result)} if factor is None else {"scale_factor": (1.0, factor)}
    if mode in ("cubic", "linear"):
        to["align_corners"] = corners
    return functional.interpolate(torch.eye(size)[None, None], mode=kind, **to)[0, 0]


def pad(write: Writer, mode: str, given: Any, amounts: Sequence[int], sizes: Shape) -> Text:
    """Write a padding with values of the tensor itself, axis by axis.

    Args:
        mode: replicate, circular or reflect.
        given: the tensor.
        amounts: the numbers of places to add, before and after, of the last axis, the axis before it, and so on.
        sizes: the sizes of the tensor.
    """
    if min(amounts) < 0:
        raise AdoptionError(f"pads by a negative number in the mode {mode}: cut the tensor with a slice instead")
    for place, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        axis = len(sizes) - 1 - place
        starts = _sources(mode, sizes[axis], before, after)
        parts = [write.call("narrow", given, axis, start, 1) if start is not None else given for start in starts]
        given = write.call("cat", parts, axis) if before or after else given
    return Text(given)


def _sources(mode: str, size: int, before: int, after: int) -> list[int | None]:
    """Return the places of which a padded axis consists. None stands for the axis itself."""
    if mode == "circular":
        return [*range(size - before, size), None, *range(after)]
    if mode == "reflect":
        return [*range(before, 0, -1), None, *range(size - 2, size - 2 - after, -1)]
    return [*[0] * before, None, *[size - 1] * after]


def einsum(write: Writer, equation: str, tensors: Sequence[Any], shapes: Sequence[Sequence[int | None]]) -> Any:
    """Write a sum over products of one or two tensors as a matrix product.

    Args:
        equation: such as "btf,fg->btg".
        tensors: the tensors.
        shapes: their shapes. None stands for a size that depends on the number of rows.
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    is_plain = all(len(set(term)) == len(term) for term in (*terms, out)) and equation.replace(" ", "").isascii()
    if not arrow or "." in equation or len(terms) > 2 or not is_plain:
        raise AdoptionError(
            f"uses einsum with {equation!r}: expected one or two tensors, each index once in a tensor, and ->; "
            "write it with torch.matmul and permute"
        )
    known: dict[str, int | None] = {}
    for term, shape in zip(terms, shapes, strict=True):
        known.update(zip(term, shape, strict=True))
    summed = [_summed(write, *pair, (*terms, out)) for pair in zip(tensors, terms, strict=True)]
    tensors, terms = [tensor for tensor, _ in summed], [term for _, term in summed]
    if len(terms) == 1:
        return _permuted(write, tensors[0], terms[0], out)
    both = [index for index in terms[0] if index in terms[1]]
    batch, inner = [index for index in both if index in out], [index for index in both if index not in out]
    rows, columns = ([index for index in term if index not in both] for term in terms)
    first = _grouped(write, tensors[0], terms[0], (*([index] for index in batch), rows, inner), known)
    second = _grouped(write, tensors[1], terms[1], (*([index] for index in batch), inner, columns), known)
    product = write.call("matmul", first, second)
    order = "".join((*batch, *rows, *columns))
    found = write.call("reshape", product, [_size(known, [index]) for index in order])
    return _permuted(write, found, order, out)


def _summed(write: Writer, tensor: Any, term: str, others: Sequence[str]) -> tuple[Any, str]:
    """Return `tensor` summed over the indices that no other term has, and its remaining indices."""
    alone = [place for place, index in enumerate(term) if sum(index in other for other in others) == 1]
    if not alone:
        return tensor, term
    return write.call("sum", tensor, alone), "".join(index for place, index in enumerate(term) if place not in alone)


def _grouped(
    write: Writer, tensor: Any, term: str, groups: Sequence[Sequence[str]], known: Mapping[str, int | None]
) -> Text:
    """Return `tensor` with one axis for each group of its indices."""
    order = "".join(index for group in groups for index in group)
    return write.call("reshape", _permuted(write, tensor, term, order), [_size(known, group) for group in groups])


def _permuted(write: Writer, tensor: Any, term: str, order: str) -> Any:
    return tensor if term == order else write.call("permute", tensor, [term.index(index) for index in order])


def _size(known: Mapping[str, int | None], group: Sequence[str]) -> int:
    """Return the size of an axis for a group of indices; -1 if it depends on the number of rows."""
    sizes = [known[index] for index in group]
    return -1 if None in sizes else math.prod(size for size in sizes if size is not None)


def recurrent(write: Writer, name: str, given: Mapping[str, Any], sizes: Shape) -> list[Text]:
    """Write the layers of an LSTM, a GRU or a plain recurrent network. Return the outputs and the last states.

    Args:
        name: lstm, gru, rnn_tanh or rnn_relu.
        given: the arguments of the operator.
        sizes: the sizes of its input.
    """
    parameters, has_biases = list(given["params"]), given["has_biases"]
    directions = 2 if given["bidirectional"] else 1
    per_cell = 4 if has_biases else 2
    if len(parameters) != per_cell * directions * given["num_layers"]:
        raise AdoptionError(f"uses {name} with projections (proj_size): expected a network without them")
    time = 1 if given["batch_first"] else 0
    states = given["hx"] if name == "lstm" else [given["hx"]]
    inputs = given["input"]
    finals: list[list[Text]] = [[] for _ in states]
    for layer in range(given["num_layers"]):
        found = []
        for direction in range(directions):
            place = layer * directions + direction
            weights = parameters[place * per_cell : (place + 1) * per_cell]
            state = [_initial(write, each, place) for each in states]
            gates = write.call("linear", inputs, weights[0], *weights[2:3])  # of all steps at once
            steps = [write.call("select", gates, time, step) for step in range(sizes[time])]
            outputs = []
            for step in reversed(steps) if direction else steps:
                state = cell(write, name, step, state, weights)
                outputs.append(state[0])
            found.append(write.call("stack", outputs[::-1] if direction else outputs, time))
            for final, part in zip(finals, state, strict=True):
                final.append(part)
        inputs = write.call("cat", found, 2) if directions == 2 else found[0]
    return [inputs, *(write.call("stack", final, 0) for final in finals)]


def _initial(write: Writer, state: Any, place: int) -> Any:
    """Return the first state of one layer and direction; None if it is zero."""
    return None if state is None else write.call("select", state, 0, place)


def cell(write: Writer, name: str, from_input: Text, state: Sequence[Any], weights: Sequence[Any]) -> list[Text]:
    """Write one step. Return the new hidden state, and the new cell state of an LSTM.

    Hochreiter & Schmidhuber 1997, "Long short-term memory"; Cho et al. 2014, "Learning phrase representations using RNN
    encoder-decoder", with the gates in the order of torch.

    Args:
        from_input: the product of the input and its weight, plus its bias, [B, gates H].
        state: the hidden state [B, H], and the cell state of an LSTM, [B, H]; None for a state of zeros.
        weights: the weight of the input, the weight of the hidden state, and the bias of each if there are biases.
    """
    input_weight, hidden_weight, *biases = weights
    width = input_weight.shape[0] // {"lstm": 4, "gru": 3}.get(name.partition("_")[0], 1)
    hidden = state[0]
    if hidden is None:
        from_hidden: Any = biases[1] if biases else None
    else:
        from_hidden = write.call("linear", hidden, hidden_weight, *biases[1:])
    if name.startswith("gru"):
        return [_gru(write, from_input, from_hidden, hidden, width)]
    gates = from_input if from_hidden is None else write.call("add", from_input, from_hidden)
    if not name.startswith("lstm"):
        return [write.call("relu" if name.startswith("rnn_relu") else "tanh", gates)]
    into, forget, value, out = write.unpack("split", 4, gates, width, 1)
    added = write.call("mul", write.call("sigmoid", into), write.call("tanh", value))
    memory = added
    if state[1] is not None:
        kept = write.call("mul", write.call("sigmoid", forget), state[1])
        memory = write.call("add", kept, added)
    return [write.call("mul", write.call("sigmoid", out), write.call("tanh", memory)), memory]


def _gru(write: Writer, from_input: Text, from_hidden: Any, hidden: Any, width: int) -> Text:
    if from_hidden is None:  # no state and no bias
        _, update, new = write.unpack("split", 3, from_input, width, 1)
        candidate = write.call("tanh", new)
        return write.call("sub", candidate, write.call("mul", write.call("sigmoid", update), candidate))
    reset, update, new = write.unpack("split", 3, from_input, width, 1)
    if isinstance(from_hidden, Tensor):
        of_reset, of_update, of_new = from_hidden.split(width)
    else:
        of_reset, of_update, of_new = write.unpack("split", 3, from_hidden, width, 1)
    reset = write.call("sigmoid", write.call("add", reset, of_reset))
    update = write.call("sigmoid", write.call("add", update, of_update))
    candidate = write.call("tanh", write.call("add", new, write.call("mul", reset, of_new)))
    if hidden is None:
        return write.call("sub", candidate, write.call("mul", update, candidate))
    difference = write.call("sub", hidden, candidate)
    return write.call("add", candidate, write.call("mul", update, difference))


RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
CELLS = frozenset({"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"})
