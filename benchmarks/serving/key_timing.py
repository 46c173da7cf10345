"""Measure whether the time of the check of an API key tells how much of a guess is right.

    python benchmarks/serving/key_timing.py
    python benchmarks/serving/key_timing.py --smoke    # fewer samples

Three kinds of wrong keys are checked in random order: keys that begin like a valid key (all but the last character are
right), keys with nothing right, and keys without the prefix elbo_. If the check compared characters one by one, the
first kind would take longer. The first and the third kind are compared with the second by the statistic of Mann and
Whitney: the probability that a random check of the one kind takes longer than a random check of the other. It is 0.5 if
the kinds do not differ. Two samples of the second kind are compared too. A check that compares characters is measured
as well, to show that the method would find a difference.

All guesses have one length, because the time to hash depends on the length of a guess, which the client knows. The last
line of the output has the median time of a check for each kind, for a valid key, and for a request without a key.
"""

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from service.access import key_file
from service.access.control import AccessControl
from service.access.key_file import ApiKey
from service.access.scopes import Scope
from service.errors import Unauthorized
from service.shared_memory import SharedCounters

KEYS = 20
POOL = 500  # different guesses of each kind, so that no kind profits from a cache
SAMPLES = 100_000  # of each kind
SMOKE_SAMPLES = 10_000
MAX_EFFECT = 0.02  # largest distance of the probability from 0.5
Check = Callable[[dict[bytes, bytes]], object]


def guesses(valid: list[str]) -> dict[str, list[dict[bytes, bytes]]]:
    """Return headers of requests with wrong keys, by kind."""

    def nearly_right() -> str:
        value = random.choice(valid)
        return value[:-1] + random.choice([char for char in "abcdefgh" if char != value[-1]])

    length = len(valid[0])
    makers: dict[str, Callable[[], str]] = {
        "right prefix": nearly_right,
        "wrong": key_file.new_value,
        "wrong again": key_file.new_value,
        "without elbo_": lambda: (key_file.new_value() + "x" * 5)[5:][:length],
    }
    pools: dict[str, list[dict[bytes, bytes]]] = {kind: [] for kind in makers}
    for _ in range(POOL):  # the kinds take turns, so that the guesses of no kind lie together in memory
        for kind, make in makers.items():
            pools[kind].append({b"host": b"elbo", b"x-api-key": make().encode()})
    return pools


def character_check(valid: list[str]) -> Check:
    """Return a check that compares characters one by one, as a careless server does."""
    values = [value.encode() for value in valid]

    def check(headers: dict[bytes, bytes]) -> None:
        given = headers.get(b"x-api-key", b"")
        for value in values:
            for expected, got in zip(value, given, strict=False):
                if expected != got:
                    break
        raise Unauthorized("the API key is not valid")

    return check


def measure(check: Check, pools: dict[str, list[dict[bytes, bytes]]], samples: int) -> dict[str, np.ndarray]:
    """Return the times of the checks in nanoseconds, by kind. The kinds take turns, in a new order each time."""
    kinds = list(pools)
    times = {kind: np.empty(samples) for kind in kinds}
    for number in range(samples):
        random.shuffle(kinds)
        for kind in kinds:
            headers = random.choice(pools[kind])
            started = perf_counter_ns()
            with suppress(Unauthorized):
                check(headers)
            times[kind][number] = perf_counter_ns() - started
    return times


def probability_longer(times: np.ndarray, others: np.ndarray) -> float:
    """Return the probability that a random element of `times` is larger than one of `others`; ties count as half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, times, side="left")
    not_above = np.searchsorted(ordered, times, side="right")
    return float((below + not_above).mean() / (2 * len(others)))


def effects(check: Check, valid: list[str], samples: int) -> dict[str, float]:
    """Return, for each kind, the probability that its check takes longer than the check of a key with nothing right."""
    times = measure(check, guesses(valid), samples)
    return {kind: probability_longer(times[kind], times["wrong"]) for kind in times if kind != "wrong"}


def create_keys(folder: Path) -> tuple[AccessControl, list[str]]:
    """Return an access control with KEYS keys, and the values of the keys."""
    path = folder / "keys.toml"
    valid = [key_file.new_value() for _ in range(KEYS)]
    for number, value in enumerate(valid):
        key = ApiKey(sha256=key_file.hash_of(value), scopes=frozenset({Scope.INFER}))
        key_file.add(path, f"key{number}", key)
    return AccessControl(path, SharedCounters()), valid


def main() -> None:
    """Measure both checks and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="fewer samples, to check that the benchmark works")
    samples = SMOKE_SAMPLES if parser.parse_args().smoke else SAMPLES
    with tempfile.TemporaryDirectory() as folder:
        keys, valid = create_keys(Path(folder))
        print("| check | " + " | ".join(kind for kind in guesses(valid) if kind != "wrong") + " |\n|---|---|---|---|")
        for name, check in (("Elbo", keys.find), ("character by character", character_check(valid))):
            found = effects(check, valid, samples)
            print(f"| {name} | {' | '.join(f'{value:.3f}' for value in found.values())} |", flush=True)
        times = measure(keys.find, guesses(valid), samples // 10)
        others = {"valid": [{b"x-api-key": value.encode()} for value in valid], "no key": [{b"host": b"elbo"}]}
        times |= measure(keys.find, others, samples // 10)
        medians = ", ".join(f"{kind} {statistics.median(found):.0f} ns" for kind, found in times.items())
        print(f"\nmedian time of a check: {medians}")


if __name__ == "__main__":
    main()
