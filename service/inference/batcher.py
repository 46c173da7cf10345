"""The inference batcher: what waits is taken as soon as the model is free, in batches.

Requests for the same model version and operation share a batch; nobody waits for one to fill. The request that has
waited longest goes first. A large request is run in pieces and goes to the back of the queue after each, so that it
delays others by one batch at most. A request whose caller has left or whose deadline has passed is dropped before it
costs anything, and one that fails takes nobody with it. A batch for which a GPU's memory is too small runs in halves.

A batch that is expected to be short runs in the event loop's own thread: to hand it to another thread and back costs
more than a small model does; how long each size takes is known from the warm-up on. Longer ones run in the inference
thread.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import torch

from service.errors import DeadlineExceeded, NotReady
from service.inference.backends import Array, Backend
from service.inference.backlog import Backlog
from service.inference.batch import compute, stacked
from service.inference.operations import Operation
from service.shared_memory import SharedNumber

SHORT = 0.002  # seconds for which a batch may hold up the event loop
SWEEP = 0.01  # seconds between two looks for deadlines that have passed


class Model(Protocol):
    """What the batcher needs of a model. Two requests share a batch only if theirs is the same object."""

    @property
    def backend(self) -> Backend:
        """What its operations run on."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row where it is widest."""


@dataclass(slots=True)
class BatchResult:
    """What came of a request: outputs, each [B, ...], the seconds it waited, and those of its batches.

    cost: of its batch, by the backend's clock.
    """

    outputs: tuple[Array, ...]
    queued: float
    computed: float
    cost: float = 0.0


@dataclass(eq=False, slots=True)
class Job:
    """A piece of a request, at most one batch large.

    Args:
        deadline: when its caller gives up, by `perf_counter`.
        late: called once if it has waited longer than most do.
    """

    inputs: tuple[Array, ...]
    result: "asyncio.Future[BatchResult]"
    deadline: float
    late: Callable[[], None] | None
    since: float = field(default_factory=perf_counter)
    rows: int = field(init=False)  # B

    def __post_init__(self) -> None:
        self.rows = len(self.inputs[0])


@dataclass(eq=False, slots=True)
class BatchQueue:
    """Requests that may share a batch, in the order of their arrival."""

    model: Model
    operation: Operation
    waiting: deque[Job] = field(default_factory=deque)


Outcome = tuple[Job, BatchResult | BaseException]


class Batcher:
    """Runs operations on models for the coroutines of one event loop.

    Args:
        max_batch_rows, max_batch_bytes: most rows that run at once, and most bytes of them.
        threads: torch's threads for one batch.
        on_batch: told the operation and the rows of each batch.
        level: where the rows that are admitted and not yet answered are kept, as its first number.
    """

    def __init__(
        self,
        max_batch_rows: int,
        max_batch_bytes: int,
        threads: int,
        on_batch: Callable[[str, int], None],
        level: SharedNumber | None = None,
    ) -> None:
        self._max_batch_rows = max_batch_rows
        self._max_batch_bytes = max_batch_bytes
        self._threads = threads
        self._on_batch = on_batch
        self._lanes: dict[tuple[int, Operation], BatchQueue] = {}  # by the model's identity
        self._running: list[Job] = []  # in the inference thread
        self._stepping = self._sweeping = self._closing = False
        self._idle: asyncio.Event
        self.backlog = Backlog()  # rows ahead of a new job: of a large request, its present piece
        self._level: SharedNumber = [0.0] if level is None else level

    @property
    def pending_rows(self) -> int:
        """Rows that are admitted and not yet answered."""
        return int(self._level[0])

    @property
    def expected_wait(self) -> float:
        """Expected seconds until a new job runs; 0 if the rows ahead of it fit into one batch."""
        return self.backlog.expected_wait if self.backlog.amount >= self._max_batch_rows else 0.0

    def start(self) -> None:
        """Make ready. ParsedRequest from the event loop that will call `run`."""
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        torch.set_num_threads(self._threads)
        self._executor = ThreadPoolExecutor(1, "inference", torch.set_num_threads, (self._threads,))

    async def close(self) -> None:
        """Finish what waits, refuse what comes."""
        self._closing = True
        await self._idle.wait()
        self._executor.shutdown()

    async def run(
        self,
        model: Model,
        operation: Operation,
        *inputs: Array,
        deadline: float = math.inf,
        late: Callable[[], None] | None = None,
    ) -> BatchResult:
        """`operation` on `inputs`, each [B, ...] with the same B >= 1.

        Raises NotReady when the batcher is closing, DeadlineExceeded, and what the
        operation raises. Cancelling the caller drops what has not yet begun.

        Args:
            deadline: by `perf_counter`.
            late: called once if the answer takes longer than SWEEP.
        """
        rows = len(inputs[0])
        self._level[0] += rows
        most = self._most_rows(model)
        try:
            if rows <= most:
                return await self._done(model, operation, Job(inputs, self._loop.create_future(), deadline, late))
            pieces = []
            for start in range(0, rows, most):
                piece = tuple(array[start : start + most] for array in inputs)
                job = Job(piece, self._loop.create_future(), deadline, None if start else late)
                pieces.append(await self._done(model, operation, job))
            return _joined(pieces)
        finally:
            self._level[0] -= rows

    def _most_rows(self, model: Model) -> int:
        """Rows that may run at once: as many as are allowed, fit, and have not yet been too many for its memory."""
        return min(self._max_batch_rows, self._max_batch_bytes // model.row_bytes or 1, model.backend.max_rows)

    async def _done(self, model: Model, operation: Operation, job: Job) -> BatchResult:
        """What comes of `job`, at most one batch large."""
        self.backlog.add(job.rows)
        try:
            self._submit(model, operation, job)
            return await job.result
        finally:
            self.backlog.finish(job.rows)

    def _submit(self, model: Model, operation: Operation, job: Job) -> None:
        if self._closing:
            raise NotReady("the server is shutting down")
        key = (id(model), operation)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = BatchQueue(model, operation)
        lane.waiting.append(job)
        self._go_on()
        if not self._sweeping:
            self._sweeping = True
            self._loop.call_later(SWEEP, self._sweep)

    def _go_on(self) -> None:
        """Take the next batch, if any waits, once everything that has arrived by now is in the queue."""
        if self._stepping or self._running:
            return
        if self._lanes:
            self._stepping = True
            self._idle.clear()
            self._loop.call_soon(self._step)
        else:
            self._idle.set()

    def _step(self) -> None:
        self._stepping = False
        taken = self._take()
        if taken is None:  # they have all left
            self._idle.set()
            return
        lane, jobs = taken
        # Judging by the last batches of its kind; the first of a kind is never short.
        expected = lane.model.backend.latency.expected(lane.operation.name, sum([job.rows for job in jobs]))
        if expected <= SHORT:
            self._settle(lane, self._run(lane, jobs))
            self._go_on()
        else:
            self._running = jobs
            self._loop.run_in_executor(self._executor, self._run, lane, jobs).add_done_callback(
                lambda done: self._finish(lane, done)
            )

    def _finish(self, lane: BatchQueue, done: "asyncio.Future[list[Outcome]]") -> None:
        self._running = []
        try:
            self._settle(lane, done.result())
        finally:
            self._go_on()

    def _take(self) -> tuple[BatchQueue, list[Job]] | None:
        """The next batch: the lane whose first job has waited longest, as many of its jobs as fit, in their order."""
        while self._lanes:
            keys = iter(self._lanes)
            key = next(keys) if len(self._lanes) == 1 else min(keys, key=lambda key: self._lanes[key].waiting[0].since)
            lane = self._lanes[key]
            jobs = self._fill(lane)
            if not lane.waiting:
                del self._lanes[key]
            if jobs:
                return lane, jobs
        return None

    def _fill(self, lane: BatchQueue) -> list[Job]:
        jobs: list[Job] = []
        rows, most = 0, self._most_rows(lane.model)
        while lane.waiting and (not jobs or rows + lane.waiting[0].rows <= most):
            job = lane.waiting.popleft()
            if job.result.done():  # cancelled, or too late
                continue
            jobs.append(job)
            rows += job.rows
            if not lane.operation.batched:
                break
        return jobs

    def _settle(self, lane: BatchQueue, outcomes: list[Outcome]) -> None:
        """Tell each job what came of it, and learn from how long the batch took."""
        rows, cost, whole = 0, 0.0, True
        for job, outcome in outcomes:
            waits = not job.result.done()  # neither cancelled meanwhile nor too late
            rows += job.rows
            if isinstance(outcome, BatchResult):
                cost = outcome.cost
                if waits:
                    job.result.set_result(outcome)
            else:
                whole = False
                if waits:
                    job.result.set_exception(outcome)
        if whole:
            self._on_batch(lane.operation.name, rows)
            lane.model.backend.latency.learn(lane.operation.name, rows, cost)

    def _sweep(self) -> None:
        """Fail the jobs whose deadline has passed, and tell those that take long."""
        now = perf_counter()
        jobs = [job for lane in self._lanes.values() for job in lane.waiting] + self._running
        for job in jobs:
            if job.result.done():
                continue
            if job.deadline <= now:
                job.result.set_exception(_too_late(now - job.since))
            elif job.late and now - job.since > SWEEP:
                job.late()
                job.late = None
        self._sweeping = bool(jobs)
        if self._sweeping:
            self._loop.call_later(SWEEP, self._sweep)

    # In either thread

    def _run(self, lane: BatchQueue, jobs: list[Job]) -> list[Outcome]:
        """The outcome of each job; if they fail together, each of them is tried by itself."""
        clock = lane.model.backend.clock
        started, began = perf_counter(), clock()
        try:
            outputs = compute(lane.model.backend, lane.operation, [job.inputs for job in jobs])
        except Exception as error:  # noqa: BLE001 - whatever a model raises belongs to whoever asked
            if len(jobs) == 1:
                return [(jobs[0], error)]
            return [outcome for job in jobs for outcome in self._run(lane, [job])]
        seconds, cost = perf_counter() - started, clock() - began
        outcomes: list[Outcome] = []
        start = 0
        for job in jobs:
            end = start + job.rows
            mine = tuple([output[start:end] for output in outputs])
            outcomes.append((job, BatchResult(mine, started - job.since, seconds, cost)))
            start = end
        return outcomes


def _too_late(seconds: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the answer was not ready after {seconds:.3g} s",
        hint="send fewer rows, or allow more time with the header X-Request-Timeout (seconds)",
    )


def _joined(pieces: list[BatchResult]) -> BatchResult:
    outputs = stacked([piece.outputs for piece in pieces])
    return BatchResult(outputs, sum(piece.queued for piece in pieces), sum(piece.computed for piece in pieces))
