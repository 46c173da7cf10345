"""Judge one run of a reader: the errors that it may raise, and the memory and the time that it may take.

Crashes are not what hurts a server most. A few bytes that take gigabytes or minutes do.
"""

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from service.codec.budget import NO_LIMIT, ROW_BYTES, Budget
from service.endpoints.offload import SMALL_BODY

MAX_BODY_BYTES = 2**20  # ELBO_MAX_BODY_BYTES of the fuzzed server, so that small inputs reach the limit
MAX_ROWS = 1000
FREE_BYTES = 8 * 2**20  # what a reader may take whatever it reads: a piece of 64 KiB as Python objects
MEMORY_FACTOR = 3  # how much memory a reader may take for each byte of input and each byte that its budget granted
FREE_SECONDS = 1.0  # processor time; coarse, because the machines that run the tests differ
SECONDS_PER_BYTE = 10e-6


class OracleError(AssertionError):
    """A reader raised an error, or took memory or time, that no input may cause."""


@dataclass(frozen=True)
class Target:
    """A reader, and how to make input for it.

    Args:
        read: reads the input; draws from the budget.
        seeds: returns valid inputs.
        mutate: returns an input like the given one with a change that knows the format.
        refusals: the errors with which the reader may refuse an input.
        may_be_small: whether the server reads a small input of this kind without a budget.
        free_bytes: the memory that the reader may take whatever it reads.
    """

    read: Callable[[bytes, Budget], object]
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, Random], bytes]
    refusals: type[Exception]
    may_be_small: bool = True
    free_bytes: int = FREE_BYTES


def check(target: Target, data: bytes, slowness: float = 1.0) -> None:
    """Let `target` read `data`. `slowness`: how much longer than usual the reader may take.

    Raises:
        OracleError: the reader raised an error that is no refusal, or took too much memory or time.
    """
    tracemalloc.start()
    try:
        seconds, held_bytes = _read(target, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = len(data) + held_bytes
    if peak > target.free_bytes + MEMORY_FACTOR * size:
        raise OracleError(f"{len(data)} bytes took {peak:,} bytes of memory; the budget granted {held_bytes:,}")
    limit = slowness * (FREE_SECONDS + SECONDS_PER_BYTE * size)
    if seconds > limit:
        seconds, _ = _read(target, data)  # tracing memory makes Python several times slower
    if seconds > limit:
        raise OracleError(f"{len(data)} bytes took {seconds:.1f} s of processor time")


def _read(target: Target, data: bytes) -> tuple[float, int]:
    """Return the seconds of processor time that `target` took for `data`, and the bytes that its budget granted."""
    budget = NO_LIMIT if target.may_be_small and len(data) <= SMALL_BODY else _budget()
    budget.start(in_event_loop=False)
    started = time.thread_time()
    try:
        target.read(data, budget)
    except target.refusals:
        pass
    except Exception as error:
        raise OracleError(
            f"expected {target.refusals.__name__} or no error, got {type(error).__name__}: {error}"
        ) from error
    finally:
        seconds = time.thread_time() - started
        budget.stop()
    return seconds, budget.held_bytes


def mutant(target: Target, seed: int) -> bytes:
    """Return input number `seed`: one of the valid inputs after a few changes."""
    random = Random(seed)
    data = random.choice(target.seeds())
    for _ in range(random.randint(1, 4)):
        data = target.mutate(data, random)
    return data


def _budget() -> Budget:
    """Return the budget that the server would give to a request; see `RequestContext.budget`."""
    return Budget(
        max_bytes=2 * MAX_BODY_BYTES + MAX_ROWS * ROW_BYTES,
        max_rows=MAX_ROWS,
        width=4,
        deadline=time.perf_counter() + 30.0,
        hold=_ignore,
        release=_ignore,
    )


def _ignore(size: int) -> None:
    """Do nothing: one request never reaches ELBO_HELD_BYTES."""
