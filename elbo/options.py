"""The options of `elbo.fit`, for type checkers and editors. They are the fields of `training.config.TrainConfig`."""

from collections.abc import Sequence
from typing import Literal, TypedDict

from models.season import Period


class Options(TypedDict, total=False):
    """Options of `elbo.fit`: those of `elbo train`, with underscores. `training.config.TrainConfig` describes them."""

    seed: int
    latents: int | None
    network: Literal["mlp", "conv"]
    hidden: Sequence[int] | None
    dense: Sequence[int]
    activation: Literal["silu", "relu", "tanh"]
    output: Literal["auto", "linear", "sigmoid"]
    epochs: int | None
    batch_size: int
    learning_rate: float | None
    l2: float
    patience: int | None
    kept: Literal["best", "last"] | None
    noise: float | None
    masking: float
    beta: float
    warm_up: int
    free_bits: float
    samples: int
    likelihood: Literal["gaussian", "bernoulli"]
    binarise: bool
    variance: Literal["learned", "feature", "optimal"] | float | None
    robust: bool
    scale: Literal["auto", "standardise", "range", "none"]
    drop: Sequence[str] | str
    keep: Sequence[str] | str
    label: Sequence[str] | str
    category: Sequence[str] | str
    bounds: Sequence[str] | str
    time: str | None
    group: str | None
    split: Literal["newest", "blocks"]
    window: Literal["auto"] | int | None
    season: Sequence[Period] | str
    time_zone: str
    scale_by_group: bool
    incident_rows: int | None
    condition: Sequence[str] | str
    calibration: Literal["auto", "split", "cross"]
    size: tuple[int, int] | None
    layout: Literal["nhwc", "nchw", "ntc", "flat"] | None
    escape: Literal["double", "backslash"] | None
    private: bool
    precision: Literal["float32", "bf16"]
    compile: bool
    device: Literal["auto", "cpu", "cuda"]
