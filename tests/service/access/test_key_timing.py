"""The time of the check of a wrong key tells nothing about how much of it is right."""

from pathlib import Path

import pytest

from benchmarks.serving.key_timing import MAX_EFFECT, character_check, create_keys, effects

SAMPLES = 5_000
ATTEMPTS = 5  # a busy machine may disturb some of them, but a real difference shows in all


@pytest.mark.parametrize("kind", ["right prefix", "without elbo_", "wrong again"])
def test_check_of_a_wrong_key_takes_as_long_as_that_of_any_other(tmp_path: Path, kind: str) -> None:
    keys, valid = create_keys(tmp_path)
    distances: list[float] = []
    while len(distances) < ATTEMPTS:
        distances.append(abs(effects(keys.find, valid, SAMPLES)[kind] - 0.5))
        if distances[-1] <= MAX_EFFECT:
            return
    raise AssertionError(f"expected a distance of at most {MAX_EFFECT} from 0.5, got {distances}")


def test_same_method_finds_the_difference_in_a_check_that_compares_characters(tmp_path: Path) -> None:
    _, valid = create_keys(tmp_path)
    found = effects(character_check(valid), valid, SAMPLES)
    assert found["right prefix"] > 0.5 + 5 * MAX_EFFECT
    assert found["without elbo_"] < 0.5 - 5 * MAX_EFFECT
