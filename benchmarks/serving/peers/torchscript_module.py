"""Load the artifact as a plain TorchScript module, on one thread. The programs of the other servers share this code."""

import socket
from typing import Any

import torch

WARM_UP_ROWS = (1, 32, 256)


def load(path: str, features: int = 784) -> Any:
    """Return the module of the artifact at `path`, frozen and warmed up."""
    torch.set_num_threads(1)
    module = torch.jit.freeze(torch.jit.load(path).eval())
    for rows in WARM_UP_ROWS:
        for _ in range(3):  # TorchScript optimises a module during the second and third call
            reconstruct(module, torch.rand(rows, features))
    return module


def reconstruct(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the reconstruction [B, D] of x [B, D]."""
    with torch.inference_mode():
        output: torch.Tensor = module(x)
    return output


def free_port() -> int:
    """Return an unused port of 127.0.0.1. Some servers always open extra ports, which need unused numbers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
