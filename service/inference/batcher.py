"""The inference batcher: runs queued jobs in batches, in the event loop's thread or in the inference thread.

One batch runs at a time. A batch that is expected to be short runs in the event loop's thread, because passing a batch
to another thread and back takes longer than running a small model. The warm-up measures how long batches of each size
take.

A large request is split into pieces. Each piece joins the queue after the previous piece has finished, and lets small
requests pass, so that large requests delay small ones by at most one piece. A job does not run if its request is
cancelled or times out before the job starts. A job that fails does not fail the other jobs of its batch.
"""

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from time import perf_counter

import numpy as np
import torch

from service.errors import NotReady
from service.inference.backends import Array
from service.inference.backlog import Backlog
from service.inference.batch import run_batch
from service.inference.batch_queue import (
    Batch,
    BatchQueue,
    BatchResult,
    BatchRun,
    FutureJob,
    Job,
    Model,
    check_delay,
)
from service.inference.operations import Operation
from service.shared_memory import SharedNumber

MAX_INLINE_SECONDS = 0.002  # a batch runs in the event loop's thread if it is expected to take at most this long
MAX_INLINE_PIECE_SECONDS = 0.0005  # the same for the pieces of large requests, which would occupy the loop all the time
MAX_INLINE_BYTES = 2**20  # larger outputs are copied in another thread, because copying would block the event loop
CHECK_SECONDS = 0.01  # interval between checks of deadlines; a job that has waited longer than this counts as delayed

Outcome = tuple[Job, int, BatchRun | BaseException]  # a job, its first row in the run, and the run


class Batcher:
    """Runs operations on models for the coroutines of one event loop.

    Args:
        max_batch_rows: maximum number of rows per batch.
        max_batch_bytes: maximum number of bytes per batch, where each row counts as `Model.row_bytes`.
        threads: the number of torch threads per batch.
        on_batch: called after each successful batch with the operation's name and the number of rows.
        exported_rows: an array whose first number is set to `pending_rows`, for metrics.

    Attributes:
        pending_rows: the number of rows of all unfinished requests.
        max_batch_rows: maximum number of rows per batch.
        backlog: the rows that run before a new job. The pieces of large requests do not count, because a new job
            usually runs before them.
        after_batch: called after each batch, when its jobs have their results.
    """

    def __init__(
        self,
        *,
        max_batch_rows: int,
        max_batch_bytes: int,
        threads: int,
        on_batch: Callable[[str, int], None],
        exported_rows: SharedNumber | None = None,
    ) -> None:
        self.pending_rows = 0
        self.backlog = Backlog()
        self.max_batch_rows = max_batch_rows
        self.after_batch: Callable[[], None] = _do_nothing
        self._queue = BatchQueue(max_batch_rows, max_batch_bytes)
        self._threads = threads
        self._on_batch = on_batch
        self._exported_rows: SharedNumber = [0.0] if exported_rows is None else exported_rows
        self._running: list[Job] = []  # the jobs that run in the inference thread
        self._in_thread: tuple[Batch, Future[list[Outcome]]] | None = None  # the batch in the inference thread
        self._is_step_scheduled = False
        self._is_check_scheduled = False
        self._is_closing = False
        self._idle: asyncio.Event

    @property
    def expected_wait(self) -> float:
        """Expected seconds until a new job runs; 0 if the rows ahead of it fit into one batch."""
        return self.backlog.expected_wait if self.backlog.amount >= self.max_batch_rows else 0.0

    def start(self) -> None:
        """Prepare to run jobs. Call this method in the event loop in which `run` will be called."""
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        torch.set_num_threads(self._threads)
        self._executor = ThreadPoolExecutor(1, "inference", torch.set_num_threads, (self._threads,))

    async def close(self) -> None:
        """Finish the queued jobs, and refuse new ones."""
        self._is_closing = True
        await self._idle.wait()
        self._executor.shutdown()

    async def run(
        self,
        model: Model,
        operation: Operation,
        *inputs: Array,
        deadline: float = math.inf,
        on_delay: Callable[[], None] | None = None,
    ) -> BatchResult:
        """Return the result of `operation` on `inputs`.

        If this call is cancelled, its jobs do not run unless they have already started.

        Args:
            model: the model that runs the operation.
            operation: the operation to run.
            inputs: arrays, each [B, ...] with the same B >= 1.
            deadline: when the request times out, on the `perf_counter` clock.
            on_delay: called once if the result takes longer than CHECK_SECONDS.

        Raises:
            NotReady: the batcher is closing.
            DeadlineExceeded: the deadline passed before the result was ready.
            Exception: any error of the operation.
        """
        rows = len(inputs[0])
        max_rows = self._queue.max_rows(model)
        self._add_pending(rows)
        try:
            if rows <= max_rows:
                job = FutureJob(inputs, self._loop.create_future(), deadline, on_delay)
                return await self._run_job(model, operation, job)
            joined = _JoinedResult(rows)
            piece_rows = self._queue.piece_rows(model)
            for start in range(0, rows, piece_rows):
                piece = tuple(array[start : start + piece_rows] for array in inputs)
                job = FutureJob(piece, self._loop.create_future(), deadline, None if start else on_delay, is_piece=True)
                result = await self._run_job(model, operation, job)
                if sum(output.nbytes for output in result.outputs) > MAX_INLINE_BYTES:
                    await asyncio.to_thread(joined.add, start, result)
                else:
                    joined.add(start, result)
            return joined.result
        finally:
            self._add_pending(-rows)

    def _add_pending(self, rows: int) -> None:
        self.pending_rows += rows
        self._exported_rows[0] = self.pending_rows

    async def _run_job(self, model: Model, operation: Operation, job: FutureJob) -> BatchResult:
        if self._is_closing:
            raise NotReady("the server is shutting down")
        if not job.is_piece:
            self.backlog.add(job.rows)
        try:
            self._put(model, operation, job)
            return await job.result
        finally:
            if not job.is_piece:
                self.backlog.finish(job.rows)

    def accepts(self, model: Model, rows: int) -> bool:
        """Return whether `submit` takes a job of `rows` rows: they fit into a batch, and the batcher is not closing."""
        return rows <= self._queue.max_rows(model) and not self._is_closing

    def submit(self, model: Model, operation: Operation, job: Job) -> None:
        """Queue a job, for which `accepts` holds. Call `release` with its rows when it is over."""
        self._add_pending(job.rows)
        self.backlog.add(job.rows)
        self._put(model, operation, job)

    def release(self, rows: int) -> None:
        """Count `rows` of jobs from `submit` as finished or given up."""
        self._add_pending(-rows)
        self.backlog.finish(rows)

    def _put(self, model: Model, operation: Operation, job: Job) -> None:
        self._queue.put(model, operation, job)
        if not self._is_step_scheduled:
            self._schedule_step()
        if not self._is_check_scheduled:
            self._is_check_scheduled = True
            self._loop.call_later(CHECK_SECONDS, self._check_delays)

    def _schedule_step(self) -> None:
        """Schedule the next batch to start as soon as all requests that have already arrived are in the queue."""
        if self._is_step_scheduled or self._running:
            return
        if self._queue.is_empty:
            self._idle.set()
        else:
            self._is_step_scheduled = True
            self._idle.clear()
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        """Run the next batch in this thread if it is expected to be short, else in the inference thread."""
        self._is_step_scheduled = False
        if self._running:  # `step_now` has started a batch, and `_finish` will schedule the next step
            return
        batch = self._queue.take()
        if batch is None:
            self._idle.set()
            return
        latency = batch.model.backend.latency
        longest = MAX_INLINE_PIECE_SECONDS if batch.jobs[0].is_piece else MAX_INLINE_SECONDS
        if latency.expected(batch.operation.name, batch.rows) <= longest:
            self._finish_jobs(batch, _run(batch))
            self._schedule_step()
        else:
            self._running = batch.jobs
            running = self._executor.submit(_run, batch)
            self._in_thread = batch, running
            running.add_done_callback(partial(self._hand_back, batch))

    def step_now(self) -> None:
        """Finish the batch that has run in the inference thread, and start the next batch, if there are any.

        Without this call, the event loop does both, but only after it has read everything that has arrived.
        """
        if self._in_thread and self._in_thread[1].done():
            self._finish(*self._in_thread)
        if self._is_step_scheduled:
            self._step()

    def _hand_back(self, batch: Batch, outcomes: "Future[list[Outcome]]") -> None:
        """Let the event loop finish a batch. Runs in the inference thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._finish, batch, outcomes)

    def _finish(self, batch: Batch, outcomes: "Future[list[Outcome]]") -> None:
        if self._in_thread is None or self._in_thread[1] is not outcomes:  # `step_now` has finished it
            return
        self._in_thread, self._running = None, []
        try:
            self._finish_jobs(batch, outcomes.result())
        finally:
            self._schedule_step()

    def _finish_jobs(self, batch: Batch, outcomes: list[Outcome]) -> None:
        """Give each job its outcome, and record how long a successful batch took."""
        cost = 0.0
        is_successful = True
        for job, start, outcome in outcomes:
            is_awaited = not job.is_over  # the request was not cancelled and did not time out while the job ran
            if isinstance(outcome, BatchRun):
                cost = outcome.cost
                if is_awaited:
                    job.finish(outcome, start)
            else:
                is_successful = False
                if is_awaited:
                    job.fail(outcome)
        if is_successful:
            name, rows = batch.operation.name, batch.rows
            self._on_batch(name, rows)
            batch.model.backend.latency.record(name, rows, cost)
        self.after_batch()

    def _check_delays(self) -> None:
        """Fail each job whose deadline has passed, and call `on_delay` of each delayed job. Repeat while jobs exist."""
        now = perf_counter()
        jobs = [*self._queue, *self._running]
        for job in jobs:
            check_delay(job, now, CHECK_SECONDS)
        self._is_check_scheduled = bool(jobs)
        if jobs:
            self._loop.call_later(CHECK_SECONDS, self._check_delays)


def _run(batch: Batch) -> list[Outcome]:
    """Run `batch`, and return the outcome of each job. If the batch fails, run its jobs one by one.

    This function runs in the event loop's thread or in the inference thread.
    """
    backend, jobs = batch.model.backend, batch.jobs
    clock = backend.clock
    started = perf_counter()
    clock_started = clock()
    try:
        outputs = run_batch(backend, batch.operation, [job.inputs for job in jobs])
    except Exception as error:  # noqa: BLE001 - any error of a model is the outcome of its jobs
        if len(jobs) == 1:
            return [(jobs[0], 0, error)]
        return [outcome for job in jobs for outcome in _run(Batch(batch.model, batch.operation, [job]))]
    run = BatchRun(outputs, started, seconds=perf_counter() - started, cost=clock() - clock_started)
    outcomes: list[Outcome] = []
    start = 0
    for job in jobs:
        outcomes.append((job, start, run))
        start += job.rows
    return outcomes


class _JoinedResult:
    """The result of a request that runs in pieces.

    The outputs of a piece are copied as soon as the piece has run, so that memory never holds all outputs twice.

    Args:
        rows: the number of rows of the request.
    """

    def __init__(self, rows: int) -> None:
        self.result = BatchResult((), queued=0.0, computed=0.0)
        self._rows = rows

    def add(self, start: int, piece: BatchResult) -> None:
        """Add the result of the piece whose first row is row `start` of the request."""
        result = self.result
        if not start:
            result.outputs = tuple(np.empty((self._rows, *part.shape[1:]), part.dtype) for part in piece.outputs)
        for output, part in zip(result.outputs, piece.outputs, strict=True):
            output[start : start + len(part)] = part
        result.queued += piece.queued
        result.computed += piece.computed


def _do_nothing() -> None:
    """Do nothing."""
