"""The processes that share one run: started by torchrun, each takes its part of every batch."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class ProcessGroup:
    """How many processes train together, and which of them this one is."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process reports, keeps the checkpoints and publishes."""
        return self.rank == 0

    def slice_of(self, rows: int) -> slice:
        """The part of a batch of `rows` that is this process's; empty where there are fewer rows than processes."""
        return slice(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor`, in place, by its sum over all processes."""
        if self.count > 1:
            distributed.all_reduce(tensor)

    def broadcast_path(self, path: Path | None) -> Path:
        """What the first process says, once it does, to all of them."""
        said = [path]
        if self.count > 1:
            distributed.broadcast_object_list(said)
        assert said[0] is not None
        return said[0]


@contextmanager
def join_process_group() -> Iterator[ProcessGroup]:
    """The processes that torchrun started, joined (NCCL on GPUs, gloo elsewhere); this one alone without torchrun."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ProcessGroup()
        return
    # An optimiser imports this module, whose functions keep the group of that moment as a default. Were it ours, Gloo's
    # threads would outlive it, and one that frees a tensor while the interpreter ends aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ProcessGroup(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()
