"""Transformers from rows to latents and back."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted

from elbo.sklearn.base import ElboEstimator
from elbo.sklearn.detectors import Activation, Scale

if TYPE_CHECKING:
    from training.config import Kind

Floats = npt.NDArray[np.float64] | npt.NDArray[np.float32]


class Transformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ElboEstimator):  # type: ignore[misc]
    """Base of the transformers.

    Seven tenths of the rows fit the model, a tenth is held out, and a fifth calibrates the scores of the model that
    `publish` writes.

    Attributes:
        n_features_in_: number of features D.
        feature_names_in_: names of the features, if X is a frame whose columns have names.
        notes_: messages about the training rows and the model.
        model_: the fitted model as `elbo.Model`.
    """

    def __sklearn_tags__(self) -> Any:
        """Return the tags: float32 rows give float32 latents."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: ARG002  # scikit-learn passes it
        """Fit the model to X [N, D]. `y` is ignored.

        Args:
            X: array or frame, at least 10 rows. NaN is a missing value: the model takes the median of the column.

        Raises:
            ValueError: X or a parameter is invalid. The message says what to do.
        """
        return self._fit(X)

    @property
    def _n_features_out(self) -> int:
        return int(self._pipeline.prior.means.shape[1])

    def transform(self, X: Any) -> Floats:
        """Return the latents [N, K] of the rows X [N, D]; of a VAE, the means of the posterior."""
        check_is_fitted(self)
        x, dtype = self._read(X)
        return self._run(lambda rows: self._pipeline.encode(rows)[0], x).astype(dtype)

    def inverse_transform(self, X: Any) -> Floats:
        """Return the rows [N, D], in raw units, that the latents X [N, K] decode to."""
        check_is_fitted(self)
        latents = check_array(X, dtype=(np.float64, np.float32), input_name="X")
        if latents.shape[1] != self._n_features_out:
            raise ValueError(
                f"X has {latents.shape[1]} latents, but {type(self).__name__} has {self._n_features_out}: expected the "
                "output of transform"
            )
        return self._run(self._pipeline.decode, latents.astype(np.float32)).astype(latents.dtype)


class PCATransformer(Transformer):
    """Converts rows to principal components of the scaled features, and back. Fits in milliseconds.

    Args:
        latents: number of components; default: as many as explain 90 % of the variance.
        robust: tolerate outliers among the training rows: fit only the three quarters that are most alike.
        scale: standardise (mean 0, variance 1), range (to [0, 1]) or none; auto: standardise.
        random_state: seed of the split of the rows.
        verbose: 1 shows the progress on standard error.
    """

    _kind: ClassVar["Kind"] = "pca"

    def __init__(
        self,
        latents: int | None = None,
        *,
        robust: bool = False,
        scale: Scale = "auto",
        random_state: Any = 0,
        verbose: int = 0,
    ) -> None:
        self.latents = latents
        self.robust = robust
        self.scale = scale
        self.random_state = random_state
        self.verbose = verbose


class AutoencoderTransformer(Transformer):
    """Converts rows to the latents of a denoising autoencoder, and back.

    Args:
        latents: number of latents; default: as many as explain 99 % of the variance, at most 64.
        hidden: widths of the encoder's hidden layers, mirrored by the decoder; default: (128, 64). Empty: linear.
        activation: silu, relu or tanh, between layers.
        epochs: passes over the rows; default: enough for about 1,500 steps.
        batch_size: rows per step.
        learning_rate: peak of the one-cycle schedule; default: 0.003.
        noise: largest standard deviation of the noise that is added to the inputs, in standard deviations of a column;
            default: 2.
        masking: probability that an input is set to 0 in training.
        l2: weight of the sum of squared weights in the loss.
        patience: stop when the loss of held-out rows has not improved for more than this many epochs; default: never.
        robust: tolerate outliers among the training rows: fit only the three quarters that are most alike.
        scale: standardise (mean 0, variance 1), range (to [0, 1]) or none; auto: standardise.
        device: cpu, cuda, or auto, which trains on a GPU if there is one.
        random_state: seed of the split, the weights and the noise.
        verbose: 1 shows the progress on standard error.
    """

    _kind: ClassVar["Kind"] = "ae"

    def __init__(
        self,
        latents: int | None = None,
        *,
        hidden: tuple[int, ...] | None = None,
        activation: Activation = "silu",
        epochs: int | None = None,
        batch_size: int = 128,
        learning_rate: float | None = None,
        noise: float | None = None,
        masking: float = 0.0,
        l2: float = 0.0,
        patience: int | None = None,
        robust: bool = False,
        scale: Scale = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        random_state: Any = 0,
        verbose: int = 0,
    ) -> None:
        self.latents = latents
        self.hidden = hidden
        self.activation = activation
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.noise = noise
        self.masking = masking
        self.l2 = l2
        self.patience = patience
        self.robust = robust
        self.scale = scale
        self.device = device
        self.random_state = random_state
        self.verbose = verbose


class VAETransformer(Transformer):
    """Converts rows to the posterior means of a variational autoencoder, and latents to rows.

    Args:
        latents: number of latents; default: as many as explain 95 % of the variance, at most 64.
        hidden: widths of the encoder's hidden layers, mirrored by the decoder; default: (128, 64). Empty: linear.
        activation: silu, relu or tanh, between layers.
        epochs: passes over the rows; default: enough for about 1,500 steps.
        batch_size: rows per step.
        learning_rate: peak of the one-cycle schedule; default: 0.003.
        beta: weight of the KL term.
        warm_up: number of steps over which the weight of the KL term rises to beta.
        free_bits: nats of KL per latent that are not penalised.
        samples: posterior samples per row; above 1, the objective is the importance-weighted bound.
        variance: variance of the likelihood: learned (one for all features), feature (one per feature), optimal (the
            mean squared error), or a fixed number; default: feature.
        l2: weight of the sum of squared weights in the loss.
        patience: stop when the loss of held-out rows has not improved for more than this many epochs; default: never.
        robust: tolerate outliers among the training rows: fit only the three quarters that are most alike.
        scale: standardise (mean 0, variance 1), range (to [0, 1]) or none; auto: standardise.
        device: cpu, cuda, or auto, which trains on a GPU if there is one.
        random_state: seed of the split, the weights and the noise.
        verbose: 1 shows the progress on standard error.
    """

    _kind: ClassVar["Kind"] = "vae"

    def __init__(
        self,
        latents: int | None = None,
        *,
        hidden: tuple[int, ...] | None = None,
        activation: Activation = "silu",
        epochs: int | None = None,
        batch_size: int = 128,
        learning_rate: float | None = None,
        beta: float = 1.0,
        warm_up: int = 0,
        free_bits: float = 0.0,
        samples: int = 1,
        variance: Literal["learned", "feature", "optimal"] | float | None = None,
        l2: float = 0.0,
        patience: int | None = None,
        robust: bool = False,
        scale: Scale = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        random_state: Any = 0,
        verbose: int = 0,
    ) -> None:
        self.latents = latents
        self.hidden = hidden
        self.activation = activation
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.beta = beta
        self.warm_up = warm_up
        self.free_bits = free_bits
        self.samples = samples
        self.variance = variance
        self.l2 = l2
        self.patience = patience
        self.robust = robust
        self.scale = scale
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
