"""The queue of inference jobs: select the jobs of the next batch, and check how long jobs have waited.

Jobs for the same model version and operation share a batch, in their order of arrival. The next batch is the one that
contains the job with the longest wait. A batch does not wait for further jobs to arrive.

The pieces of a large request have batches of their own. A small request that arrives within PIECE_SECONDS after a piece
runs before the piece. A small request therefore waits for one batch, however many large requests are in the queue.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from service.errors import DeadlineExceeded
from service.inference.backends import Array, Backend
from service.inference.operations import Operation

PIECE_ROWS = 64  # a piece has at least this many rows, because smaller pieces cost a third more time per row
PIECE_BYTES = 200 * 1024  # a piece of more than PIECE_ROWS rows has at most this many bytes
PIECE_SECONDS = 0.1  # a small request that arrives within this time after a piece runs before the piece


class Model(Protocol):
    """The attributes of a model that batching needs. Jobs share a batch only if their model is the same object."""

    @property
    def backend(self) -> Backend:
        """The backend that runs the model's operations."""

    @property
    def row_bytes(self) -> int:
        """The number of bytes that one row takes in the widest array."""


@dataclass(slots=True)
class BatchResult:
    """The result of a job, or of all jobs of a request.

    Args:
        outputs: arrays, each [B, ...].
        queued: time in the queue, in seconds.
        computed: duration of the whole batch, in seconds.
    """

    outputs: tuple[Array, ...]
    queued: float
    computed: float


@dataclass(eq=False, slots=True)
class BatchRun:
    """A batch that has run.

    Args:
        outputs: arrays, each [B, ...], for the rows of all jobs.
        started: when the batch began, on the `perf_counter` clock.
        seconds: duration.
        cost: duration in seconds on the backend's clock.
    """

    outputs: tuple[Array, ...]
    started: float
    seconds: float
    cost: float


class Job(ABC):
    """Rows of one request that fit into one batch.

    Args:
        inputs: arrays, each [B, ...].
        deadline: when the request times out, on the `perf_counter` clock.
        queued_at: when the job joins the queue, on the same clock.

    Attributes:
        rows: B.
        is_piece: whether the rows are a piece of a request that does not fit into one batch.
        on_delay: called at most once, when `check_delay` finds that the job has waited too long.
    """

    __slots__ = ("deadline", "inputs", "is_piece", "on_delay", "queued_at", "rows")

    def __init__(self, inputs: tuple[Array, ...], deadline: float, queued_at: float) -> None:
        self.inputs = inputs
        self.deadline = deadline
        self.queued_at = queued_at
        self.rows = len(inputs[0])
        self.is_piece = False
        self.on_delay: Callable[[], None] | None = None

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether nobody waits for a result: it is there, or the request was cancelled or timed out."""

    @abstractmethod
    def finish(self, run: BatchRun, start: int) -> None:
        """Take the results from `run`, in which the rows of this job begin at `start`."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Take an error as the result."""


class FutureJob(Job):
    """A job whose request waits for a future.

    Args:
        result: the future. It completes early if the request is cancelled or times out.
        on_delay, is_piece: see `Job`.
    """

    __slots__ = ("result",)

    def __init__(
        self,
        inputs: tuple[Array, ...],
        result: "asyncio.Future[BatchResult]",
        deadline: float,
        on_delay: Callable[[], None] | None,
        is_piece: bool = False,
    ) -> None:
        super().__init__(inputs, deadline, perf_counter())
        self.result = result
        self.on_delay = on_delay
        self.is_piece = is_piece

    @property
    def is_over(self) -> bool:
        """Whether the future has completed."""
        return self.result.done()

    def finish(self, run: BatchRun, start: int) -> None:
        """Complete the future with the results of these rows."""
        outputs = tuple([output[start : start + self.rows] for output in run.outputs])
        self.result.set_result(BatchResult(outputs, run.started - self.queued_at, run.seconds))

    def fail(self, error: BaseException) -> None:
        """Complete the future with an error."""
        self.result.set_exception(error)


@dataclass(eq=False, slots=True)
class Batch:
    """Jobs that run together on one model."""

    model: Model
    operation: Operation
    jobs: list[Job]

    @property
    def rows(self) -> int:
        """The number of rows of all jobs together."""
        return sum([job.rows for job in self.jobs])


_LaneKey = tuple[int, Operation, bool]  # the id of the model, the operation, and whether the jobs are pieces


@dataclass(eq=False, slots=True)
class _Lane:
    """Waiting jobs that may share a batch, in their order of arrival."""

    key: "_LaneKey"
    model: Model
    operation: Operation
    jobs: deque[Job] = field(default_factory=deque)

    @property
    def turn(self) -> float:
        """The time that decides which lane is next, on the `perf_counter` clock."""
        job = self.jobs[0]
        return job.queued_at + PIECE_SECONDS if job.is_piece else job.queued_at


class BatchQueue:
    """Waiting jobs, by model and operation.

    Args:
        max_batch_rows: maximum number of rows per batch.
        max_batch_bytes: maximum number of bytes per batch, where each row counts as `Model.row_bytes`.
    """

    def __init__(self, max_batch_rows: int, max_batch_bytes: int) -> None:
        self._max_batch_rows = max_batch_rows
        self._max_batch_bytes = max_batch_bytes
        self._lanes: dict[_LaneKey, _Lane] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no job waits."""
        return not self._lanes

    def __iter__(self) -> Iterator[Job]:
        """Yield every waiting job."""
        for lane in self._lanes.values():
            yield from lane.jobs

    def max_rows(self, model: Model) -> int:
        """Return the maximum number of rows in a batch of `model`. It depends on the settings and on device memory."""
        return min(self._max_batch_rows, self._max_batch_bytes // model.row_bytes or 1, model.backend.max_rows)

    def piece_rows(self, model: Model) -> int:
        """Return the number of rows in a piece of a large request.

        Small requests wait until the running piece ends. Models of wide rows have large networks: 256 rows of 784
        features take 5 to 10 ms, and 64 rows take 2 to 3 ms. The number must not depend on measured times, because the
        last bit of a sample can depend on it, and the same seed must give the same bytes.
        """
        return min(self.max_rows(model), max(PIECE_ROWS, PIECE_BYTES // model.row_bytes))

    def put(self, model: Model, operation: Operation, job: Job) -> None:
        """Append a job."""
        key = id(model), operation, job.is_piece
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(key, model, operation)
        lane.jobs.append(job)

    def take(self) -> Batch | None:
        """Remove and return the next batch, or return None if every waiting job has been cancelled or has timed out."""
        while self._lanes:
            lanes = self._lanes.values()
            lane = next(iter(lanes)) if len(lanes) == 1 else min(lanes, key=lambda lane: lane.turn)
            jobs = self._take_jobs(lane)
            if not lane.jobs:
                del self._lanes[lane.key]
            if jobs:
                return Batch(lane.model, lane.operation, jobs)
        return None

    def _take_jobs(self, lane: _Lane) -> list[Job]:
        """Remove and return the first jobs of `lane` that fit into one batch. Drop jobs that are already done."""
        jobs: list[Job] = []
        rows = 0
        max_rows = self.max_rows(lane.model)
        while lane.jobs and (not jobs or rows + lane.jobs[0].rows <= max_rows):
            job = lane.jobs.popleft()
            if job.is_over:
                continue
            jobs.append(job)
            rows += job.rows
            if not lane.operation.batched:
                break
        return jobs


def check_delay(job: Job, now: float, delay: float) -> None:
    """Fail `job` if its deadline has passed. Otherwise call `on_delay` if the job has waited more than `delay` seconds.

    `on_delay` is called at most once per job.
    """
    if job.is_over:
        return
    waited = now - job.queued_at
    if job.deadline <= now:
        error = DeadlineExceeded(
            f"the response was not ready after {waited:.3g} s",
            hint="send fewer rows, or allow more time with the header X-Request-Timeout (seconds)",
        )
        job.fail(error)
    elif job.on_delay and waited > delay:
        job.on_delay()
        job.on_delay = None
