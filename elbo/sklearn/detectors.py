"""Outlier and novelty detectors, with a threshold that keeps the false-alarm rate."""

import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import OutlierMixin
from sklearn.utils.validation import check_is_fitted

from elbo.errors import ElboWarning
from elbo.sklearn.base import Array, ElboEstimator

if TYPE_CHECKING:
    from training.config import Kind

Calibration = Literal["auto", "split", "cross"]
Scale = Literal["auto", "standardise", "range", "none"]
Activation = Literal["silu", "relu", "tanh"]


class Detector(OutlierMixin, ElboEstimator):  # type: ignore[misc]  # scikit-learn publishes no types
    """Base of the detectors.

    The threshold comes from conformal calibration: calibration rows are scored by models that were fitted without them.
    `predict` therefore calls at most a share `alpha` of new normal rows outliers, on average over training sets, if
    these rows and the training rows are exchangeable.

    `alpha` is not scikit-learn's `contamination`. `contamination` is the share of the training rows that are outliers,
    and puts the threshold at a quantile of the scores of rows that trained the model. `alpha` is the false-alarm rate
    among rows that did not, and does not depend on how many outliers there are.

    Attributes:
        offset_: the threshold: `decision_function(X) = score_samples(X) - offset_`. It is -inf if there are fewer than
            1/alpha - 1 calibration rows: then no row is an outlier, and `fit` warns.
        n_features_in_: number of features D.
        feature_names_in_: names of the features, if X is a frame whose columns have names.
        notes_: messages about the training rows and the model.
        model_: the fitted model as `elbo.Model`.
    """

    alpha: float

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: ARG002  # scikit-learn passes it
        """Fit the model to X [N, D], and calibrate it. `y` is ignored.

        Args:
            X: array or frame, at least 10 rows. NaN is a missing value. The score of a row with missing values is the
                expected score of the complete row.

        Raises:
            ValueError: X or a parameter is invalid. The message says what to do.
        """
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha: expected a rate above 0 and below 1, got {self.alpha!r}")
        self._fit(X)
        from models.manifest import reaches

        calibration = self._pipeline.calibration
        rows = len(calibration.scores)
        self.offset_ = -float(calibration.threshold(self.alpha))
        if not reaches(1 / (rows + 1), self.alpha):  # as on the server: see service.inference.operations
            self.offset_ = -np.inf
            warnings.warn(
                f"no row is an outlier at alpha={self.alpha:g}: the smallest possible p-value is {1 / (rows + 1):.3g}, "
                f"because there are only {rows} calibration rows; fit more rows, or raise alpha",
                ElboWarning,
                stacklevel=2,
            )
        return self

    def score_samples(self, X: Any) -> Array:
        """Return how normal the rows X [N, D] are, [N]: the higher, the more normal.

        It is minus the score that the server gives for the row.
        """
        check_is_fitted(self)
        from models import artifact

        x, _ = self._read(X)
        return -self._run(lambda rows: artifact.score(self._pipeline, rows)[0], x)

    def decision_function(self, X: Any) -> Array:
        """Return by how much the rows X [N, D] are inside the threshold, [N]: negative for outliers."""
        scores = self.score_samples(X)
        return scores - self.offset_

    def predict(self, X: Any) -> npt.NDArray[np.int64]:
        """Return -1 for each outlier among the rows X [N, D], and 1 for each other row, [N].

        A row is an outlier if and only if its p-value is at most `alpha`.
        """
        return np.where(self.decision_function(X) < 0, -1, 1)

    def p_value(self, X: Any) -> Array:
        """Return the conformal p-values of the rows X [N, D], [N].

        A new normal row has a p-value of at most alpha with a probability of at most alpha, for every alpha.
        """
        import torch

        scores = -self.score_samples(X)
        p_values: Array = self._pipeline.calibration.p_value(torch.from_numpy(scores)).numpy()
        return p_values

    def predict_proba(self, X: Any) -> Array:
        """Return [1 - p, p] for each of the rows X [N, D], [N, 2], where p is the p-value of the row.

        The columns are in the order of the labels -1 and 1, as scikit-learn orders classes: the last column is the
        p-value, and is high for normal rows. It is a tail probability of normal rows, and not the probability that a
        row is normal, which depends on how frequent outliers are.
        """
        p_value = self.p_value(X)
        return np.column_stack((1 - p_value, p_value))


class PCADetector(Detector):
    """Detects rows that principal components explain badly, or that lie far out along them. Fits in milliseconds.

    Args:
        alpha: share of new normal rows that may be called outliers.
        latents: number of components; default: as many as explain 90 % of the variance.
        robust: tolerate outliers among the training rows: fit only the three quarters that are most alike.
        scale: standardise (mean 0, variance 1), range (to [0, 1]) or none; auto: standardise.
        calibration: split (a fifth of the rows calibrates and fits nothing), cross (all rows, each scored by a model
            that was fitted without it), or auto (cross for at most 500 distinct rows).
        random_state: seed of the split of the rows. An integer gives the model that `elbo train --seed` gives.
        verbose: 1 shows the progress on standard error.
    """

    _kind: ClassVar["Kind"] = "pca"

    def __init__(
        self,
        alpha: float = 0.05,
        *,
        latents: int | None = None,
        robust: bool = False,
        scale: Scale = "auto",
        calibration: Calibration = "auto",
        random_state: Any = 0,
        verbose: int = 0,
    ) -> None:
        self.alpha = alpha
        self.latents = latents
        self.robust = robust
        self.scale = scale
        self.calibration = calibration
        self.random_state = random_state
        self.verbose = verbose


class AutoencoderDetector(Detector):
    """Detects rows that a denoising autoencoder reconstructs badly, or whose latents are unusual.

    Args:
        alpha: share of new normal rows that may be called outliers.
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
        calibration: split (a fifth of the rows calibrates and fits nothing), cross (all rows, each scored by a model
            that was fitted without it: six fits), or auto (cross for at most 500 distinct rows).
        device: cpu, cuda, or auto, which trains on a GPU if there is one.
        random_state: seed of the split, the weights and the noise. An integer gives the model that
            `elbo train --seed` gives.
        verbose: 1 shows the progress on standard error.
    """

    _kind: ClassVar["Kind"] = "ae"

    def __init__(
        self,
        alpha: float = 0.05,
        *,
        latents: int | None = None,
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
        calibration: Calibration = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        random_state: Any = 0,
        verbose: int = 0,
    ) -> None:
        self.alpha = alpha
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
        self.calibration = calibration
        self.device = device
        self.random_state = random_state
        self.verbose = verbose


class EnsembleDetector(AutoencoderDetector):
    """Detects outliers by a denoising autoencoder and nearest neighbours together: the best anomaly scores.

    It takes the parameters of `AutoencoderDetector`.
    """

    _kind: ClassVar["Kind"] = "ensemble"


class VAEDetector(Detector):
    """Detects rows that are improbable under a variational autoencoder.

    Args:
        alpha: share of new normal rows that may be called outliers.
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
        calibration: split (a fifth of the rows calibrates and fits nothing), cross (all rows, each scored by a model
            that was fitted without it: six fits), or auto (cross for at most 500 distinct rows).
        device: cpu, cuda, or auto, which trains on a GPU if there is one.
        random_state: seed of the split, the weights and the noise. An integer gives the model that
            `elbo train --seed` gives.
        verbose: 1 shows the progress on standard error.
    """

    _kind: ClassVar["Kind"] = "vae"

    def __init__(
        self,
        alpha: float = 0.05,
        *,
        latents: int | None = None,
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
        calibration: Calibration = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        random_state: Any = 0,
        verbose: int = 0,
    ) -> None:
        self.alpha = alpha
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
        self.calibration = calibration
        self.device = device
        self.random_state = random_state
        self.verbose = verbose
