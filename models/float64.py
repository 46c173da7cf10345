"""Modules that keep their weights in float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Float64Module(nn.Module):
    """A module whose weights of float64 stay float64 when the module that contains it is converted to another type.

    Its results would lose digits otherwise: a mean of 1e6 in float32 is wrong by up to 0.06.
    """

    def _apply(self, fn: Callable[[Tensor], Any], recurse: bool = True) -> "Float64Module":
        def moved(tensor: Tensor) -> Any:
            found = fn(tensor)
            if tensor.dtype == torch.float64 and isinstance(found, Tensor) and found.dtype != torch.float64:
                return tensor.to(found.device)
            return found

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self
