"""Random number generators that depend only on a seed, a purpose and an index.

No generator state has to be saved or sent. A run that resumes at step n draws the same numbers as a run that was
never stopped, and processes that share a batch draw the same noise. The generators run on the CPU, so a seed gives
the same numbers on every device.
"""

import hashlib

import torch

ORDER, NOISE, VALIDATION, SHUFFLE, PRIOR, SAMPLES = range(6)  # the values of the argument `purpose`


def random_stream(seed: int, purpose: int, index: int = 0) -> torch.Generator:
    """Return the generator for one use.

    Args:
        purpose: one of the constants of this module.
        index: the number of the epoch, of the step, or of the pool of rows (see `Batches`).
    """
    digest = hashlib.blake2b(f"{seed} {purpose} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # manual_seed takes 63 bits


def epoch_order(seed: int, epoch: int, count: int) -> torch.Tensor:
    """Return a permutation [count]: the order in which `epoch` visits its rows or blocks."""
    return torch.randperm(count, generator=random_stream(seed, ORDER, epoch))
