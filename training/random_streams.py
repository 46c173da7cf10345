"""Random streams without a state: each is a function of the seed and of what it is for.

A run that starts again at step n draws what it would have drawn, and processes that share a batch draw the same noise,
with nothing to save and nothing to send. Streams are on the CPU, so that a seed means the same on every device.
"""

import hashlib

import torch

ORDER, NOISE, VALIDATION, SHUFFLE = range(4)  # what a stream is for


def random_stream(seed: int, purpose: int, index: int = 0) -> torch.Generator:
    """The generator of `seed` for number `index` of `purpose`: an epoch's order, a step's noise."""
    mixed = hashlib.blake2b(f"{seed} {purpose} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "big") >> 1)  # manual_seed takes 63 bits


def epoch_order(seed: int, epoch: int, rows: int) -> torch.Tensor:
    """The order [rows] in which `epoch` visits the rows."""
    return torch.randperm(rows, generator=random_stream(seed, ORDER, epoch))
