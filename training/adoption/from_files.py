"""Adopt a network from files: the network, its weights, its scaler, and tables of rows."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from models.keys import PrivateKey
from training.adoption.adopt import adopt
from training.adoption.arguments import argument, named_as_options
from training.adoption.estimators import is_estimator, module_of, split_pipeline
from training.adoption.files import read_module, read_scaler
from training.adoption.scalers import differing_column, require_same_columns
from training.data.layout import Layout
from training.data.table import Table, read_table
from training.errors import DataError
from training.progress import Reporter
from training.publishing.compatibility import refuse_other_features

Array = npt.NDArray[np.float32]


@named_as_options()
def adopt_files(
    source: str,
    calibrate: str,
    *,
    name: str,
    artifacts: Path,
    report: Reporter,
    weights: Path | None = None,
    scaler: Path | None = None,
    fit_rows: str | None = None,
    shape: Sequence[int] | None = None,
    encode: str | None = None,
    decode: str | None = None,
    spread: Literal["log_variance", "std"] | None = None,
    prior: Literal["fitted", "standard"] = "fitted",
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    escape: str | None = None,
    layout: Layout | None = None,
    label: Sequence[str] = (),
    seed: int = 0,
    allow_pickle: bool = False,
    replace_features: bool = False,
    key: PrivateKey | None = None,
) -> Path:
    """Publish the network in a file as an artifact. Return the path of the artifact.

    Args:
        source: the file of the network. See `training.adoption.files.read_module`.
        calibrate: normal rows that did not train the network, as `read_table` reads them.
        name: name of the model.
        artifacts: artifact folder.
        report: receives the progress and the notes.
        weights: the weights of the network that `source` builds.
        scaler: the file of the scaler. See `training.adoption.files.read_scaler`.
        fit_rows: rows that may have trained the network, as `read_table` reads them.
        shape: the shape of one row; by default, that of an ONNX file or of the table.
        encode: the name of the encoder in the network; for an ONNX file, of the value that is the code.
        decode: the name of the decoder in the network.
        spread: what the encoder returns besides the mean.
        prior: whether the prior is fitted to the latents, or N(0, I).
        drop: columns to leave out.
        keep: columns that are measurements although they look like identifiers.
        size: height and width to which the images of a folder are resized.
        escape: how CSV writes a quotation mark inside a quoted cell.
        layout: what the dimensions of an array mean.
        label: columns of labels. Rows that are labelled as anomalous are left out.
        seed: seed of the split of the rows and of the fit of the prior.
        allow_pickle: whether `source` and `weights` may be pickles, which can run any code.
        replace_features: allow features that differ from those of the newest version of `name`.
        key: signs the artifact.

    Raises:
        DataError: a file is missing or cannot be read, or the tables do not fit each other or the newest version.
        AdoptionError: the network, the weights, the scaler and the rows do not fit each other.
    """

    def read(rows: str) -> Table:
        return read_table(rows, drop, keep, size, escape=escape, layout=layout, label=label)

    report.stage("reading the network")
    is_onnx = source.endswith(".onnx")
    found = read_module(source, weights, encode if is_onnx else None, allow_pickle)
    inner, module = _network(found)
    given = None if scaler is None else read_scaler(scaler)
    if given is not None and inner is not None:
        raise DataError(f"{source} has a scaler of its own: leave {argument('scaler')} out")
    given = inner if given is None else given
    report.stage("reading the rows")
    table = read(calibrate)
    if not replace_features:
        refuse_other_features(table, artifacts, name)
    other = None if fit_rows is None else read(fit_rows)
    if other is not None and other.names != table.names:
        raise DataError(
            f"{fit_rows} and {calibrate} have different columns: {differing_column(other.names, table.names)}; give "
            "tables with the same columns in the same order"
        )
    require_same_columns(found if inner is not None or given is None else given, table.names)
    for note in [*table.notes, *table.warnings]:
        report.note(note)
    shape = shape or _shape(module, table)
    return adopt(
        module,
        _normal_rows(table, report, calibrate),
        name=name,
        artifacts=artifacts,
        fit_rows=None if other is None else _normal_rows(other, report, str(fit_rows)),
        scaler=given,
        prior="standard" if prior == "standard" else None,
        shape=shape,
        feature_names=table.names,
        encode=None if is_onnx else encode,
        decode=None if is_onnx else decode,
        spread=spread,
        images=table.pixel_range is not None,
        source=table.source,
        seed=seed,
        key=key,
        report=report,
    )


def _network(found: Any) -> tuple[Any, nn.Module]:
    """Return the scaler and the network in what a file has: a network, an estimator, or a Pipeline of both."""
    if not is_estimator(found):
        return None, found
    scaler, estimator = split_pipeline(found)
    return scaler, module_of(estimator)


def _shape(module: nn.Module, table: Table) -> Sequence[int] | None:
    """Return the shape of a row: that which an ONNX file fixes, else that of the table if it has several dimensions."""
    fixed = getattr(module, "input_shape", ())
    if fixed and None not in fixed and math.prod(fixed) == table.x.width:
        return tuple(fixed)
    return table.shape if len(table.shape) > 1 else None


def _normal_rows(table: Table, report: Reporter, source: str) -> Array:
    """Return the rows [N, D] of the table that are not labelled as anomalous."""
    rows = table.x.read_range(0, len(table.x))
    if table.anomalous is None or not table.anomalous.any():
        return rows
    report.note(f"{int(table.anomalous.sum()):,} rows of {source} are labelled as anomalous: they are left out")
    return rows[~table.anomalous]
