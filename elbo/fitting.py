"""`elbo.fit`: fit a model to rows in memory or in a file."""

import csv
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from pydantic import ValidationError

from elbo.errors import OptionError
from elbo.model import Model
from elbo.notes import warn_of
from elbo.sources import LABEL_COLUMN, Data, Labels, as_source
from models.errors import ElboError, first_fault
from training.config import COLUMN_OPTIONS, Kind, TrainConfig
from training.data.policy_file import read_policy
from training.data.readers import InMemory
from training.progress import LiveReporter, PlainReporter, SilentReporter
from training.progress import reporter as terminal_reporter
from training.train import fit_model, read

if TYPE_CHECKING:
    from elbo.options import Options
    from models.policy_rules import Policy

COMMAND_COLUMNS = re.compile(r"--(drop|keep|label) ('[^']*'|[^\s;:,]+)")  # advice to choose columns, in messages
COMMAND_OPTION = re.compile(r"--([a-z][a-z-]*)")


def fit(
    data: Data,
    kind: Kind | Literal["auto"] = "vae",
    *,
    name: str = "model",
    labels: Labels | None = None,
    feature_names: Sequence[str] | None = None,
    policy: "Policy | str | os.PathLike[str] | None" = None,
    progress: bool = False,
    **options: "Unpack[Options]",
) -> Model:
    """Fit, evaluate and calibrate a model, and return it. Nothing is written: `Model.save` publishes it.

    The weights equal those that `elbo train` publishes for the same rows and options. While `fit` runs, torch uses one
    thread in the whole process.

    Args:
        data: the training rows. A path or the name of bundled data, such as "digits"; a NumPy array or a torch tensor,
            [N, D], images [N, H, W] or [N, H, W, C], or series [N, T, C]; a DataFrame of pandas or polars, or another
            frame with the Arrow interface; a list of rows or of records. Frames give the names of the features: the
            column "load [%]" is the feature "load" in the unit "%".
        kind: pca, ae (autoencoder), vae (variational autoencoder), ensemble (an ae and nearest neighbours), or auto
            (fit pca, ae and vae, and return the one that does best on held-out rows).
        name: name under which `Model.save` publishes the model.
        labels: a label of each row, [N], integers or text; never used to train, except with `condition=["label"]`.
        feature_names: names of the columns of an array [N, D].
        policy: which deviations matter: a policy, or the path of a TOML file.
        progress: show the progress: a bar in a terminal, and in a notebook with ipywidgets; otherwise, lines.
        options: the options of `elbo train`, with underscores; see `training.config.TrainConfig`.

    Raises:
        DataError: the rows cannot be used. The message says what to do.
        FitError: the options do not fit the rows, or the fit failed.
        OptionError: there is no such option, or its value is invalid.
    """
    config = _config(kind, name, dict(options), has_label_column=labels is not None)
    source = as_source(data, labels, feature_names)
    if isinstance(source, InMemory) and not source.has_columns:
        config = config.model_copy(update={"label": ()})  # the labels of an array are not in a column
    report = _reporter(progress)
    try:
        with in_terms_of_python():
            table = read(source, config)
            if isinstance(policy, str | os.PathLike):
                policy = read_policy(Path(policy), table.names, table.units)
            fitted = fit_model(config, table, report, policy=policy)
            content = fitted.assemble(report).content()
    finally:
        if not isinstance(report, SilentReporter):
            report.close()
    notes = [python_words(note) for note in fitted.notes]
    warn_of(notes, stacklevel=2)
    return Model.from_bytes(content, notes=notes)


def _config(kind: str, name: str, options: dict[str, Any], *, has_label_column: bool) -> TrainConfig:
    """Return the validated options.

    Raises:
        OptionError: an option does not exist, or its value is invalid.
    """
    fields = TrainConfig.model_fields
    known = [field for field in fields if field not in ("model", "name")]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise OptionError(f"there is no option {option!r}: {hint}")
    for option in COLUMN_OPTIONS:
        if isinstance(options.get(option), str):
            options[option] = [options[option]]
    options.setdefault("calibration", "auto")  # the default of elbo train
    if has_label_column:
        options.setdefault("label", [LABEL_COLUMN])
    try:
        return TrainConfig.model_validate({"model": kind, "name": name, **options})
    except ValidationError as error:
        fault = first_fault(error)
        field = {"model": "kind"}.get(fault.path[0], fault.path[0]) if fault.path else "options"
        raise OptionError(f"{field}: {python_words(fault.message)}, got {fault.value!r}") from None


def _reporter(progress: bool) -> SilentReporter | PlainReporter | LiveReporter:
    if not progress:
        return SilentReporter()
    return LiveReporter() if _is_notebook_with_widgets() else terminal_reporter()


def _is_notebook_with_widgets() -> bool:
    """Return whether rich can draw in the notebook that runs this code: it needs ipywidgets."""
    if "ipykernel" not in sys.modules or find_spec("ipywidgets") is None:
        return False
    from rich.console import Console

    return Console().is_jupyter


@contextmanager
def in_terms_of_python() -> Iterator[None]:
    """Let messages of errors name arguments instead of options, and the extra of Elbo that has a missing package."""
    try:
        yield
    except ElboError as error:
        message = python_words(str(error))
        if message == str(error):
            raise
        raise type(error)(message) from error
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"elbo.fit needs the package {(error.name or '').partition('.')[0]}: pip install 'elbo[train]'",
            name=error.name,
        ) from error


def python_words(message: str) -> str:
    """Return `message` with arguments in place of options: `drop=['id']` for `--drop id`, and `time` for `--time`."""

    def columns(match: re.Match[str]) -> str:
        return f"{match[1]}={next(csv.reader([match[2].strip(chr(39))]))}"

    message = COMMAND_COLUMNS.sub(columns, message)
    return COMMAND_OPTION.sub(lambda match: match[1].replace("-", "_"), message)
