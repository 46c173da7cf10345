"""What open options become: for tables, for pictures, and not at all where they were chosen."""

from typing import Any

import pytest

from training.config import EVERY_KIND, Kind, TrainConfig
from training.fitting.defaults import MAX_TABLE_LATENTS, default_image_latents, default_table_latents, with_defaults


def config(kind: Kind = "ae", **options: object) -> TrainConfig:
    return TrainConfig.model_validate({"model": kind, "name": "m"} | options)


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("pictures", [False, True])
def test_everything_but_latents_and_the_epochs_of_pictures_is_settled(kind: Kind, pictures: bool) -> None:
    found = with_defaults(config(kind), pictures, rows=1_000)
    for name in ("noise", "learning_rate", "variance", "hidden", "kept"):
        assert getattr(found, name) is not None, name
    assert (found.epochs is None) == pictures


def test_what_was_chosen_stays() -> None:
    chosen: dict[str, Any] = {
        "noise": 0.0,
        "learning_rate": 0.1,
        "variance": "optimal",
        "hidden": (3,),
        "epochs": 7,
        "kept": "best",
    }
    for pictures in (False, True):
        assert with_defaults(config(**chosen), pictures, rows=50) == config(**chosen)


def test_patience_wants_the_best_epoch() -> None:
    assert [with_defaults(config(patience=patience), False, 100).kept for patience in (None, 3)] == ["last", "best"]


def test_a_small_table_and_a_large_one_get_about_as_many_steps() -> None:
    steps = [(with_defaults(config(), False, rows).epochs or 0) * -(-rows // 128) for rows in (1_000, 10_000, 19_000)]
    assert all(1_500 <= count < 1_800 for count in steps)


@pytest.mark.parametrize(("kind", "expected"), [("pca", 2), ("vae", 3), ("ae", 4), ("ensemble", 4)])
def test_latents_follow_the_explained_variance(kind: Kind, expected: int) -> None:
    shares = [0.6, 0.31, 0.05, 0.035, 0.005]
    assert default_table_latents(kind, shares, rows=1_000, width=5) == expected


def test_latents_never_exceed_what_rows_and_columns_allow() -> None:
    flat = 200 * [1 / 200]
    assert default_table_latents("ae", flat, rows=10_000, width=200) == MAX_TABLE_LATENTS
    assert default_table_latents("ae", flat, rows=21, width=200) == 10
    assert default_table_latents("ae", [1.0], rows=21, width=1) == 1
    assert default_table_latents("ae", [0.5, 0.5], rows=21, width=2) == 1
    assert [default_image_latents(width) for width in (9, 64, 784)] == [5, 16, 16]
