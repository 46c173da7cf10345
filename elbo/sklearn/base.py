"""Base class of the detectors and the transformers: options, fitting, pickling and publishing."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from sklearn import config_context
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from models.errors import ElboError

if TYPE_CHECKING:
    from torch import Tensor

    from elbo.model import Model
    from models.pipeline import Pipeline
    from training.config import Kind, TrainConfig
    from training.data.table import Table
    from training.train import FittedModel

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]

MINIMUM_ROWS = 10  # as in training.data.table, which imports torch
BATCH_ROWS = 4096  # rows per forward pass; limits the memory
NAME = "model"  # name of a model until it is published
NOT_OPTIONS = ("alpha", "random_state", "verbose")  # parameters that are no options of `elbo train`


class ElboEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn publishes no types
    """Base of the estimators. The parameters of a subclass are options of `elbo train`, except NOT_OPTIONS.

    While `fit` runs, torch uses one thread in the whole process, so that the result does not depend on the number of
    cores.

    A pickle contains the fitted networks and the artifact, but no training rows except for the held-out rows in the
    artifact.
    """

    _kind: ClassVar["Kind"]
    random_state: Any
    verbose: int
    notes_: list[str]
    _fitted: "FittedModel | None"  # the result of the run, with the training rows; None once `_content` is made
    _content: bytes | None  # the artifact, which is made when it is first needed
    _model: "Model | None"
    _missing: npt.NDArray[np.bool_]  # [D], whether a training row lacks the feature
    _pipeline: "Pipeline"

    def __sklearn_tags__(self) -> Any:
        """Return the tags: rows may have missing values."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    @property
    def model_(self) -> "Model":
        """The fitted model as `elbo.Model`, which also explains rows, draws samples and draws figures."""
        check_is_fitted(self)
        if self._model is None:
            from elbo.model import Model

            self._model = Model.from_bytes(self._artifact(), notes=self.notes_)
        return self._model

    def publish(self, artifacts: "str | os.PathLike[str]" = "artifacts", *, name: str = NAME, **options: Any) -> Path:
        """Publish the fitted model as the next version of `name`. Return the path of the artifact.

        `elbo serve` then gives the same scores over HTTP.

        Args:
            artifacts: the artifact folder.
            name: the name under which the model is served.
            options: further arguments of `elbo.Model.save`, such as the key that signs the artifact.

        Raises:
            ArtifactError: the artifact cannot be written.
        """
        return self.model_.save(artifacts, name=name, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that a pickle contains. The artifact replaces the training rows."""
        state: dict[str, Any] = super().__getstate__()
        if "_fitted" in state:
            state |= {"_content": self._artifact(), "_fitted": None, "_model": None}
        return state

    def _fit(self, X: Any) -> Self:
        """Fit the model to X [N, D]."""
        from elbo.fitting import python_words
        from elbo.notes import warn_of

        x = self._read(X, reset=True, ensure_min_samples=MINIMUM_ROWS)[0]
        fitted = self._fit_model(x)
        self.notes_ = list(map(python_words, fitted.notes))
        warn_of(self.notes_, stacklevel=3)
        self._fitted, self._content, self._model = fitted, None, None
        self._missing = np.asarray(np.isnan(x).any(axis=0))
        # In float64, the other rows of a batch change the result for a row by at most 1e-7.
        self._pipeline = deepcopy(fitted.chosen.pipeline).double()
        return self

    def _fit_model(self, x: Rows) -> "FittedModel":
        from elbo.fitting import in_terms_of_python
        from training.data.readers import InMemory
        from training.data.table import read_table
        from training.train import fit_model

        # The training uses estimators of scikit-learn, which need its default configuration.
        defaults = config_context(array_api_dispatch=False, transform_output="default")
        with defaults, _as_value_error(), in_terms_of_python(), self._reporter() as report:
            table = read_table(InMemory(x, name="X"))
            if hasattr(self, "feature_names_in_"):
                table = _with_titles(table, self.feature_names_in_.tolist())
            return fit_model(self._config(), table, report)

    def _config(self) -> "TrainConfig":
        """Return the options of the run. Raise ValueError if a parameter is invalid."""
        from pydantic import ValidationError

        from models.errors import first_fault
        from training.config import TrainConfig

        options = {name: _plain(value) for name, value in self.get_params(deep=False).items()}
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31)
        options = {name: value for name, value in options.items() if name not in NOT_OPTIONS}
        try:
            return TrainConfig.model_validate({"model": self._kind, "name": NAME, "seed": int(seed), **options})
        except ValidationError as error:
            fault = first_fault(error)
            name = {"seed": "random_state"}.get(fault.path[0], fault.path[0])
            raise ValueError(f"{name}: {fault.message}, got {fault.value!r}") from None

    @contextmanager
    def _reporter(self) -> Iterator[Any]:
        from training.progress import SilentReporter, reporter

        if not self.verbose:
            yield SilentReporter()
            return
        report = reporter()
        try:
            yield report
        finally:
            report.close()

    def _artifact(self) -> bytes:
        """Return the bytes of the artifact. The first call makes them, and releases the training rows."""
        if self._content is None:
            from training.progress import SilentReporter

            assert self._fitted is not None
            self._content = self._fitted.assemble(SilentReporter()).content()
            self._fitted = None
        return self._content

    def _read(self, X: Any, *, reset: bool = False, **checks: Any) -> tuple[Rows, npt.DTypeLike]:
        """Return X as float32 [N, D], and the type of float that scikit-learn's conventions give its results.

        Raises:
            ValueError: X is no table of numbers with the features of the training rows, has infinite values in float32,
                or has missing values in a feature in which no training row had any.
        """
        floats = (np.float64, np.float32)
        values = validate_data(self, X, reset=reset, dtype=floats, ensure_all_finite="allow-nan", **checks)
        with np.errstate(over="ignore"):
            x: Rows = values.astype(np.float32)  # a copy, which the caller's later changes do not reach
        if np.isinf(x).any():
            raise ValueError("Input X contains infinity or a value too large for dtype('float32').")
        self._refuse_missing(np.isnan(x), in_training=reset)
        return x, values.dtype

    def _refuse_missing(self, missing: npt.NDArray[np.bool_], *, in_training: bool) -> None:
        """Raise ValueError if a value is missing in a feature that may have none missing. `missing` is [N, D]."""
        refused = np.asarray(missing.all(axis=0))
        if not in_training:
            refused = np.asarray(missing.any(axis=0)) & ~self._missing
        if not refused.any():
            return
        column = int(np.flatnonzero(refused)[0])
        name = getattr(self, "feature_names_in_", np.arange(len(refused)))[column]
        if in_training:
            raise ValueError(f"Input X contains NaN in all rows of feature {name!s}: leave the feature out")
        raise ValueError(
            f"Input X contains NaN in feature {name!s}, in which no training row has a missing value: impute the "
            "value, or fit with rows in which values of this feature are missing"
        )

    def _run(self, method: "Callable[[Tensor], Tensor]", x: Rows) -> Array:
        """Return the result of a method of the model for the rows x [N, ...], which it gets in batches."""
        import torch

        with torch.inference_mode():
            parts = [method(rows.double()) for rows in torch.from_numpy(x).split(BATCH_ROWS)]
            return torch.cat(parts).numpy()


def _with_titles(table: "Table", titles: Sequence[str]) -> "Table":
    """Return `table` with the names and units in the titles of its columns, as Elbo reads them in files and frames.

    Raises:
        ValueError: two columns have the same name.
    """
    from models.columns import parse_title

    columns = [parse_title(title) for title in titles]
    names = [column.name for column in columns]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Input X has two columns with the name {twice!r} (units in brackets are no part of it)")
    return replace(table, names=names, units=[column.unit for column in columns])


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Raise an ElboError as a ValueError, which scikit-learn expects for unusable rows and parameters."""
    try:
        yield
    except ElboError as error:
        raise ValueError(str(error)) from error


def _plain(value: Any) -> Any:
    """Return a NumPy scalar, such as a parameter of a grid, as a Python number; any other value unchanged."""
    return value.item() if isinstance(value, np.generic) else value
