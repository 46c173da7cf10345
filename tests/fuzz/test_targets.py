"""Each fuzz target refuses or reads its valid inputs and a few mutants, within the limits of memory and time.

ELBO_TEST_EXAMPLES sets the number of mutants per target. `make fuzz` searches for longer, guided by coverage.
"""

import os
from time import thread_time

import pytest

from service.codec.budget import NO_LIMIT, Budget
from service.errors import ServiceError
from tests.fuzz.oracle import OracleError, Target, check, mutant
from tests.fuzz.targets import TARGETS

EXAMPLES = int(os.environ.get("ELBO_TEST_EXAMPLES", "10"))


@pytest.mark.parametrize("name", TARGETS)
def test_reader_takes_every_valid_input_of_its_fuzz_target(name: str) -> None:
    target = TARGETS[name]
    seeds = list(target.seeds())
    assert seeds
    for seed in seeds:
        target.read(seed, NO_LIMIT)
        check(target, seed)


@pytest.mark.parametrize("name", TARGETS)
def test_reader_reads_or_refuses_mutants_within_memory_and_time(name: str) -> None:
    mutants = [mutant(TARGETS[name], seed) for seed in range(EXAMPLES)]
    assert len(set(mutants)) > EXAMPLES / 4, "most mutants are equal, so they test little"
    for data in mutants:
        check(TARGETS[name], data)


def _raise(_: bytes, __: Budget) -> None:
    raise KeyError("a fault")


def _take_memory(_: bytes, __: Budget) -> None:
    bytes(2**26)


def _take_time(_: bytes, __: Budget) -> None:
    end = thread_time() + 1.2
    while thread_time() < end:
        sum(range(10_000))


@pytest.mark.parametrize(
    ("read", "message"), [(_raise, "got KeyError"), (_take_memory, "bytes of memory"), (_take_time, "processor time")]
)
def test_oracle_with_a_faulty_reader_raises_the_reason(read: object, message: str) -> None:
    target = Target(read, lambda: [b"x"], lambda data, _: data, ServiceError)  # type: ignore[arg-type]
    with pytest.raises(OracleError, match=message):
        check(target, b"x")


@pytest.mark.parametrize("name", TARGETS)
def test_mutants_of_a_fuzz_target_differ(name: str) -> None:
    assert len({mutant(TARGETS[name], seed) for seed in range(4)}) > 1
