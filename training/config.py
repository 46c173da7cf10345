"""Options of a training run, with their defaults. The module imports no torch, so that `elbo train --help` is fast."""

from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from models.manifest import (
    MAX_CONDITION_COLUMNS,
    MAX_INCIDENT_ROWS,
    MAX_WINDOW_ROWS,
    MIN_INCIDENT_ROWS,
    MIN_WINDOW_ROWS,
    NAME,
)
from models.season import PERIODS, Period

Kind = Literal["pca", "ae", "vae", "ensemble"]
EVERY_KIND: tuple[Kind, ...] = get_args(Kind)
AUTO_KINDS: tuple[Kind, ...] = ("pca", "ae", "vae")  # the kinds that auto compares and that `elbo demo` trains
CONDITIONAL_KINDS = ("ae", "vae")  # the kinds that can know the condition of a row
NEW_OPTIONS = (  # options that earlier releases do not know
    "time", "group", "split", "window", "season", "time_zone", "scale_by_group", "incident_rows", "condition",
    "calibration", "category", "bounds",
)  # fmt: skip
AUTO_CROSS_ROWS = 500  # --calibration auto is cross for tables of at most this many distinct rows
WIDTHS = {"mlp": (256, 128), "conv": (32, 64)}  # default hidden widths; for tables, see fitting/defaults.py


def read_bounds(entry: str) -> tuple[str, float, float]:
    """Return the name of the column in an entry of --bounds, and its smallest and largest value.

    An end that is absent is infinite: it does not change the range of the training rows.

    Raises:
        ValueError: the entry is not of the form name=low:high.
    """
    name, _, ends = entry.rpartition("=")
    first, colon, last = ends.partition(":")
    try:
        low, high = float(first or "-inf"), float(last or "inf")
    except ValueError:
        colon, low, high = "", 0.0, 0.0
    if not (name and colon and low < high):
        raise ValueError(
            f"expected a column with its smallest and its largest value, such as load=0:100, got {entry!r}"
        )
    return name, low, high


# Options that name columns or their bounds; each is a list
COLUMN_OPTIONS = ("drop", "keep", "label", "category", "bounds", "season", "condition")


class TrainConfig(BaseModel):
    """Options of one training run. The artifact's manifest stores them, so that the run can be repeated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Literal[Kind, "auto"] = Field(
        description="pca (exact, closed form), ae (autoencoder), vae (variational autoencoder), ensemble (an ae "
        "plus nearest neighbours: the best anomaly scores), or auto (train pca, ae and vae, and "
        "publish the one that does best on held-out rows)"
    )
    name: str = Field(pattern=f"^{NAME.pattern}$", description="name under which the model is published and served")
    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of the split, the initial weights, the shuffling and the noise"
    )
    latents: int | None = Field(
        None,
        ge=1,
        description="number of latents; default for tables: as many as explain 99 % of the variance (vae: 95 %, "
        "pca: 90 %), at most 64; default for images: 16, or half the number of features if that is "
        "less",
    )
    network: Literal["mlp", "conv"] = Field(
        "mlp", description="encoder and decoder: mlp (multilayer perceptron) or conv (convolutions, for images)"
    )
    hidden: tuple[int, ...] | None = Field(
        None,
        description="widths of the encoder's hidden layers, mirrored by the decoder (for conv: channels per stage; "
        "each stage halves the image); the value 'none' makes the networks linear; default: 128,64 for tables, "
        "256,128 for images, 32,64 for conv",
    )
    dense: tuple[int, ...] = Field(
        (),
        description="widths of dense layers between the convolutions and the latents, mirrored by the decoder (conv)",
    )
    activation: Literal["silu", "relu", "tanh"] = Field("silu", description="activation function between layers")
    output: Literal["auto", "linear", "sigmoid"] = Field(
        "auto",
        description="last layer of the decoder (ae, ensemble, gaussian vae); auto: sigmoid for images scaled to "
        "[0, 1] unless the networks are linear, else linear",
    )
    epochs: int | None = Field(
        None,
        ge=1,
        description="passes over the fit rows; default: enough for about 1,500 steps for tables, 3,000 for images",
    )
    batch_size: int = Field(128, ge=1, description="rows per step")
    learning_rate: float | None = Field(
        None, gt=0, description="peak of the one-cycle schedule; default: 3e-3 for tables, 1e-3 for images"
    )
    l2: float = Field(0.0, ge=0, description="weight of the sum of squared weights in the loss")
    patience: int | None = Field(
        None,
        ge=0,
        description="stop when the held-out loss has not improved for more than this many epochs; default: never "
        "stop early",
    )
    kept: Literal["best", "last"] | None = Field(
        None,
        description="epoch to publish: best (lowest held-out loss) or last; default: last for tables trained without "
        "--patience, otherwise best",
    )
    noise: float | None = Field(
        None,
        ge=0,
        description="denoising (ae, ensemble): maximum standard deviation of the noise added to the inputs, in "
        "model units; each row draws its own standard deviation, log-uniform from 1/20 of the maximum to the maximum; "
        "default: 2 for tables, 0 for images",
    )
    masking: float = Field(
        0.0, ge=0, lt=1, description="denoising (ae, ensemble): probability that an input is set to 0"
    )
    beta: float = Field(1.0, ge=0, description="weight of the KL term (vae)")
    warm_up: int = Field(
        0,
        ge=0,
        description="number of steps, from the start of training, over which the weight of the KL term rises from 0 to "
        "beta; if --samples is above 1, these first steps draw only one sample per row (vae)",
    )
    free_bits: float = Field(0.0, ge=0, description="nats of KL per latent that are not penalised (vae)")
    samples: int = Field(
        1, ge=1, description="posterior samples per row; above 1 the objective is the importance-weighted bound (vae)"
    )
    likelihood: Literal["gaussian", "bernoulli"] = Field(
        "gaussian", description="p(x|z) (vae): gaussian with a learned variance, or bernoulli for values in [0, 1]"
    )
    binarise: bool = Field(
        False, description="at each step, replace each value v by 1 with probability v, else by 0 (bernoulli)"
    )
    variance: Literal["learned", "feature", "optimal"] | float | None = Field(
        None,
        description="variance of the gaussian likelihood (vae): learned (one for all features), feature (one per "
        "feature), optimal (the mean squared error), or a fixed number; default: feature for tables, "
        "learned for images",
    )
    robust: bool = Field(
        False,
        description="tolerate anomalies in the training data: fit only the three quarters of the rows that are most "
        "alike",
    )
    scale: Literal["auto", "standardise", "range", "none"] = Field(
        "auto",
        description="preprocessing: standardise (mean 0, variance 1 per feature), range (to [0, 1]) or none; "
        "auto: range for images and for bernoulli, standardise for tables",
    )
    drop: tuple[str, ...] = Field((), description="columns to leave out: text, dates, times, counters, identifiers")
    keep: tuple[str, ...] = Field((), description="columns to train on even if they look like identifiers or counters")
    label: tuple[str, ...] = Field(
        (),
        description="columns that hold labels although no name says so: they are no features, and the first one says "
        "which rows are anomalous; without this option, a label column is found by its name",
    )
    category: tuple[str, ...] = Field(
        (),
        description="columns of numbers that are names, such as codes or ports: each value is a level of a category. "
        "Columns of text are categories without this option",
    )
    bounds: tuple[str, ...] = Field(
        (),
        description="the smallest and the largest value of columns of numbers, such as 'load=0:100' or 'errors=0:': "
        "samples and imputed values stay within; default: the range of the training rows",
    )
    time: str | None = Field(
        None,
        description="column with the time of each row (ISO 8601, or Unix time in s, ms, us or ns): split the rows by "
        "time, and calibrate on the newest; default: split them at random",
    )
    group: str | None = Field(
        None, description="column with the group of each row, such as its host; needs --time; default: one group"
    )
    split: Literal["newest", "blocks"] = Field(
        "newest",
        description="how rows are split by time: newest (the oldest 70 % fit, the newest 20 % calibrate), or blocks "
        "(each of 5 blocks of the history has fit rows, held-out rows and calibration rows). With blocks, the model "
        "knows the whole of a history that changes. But the figures on held-out rows are better than they will be on "
        "later rows, because the model was fitted to rows of the same days; blocks needs --time",
    )
    window: Literal["auto"] | int | None = Field(
        None,
        description="judge each row together with the rows before it in its group, this many rows in all (2 to 1000), "
        "by their means and deviations; needs --time; auto: 30 rows, or 10 if there are too few rows for 30, or none; "
        "default: judge each row alone",
    )
    season: tuple[Period, ...] = Field(
        (),
        description="judge a row by the scores that are usual at its hour of the day (day), at its hour and day of the "
        "week (day,week), or at its place in the week (week); needs --time and at least two such periods of rows; "
        "default: at all hours alike",
    )
    time_zone: str = Field(
        "UTC", description="time zone of the hours of --season, such as Europe/Berlin, with its summer time"
    )
    scale_by_group: bool = Field(
        False,
        description="convert the rows of each group into common units before the model sees them: a feature then says "
        "how far it is from what is usual for the group (with --season, also at that time). This finds small "
        "incidents although hosts differ much; needs --group; default: the model sees the rows as they are",
    )
    incident_rows: int | None = Field(
        None,
        ge=MIN_INCIDENT_ROWS,
        le=MAX_INCIDENT_ROWS,
        description="after this many consecutive rows of a group, an incident counts as a change: from then on, such "
        "rows are judged as usual; needs --time; default: 120, or more with a window of more than 10 rows",
    )
    condition: tuple[str, ...] = Field(
        (),
        description="columns of few levels, such as a class, that the model knows but does not learn as features (ae, "
        "vae): rows can then be drawn, decoded and judged for a level. In a source without columns, `label` means the "
        "labels of the rows, such as the names of the folders of images; default: no condition",
    )
    calibration: Literal["auto", "split", "cross"] = Field(
        "split",
        json_schema_extra={"command_default": "auto"},  # of elbo train; programs fit only once by default
        description="which rows calibrate: split (a fifth of the rows, which then fit nothing); cross (all rows, each "
        "scored by a model that was fitted without it: takes several fits; not with --time or --condition); or auto "
        f"(cross for tables of at most {AUTO_CROSS_ROWS} distinct rows without these options, otherwise split)",
    )
    size: tuple[int, int] | None = Field(
        None,
        description="<height>x<width>: crop each image of a folder around its centre, and resize it to this size",
    )
    layout: Literal["nhwc", "nchw", "ntc", "flat"] | None = Field(
        None,
        description="what the dimensions of an array mean: nhwc (images, [N, H, W] or [N, H, W, C]), nchw (images, "
        "[N, C, H, W]), ntc (series of measurements, [N, T, C]) or flat (measurements); default: recognised by the "
        "shape and the values",
    )
    escape: Literal["double", "backslash"] | None = Field(
        None,
        description='how a CSV file writes a quotation mark inside a quoted cell: double ("") or backslash (\\"); '
        "default: double, but files whose lines could be merged by mistake are refused",
    )
    private: bool = Field(
        False,
        description="leave held-out rows and their latents out of the artifact; the explorer then cannot show them",
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32",
        description="precision of matrix products during training; bf16 is faster on a GPU and keeps about three "
        "digits",
    )
    compile: bool = Field(False, description="compile the networks with torch.compile: slower start, faster steps")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device on which the networks train")

    @field_validator("bounds")
    @classmethod
    def _check_bounds(cls, bounds: tuple[str, ...]) -> tuple[str, ...]:
        names = [read_bounds(entry)[0] for entry in bounds]
        if len(set(names)) < len(names):
            raise ValueError("expected each column once")
        return bounds

    @field_validator("group")
    @classmethod
    def _check_group(cls, group: str | None, info: ValidationInfo) -> str | None:
        time = info.data.get("time")
        if group is not None and time is None:
            raise ValueError("expected --time too, because rows are put in order within a group")
        if group is not None and group == time:
            raise ValueError("expected another column than that of --time")
        return group

    @field_validator("split")
    @classmethod
    def _check_split(cls, split: str, info: ValidationInfo) -> str:
        if split == "blocks" and info.data.get("time") is None:
            raise ValueError("expected --time too, because the blocks are parts of the history")
        return split

    @field_validator("window")
    @classmethod
    def _check_window(cls, window: str | int | None, info: ValidationInfo) -> str | int | None:
        if window is not None and info.data.get("time") is None:
            raise ValueError("expected --time too, because a window holds the rows before a row in time")
        if isinstance(window, int) and not MIN_WINDOW_ROWS <= window <= MAX_WINDOW_ROWS:
            raise ValueError(f"expected auto, or {MIN_WINDOW_ROWS} to {MAX_WINDOW_ROWS} rows")
        return window

    @field_validator("incident_rows")
    @classmethod
    def _check_incident_rows(cls, rows: int | None, info: ValidationInfo) -> int | None:
        if rows is not None and info.data.get("time") is None:
            raise ValueError("expected --time too, because only rows with a time have incidents")
        return rows

    @field_validator("calibration")
    @classmethod
    def _check_calibration(cls, calibration: str, info: ValidationInfo) -> str:
        if calibration == "cross" and info.data.get("condition"):
            raise ValueError(
                "expected split or auto with --condition, because scores of rows without a level are corrected with "
                "calibration rows that trained no model"
            )
        if calibration == "cross" and info.data.get("time") is not None:
            raise ValueError(
                "expected split or auto with --time, because neighbouring rows resemble each other: a model that was "
                "fitted to the neighbours of a row scores it too low"
            )
        return calibration

    @field_validator("season")
    @classmethod
    def _check_season(cls, season: tuple[Period, ...], info: ValidationInfo) -> tuple[Period, ...]:
        if season and info.data.get("time") is None:
            raise ValueError("expected --time too, because the season of a row depends on its time")
        return tuple(period for period in PERIODS if period in season)

    @field_validator("scale_by_group")
    @classmethod
    def _check_scale_by_group(cls, scale_by_group: bool, info: ValidationInfo) -> bool:
        if scale_by_group and info.data.get("group") is None:
            raise ValueError("expected --group too, because rows are scaled by what is usual for their group")
        return scale_by_group

    @field_validator("condition")
    @classmethod
    def _check_condition(cls, condition: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if condition and (model := info.data.get("model")) not in CONDITIONAL_KINDS:
            raise ValueError(f"expected --model ae or vae, because {model} does not know the condition of a row")
        if condition and info.data.get("time") is not None:
            raise ValueError("expected no --time: a model with times does not know the condition of a row")
        if len(set(condition)) < len(condition):
            raise ValueError("expected different columns, got one twice")
        if len(condition) > MAX_CONDITION_COLUMNS:
            raise ValueError(f"expected at most {MAX_CONDITION_COLUMNS} columns")
        return condition

    @model_serializer(mode="wrap")
    def _leave_out_absent_options(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the options, but omit those in NEW_OPTIONS that have their defaults: older releases refuse them."""
        options: dict[str, Any] = serialise(self)
        absent = {name for name in NEW_OPTIONS if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in options.items() if name not in absent}

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the hidden widths of the encoder: `hidden`, or the default of the network."""
        return WIDTHS[self.network] if self.hidden is None else self.hidden


# The models that `elbo demo` trains, and their data. The linear autoencoder spans the same subspace as PCA, and the
# explorer compares the two.
DEMONSTRATIONS: tuple[tuple[str, TrainConfig], ...] = (
    *(("digits", TrainConfig(model=kind, name=kind)) for kind in AUTO_KINDS),
    # a learning rate of 0.001 converges too slowly
    ("digits", TrainConfig(model="ae", name="linear", hidden=(), learning_rate=0.03)),
    ("digits", TrainConfig(model="vae", name="map", latents=2)),
    ("digits", TrainConfig(model="vae", name="conditional", condition=("label",))),
    (
        "simulated-hosts",
        TrainConfig(
            model="pca", name="hosts", time="time", group="host", season=("day", "week"), time_zone="Europe/Berlin"
        ),
    ),
)
