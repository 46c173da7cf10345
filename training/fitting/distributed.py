"""Data-parallel training: torchrun starts several processes, and each computes its share of every batch."""

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
    """The processes that train one model together, and the rank of this process. By default there is one process."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reports progress, saves checkpoints and publishes."""
        return self.rank == 0

    def slice_of(self, rows: int) -> slice:
        """Return the slice of a batch of `rows` rows that this process computes. The slice may be empty."""
        return slice(rows * self.rank // self.count, rows * (self.rank + 1) // self.count)

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor`, in place, by its sum over all processes."""
        if self.count > 1:
            distributed.all_reduce(tensor)

    def broadcast_path(self, path: Path | None) -> Path:
        """Return, in every process, the `path` of the first process. The other processes pass None and wait."""
        paths = [path]
        if self.count > 1:
            distributed.broadcast_object_list(paths)
        assert paths[0] is not None
        return paths[0]


@contextmanager
def join_process_group() -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started (NCCL on GPUs, else gloo). Without torchrun, this process is alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ProcessGroup()
        return
    # Import torch.distributed.nn.functional before our process group exists. Otherwise, the first optimiser imports
    # that module later, and the functions of the module keep our group as a default argument. Then gloo's threads
    # outlive `destroy_process_group`, and the process aborts if one of these threads frees a tensor while the
    # interpreter exits.
    importlib.import_module("torch.distributed.nn.functional")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ProcessGroup(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()
