"""Defaults that depend on the data: they differ for tables and images, and never replace options that were given."""

from typing import Any

import pytest

from training.config import EVERY_KIND, Kind, TrainConfig
from training.fitting.defaults import MAX_TABLE_LATENTS, default_image_latents, default_table_latents, with_defaults


def config(kind: Kind = "ae", **options: object) -> TrainConfig:
    return TrainConfig.model_validate({"model": kind, "name": "m"} | options)


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("images", [False, True])
def test_every_option_has_a_default_except_the_number_of_epochs_for_images(kind: Kind, images: bool) -> None:
    filled = with_defaults(config(kind), images, rows=1_000)
    for name in ("noise", "learning_rate", "variance", "hidden", "kept"):
        assert getattr(filled, name) is not None, name
    assert (filled.epochs is None) == images


def test_defaults_do_not_replace_given_options() -> None:
    given: dict[str, Any] = {
        "noise": 0.0,
        "learning_rate": 0.1,
        "variance": "optimal",
        "hidden": (3,),
        "epochs": 7,
        "kept": "best",
    }
    for images in (False, True):
        assert with_defaults(config(**given), images, rows=50) == config(**given)


def test_default_is_to_publish_the_best_epoch_if_patience_is_given_and_else_the_last() -> None:
    assert [with_defaults(config(patience=patience), False, 100).kept for patience in (None, 3)] == ["last", "best"]


def test_default_epochs_give_about_the_same_number_of_steps_for_tables_of_any_size() -> None:
    steps = [(with_defaults(config(), False, rows).epochs or 0) * -(-rows // 128) for rows in (1_000, 10_000, 19_000)]
    assert all(1_500 <= count < 1_800 for count in steps)


@pytest.mark.parametrize(("kind", "expected"), [("pca", 2), ("vae", 3), ("ae", 4), ("ensemble", 4)])
def test_default_latents_of_a_table_explain_the_share_of_variance_that_the_kind_requires(
    kind: Kind, expected: int
) -> None:
    variance_shares = [0.6, 0.31, 0.05, 0.035, 0.005]
    assert default_table_latents(kind, variance_shares, rows=1_000, width=5) == expected


def test_default_latents_are_limited_by_rows_and_columns() -> None:
    flat = 200 * [1 / 200]
    assert default_table_latents("ae", flat, rows=10_000, width=200) == MAX_TABLE_LATENTS
    assert default_table_latents("ae", flat, rows=21, width=200) == 10
    assert default_table_latents("ae", [1.0], rows=21, width=1) == 1
    assert default_table_latents("ae", [0.5, 0.5], rows=21, width=2) == 1
    assert [default_image_latents(width) for width in (9, 64, 784)] == [5, 16, 16]
