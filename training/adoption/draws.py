"""Replace draws of normal noise by their mean while the block runs. Refuse other random numbers."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from training.adoption.arguments import setting
from training.adoption.user_code import current_line, is_of_user
from training.errors import AdoptionError

NORMAL = {torch.randn_like: torch.zeros_like, torch.randn: torch.zeros}
RANDOM = frozenset({
    torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randperm, torch.bernoulli,
    torch.multinomial, torch.poisson, Tensor.bernoulli, Tensor.bernoulli_, Tensor.uniform_, Tensor.random_,
    Tensor.exponential_, Tensor.cauchy_, Tensor.geometric_, Tensor.log_normal_, Tensor.multinomial,
})  # fmt: skip
DROPOUTS = frozenset({
    "dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "feature_dropout", "feature_dropout_",
    "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d",
})  # fmt: skip
# Functions that read the values of a tensor, and what they return. A branch or a loop could depend on the result.
READS = {
    Tensor.__bool__: "a branch", Tensor.item: "a number", Tensor.tolist: "numbers", Tensor.__int__: "a number",
    Tensor.__float__: "a number", Tensor.__index__: "a number", Tensor.numpy: "an array of NumPy",
    Tensor.__array__: "an array of NumPy", Tensor.nonzero: "a number of results", torch.nonzero: "a number of results",
    torch.masked_select: "a number of results", Tensor.masked_select: "a number of results",
    torch.unique: "a number of results", Tensor.unique: "a number of results",
}  # fmt: skip


class WithoutNoise(TorchFunctionMode):
    """A mode in which draws of normal noise return its mean.

    The reparameterised draw mean + std * noise then returns the mean (Kingma & Welling 2014, section 2.4).

    Args:
        weights: the weights of the module. A branch may depend on them.
        checks_reads: whether to refuse a branch, a loop or a size that depends on the values of a tensor. A tracer
            makes tensors of the sizes of tensors, so this is for runs without it.

    Attributes:
        lines: the lines of the user's code that drew normal noise.
        constants: the lines of the user's code that took the length of a tensor, which a tracer makes a constant.
    """

    def __init__(self, weights: Sequence[Tensor] = (), checks_reads: bool = False) -> None:
        super().__init__()
        self._weights = {tensor.data_ptr() for tensor in weights}
        self._checks_reads = checks_reads
        self.lines: list[str] = []
        self.constants: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return what `func` returns, without noise.

        Raises:
            AdoptionError: the module draws random numbers other than normal noise, or reads the values of a tensor.
        """
        named = {key: value for key, value in (kwargs or {}).items() if key != "generator"}
        if func in NORMAL:
            self.lines.append(current_line())
            return NORMAL[func](*args, **named)  # type: ignore[operator]
        if func is Tensor.normal_:
            self.lines.append(current_line())
            return torch.full_like(args[0], float(args[1] if len(args) > 1 else named.get("mean", 0.0)))
        if func is torch.normal:
            self.lines.append(current_line())
            return self._mean_of_normal(args, named)
        if func in RANDOM:
            name = getattr(func, "__name__", "an operator")
            raise AdoptionError(
                f"{current_line()} draws random numbers ({name}), so the same row would get different results: leave "
                "them out in evaluation mode (if self.training), or name functions without them "
                f"({setting('encode')}, {setting('decode')})"
            )
        if getattr(func, "__name__", "") in DROPOUTS:
            self._refuse_dropout(args, named)
        if func is Tensor.__len__:
            self.constants.append(current_line())
        if self._checks_reads and func in READS:
            self._refuse_read(func, args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _refuse_dropout(args: Sequence[Any], named: Mapping[str, Any]) -> None:
        rate = args[1] if len(args) > 1 else named.get("p", 0.5)
        is_on = named.get("training", named.get("train", args[2] if len(args) > 2 else True))
        if is_on is True and rate:
            raise AdoptionError(
                f"{current_line()} drops values at random in evaluation mode: pass training=self.training, or use "
                "torch.nn.Dropout"
            )

    @staticmethod
    def _mean_of_normal(args: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
        mean = args[0] if args else named["mean"]
        std = args[1] if len(args) > 1 else named.get("std", 1.0)
        size = args[2] if len(args) > 2 else named.get("size")
        if size is not None:
            return torch.full(size, float(mean))
        if not isinstance(mean, Tensor):
            return torch.full_like(std, float(mean))
        return mean + torch.zeros_like(std) if isinstance(std, Tensor) else mean.clone()

    def _refuse_read(self, func: Callable[..., Any], args: Sequence[Any]) -> None:
        tensor = args[0]
        if tensor.data_ptr() in self._weights or not (line := _innermost_user_line()):
            return
        raise AdoptionError(
            f"{line} makes {READS[func]} of the values of a tensor, so the computation depends on the values of a row, "
            "which an artifact cannot do: choose with torch.where, which computes both branches"
        )


def _innermost_user_line() -> str:
    """Return the line of the user's code that reads the value; an empty string if torch itself reads it."""
    frame = sys._getframe(3)
    file = frame.f_code.co_filename
    return current_line() if is_of_user(file) else ""


@contextmanager
def without_noise(weights: Sequence[Tensor] = (), *, checks_reads: bool = False) -> Iterator[WithoutNoise]:
    """Run the block without noise, gradients and torch's fused attention. Yield the mode, which records the draws."""
    validates, shortcuts = Distribution._validate_args, torch.backends.mha.get_fastpath_enabled()
    Distribution.set_default_validate_args(False)  # its checks are branches on values
    torch.backends.mha.set_fastpath_enabled(False)  # the fused operator has no ONNX twin
    try:
        with torch.no_grad(), WithoutNoise(weights, checks_reads) as mode:
            yield mode
    finally:
        Distribution.set_default_validate_args(validates)
        torch.backends.mha.set_fastpath_enabled(shortcuts)
