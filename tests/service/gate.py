"""An operation that waits: by it a test decides what the batcher finds in its queue."""

import asyncio
import threading
from typing import Any

import numpy as np
import torch

from service.inference.batcher import Batcher, Model
from service.inference.operations import Operation


class Gate:
    """An operation that holds the batcher until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.operation = Operation("gate", self._pass, batched=False)

    def _pass(self, _: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        self.entered.set()
        assert self.open.wait(10)
        return (x,)

    async def hold(self, batcher: Batcher, model: Model, x: np.ndarray) -> "asyncio.Task[Any]":
        """Occupy the batcher; the task ends when the gate opens."""
        task = asyncio.create_task(batcher.run(model, self.operation, x))
        await asyncio.to_thread(self.entered.wait, 10)
        return task
