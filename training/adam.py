"""Adam (Kingma & Ba 2015) by torch's fused kernel, called at once: what torch.optim does around it costs as much time.

State, checkpoints and arithmetic are those of `torch.optim.Adam`, to the bit.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class Adam(torch.optim.Adam):
    """torch's Adam for parameters of one type on one device, without weight decay.

    Args:
        rate: until a schedule sets it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float) -> None:
        super().__init__(parameters, rate, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        group = self.param_groups[0]
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        states = [self.state[parameter] for parameter in parameters]
        if closure or not all(states):  # the first step: torch makes the state
            return super().step(closure)  # type: ignore[no-any-return]
        steps: list[Tensor] = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        assert set_to_none, "a gradient is made anew by each step"
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None
