"""An operation that runs until a test opens a gate, so that the test controls the content of the batcher's queue."""

import asyncio
import threading
from typing import Any

import numpy as np
import torch

from service.inference.batch_queue import Model
from service.inference.batcher import Batcher
from service.inference.operations import Operation


class Gate:
    """An operation that occupies the batcher until `open` is set."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.operation = Operation("gate", self._wait, batched=False)

    def _wait(self, _: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        self.entered.set()
        assert self.open.wait(10)
        return (x,)

    async def hold(self, batcher: Batcher, model: Model, x: np.ndarray) -> "asyncio.Task[Any]":
        """Occupy the batcher; the returned task ends when the gate opens."""
        task = asyncio.create_task(batcher.run(model, self.operation, x))
        await asyncio.to_thread(self.entered.wait, 10)
        return task
