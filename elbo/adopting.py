"""`elbo.adopt`: publish a network that was trained elsewhere, and return it as a model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from elbo.model import Model, artifact_folder
from elbo.notes import warn_of
from elbo.sources import Data, as_source
from models.columns import parse_title
from models.keys import PrivateKey, read_private_key
from models.manifest import read_sealed
from training.adoption import adopt as adoption
from training.adoption.estimators import is_estimator, module_of, split_pipeline
from training.adoption.files import read_module
from training.adoption.inspection import Named, Spread
from training.adoption.scalers import require_same_columns
from training.adoption.statistics import PriorOption
from training.data.readers import InMemory
from training.data.table import read_table
from training.errors import AdoptionError
from training.progress import PlainReporter, SilentReporter

if TYPE_CHECKING:
    import polars as pl
    from torch import nn


def adopt(
    module: "nn.Module | str | os.PathLike[str] | Any",
    calibration_rows: Data,
    *,
    name: str,
    artifacts: "str | os.PathLike[str] | None" = None,
    fit_rows: Data | None = None,
    scaler: Any = None,
    prior: PriorOption = None,
    shape: Sequence[int] | None = None,
    feature_names: Sequence[str] | None = None,
    encode: Named = None,
    decode: Named = None,
    spread: Spread | None = None,
    images: bool | None = None,
    seed: int = 0,
    key: "PrivateKey | str | os.PathLike[str] | None" = None,
    replace_features: bool = False,
    progress: bool = False,
) -> Model:
    """Publish a network that was trained elsewhere as the next version of `name`, and return it.

    The artifact has a calibration, an explanation, golden answers, a card and, if the export succeeds, an ONNX twin.
    Serving it needs neither the class of the module nor the library that trained it. `module` does not change.

    Args:
        module: a torch module with `encode` and `decode`, with `encoder` and `decoder`, or only with `forward`; an
            estimator of scikit-learn (PCA, IncrementalPCA, TruncatedSVD, FactorAnalysis, MLPRegressor, or a Pipeline of
            scalers that ends with one); or the path of an .onnx, .pt2 or TorchScript file.
        calibration_rows: normal rows that did not train the network, in raw units, of any type that `elbo.fit` takes.
            At least 56 distinct rows are needed, or 30 with `fit_rows`.
        name: name under which the model is published.
        artifacts: artifact folder; default: ELBO_ARTIFACTS, or "artifacts".
        fit_rows: rows that may have trained the network, in raw units.
        scaler: converts raw units to the units that the module takes: a scaler of scikit-learn, (mean, scale), or a
            module with forward and inverse.
        prior: distribution of the latents of samples: by default a fitted mixture of Gaussians, or "standard".
        shape: shape of one row, such as (28, 28), or (30, 8) for windows of 30 rows.
        feature_names: names of the features; by default, those of the columns of a frame.
        encode: name of the encoder, if it has another name, or a function of the module and its inputs.
        decode: name of the decoder, if it has another name, or a function of the module and its latents.
        spread: what the encoder returns besides the mean: "log_variance" or "std".
        images: whether rows are images; by default, this is recognised by their shape and values.
        seed: seed of the split of the rows and of the fit of the prior.
        key: signs the artifact: a private key, or the path of one (`elbo keygen`).
        replace_features: publish even if the newest version of this name has other features.
        progress: write the stages and the notes to standard error.

    Raises:
        AdoptionError: the module, the scaler or the rows cannot become an artifact. The message says why. Nothing is
            published.
        DataError: the rows, or the file of the network, cannot be read; or the newest version of this name has other
            features, and `replace_features` is false.
        ArtifactUnwritable: the model cannot be written to `artifacts`.
    """
    rows, names = _rows(calibration_rows, None)
    others = None if fit_rows is None else _rows(fit_rows, names)[0]
    feature_names = names if feature_names is None else feature_names
    for fitted in (scaler, module):
        require_same_columns(fitted, feature_names)
    if isinstance(module, str | os.PathLike):
        module = read_module(os.fspath(module))
    elif is_estimator(module):
        before, estimator = split_pipeline(module)
        if before is not None and scaler is not None:
            raise AdoptionError("the Pipeline has scalers already: leave scaler out")
        scaler, module = (scaler if before is None else before), module_of(estimator)
    report = _Notes(progress)
    path = adoption.adopt(
        module,
        rows,
        name=name,
        artifacts=artifact_folder(artifacts),
        fit_rows=others,
        scaler=scaler,
        prior=prior,
        shape=shape,
        feature_names=feature_names,
        encode=encode,
        decode=decode,
        spread=spread,
        images=images,
        source="data",
        seed=seed,
        key=read_private_key(Path(key)) if isinstance(key, str | os.PathLike) else key,
        replace_features=replace_features,
        report=report,
    )
    warn_of(report.notes, stacklevel=2)
    return Model.from_bytes(read_sealed(path), path=path, notes=report.notes)


class _Notes(SilentReporter):
    """Keeps the notes, and shows them and the stages if `progress` is true."""

    def __init__(self, progress: bool) -> None:
        self.notes: list[str] = []
        self._shown = PlainReporter() if progress else SilentReporter()

    def stage(self, title: str) -> None:
        """Show the stage."""
        self._shown.note(title)

    def note(self, message: str) -> None:
        """Keep and show the message."""
        self.notes.append(message)
        self._shown.note(message)


def _rows(data: Data, names: Sequence[str] | None) -> tuple[npt.NDArray[Any], list[str] | None]:
    """Return the rows [N, ...] and, if they come from a frame, the names of its columns.

    Args:
        data: the rows.
        names: the columns of a frame to return, in this order; None for all.
    """
    source = as_source(data)
    if not isinstance(source, InMemory):
        table = read_table(source)
        rows = table.x.read_range(0, len(table.x)).reshape(-1, *table.shape)
        return rows, table.names if len(table.shape) == 1 else None
    if isinstance(source.rows, np.ndarray):
        return source.rows, None
    return _of_frame(source.rows, names)


def _of_frame(frame: "pl.DataFrame", names: Sequence[str] | None) -> tuple[npt.NDArray[Any], list[str]]:
    columns = {parse_title(title)[0]: title for title in frame.columns}
    for name in names or ():
        if name not in columns:
            raise AdoptionError(f"fit_rows lack the column {name!r} of calibration_rows: expected the same columns")
    chosen = list(names or columns)
    for name in chosen:
        if not frame[columns[name]].dtype.is_numeric():
            raise AdoptionError(f"column {name!r} is {frame[columns[name]].dtype}: expected numbers; leave it out")
    return frame.select([columns[name] for name in chosen]).to_numpy().astype(np.float32), chosen
