"""What a training run may choose, and the defaults. Imports no torch: the command line reads its defaults here."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from models.manifest import NAME

Kind = Literal["pca", "ae", "vae", "ensemble"]
KINDS: tuple[Kind, ...] = ("pca", "ae", "vae")  # what auto compares and the demonstration shows
EVERY_KIND: tuple[Kind, ...] = (*KINDS, "ensemble")
WIDTHS = {"mlp": (256, 128), "conv": (32, 64)}  # where --hidden is not given


class TrainConfig(BaseModel):
    """One run. Written into the artifact's manifest, so that it can be repeated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Literal["pca", "ae", "vae", "ensemble", "auto"] = Field(
        description="pca (exact, closed form), ae (autoencoder), vae (variational autoencoder), ensemble (an ae "
        "and nearest neighbours: the best anomaly scores), or auto: the first three, of which the one is "
        "published that does best on rows that it has not seen"
    )
    name: str = Field(pattern=f"^{NAME.pattern}$", description="what the artifact is published and served as")
    seed: int = Field(0, ge=0, lt=2**32, description="of the split, the initial weights, the shuffling and the noise")
    latents: int | None = Field(
        None,
        ge=1,
        description="dimension of the code; by default as many as explain 99 % of a table's variance (vae: 95 %, "
        "pca: 90 %), at most 64; for pictures 16, or half of the features if fewer than 32",
    )
    network: Literal["mlp", "conv"] = Field(
        "mlp", description="what encoder and decoder are: a multilayer perceptron, or convolutions (for images)"
    )
    hidden: tuple[int, ...] | None = Field(
        None,
        description="hidden widths of the encoder (of conv: channels, each stage halving the picture), mirrored by the "
        "decoder; none makes both linear; by default 128,64 for tables, 256,128 for pictures and 32,64 for conv",
    )
    dense: tuple[int, ...] = Field(
        (), description="hidden widths between the convolutions and the code, mirrored by the decoder (conv)"
    )
    activation: Literal["silu", "relu", "tanh"] = Field("silu", description="between the layers")
    output: Literal["auto", "linear", "sigmoid"] = Field(
        "auto",
        description="what the decoder of an ae or a gaussian vae ends in: auto takes the sigmoid for pictures in "
        "[0, 1], unless the networks are linear",
    )
    epochs: int | None = Field(
        None, ge=1, description="by default as many as make about 1,500 steps for tables, 3,000 for pictures"
    )
    batch_size: int = Field(128, ge=1, description="rows a step")
    learning_rate: float | None = Field(
        None, gt=0, description="the peak of the one-cycle schedule; by default 3e-3 for tables, 1e-3 for pictures"
    )
    l2: float = Field(0.0, ge=0, description="weight of the sum of squared weights in the loss")
    patience: int | None = Field(
        None, ge=0, description="epochs without a better held-out loss before training stops; by default it never does"
    )
    kept: Literal["best", "last"] | None = Field(
        None,
        description="the epoch that is published: best by the loss of the held-out rows, or last; by default last for "
        "tables, unless --patience is given, and best for pictures",
    )
    noise: float | None = Field(
        None,
        ge=0,
        description="denoising (ae, ensemble): the highest standard deviation of noise on the inputs, in model units, "
        "drawn log-uniformly a row from a twentieth of it; by default 2 for tables and none for pictures",
    )
    masking: float = Field(0.0, ge=0, lt=1, description="denoising (ae): share of the inputs that are set to 0")
    beta: float = Field(1.0, ge=0, description="weight of the KL term (vae)")
    warm_up: int = Field(
        0,
        ge=0,
        description="steps in which the weight of the KL term rises from 0 to beta; with more than 1 draw a row, steps "
        "that make do with 1 (vae)",
    )
    free_bits: float = Field(0.0, ge=0, description="nats of KL a latent that cost nothing (vae)")
    samples: int = Field(1, ge=1, description="draws a row; more than 1 makes the bound importance-weighted (vae)")
    likelihood: Literal["gaussian", "bernoulli"] = Field(
        "gaussian", description="p(x|z) (vae): gaussian with a learned variance, or bernoulli for values in [0, 1]"
    )
    binarise: bool = Field(
        False, description="draw every value anew each time, 1 with itself as the probability, else 0 (bernoulli)"
    )
    variance: Literal["learned", "feature", "optimal"] | float | None = Field(
        None,
        description="of the gaussian likelihood (vae): learned, one a feature, optimal (the mean squared error), or "
        "a number that stays; by default one a feature for tables and learned for pictures",
    )
    robust: bool = Field(
        False, description="some of the rows may be anomalies: fit to the three quarters of them that are most alike"
    )
    scale: Literal["auto", "standardise", "range", "none"] = Field(
        "auto",
        description="preprocessing: mean 0 and variance 1 a feature, or the range to [0, 1]; auto takes the range for "
        "images and for bernoulli, and standardises tables",
    )
    drop: tuple[str, ...] = Field((), description="columns to leave out: text, dates, identifiers")
    keep: tuple[str, ...] = Field((), description="columns to learn from though they look like identifiers")
    size: tuple[int, int] | None = Field(
        None,
        description="of pictures in a folder, <height>x<width>: each is cut to that shape about its centre and resized",
    )
    private: bool = Field(
        False, description="leave held-out rows and their codes out of the artifact: the explorer then shows none"
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="of the networks' products while they train: bf16 is faster on a GPU, to three digits"
    )
    compile: bool = Field(False, description="let torch.compile build the networks: slow to start, then faster")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the networks train")

    @property
    def widths(self) -> tuple[int, ...]:
        """Hidden widths of the encoder, chosen or by default."""
        return WIDTHS[self.network] if self.hidden is None else self.hidden


# What `elbo demo` trains on the bundled digits. The linear autoencoder is there to be laid beside PCA, which it equals.
DEMONSTRATION: tuple[TrainConfig, ...] = (
    *(TrainConfig(model=kind, name=kind) for kind in KINDS),
    TrainConfig(model="ae", name="linear", hidden=(), learning_rate=0.03),  # at 0.001 it is still on its way
)
