"""Detectors with PyOD's names, parameters and conventions: users of PyOD change one import.

    from elbo.pyod import AutoEncoder  # instead of pyod.models.auto_encoder

The conventions are those of PyOD 3 (Zhao, Nasrullah & Li, "PyOD: A Python toolbox for scalable outlier detection",
2019), which are not those of scikit-learn: a higher score is more anomalous, 1 means outlier, and `contamination` is
the share of the training rows that lie above the threshold. Parameters that are not given have Elbo's defaults, and not
PyOD's. Parameters without a counterpart in Elbo are accepted and ignored. A warning names those that would have changed
the result of PyOD.
"""

import os
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from elbo.errors import ElboWarning
from elbo.sklearn import AutoencoderDetector, PCADetector, VAEDetector
from elbo.sklearn.detectors import Detector

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

ACTIVATIONS = ("relu", "silu", "tanh")
BATCH_SIZE = 128  # Elbo's default


class PyODDetector(BaseEstimator):  # type: ignore[misc]  # scikit-learn publishes no types
    """Base of the detectors: the methods of `pyod.models.base.BaseDetector`.

    Attributes:
        decision_scores_: scores of the training rows, [N]; the higher, the more anomalous.
        threshold_: the score above which a row is an outlier: the (1 - contamination) quantile of `decision_scores_`.
        labels_: 1 for the training rows above the threshold, otherwise 0, [N].
        detector_: the fitted detector of `elbo.sklearn`. Its `p_value` and its `predict` keep a false-alarm rate, and
            its `model_` explains scores.
    """

    contamination: float

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: ARG002  # PyOD ignores it, too
        """Fit the detector to X [N, D], and set the threshold by `contamination`. `y` is ignored.

        Raises:
            ValueError: X or a parameter is invalid.
        """
        contamination: Any = self.contamination  # PyOD also takes objects of PyThresh, Elbo does not
        if not isinstance(contamination, float | int) or not 0 < contamination <= 0.5:
            raise ValueError(f"contamination must be a number in (0, 0.5], got: {self.contamination!r}")
        self._warn_of_ignored()
        self.detector_ = self._detector().fit(X)
        self.decision_scores_ = self.decision_function(X)
        self.threshold_ = float(np.percentile(self.decision_scores_, 100 * (1 - self.contamination)))
        self.labels_ = self._label(self.decision_scores_)
        return self

    @abstractmethod
    def _detector(self) -> Detector:
        """Return the detector of `elbo.sklearn` with these parameters, unfitted."""

    @abstractmethod
    def _ignored(self) -> dict[str, bool]:
        """Return the parameters without a counterpart, and whether the value of each would change PyOD's result."""

    def _warn_of_ignored(self) -> None:
        names = [name for name, is_given in self._ignored().items() if is_given]
        if names:
            warnings.warn(
                f"{type(self).__name__} ignores {', '.join(names)}: Elbo has no counterpart",
                ElboWarning,
                stacklevel=3,
            )

    def decision_function(self, X: Any) -> Array:
        """Return the scores of the rows X [N, D], [N]: the higher, the more anomalous, as the server gives them."""
        check_is_fitted(self, "detector_")
        return -self.detector_.score_samples(X)

    def predict(self, X: Any, return_confidence: bool = False) -> Any:
        """Return 1 for each outlier among the rows X [N, D], 0 for each other row, [N].

        Args:
            return_confidence: also return the confidences [N] of `predict_confidence`.
        """
        scores = self.decision_function(X)
        labels = self._label(scores)
        return (labels, self._confidence(scores)) if return_confidence else labels

    def predict_proba(
        self, X: Any, method: Literal["linear", "unify"] = "linear", return_confidence: bool = False
    ) -> Any:
        """Return the score of each of the rows X [N, D] as a number in [0, 1], as [N, 2]: [normal, outlier].

        Neither method gives a probability: use `p_value` of `detector_` to keep a false-alarm rate.

        Args:
            method: linear (0 at the lowest score of a training row, 1 at the highest) or unify (Kriegel, Kroeger,
                Schubert & Zimek, "Interpreting and unifying outlier scores", 2011, section 4.2).
            return_confidence: also return the confidences [N] of `predict_confidence`.
        """
        from scipy.special import erf

        scores = self.decision_function(X)
        if method == "linear":
            low, high = self.decision_scores_.min(), self.decision_scores_.max()
            outlier = (scores - low) / ((high - low) or 1.0)
        elif method == "unify":
            deviation = self.decision_scores_.std() * np.sqrt(2)
            outlier = erf((scores - self.decision_scores_.mean()) / (deviation or 1.0))
        else:
            raise ValueError(f"method: expected 'linear' or 'unify', got {method!r}")
        outlier = outlier.clip(0, 1)
        proba = np.column_stack((1 - outlier, outlier))
        return (proba, self._confidence(scores)) if return_confidence else proba

    def predict_confidence(self, X: Any) -> Array:
        """Return the probabilities [N] that other training rows give the same predictions for the rows X [N, D].

        Source: Perini, Vercruyssen & Davis, "Quantifying the confidence of anomaly detectors in their example-wise
        predictions", 2020.
        """
        return self._confidence(self.decision_function(X))

    def fit_predict(self, X: Any, y: Any = None) -> Labels:
        """Fit the detector to X [N, D], and return `labels_`, [N]."""
        return self.fit(X, y).labels_

    def publish(
        self, artifacts: "str | os.PathLike[str]" = "artifacts", *, name: str = "model", **options: Any
    ) -> Path:
        """Publish the fitted model as the next version of `name`: see `elbo.sklearn`. The server gives these scores."""
        check_is_fitted(self, "detector_")
        return self.detector_.publish(artifacts, name=name, **options)

    def _label(self, scores: Array) -> Labels:
        return (scores > self.threshold_).astype(np.int64)

    def _confidence(self, scores: Array) -> Array:
        from scipy.stats import binom

        rows = len(self.decision_scores_)
        not_above = np.searchsorted(np.sort(self.decision_scores_), scores, side="right")
        posterior = (1 + not_above) / (2 + rows)
        outlier = 1 - binom.cdf(rows - int(rows * self.contamination), rows, posterior)
        confidence: Array = np.where(self._label(scores) == 1, outlier, 1 - outlier)
        return confidence


class _NetworkDetector(PyODDetector):
    """Base of the detectors with networks."""

    preprocessing: bool
    lr: float | None
    epoch_num: int | None
    batch_size: int | None
    device: Any
    random_state: int | None
    verbose: int
    hidden_activation_name: str | None

    def _training_options(self) -> dict[str, Any]:
        """Return the parameters of the detector of `elbo.sklearn` that all networks have."""
        activation = self.hidden_activation_name if self.hidden_activation_name in ACTIVATIONS else "silu"
        return {
            "alpha": self.contamination,
            "scale": "standardise" if self.preprocessing else "none",
            "learning_rate": self.lr,
            "epochs": self.epoch_num,
            "batch_size": self.batch_size or BATCH_SIZE,
            "device": "auto" if self.device is None else str(self.device).partition(":")[0],
            "random_state": self.random_state or 0,
            "verbose": self.verbose,
            "activation": activation,
        }

    def _ignored(self) -> dict[str, bool]:
        return {
            "optimizer_name": self._differs("optimizer_name", "adam"),
            "optimizer_params": self._differs("optimizer_params"),
            "hidden_activation_name": self._differs("hidden_activation_name", *ACTIVATIONS),
            "batch_norm": self._differs("batch_norm", False),
            "dropout_rate": self._differs("dropout_rate", 0.0),
        }

    def _differs(self, name: str, *same: Any) -> bool:
        """Return whether the parameter `name` is given, and is none of the values that Elbo's networks have."""
        value = getattr(self, name)
        return value is not None and value not in same


class AutoEncoder(_NetworkDetector):
    """Elbo's denoising autoencoder with the parameters of `pyod.models.auto_encoder.AutoEncoder`.

    Args:
        contamination: share of the training rows that lie above the threshold.
        preprocessing: standardise the features.
        lr: peak of the learning rate; default: 0.003.
        epoch_num: passes over the rows; default: enough for about 1,500 steps.
        batch_size: rows per step; default: 128.
        optimizer_name: ignored: Elbo trains with Adam.
        device: cpu or cuda; default: a GPU if there is one.
        random_state: seed.
        use_compile: ignored.
        compile_mode: ignored.
        verbose: 1 shows the progress on standard error.
        optimizer_params: ignored.
        hidden_neuron_list: widths of the encoder's layers; the last one is the number of latents. Default: (128, 64),
            and as many latents as explain 99 % of the variance.
        hidden_activation_name: relu, silu or tanh; default: silu.
        batch_norm: ignored.
        dropout_rate: ignored.
    """

    def __init__(
        self,
        contamination: float = 0.1,
        preprocessing: bool = True,
        lr: float | None = None,
        epoch_num: int | None = None,
        batch_size: int | None = None,
        optimizer_name: str | None = None,
        device: Any = None,
        random_state: int | None = 42,
        use_compile: bool = False,
        compile_mode: str = "default",
        verbose: int = 0,
        optimizer_params: dict[str, Any] | None = None,
        hidden_neuron_list: Sequence[int] | None = None,
        hidden_activation_name: str | None = None,
        batch_norm: bool | None = None,
        dropout_rate: float | None = None,
    ) -> None:
        self.contamination = contamination
        self.preprocessing = preprocessing
        self.lr = lr
        self.epoch_num = epoch_num
        self.batch_size = batch_size
        self.optimizer_name = optimizer_name
        self.device = device
        self.random_state = random_state
        self.use_compile = use_compile
        self.compile_mode = compile_mode
        self.verbose = verbose
        self.optimizer_params = optimizer_params
        self.hidden_neuron_list = hidden_neuron_list
        self.hidden_activation_name = hidden_activation_name
        self.batch_norm = batch_norm
        self.dropout_rate = dropout_rate

    def _detector(self) -> Detector:
        widths = self.hidden_neuron_list
        return AutoencoderDetector(
            latents=None if widths is None else widths[-1],
            hidden=None if widths is None else tuple(widths[:-1]),
            **self._training_options(),
        )


class VAE(_NetworkDetector):
    """Elbo's variational autoencoder with the parameters of `pyod.models.vae.VAE`.

    Args:
        contamination: share of the training rows that lie above the threshold.
        preprocessing: standardise the features.
        lr: peak of the learning rate; default: 0.003.
        epoch_num: passes over the rows; default: enough for about 1,500 steps.
        batch_size: rows per step; default: 128.
        optimizer_name: ignored: Elbo trains with Adam.
        device: cpu or cuda; default: a GPU if there is one.
        random_state: seed.
        use_compile: ignored.
        compile_mode: ignored.
        verbose: 1 shows the progress on standard error.
        optimizer_params: ignored.
        beta: weight of the KL term.
        capacity: ignored.
        encoder_neuron_list: widths of the encoder's hidden layers; default: (128, 64).
        decoder_neuron_list: ignored unless it is the mirror of `encoder_neuron_list`, which Elbo's decoder always is.
        latent_dim: number of latents; default: as many as explain 95 % of the variance.
        hidden_activation_name: relu, silu or tanh; default: silu.
        output_activation_name: ignored: the output is linear.
        batch_norm: ignored.
        dropout_rate: ignored.
        logvar_clip: ignored.
    """

    def __init__(
        self,
        contamination: float = 0.1,
        preprocessing: bool = True,
        lr: float | None = None,
        epoch_num: int | None = None,
        batch_size: int | None = None,
        optimizer_name: str | None = None,
        device: Any = None,
        random_state: int | None = 42,
        use_compile: bool = False,
        compile_mode: str = "default",
        verbose: int = 0,
        optimizer_params: dict[str, Any] | None = None,
        beta: float = 1.0,
        capacity: float = 0.0,
        encoder_neuron_list: Sequence[int] | None = None,
        decoder_neuron_list: Sequence[int] | None = None,
        latent_dim: int | None = None,
        hidden_activation_name: str | None = None,
        output_activation_name: str | None = None,
        batch_norm: bool | None = None,
        dropout_rate: float | None = None,
        logvar_clip: tuple[float, float] | None = None,
    ) -> None:
        self.contamination = contamination
        self.preprocessing = preprocessing
        self.lr = lr
        self.epoch_num = epoch_num
        self.batch_size = batch_size
        self.optimizer_name = optimizer_name
        self.device = device
        self.random_state = random_state
        self.use_compile = use_compile
        self.compile_mode = compile_mode
        self.verbose = verbose
        self.optimizer_params = optimizer_params
        self.beta = beta
        self.capacity = capacity
        self.encoder_neuron_list = encoder_neuron_list
        self.decoder_neuron_list = decoder_neuron_list
        self.latent_dim = latent_dim
        self.hidden_activation_name = hidden_activation_name
        self.output_activation_name = output_activation_name
        self.batch_norm = batch_norm
        self.dropout_rate = dropout_rate
        self.logvar_clip = logvar_clip

    def _detector(self) -> Detector:
        widths = self.encoder_neuron_list
        return VAEDetector(
            latents=self.latent_dim,
            hidden=None if widths is None else tuple(widths),
            beta=self.beta,
            **self._training_options(),
        )

    def _ignored(self) -> dict[str, bool]:
        mirror = list(reversed(self.encoder_neuron_list or ()))
        return super()._ignored() | {
            "capacity": bool(self.capacity),
            "decoder_neuron_list": self.decoder_neuron_list is not None and list(self.decoder_neuron_list) != mirror,
            "output_activation_name": self._differs("output_activation_name", "identity"),
            "logvar_clip": self.logvar_clip is not None,
        }


class PCA(PyODDetector):
    """Elbo's PCA with the parameters of `pyod.models.pca.PCA`.

    Args:
        n_components: number of components; default: as many as explain 90 % of the variance.
        n_selected_components: ignored: the score uses all directions.
        contamination: share of the training rows that lie above the threshold.
        copy: ignored: the rows are never changed.
        whiten: ignored: the score does not depend on it.
        svd_solver: ignored: the solution is exact.
        tol: ignored.
        iterated_power: ignored.
        random_state: seed of the split of the rows; default: 0.
        weighted: ignored: the score always weighs directions by their variances.
        standardization: standardise the features.
    """

    def __init__(
        self,
        n_components: int | None = None,
        n_selected_components: int | None = None,
        contamination: float = 0.1,
        copy: bool = True,
        whiten: bool = False,
        svd_solver: str = "auto",
        tol: float = 0.0,
        iterated_power: int | str = "auto",
        random_state: int | None = None,
        weighted: bool = True,
        standardization: bool = True,
    ) -> None:
        self.n_components = n_components
        self.n_selected_components = n_selected_components
        self.contamination = contamination
        self.copy = copy
        self.whiten = whiten
        self.svd_solver = svd_solver
        self.tol = tol
        self.iterated_power = iterated_power
        self.random_state = random_state
        self.weighted = weighted
        self.standardization = standardization

    def _detector(self) -> Detector:
        return PCADetector(
            alpha=self.contamination,
            latents=self.n_components if isinstance(self.n_components, int) else None,
            scale="standardise" if self.standardization else "none",
            random_state=self.random_state or 0,
        )

    def _ignored(self) -> dict[str, bool]:
        return {
            "n_components": self.n_components is not None and not isinstance(self.n_components, int),
            "n_selected_components": self.n_selected_components is not None,
            "weighted": not self.weighted,
        }
