"""The time that the check of a wrong key takes does not tell how many of its characters are right."""

from pathlib import Path

import pytest

from benchmarks.serving.key_timing import MAX_EFFECT, character_check, create_keys, effects

SAMPLES = 5_000
ATTEMPTS = 5  # a busy machine may disturb some of them, but a real difference shows in all


@pytest.mark.parametrize("kind", ["right prefix", "without elbo_", "wrong again"])
def test_check_takes_equally_long_for_every_kind_of_wrong_key(tmp_path: Path, kind: str) -> None:
    keys, valid = create_keys(tmp_path)
    distances: list[float] = []
    while len(distances) < ATTEMPTS:
        distances.append(abs(effects(keys.find, valid, SAMPLES)[kind] - 0.5))
        if distances[-1] <= MAX_EFFECT:
            return
    raise AssertionError(f"expected a distance of at most {MAX_EFFECT} from 0.5, got {distances}")


def test_measurement_finds_a_difference_if_the_check_compares_characters_one_by_one(tmp_path: Path) -> None:
    _, valid = create_keys(tmp_path)
    found = effects(character_check(valid), valid, SAMPLES)
    assert found["right prefix"] > 0.5 + 5 * MAX_EFFECT
    assert found["without elbo_"] < 0.5 - 5 * MAX_EFFECT
