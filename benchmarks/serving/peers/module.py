"""What the peers share: the same file, loaded as each of their users would load it, on one thread."""

import socket
from typing import Any

import torch

WARM_ROWS = (1, 32, 256)


def load(path: str, features: int = 784) -> Any:
    """The module of the artifact at `path`, frozen and warm: x [B, D] to its reconstruction [B, D]."""
    torch.set_num_threads(1)
    module = torch.jit.freeze(torch.jit.load(path).eval())
    for rows in WARM_ROWS:
        for _ in range(3):  # TorchScript re-optimises on its second and third call
            reconstruct(module, torch.rand(rows, features))
    return module


def reconstruct(module: Any, x: torch.Tensor) -> torch.Tensor:
    """`module` of x [B, D], without gradients."""
    with torch.inference_mode():
        output: torch.Tensor = module(x)
    return output


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on just now, for what a server insists on opening besides HTTP."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
