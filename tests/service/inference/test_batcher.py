"""The batcher: which jobs share a batch, in which order they run, and what happens when they fail or are cancelled."""

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from time import monotonic, perf_counter, sleep
from typing import Any

import numpy as np
import pytest
import torch

from models.artifact import Artifact
from service.errors import DeadlineExceeded, NotReady
from service.inference.backend_selection import select_backend
from service.inference.batch_queue import BatchQueue, BatchResult, BatchRun, FutureJob, Job, check_delay
from service.inference.batcher import Batcher
from service.inference.operations import ENCODE, SAMPLE, Operation, reconstruct
from tests.service.batching import BareModel, Batches, random_rows, reconstruction, running_batcher
from tests.service.gate import Gate

RECONSTRUCT = reconstruct(gaps=False)


@pytest.fixture
def vae(vae: Artifact) -> BareModel:
    """Return the session's VAE, with a backend whose latency has not been measured."""
    return BareModel(select_backend(vae, requested="torchscript").backend)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run `scenario` in an event loop, and assert that no callback of the loop raised an error."""
    errors: list[dict[str, Any]] = []

    async def run_strictly() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        await scenario()
        await asyncio.sleep(0)

    asyncio.run(run_strictly())
    assert not errors


def test_result_equals_the_output_of_the_module(vae: BareModel) -> None:
    async def scenario() -> None:
        async with running_batcher() as batcher:
            result = await batcher.run(vae, RECONSTRUCT, random_rows(5))
        np.testing.assert_array_equal(result.outputs[0], reconstruction(vae, random_rows(5)))
        error = ((reconstruction(vae, random_rows(5)) - random_rows(5)) ** 2).mean(axis=1)
        np.testing.assert_allclose(result.outputs[1], error, rtol=1e-5)
        assert result.computed > 0

    run(scenario)


def test_jobs_for_the_same_operation_share_a_batch_and_each_gets_its_own_rows(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches) as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            sizes = [1, 5, 2, 7]
            tasks = [asyncio.create_task(batcher.run(vae, RECONSTRUCT, random_rows(n, seed=n))) for n in sizes]
            other = asyncio.create_task(batcher.run(vae, ENCODE, random_rows(3)))
            await asyncio.sleep(0)
            gate.open.set()
            results = await asyncio.gather(*tasks)
            await asyncio.gather(held, other)
        for n, result in zip(sizes, results, strict=True):
            np.testing.assert_allclose(result.outputs[0], reconstruction(vae, random_rows(n, seed=n)), atol=1e-6)
        assert batches == [("gate", 1), ("reconstruct", 15), ("encode", 3)]

    run(scenario)


def test_batches_respect_their_maximum_size_and_the_order_of_arrival(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches, max_batch_rows=8) as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            finished: list[int] = []

            async def run_numbered(number: int, count: int) -> None:
                await batcher.run(vae, RECONSTRUCT, random_rows(count))
                finished.append(number)

            tasks = [asyncio.create_task(run_numbered(i, count)) for i, count in enumerate([3, 4, 2, 6, 8, 1])]
            await asyncio.sleep(0)
            gate.open.set()
            await asyncio.gather(held, *tasks)
        assert [size for _, size in batches] == [1, 7, 8, 8, 1]
        assert finished == [0, 1, 2, 3, 4, 5]

    run(scenario)


def test_batches_do_not_exceed_the_maximum_number_of_bytes(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches, max_batch_bytes=5 * vae.row_bytes) as batcher:
            await asyncio.gather(*[batcher.run(vae, RECONSTRUCT, random_rows(n)) for n in (2, 2, 2, 12)])

    run(scenario)
    assert max(size for _, size in batches) <= 5
    assert sum(size for _, size in batches) == 18


def test_large_request_runs_in_pieces_with_other_requests_in_between(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches, max_batch_rows=8) as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            large = asyncio.create_task(batcher.run(vae, RECONSTRUCT, random_rows(20)))
            small = asyncio.create_task(batcher.run(vae, ENCODE, random_rows(1)))
            await asyncio.sleep(0)
            gate.open.set()
            result = await large
            await asyncio.gather(held, small)
        np.testing.assert_allclose(result.outputs[0], reconstruction(vae, random_rows(20)), atol=1e-6)
        assert batches == [("gate", 1), ("encode", 1), ("reconstruct", 8), ("reconstruct", 8), ("reconstruct", 4)]

    run(scenario)


@pytest.mark.parametrize(("row_bytes", "sizes"), [(256, [256, 44]), (1024, [200, 100]), (4096, [64, 64, 64, 64, 44])])
def test_large_request_has_smaller_pieces_if_its_rows_are_wide(
    vae: BareModel, row_bytes: int, sizes: list[int]
) -> None:
    """Small requests wait until a piece ends, and the networks of wide rows take longer."""
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches, max_batch_rows=256) as batcher:
            result = await batcher.run(replace(vae, row_bytes=row_bytes), RECONSTRUCT, random_rows(300))
        np.testing.assert_allclose(result.outputs[0], reconstruction(vae, random_rows(300)), atol=1e-6)

    run(scenario)
    assert [size for _, size in batches] == sizes


@pytest.mark.parametrize(
    ("milliseconds", "rows", "is_in_event_loop"),
    [(0.1, 8, True), (1.0, 8, True), (3.0, 8, False), (0.1, 24, True), (1.0, 24, False), (3.0, 24, False)],
)
def test_short_batch_runs_in_the_event_loop_but_a_piece_of_a_large_request_only_if_it_is_very_short(
    vae: BareModel, milliseconds: float, rows: int, is_in_event_loop: bool
) -> None:
    threads: set[int] = set()

    def note_thread(_: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        threads.add(threading.get_ident())
        return (x,)

    async def scenario() -> None:
        async with running_batcher(max_batch_rows=8) as batcher:
            vae.backend.latency.record("noted", 8, milliseconds / 1000)  # three batches hardly change this estimate
            await batcher.run(vae, Operation("noted", note_thread), random_rows(rows))
            assert (threads == {threading.get_ident()}) is is_in_event_loop

    run(scenario)


def test_batches_in_the_inference_thread_go_on_if_the_event_loop_calls_step_now_in_a_long_pass(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches) as batcher:
            jobs = [
                asyncio.create_task(batcher.run(vae, operation, random_rows(3))) for operation in (ENCODE, RECONSTRUCT)
            ]
            await asyncio.sleep(0)
            end = monotonic() + 60
            while len(batches) < 2 and monotonic() < end:  # the event loop itself has no turn
                batcher.step_now()
                sleep(0.001)
            assert batches == [("encode", 3), ("reconstruct", 3)]
            _, reconstructed = await asyncio.gather(*jobs)
        np.testing.assert_array_equal(reconstructed.outputs[0], reconstruction(vae, random_rows(3)))
        assert len(batches) == 2

    run(scenario)


def test_jobs_never_share_a_batch_if_their_operation_is_not_batched(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches) as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            noise, choice = np.ones((2, 16), np.float32), np.zeros(2, np.float32)
            tasks = [asyncio.create_task(batcher.run(vae, SAMPLE, noise, choice)) for _ in range(3)]
            await asyncio.sleep(0)
            gate.open.set()
            first, *others = [result.outputs for result in await asyncio.gather(*tasks)]
            await held
        for other in others:
            np.testing.assert_array_equal(first[1], other[1])
        assert batches[1:] == [("sample", 2)] * 3

    run(scenario)


def test_failing_job_does_not_fail_the_other_jobs_of_its_batch(vae: BareModel) -> None:
    def fail_above_5(module: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        if (x > 5).any():
            raise RuntimeError("too large")
        return (module(x),)

    async def scenario() -> None:
        async with running_batcher() as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            operation = Operation("picky", fail_above_5)
            inputs = [random_rows(2, seed=1), random_rows(1) + 9, random_rows(3, seed=3)]
            tasks = [asyncio.create_task(batcher.run(vae, operation, x)) for x in inputs]
            wrong_width = asyncio.create_task(batcher.run(vae, operation, np.zeros((1, 3), np.float32)))
            await asyncio.sleep(0)
            gate.open.set()
            outcomes = await asyncio.gather(*tasks, wrong_width, return_exceptions=True)
            await held
            assert batcher.pending_rows == 0
        np.testing.assert_allclose(outcomes[0].outputs[0], reconstruction(vae, inputs[0]), atol=1e-6)  # type: ignore[union-attr] # a result, not an error
        np.testing.assert_allclose(outcomes[2].outputs[0], reconstruction(vae, inputs[2]), atol=1e-6)  # type: ignore[union-attr] # a result, not an error
        assert str(outcomes[1]) == "too large"
        assert isinstance(outcomes[3], RuntimeError)

    run(scenario)


def test_cancelled_request_never_runs(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches, max_batch_rows=8) as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            cancelled = asyncio.create_task(batcher.run(vae, RECONSTRUCT, random_rows(20)))
            kept = asyncio.create_task(batcher.run(vae, RECONSTRUCT, random_rows(3)))
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.sleep(0)
            gate.open.set()
            result = await kept
            await held
            assert batcher.pending_rows == 0
        assert cancelled.cancelled()
        assert batches == [("gate", 1), ("reconstruct", 3)]
        np.testing.assert_allclose(result.outputs[0], reconstruction(vae, random_rows(3)), atol=1e-6)

    run(scenario)


def test_job_that_was_cancelled_does_not_split_the_batch_around_it(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches) as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            first, cancelled, last = [
                asyncio.create_task(batcher.run(vae, RECONSTRUCT, random_rows(rows))) for rows in (2, 4, 3)
            ]
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.sleep(0)
            gate.open.set()
            await asyncio.gather(held, first, last)
        assert batches == [("gate", 1), ("reconstruct", 5)]

    run(scenario)


def test_closing_finishes_queued_jobs_and_refuses_new_jobs(vae: BareModel) -> None:
    async def scenario() -> None:
        async with running_batcher() as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            waiting = asyncio.create_task(batcher.run(vae, RECONSTRUCT, random_rows(2)))
            await asyncio.sleep(0)
            closing = asyncio.create_task(batcher.close())
            await asyncio.sleep(0)
            with pytest.raises(NotReady):
                await batcher.run(vae, RECONSTRUCT, random_rows(1))
            gate.open.set()
            await closing
            assert (await waiting).outputs[0].shape == (2, 64)
            await held

    run(scenario)


def test_results_are_correct_if_half_of_300_requests_are_cancelled_at_random(vae: BareModel) -> None:
    async def scenario() -> None:
        rng = np.random.default_rng(1)
        async with running_batcher(max_batch_rows=16) as batcher:
            sizes = rng.integers(1, 40, 300)
            inputs = [random_rows(int(n), seed=i) for i, n in enumerate(sizes)]
            tasks = [asyncio.create_task(batcher.run(vae, RECONSTRUCT, x)) for x in inputs]
            for i in rng.permutation(300)[:150]:
                tasks[i].cancel()
                if i % 10 == 0:
                    await asyncio.sleep(0.001)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert batcher.pending_rows == 0
        survivors = [
            (x, result) for x, result in zip(inputs, outcomes, strict=True) if not isinstance(result, BaseException)
        ]
        assert len(survivors) >= 150
        for x, result in survivors:
            np.testing.assert_allclose(result.outputs[0], reconstruction(vae, x), atol=1e-6)
        cancelled = [result for result in outcomes if isinstance(result, BaseException)]
        assert all(isinstance(result, asyncio.CancelledError) for result in cancelled)

    run(scenario)


def future_job(deadline: float = 1e9, on_delay: Callable[[], None] | None = None) -> FutureJob:
    result: asyncio.Future[BatchResult] = asyncio.get_running_loop().create_future()
    return FutureJob((random_rows(1),), result, deadline, on_delay)


def test_delayed_job_is_reported_once_and_fails_only_after_its_deadline() -> None:
    async def scenario() -> None:
        calls: list[str] = []
        job = future_job(on_delay=lambda: calls.append("delayed"))
        job.deadline = job.queued_at + 2.0
        check_delay(job, job.queued_at + 0.5, delay=0.5)
        assert not calls
        for waited in (0.6, 0.7, 1.9):
            check_delay(job, job.queued_at + waited, delay=0.5)
        assert calls == ["delayed"]
        assert not job.is_over
        check_delay(job, job.queued_at + 2.0, delay=0.5)
        with pytest.raises(DeadlineExceeded, match=r"not ready after 2 s") as caught:
            await job.result
        assert "X-Request-Timeout" in str(caught.value.hint)
        check_delay(job, job.queued_at + 3.0, delay=0.5)  # the job is over

    run(scenario)


class UnobservedJob(Job):
    """A job whose result nobody reads, with the attributes that `Job` sets."""

    __slots__ = ()
    is_over = False

    def finish(self, run: BatchRun, start: int) -> None:
        """Ignore the results."""

    def fail(self, error: BaseException) -> None:
        """Ignore the error."""


class ObservedJob(Job):
    """A job that keeps its first result, and counts the results."""

    def __init__(self, inputs: tuple[np.ndarray, ...], done: asyncio.Event) -> None:
        super().__init__(inputs, math.inf, perf_counter())
        self.outcomes: list[np.ndarray | BaseException] = []
        self._done = done

    @property
    def is_over(self) -> bool:
        """Whether there is a result."""
        return bool(self.outcomes)

    def finish(self, run: BatchRun, start: int) -> None:
        """Keep the rows of this job."""
        self.outcomes.append(run.outputs[0][start : start + self.rows])
        self._done.set()

    def fail(self, error: BaseException) -> None:
        """Keep the error."""
        self.outcomes.append(error)
        self._done.set()


def test_submitted_jobs_share_a_batch_and_count_as_pending_until_they_are_released(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches, max_batch_rows=8) as batcher:
            jobs = [ObservedJob((random_rows(rows, seed=rows),), asyncio.Event()) for rows in (2, 3)]
            for job in jobs:
                assert batcher.accepts(vae, job.rows)
                batcher.submit(vae, RECONSTRUCT, job)
            assert (batcher.pending_rows, batcher.backlog.amount) == (5, 5)
            for job in jobs:
                await asyncio.wait_for(job._done.wait(), 60)
                (output,) = job.outcomes
                assert not isinstance(output, BaseException)
                np.testing.assert_allclose(output, reconstruction(vae, job.inputs[0]), atol=1e-6)
                batcher.release(job.rows)
            assert (batcher.pending_rows, batcher.backlog.amount) == (0, 0)
            assert not batcher.accepts(vae, 9)
        assert not batcher.accepts(vae, 1)
        assert batches == [("reconstruct", 5)]

    run(scenario)


def test_number_of_pending_rows_is_exported(vae: BareModel) -> None:
    async def scenario() -> None:
        exported = [-1.0]
        batcher = Batcher(
            max_batch_rows=64, max_batch_bytes=2**20, threads=1, on_batch=lambda *_: None, exported_rows=exported
        )
        batcher.start()
        task = asyncio.create_task(batcher.run(vae, RECONSTRUCT, random_rows(5)))
        await asyncio.sleep(0)
        assert exported == [5]
        await task
        assert exported == [0]
        await batcher.close()

    run(scenario)


def test_jobs_of_different_classes_share_a_batch(vae: BareModel) -> None:
    async def scenario() -> None:
        queue = BatchQueue(max_batch_rows=8, max_batch_bytes=2**20)
        jobs = [future_job(), UnobservedJob((random_rows(2),), 1e9, 0.0)]
        for job in jobs:
            queue.put(vae, RECONSTRUCT, job)
        batch = queue.take()
        assert batch is not None
        assert (batch.jobs, batch.rows) == (jobs, 3)
        assert queue.is_empty

    run(scenario)
