"""The inference engine: one thread that takes what waits as soon as it is free, and runs it in batches.

Requests for the same model version and operation share a batch; nobody waits for one to fill. The request that has
waited longest goes first. A large request is run in pieces and goes to the back of the queue after each, so that it
delays others by one batch at most. A request whose caller has left is dropped before it costs anything, and one that
fails takes nobody with it.
"""

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from service.backends import Array, Backend
from service.errors import NotReady, Overloaded
from service.operations import Operation


class Model(Protocol):
    """What the engine needs of a model. Two requests share a batch only if theirs is the same object."""

    @property
    def backend(self) -> Backend:
        """What its operations run on."""


@dataclass
class Ran:
    """What came of a request: outputs, each [B, ...], the seconds it waited, and those of its batches."""

    outputs: tuple[Array, ...]
    queued: float
    computed: float


@dataclass(eq=False)
class Job:
    """A piece of a request, at most one batch large."""

    inputs: tuple[Array, ...]
    result: "asyncio.Future[Ran]"
    since: float = field(default_factory=perf_counter)

    @property
    def rows(self) -> int:
        """B, how many rows."""
        return len(self.inputs[0])


@dataclass(eq=False)
class Lane:
    """Requests that may share a batch, in the order of their arrival."""

    model: Model
    operation: Operation
    waiting: deque[Job] = field(default_factory=deque)


Outcome = tuple[Job, Ran | BaseException]


class Engine:
    """Runs operations on models for the coroutines of one event loop.

    Args:
        max_batch_rows: most rows that run at once.
        queue_rows: most rows that wait or run; beyond them `run` refuses.
        threads: torch's threads for one batch.
        on_batch: told the operation and the rows of each batch, in the engine's thread.
    """

    def __init__(
        self, max_batch_rows: int, queue_rows: int, threads: int, on_batch: Callable[[str, int], None]
    ) -> None:
        self._max_batch_rows = max_batch_rows
        self._queue_rows = queue_rows
        self._threads = threads
        self._on_batch = on_batch
        self._lanes: dict[tuple[int, Operation], Lane] = {}  # by the model's identity
        self._work = threading.Condition()
        self._closing = False
        self._seconds_per_row = 0.0  # lately
        self._thread = threading.Thread(target=self._serve, name="inference", daemon=True)
        self.pending_rows = 0  # admitted and not yet answered

    def start(self) -> None:
        """Start the thread. Call from the event loop that will call `run`."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Finish what waits, refuse what comes, and end the thread."""
        with self._work:
            self._closing = True
            self._work.notify()
        await asyncio.to_thread(self._thread.join)

    async def run(self, model: Model, operation: Operation, *inputs: Array) -> Ran:
        """`operation` on `inputs`, each [B, ...] with the same B >= 1.

        Raises Overloaded when the queue is full, NotReady when the engine is closing, and what the operation raises.
        Cancelling the caller drops what has not yet begun.
        """
        rows = len(inputs[0])
        if self.pending_rows + rows > self._queue_rows:
            raise self._overloaded(rows)
        self.pending_rows += rows
        try:
            if rows <= self._max_batch_rows:
                return await self._submit(model, operation, inputs)
            pieces = []
            for start in range(0, rows, self._max_batch_rows):
                piece = tuple(array[start : start + self._max_batch_rows] for array in inputs)
                pieces.append(await self._submit(model, operation, piece))
            return _joined(pieces)
        finally:
            self.pending_rows -= rows

    def _submit(self, model: Model, operation: Operation, inputs: tuple[Array, ...]) -> "asyncio.Future[Ran]":
        job = Job(inputs, self._loop.create_future())
        with self._work:
            if self._closing:
                raise NotReady("the server is shutting down")
            self._lanes.setdefault((id(model), operation), Lane(model, operation)).waiting.append(job)
            self._work.notify()
        return job.result

    def _overloaded(self, rows: int) -> Overloaded:
        wait = max(1, math.ceil(self._seconds_per_row * self.pending_rows))
        return Overloaded(
            f"{self.pending_rows} rows are waiting, {rows} more do not fit",
            expected=f"at most {self._queue_rows} rows at once",
            got=f"{self.pending_rows + rows} rows",
            hint=f"try again in {wait} s",
            headers={"Retry-After": str(wait)},
        )

    # The thread's side

    def _serve(self) -> None:
        torch.set_num_threads(self._threads)
        while (taken := self._take()) is not None:
            lane, jobs = taken
            outcomes = self._run(lane, jobs)
            self._loop.call_soon_threadsafe(_settle, outcomes)

    def _take(self) -> tuple[Lane, list[Job]] | None:
        """The next batch: the lane whose first job has waited longest, as many of its jobs as fit, in their order."""
        with self._work:
            while True:
                while not self._lanes:
                    if self._closing:
                        return None
                    self._work.wait()
                key, lane = min(self._lanes.items(), key=lambda item: item[1].waiting[0].since)
                jobs = self._fill(lane)
                if not lane.waiting:
                    del self._lanes[key]
                if jobs:
                    return lane, jobs

    def _fill(self, lane: Lane) -> list[Job]:
        jobs: list[Job] = []
        rows = 0
        while lane.waiting and rows + lane.waiting[0].rows <= self._max_batch_rows:
            job = lane.waiting.popleft()
            if job.result.cancelled():
                continue
            jobs.append(job)
            rows += job.rows
            if not lane.operation.merges:
                break
        return jobs

    def _run(self, lane: Lane, jobs: list[Job]) -> list[Outcome]:
        """The outcome of each job; if they fail together, each of them is tried by itself."""
        started = perf_counter()
        try:
            outputs = _compute(lane, [job.inputs for job in jobs])
        except Exception as error:  # noqa: BLE001 - whatever a model raises belongs to whoever asked
            if len(jobs) == 1:
                return [(jobs[0], error)]
            return [outcome for job in jobs for outcome in self._run(lane, [job])]
        seconds = perf_counter() - started
        rows = len(outputs[0])
        self._seconds_per_row += 0.2 * (seconds / rows - self._seconds_per_row)
        self._on_batch(lane.operation.name, rows)
        ends = np.cumsum([job.rows for job in jobs]).tolist()
        return [
            (job, Ran(tuple(output[end - job.rows : end] for output in outputs), started - job.since, seconds))
            for job, end in zip(jobs, ends, strict=True)
        ]


def _compute(lane: Lane, inputs: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    columns = inputs[0] if len(inputs) == 1 else tuple(np.concatenate(column) for column in zip(*inputs, strict=True))
    return lane.model.backend.run(lane.operation, columns)


def _joined(pieces: list[Ran]) -> Ran:
    outputs = tuple(np.concatenate(column) for column in zip(*(piece.outputs for piece in pieces), strict=True))
    return Ran(outputs, sum(piece.queued for piece in pieces), sum(piece.computed for piece in pieces))


def _settle(outcomes: list[Outcome]) -> None:
    for job, outcome in outcomes:
        if job.result.done():  # cancelled meanwhile
            continue
        if isinstance(outcome, Ran):
            job.result.set_result(outcome)
        else:
            job.result.set_exception(outcome)
