"""The names that the code in an artifact may use. `models.code_check` refuses every other name.

TRAINED has exactly the names that the code of Elbo's own models needs: a test trains every kind of model, and fails if
a name is missing or is not needed. Before you add a name, make sure that the operator reads and writes nothing but its
arguments: no file, no socket, no process, no memory by address, and no other state. If the result can be much larger
than the arguments, the arguments that give its size must be numbers and not tensors (see `Rule`).
"""

from typing import NamedTuple


class Rule(NamedTuple):
    """What the arguments of an operator may be.

    Args:
        tensors: how many of the first arguments may be tensors, or lists of tensors. The other arguments are numbers
            that do not depend on the values of a row, and neither does the size of the result.
        numbers: whether the result is a size: a number or a list of numbers, independent of the values of a row.
        grows: whether the result can be larger than every argument, or is costly to compute. Such an operator may not
            stand in a branch or a loop that depends on the request.
        sizes: the places among the first `tensors` arguments that are numbers, as for the other arguments.
    """

    tensors: int
    numbers: bool = False
    grows: bool = True
    sizes: tuple[int, ...] = ()


def _rules(names: str, tensors: int, numbers: bool = False, grows: bool = True) -> dict[str, Rule]:
    return {f"torch.{name}": Rule(tensors, numbers, grows) for name in names.split()}


TRAINED: dict[str, Rule] = {
    # Arithmetic and comparison, number by number.
    **_rules("add sub mul div eq ne gt ge lt maximum minimum", 2, grows=False),
    **_rules("neg exp log log1p sqrt square round isnan", 1, grows=False),
    **_rules("where", 3, grows=False),
    **_rules("clamp hardtanh", 1, grows=False),
    # Activations and the normal distribution function.
    **_rules("relu sigmoid silu softplus special_ndtr tanh", 1, grows=False),
    # Sums over a dimension.
    **_rules("sum mean amin amax cumsum softmax", 1, grows=False),
    # Layers.
    **_rules("matmul", 2),
    **_rules("addmm linear conv2d conv_transpose2d", 3),
    # Systems of linear equations.
    **_rules("linalg_cholesky_ex diag_embed", 1),
    **_rules("linalg_solve_triangular", 2),
    # Parts, shapes and types of tensors.
    **_rules("select slice split squeeze detach contiguous numpy_T", 1, grows=False),
    **_rules("reshape permute flatten unflatten unsqueeze cat stack zeros_like full_like", 1),
    **_rules("expand_as", 2),
    **_rules("to", 2, grows=False),
    **_rules("tensor", 0, grows=False),
    # Look-up of a place in a table, such as the calibration scores.
    **_rules("searchsorted index", 2),
    # Sizes, and the arithmetic of sizes.
    **_rules("size dim len", 1, numbers=True, grows=False),
    **_rules("floordiv __is__ __isnot__", 0, numbers=True, grows=False),
    **_rules("append", 0, numbers=True, grows=False),
    "ops.prim.dtype": Rule(1, numbers=True, grows=False),
    "ops.prim.min": Rule(0, numbers=True, grows=False),
    # Error messages of torch.nn.ConvTranspose2d.
    "torch.format": Rule(0, numbers=True, grows=False),
    "ops.prim.RaiseException": Rule(0, numbers=True, grows=False),
}

# The arguments that may be given by name. `out` is not allowed: many operators write their result to the tensor that is
# given as `out`, which may be a weight.
KEYWORDS: dict[str, frozenset[str]] = {
    "torch.linalg_solve_triangular": frozenset({"upper"}),
    "torch.searchsorted": frozenset({"out_int32", "right"}),
    "torch.tensor": frozenset({"dtype"}),
}

# Operators that change their first argument. torch.nn has them in branches that a served model never takes, such as
# `if inplace` with the constant False, or `if self.training`. Code that reaches one of them is refused.
NEVER_REACHED = frozenset({"torch.copy_", "torch.hardtanh_", "torch.relu_", "torch.silu_"})

# Further names for models that Elbo adopts from elsewhere. A test adopts a module for each name, and fails if a name is
# not needed. Another test calls each of these operators that takes several tensors with tensors of mismatched shapes,
# which torch must refuse. Operators that were seen to accept wrong arguments (torch 2.13, on a CPU) are not allowed:
# - torch.lstm: weights of a wrong shape corrupt the heap.
# - torch.scaled_dot_product_attention: values may have another length than the keys. The result then varies.
# - torch.upsample_*: scale factors may be NaN or negative.
# `training.adoption.decompositions` writes these, and also GRUs and batch normalisation, with allowed operators.
ADOPTED: dict[str, Rule] = {
    # Arithmetic and comparison, number by number.
    **_rules("pow le logical_and logical_or masked_fill", 2, grows=False),
    **_rules("abs erf reciprocal rsqrt sin cos logical_not", 1, grows=False),
    # Activations.
    **_rules(
        "gelu elu celu selu leaky_relu mish hardswish hardsigmoid log_sigmoid log_softmax glu relu6", 1, grows=False
    ),
    **_rules("prelu", 2, grows=False),
    # Sums over a dimension.
    **_rules("var std linalg_vector_norm logsumexp max min prod", 1, grows=False),
    # Layers.
    **_rules("conv1d conv3d conv_transpose1d conv_transpose3d", 3),
    **_rules("bmm", 2),
    **_rules("baddbmm", 3),
    "torch.layer_norm": Rule(4, sizes=(1,)),
    "torch.group_norm": Rule(4, sizes=(1,)),
    **_rules("max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d", 1),
    **_rules("constant_pad_nd reflection_pad1d reflection_pad2d", 1),
    # Parts and shapes of tensors.
    **_rules("unbind narrow t transpose movedim", 1, grows=False),
    **_rules("flip roll pixel_shuffle ones_like", 1),
    **_rules("expand repeat new_zeros new_ones new_full", 1),
}

OPERATORS: dict[str, Rule] = TRAINED | ADOPTED

# Words of the language, besides operators.
WORDS = frozenset({"annotate", "getattr", "int", "range", "unchecked_cast"})
CONSTANTS = frozenset({"inf", "nan"})
TYPES = frozenset({"Tensor", "bool", "float", "int", "str", "NoneType"})
GENERIC_TYPES = frozenset({"Final", "List", "Optional", "Tuple"})
CLASS_FIELDS = frozenset({"__parameters__", "__buffers__"})
SPECIAL_METHODS = frozenset({"__len__"})
