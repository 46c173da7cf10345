"""The batcher: who shares a batch, who waits, who fails, who is told."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch

from models.artifact import Artifact
from service.errors import NotReady
from service.inference.backend_selection import select_backend
from service.inference.operations import ENCODE, SAMPLE, Operation, reconstruct
from tests.service.batching import BareModel, Batches, random_rows, reconstruction, running_batcher
from tests.service.gate import Gate

RECONSTRUCT = reconstruct(gaps=False)


@pytest.fixture
def vae(vae: Artifact) -> BareModel:
    """The VAE of the session, as the batcher wants it, with nothing known yet of how long it takes."""
    return BareModel(select_backend(vae, requested="torchscript").backend)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type] # a coroutine, typed as awaitable


def test_an_answer_is_the_modules_own(vae: BareModel) -> None:
    async def scenario() -> None:
        async with running_batcher() as batcher:
            ran = await batcher.run(vae, RECONSTRUCT, random_rows(5))
        np.testing.assert_array_equal(ran.outputs[0], reconstruction(vae, random_rows(5)))
        error = ((reconstruction(vae, random_rows(5)) - random_rows(5)) ** 2).mean(axis=1)
        np.testing.assert_allclose(ran.outputs[1], error, rtol=1e-5)
        assert ran.computed > 0

    run(scenario)


def test_what_waits_for_the_same_operation_shares_a_batch_and_each_gets_its_own(vae: BareModel) -> None:
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
            answers = await asyncio.gather(*tasks)
            await asyncio.gather(held, other)
        for n, ran in zip(sizes, answers, strict=True):
            np.testing.assert_allclose(ran.outputs[0], reconstruction(vae, random_rows(n, seed=n)), atol=1e-6)
        assert batches == [("gate", 1), ("reconstruct", 15), ("encode", 3)]

    run(scenario)


def test_batches_keep_to_their_size_and_to_the_order_of_arrival(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches, max_batch_rows=8) as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            ended: list[int] = []

            async def ask(number: int, count: int) -> None:
                await batcher.run(vae, RECONSTRUCT, random_rows(count))
                ended.append(number)

            tasks = [asyncio.create_task(ask(i, count)) for i, count in enumerate([3, 4, 2, 8, 1])]
            await asyncio.sleep(0)
            gate.open.set()
            await asyncio.gather(held, *tasks)
        assert [size for _, size in batches] == [1, 7, 2, 8, 1]
        assert ended == [0, 1, 2, 3, 4]

    run(scenario)


def test_a_large_request_runs_in_pieces_between_which_others_have_their_turn(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches, max_batch_rows=8) as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            large = asyncio.create_task(batcher.run(vae, RECONSTRUCT, random_rows(20)))
            small = asyncio.create_task(batcher.run(vae, ENCODE, random_rows(1)))
            await asyncio.sleep(0)
            gate.open.set()
            ran = await large
            await asyncio.gather(held, small)
        np.testing.assert_allclose(ran.outputs[0], reconstruction(vae, random_rows(20)), atol=1e-6)
        assert batches == [("gate", 1), ("reconstruct", 8), ("encode", 1), ("reconstruct", 8), ("reconstruct", 4)]

    run(scenario)


def test_samples_never_share_a_batch(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches) as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            noise, choice = np.ones((2, 16), np.float32), np.zeros(2, np.float32)
            tasks = [asyncio.create_task(batcher.run(vae, SAMPLE, noise, choice)) for _ in range(3)]
            await asyncio.sleep(0)
            gate.open.set()
            first, *others = [ran.outputs for ran in await asyncio.gather(*tasks)]
            await held
        for other in others:
            np.testing.assert_array_equal(first[1], other[1])
        assert batches[1:] == [("sample", 2)] * 3

    run(scenario)


def test_only_the_culprit_hears_of_its_failure(vae: BareModel) -> None:
    def picky(module: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        if (x > 5).any():
            raise RuntimeError("too large")
        return (module(x),)

    async def scenario() -> None:
        async with running_batcher() as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            operation = Operation("picky", picky)
            inputs = [random_rows(2, seed=1), random_rows(1) + 9, random_rows(3, seed=3)]
            tasks = [asyncio.create_task(batcher.run(vae, operation, x)) for x in inputs]
            wrong_width = asyncio.create_task(batcher.run(vae, operation, np.zeros((1, 3), np.float32)))
            await asyncio.sleep(0)
            gate.open.set()
            outcomes = await asyncio.gather(*tasks, wrong_width, return_exceptions=True)
            await held
            assert batcher.pending_rows == 0
        np.testing.assert_allclose(outcomes[0].outputs[0], reconstruction(vae, inputs[0]), atol=1e-6)  # type: ignore[union-attr] # an answer, no error
        np.testing.assert_allclose(outcomes[2].outputs[0], reconstruction(vae, inputs[2]), atol=1e-6)  # type: ignore[union-attr] # an answer, no error
        assert str(outcomes[1]) == "too large"
        assert isinstance(outcomes[3], RuntimeError)

    run(scenario)


def test_a_request_whose_caller_has_left_is_never_computed(vae: BareModel) -> None:
    batches: Batches = []

    async def scenario() -> None:
        async with running_batcher(batches, max_batch_rows=8) as batcher:
            gate = Gate()
            held = await gate.hold(batcher, vae, random_rows(1))
            leaving = asyncio.create_task(batcher.run(vae, RECONSTRUCT, random_rows(20)))
            staying = asyncio.create_task(batcher.run(vae, RECONSTRUCT, random_rows(3)))
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.sleep(0)
            gate.open.set()
            ran = await staying
            await held
            assert batcher.pending_rows == 0
        assert leaving.cancelled()
        assert batches == [("gate", 1), ("reconstruct", 3)]
        np.testing.assert_allclose(ran.outputs[0], reconstruction(vae, random_rows(3)), atol=1e-6)

    run(scenario)


def test_closing_finishes_what_waits_and_refuses_what_comes(vae: BareModel) -> None:
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


def test_a_storm_of_leavers_costs_nobody_else_an_answer(vae: BareModel) -> None:
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
        survivors = [(x, ran) for x, ran in zip(inputs, outcomes, strict=True) if not isinstance(ran, BaseException)]
        assert len(survivors) >= 150
        for x, ran in survivors:
            np.testing.assert_allclose(ran.outputs[0], reconstruction(vae, x), atol=1e-6)
        left = [ran for ran in outcomes if isinstance(ran, BaseException)]
        assert all(isinstance(ran, asyncio.CancelledError) for ran in left)

    run(scenario)
