"""The batcher: who shares a batch, who waits, who fails, who is told."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from models.artifact import Artifact
from service.errors import NotReady, Overloaded
from service.inference.backend_selection import select_backend
from service.inference.backends import Backend
from service.inference.batcher import Batcher
from service.inference.operations import ENCODE, SAMPLE, Operation, reconstruct
from tests.service.gate import Gate

RECONSTRUCT = reconstruct(gaps=False)

Batches = list[tuple[str, int]]


@dataclass(frozen=True)
class Lone:
    """A model outside a registry."""

    backend: Backend
    row_bytes: int = 256


@pytest.fixture
def vae(vae: Artifact) -> Lone:
    """The VAE of the session, as the batcher wants it, with nothing known yet of how long it takes."""
    return Lone(select_backend(vae, requested="torchscript").backend)


@asynccontextmanager
async def batcher(
    batches: Batches | None = None,
    max_batch_rows: int = 64,
    queue_rows: int = 1000,
    max_batch_bytes: int = 2**20,
    queue_seconds: float = math.inf,
) -> AsyncIterator[Batcher]:
    told: Batches = [] if batches is None else batches
    limits = max_batch_rows, max_batch_bytes, queue_rows, 1
    running = Batcher(*limits, lambda name, rows: told.append((name, rows)), queue_seconds=queue_seconds)
    running.start()
    try:
        yield running
    finally:
        await running.close()


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 64)).astype(np.float32)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type] # a coroutine, typed as awaitable


def alone(model: Lone, x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        answer: np.ndarray = model.backend.module(torch.from_numpy(x)).numpy()
    return answer


def test_an_answer_is_the_modules_own(vae: Lone) -> None:
    async def scenario() -> None:
        async with batcher() as running:
            ran = await running.run(vae, RECONSTRUCT, rows(5))
        np.testing.assert_array_equal(ran.outputs[0], alone(vae, rows(5)))
        error = ((alone(vae, rows(5)) - rows(5)) ** 2).mean(axis=1)
        np.testing.assert_allclose(ran.outputs[1], error, rtol=1e-5)
        assert ran.computed > 0

    run(scenario)


def test_what_waits_for_the_same_operation_shares_a_batch_and_each_gets_its_own(vae: Lone) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with batcher(batches) as running:
            gate = Gate()
            held = await gate.hold(running, vae, rows(1))
            sizes = [1, 5, 2, 7]
            tasks = [asyncio.create_task(running.run(vae, RECONSTRUCT, rows(n, seed=n))) for n in sizes]
            other = asyncio.create_task(running.run(vae, ENCODE, rows(3)))
            await asyncio.sleep(0)
            gate.open.set()
            answers = await asyncio.gather(*tasks)
            await asyncio.gather(held, other)
        for n, ran in zip(sizes, answers, strict=True):
            np.testing.assert_allclose(ran.outputs[0], alone(vae, rows(n, seed=n)), atol=1e-6)
        assert batches == [("gate", 1), ("reconstruct", 15), ("encode", 3)]

    run(scenario)


def test_batches_keep_to_their_size_and_to_the_order_of_arrival(vae: Lone) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with batcher(batches, max_batch_rows=8) as running:
            gate = Gate()
            held = await gate.hold(running, vae, rows(1))
            ended: list[int] = []

            async def ask(number: int, count: int) -> None:
                await running.run(vae, RECONSTRUCT, rows(count))
                ended.append(number)

            tasks = [asyncio.create_task(ask(i, count)) for i, count in enumerate([3, 4, 2, 8, 1])]
            await asyncio.sleep(0)
            gate.open.set()
            await asyncio.gather(held, *tasks)
        assert [size for _, size in batches] == [1, 7, 2, 8, 1]
        assert ended == [0, 1, 2, 3, 4]

    run(scenario)


def test_a_large_request_runs_in_pieces_between_which_others_have_their_turn(vae: Lone) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with batcher(batches, max_batch_rows=8) as running:
            gate = Gate()
            held = await gate.hold(running, vae, rows(1))
            large = asyncio.create_task(running.run(vae, RECONSTRUCT, rows(20)))
            small = asyncio.create_task(running.run(vae, ENCODE, rows(1)))
            await asyncio.sleep(0)
            gate.open.set()
            ran = await large
            await asyncio.gather(held, small)
        np.testing.assert_allclose(ran.outputs[0], alone(vae, rows(20)), atol=1e-6)
        assert batches == [("gate", 1), ("reconstruct", 8), ("encode", 1), ("reconstruct", 8), ("reconstruct", 4)]

    run(scenario)


def test_samples_never_share_a_batch(vae: Lone) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with batcher(batches) as running:
            gate = Gate()
            held = await gate.hold(running, vae, rows(1))
            noise, choice = np.ones((2, 16), np.float32), np.zeros(2, np.float32)
            tasks = [asyncio.create_task(running.run(vae, SAMPLE, noise, choice)) for _ in range(3)]
            await asyncio.sleep(0)
            gate.open.set()
            first, *others = [ran.outputs for ran in await asyncio.gather(*tasks)]
            await held
        for other in others:
            np.testing.assert_array_equal(first[1], other[1])
        assert batches[1:] == [("sample", 2)] * 3

    run(scenario)


def test_only_the_culprit_hears_of_its_failure(vae: Lone) -> None:
    def picky(module: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        if (x > 5).any():
            raise RuntimeError("too large")
        return (module(x),)

    async def scenario() -> None:
        async with batcher() as running:
            gate = Gate()
            held = await gate.hold(running, vae, rows(1))
            operation = Operation("picky", picky)
            inputs = [rows(2, seed=1), rows(1) + 9, rows(3, seed=3)]
            tasks = [asyncio.create_task(running.run(vae, operation, x)) for x in inputs]
            wrong_width = asyncio.create_task(running.run(vae, operation, np.zeros((1, 3), np.float32)))
            await asyncio.sleep(0)
            gate.open.set()
            outcomes = await asyncio.gather(*tasks, wrong_width, return_exceptions=True)
            await held
            assert running.pending_rows == 0
        np.testing.assert_allclose(outcomes[0].outputs[0], alone(vae, inputs[0]), atol=1e-6)  # type: ignore[union-attr] # an answer, no error
        np.testing.assert_allclose(outcomes[2].outputs[0], alone(vae, inputs[2]), atol=1e-6)  # type: ignore[union-attr] # an answer, no error
        assert str(outcomes[1]) == "too large"
        assert isinstance(outcomes[3], RuntimeError)

    run(scenario)


def test_a_request_whose_caller_has_left_is_never_computed(vae: Lone) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with batcher(batches, max_batch_rows=8) as running:
            gate = Gate()
            held = await gate.hold(running, vae, rows(1))
            leaving = asyncio.create_task(running.run(vae, RECONSTRUCT, rows(20)))
            staying = asyncio.create_task(running.run(vae, RECONSTRUCT, rows(3)))
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.sleep(0)
            gate.open.set()
            ran = await staying
            await held
            assert running.pending_rows == 0
        assert leaving.cancelled()
        assert batches == [("gate", 1), ("reconstruct", 3)]
        np.testing.assert_allclose(ran.outputs[0], alone(vae, rows(3)), atol=1e-6)

    run(scenario)


def test_a_full_queue_refuses_and_says_when_to_come_back(vae: Lone) -> None:
    async def scenario() -> None:
        async with batcher(queue_rows=10) as running:
            gate = Gate()
            held = await gate.hold(running, vae, rows(1))
            waiting = asyncio.create_task(running.run(vae, RECONSTRUCT, rows(9)))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded) as caught:
                await running.run(vae, RECONSTRUCT, rows(1))
            assert int(caught.value.headers["Retry-After"]) >= 1
            gate.open.set()
            await asyncio.gather(held, waiting)
            ran = await running.run(vae, RECONSTRUCT, rows(10))
            assert len(ran.outputs[0]) == 10

    run(scenario)


def test_closing_finishes_what_waits_and_refuses_what_comes(vae: Lone) -> None:
    async def scenario() -> None:
        async with batcher() as running:
            gate = Gate()
            held = await gate.hold(running, vae, rows(1))
            waiting = asyncio.create_task(running.run(vae, RECONSTRUCT, rows(2)))
            await asyncio.sleep(0)
            closing = asyncio.create_task(running.close())
            await asyncio.sleep(0)
            with pytest.raises(NotReady):
                await running.run(vae, RECONSTRUCT, rows(1))
            gate.open.set()
            await closing
            assert (await waiting).outputs[0].shape == (2, 64)
            await held

    run(scenario)


def test_a_storm_of_leavers_costs_nobody_else_an_answer(vae: Lone) -> None:
    async def scenario() -> None:
        rng = np.random.default_rng(1)
        async with batcher(max_batch_rows=16, queue_rows=100_000) as running:
            sizes = rng.integers(1, 40, 300)
            inputs = [rows(int(n), seed=i) for i, n in enumerate(sizes)]
            tasks = [asyncio.create_task(running.run(vae, RECONSTRUCT, x)) for x in inputs]
            for i in rng.permutation(300)[:150]:
                tasks[i].cancel()
                if i % 10 == 0:
                    await asyncio.sleep(0.001)
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert running.pending_rows == 0
        survivors = [(x, ran) for x, ran in zip(inputs, outcomes, strict=True) if not isinstance(ran, BaseException)]
        assert len(survivors) >= 150
        for x, ran in survivors:
            np.testing.assert_allclose(ran.outputs[0], alone(vae, x), atol=1e-6)
        left = [ran for ran in outcomes if isinstance(ran, BaseException)]
        assert all(isinstance(ran, asyncio.CancelledError) for ran in left)

    run(scenario)


def slow(_: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
    time.sleep(0.02 * len(x))
    return (x,)


def test_what_would_wait_too_long_is_refused_and_a_large_request_on_an_idle_engine_never(vae: Lone) -> None:
    operation = Operation("slow", slow)

    async def scenario() -> None:
        async with batcher(max_batch_rows=1, queue_seconds=0.1) as running:
            cold = await asyncio.gather(*[running.run(vae, operation, rows(1)) for _ in range(30)])
            assert len(cold) == 30  # nothing was measured yet: all were let in
            ran = await running.run(vae, operation, rows(20, seed=1))  # takes 0.4 s by itself
            np.testing.assert_array_equal(ran.outputs[0], rows(20, seed=1))
            asked = [rows(1, seed=seed) for seed in range(30)]
            answers = await asyncio.gather(*[running.run(vae, operation, x) for x in asked], return_exceptions=True)
            served = [index for index, answer in enumerate(answers) if not isinstance(answer, Overloaded)]
            assert served == list(range(len(served)))  # the first in are the first out
            assert 1 < len(served) <= 7  # 50 rows a second, in 0.1 s, and the one that runs
            for index in served:
                answer = answers[index]
                assert not isinstance(answer, BaseException)
                np.testing.assert_array_equal(answer.outputs[0], asked[index])
            refused = answers[-1]
            assert isinstance(refused, Overloaded)
            assert int(refused.headers["Retry-After"]) >= 1
            assert running.pending_rows == 0
            await running.run(vae, operation, rows(1))

    run(scenario)
