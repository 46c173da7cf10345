"""`elbo train --sweep`: train a model for each combination of options, and publish the best.

The best is published only if it is better than the served version. All models of a sweep are fitted to the same rows
and compared on the same held-out rows, even if the seed is varied.
"""

import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path

from models.artifact import Artifact, load, publish_content, require_writable
from models.errors import ArtifactError, ElboError, join_names
from models.keys import PrivateKey
from models.manifest import FILE_NAME, version_folder, versions
from training.config import TrainConfig
from training.errors import FitError
from training.evaluation.model_selection import (
    MEANING,
    Measures,
    mean_of,
    measure,
    significant_wins,
    wins_minus_losses,
)
from training.progress import SilentReporter
from training.publishing.compatibility import refuse_other_features
from training.results_table import align, cells_of, results_page
from training.served_version import (
    NOT_COMPARABLE,
    SERVED,
    held_out_rows,
    is_comparable,
    means_of,
    measure_artifact,
    why_not_better,
)
from training.train import fit_model, read, split_data

# Options that change neither the rows nor their split, so that all models of a sweep have the same held-out rows.
SWEPT = (
    "activation", "batch_size", "beta", "dense", "epochs", "free_bits", "hidden", "kept", "l2", "latents",
    "learning_rate", "likelihood", "masking", "model", "network", "noise", "output", "patience", "samples", "seed",
    "variance", "warm_up",
)  # fmt: skip
MAX_TRIALS = 1000
COMPARED = 20  # trials with the best mean on a measure, which are compared with each other


@dataclass(frozen=True)
class Trial:
    """One combination of options, as text, and the configuration that they give."""

    index: int
    options: dict[str, str]
    config: TrainConfig

    @property
    def label(self) -> str:
        """The options on one line."""
        return " ".join(f"{name}={value}" for name, value in self.options.items())


@dataclass(frozen=True)
class Sweep:
    """What all trials of a sweep have in common. It is small, because every task of Ray gets a copy."""

    source: str
    split_seed: int  # seed of the split of the rows, which is the same for all trials
    folder: Path  # where the trials write their artifacts


@dataclass(frozen=True)
class TrialResult:
    """The measures of a trained model, or the error that ended its training."""

    trial: Trial
    seconds: float = 0.0
    measures: Measures = field(default_factory=dict)
    is_worse_than_mean: bool = False
    error: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """All models of a sweep, and the path of the new version if one was published."""

    results: list[TrialResult]
    best: TrialResult
    path: Path | None
    reason: str  # why the best model was published, or why not
    means: dict[str, dict[str, float]]  # by label: the mean of each measure; also of the served version


Show = Callable[[TrialResult], None]
Engine = Callable[[Sweep, Sequence[Trial], Show], list[TrialResult]]


def parse_sweep(texts: Sequence[str]) -> list[dict[str, str]]:
    """Return the combinations of the values in texts such as "latents=2,4,8", in order.

    A value with commas is in quotation marks: 'hidden="128,64",32'.

    Raises:
        FitError: a text is not valid, an option cannot be varied, or there are too many combinations.
    """
    values: dict[str, list[str]] = {}
    for text in texts:
        name, equals, listed = text.partition("=")
        option = name.strip().removeprefix("--").replace("-", "_")
        if option not in SWEPT:
            names = join_names([each.replace("_", "-") for each in SWEPT], len(SWEPT))
            raise FitError(f"--sweep {text}: {name!r} cannot be varied: expected one of {names}")
        found = [value.strip() for value in next(csv.reader([listed], skipinitialspace=True), [])]
        if not equals or not found or not all(found) or option in values:
            raise FitError(f"--sweep {text}: expected an option and its values, such as latents=2,4,8, each only once")
        values[option] = list(dict.fromkeys(found))
    count = prod(len(found) for found in values.values())
    if count > MAX_TRIALS:
        raise FitError(f"--sweep: {count:,} combinations are too many: expected at most {MAX_TRIALS:,}")
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def run_sweep(
    trials: Sequence[Trial],
    source: str,
    artifacts: Path,
    folder: Path,
    engine: Engine,
    *,
    split_seed: int = 0,
    force: bool = False,
    replace_features: bool = False,
    key: PrivateKey | None = None,
    show: Show = lambda result: None,  # noqa: ARG005
) -> SweepResult:
    """Train the models of all trials. Publish the best if it is better than the served version.

    The best is the model that wins most comparisons minus those that it loses; see `_best`. On a tie, the first of the
    tied trials is the best, and the served version stays. If the served version was trained on the
    held-out rows, the comparison favours it. The best is also published if there is no served version, or none that can
    be compared: one that cannot be loaded, has other features, or was trained with one of the options NOT_COMPARABLE.

    Args:
        trials: the combinations of options, in order of preference.
        source: the training data.
        artifacts: artifact folder.
        folder: an empty folder for the artifacts of the trials, at the same path on all machines that train.
        engine: trains the models.
        split_seed: seed of the split of the rows.
        force: publish the best even if it is no better than the served version, or worse than predicting the mean.
        replace_features: allow features that differ from those of the newest version.
        key: signs the version.
        show: called with each result.

    Raises:
        DataError: the table cannot be used, or its features differ from those of the newest version.
        FitError: an option is not for sweeps, or no model could be trained.
        ArtifactUnwritable: the model cannot be written to `artifacts`. This is checked before the training.
    """
    config = trials[0].config
    if refused := [name for name in NOT_COMPARABLE if getattr(config, name)]:
        raise FitError(f"--sweep is not for models with --{refused[0].replace('_', '-')}: leave one of them out")
    table = read(source, config)
    if not replace_features:
        refuse_other_features(table, artifacts, config.name)
    served_artifact = _load_served(artifacts, config.name, table.names)
    del table  # the rows may take much memory
    require_writable(artifacts, config.name)
    results = engine(Sweep(source, split_seed, folder), trials, show)
    trained = [result for result in results if result.error is None]
    if not trained:
        raise FitError(f"no model of the sweep could be trained; the first failed with: {results[0].error}")
    measures = {result.trial.label: result.measures for result in trained}
    best = _best(trained)
    served = None
    if served_artifact is not None:  # the options of `config` may not fit the data, those of the best do
        served = _measure_served(served_artifact, best.trial.config, source, split_seed)
    means = {name: means_of(of_model) for name, of_model in measures.items()}
    if served is not None:
        means[SERVED] = means_of(served)
    refusal = why_not_better(best.measures, served, is_worse_than_mean=best.is_worse_than_mean)
    if refusal is not None:
        reason = f"--force was given, although {refusal}" if force else refusal
    elif served is not None:
        reason = "it beats the served version"
    elif versions(artifacts, config.name):
        reason = "the served version was not compared, because it cannot be loaded or takes other inputs"
    else:
        reason = "there is no served version"
    path = None
    if refusal is None or force:
        content = _artifact_file(folder, best.trial).read_bytes()
        path = publish_content(content, config.name, artifacts, key)
    return SweepResult(results, best, path, reason, means)


def _best(trained: Sequence[TrialResult]) -> TrialResult:
    """Return the trial that wins most comparisons minus those that it loses; on a tie, the first of the tied trials.

    Trials that are worse than predicting the mean come last. Only the COMPARED trials with the best mean on each
    measure are compared: a thousand trials have half a million pairs, and each takes a millisecond per measure.
    """
    sound = [each for each in trained if not each.is_worse_than_mean] or list(trained)
    ranked: set[int] = set()
    for name in {name for each in sound for name in each.measures}:
        means = {
            number: _finite(mean_of(name, each.measures[name])[0])
            for number, each in enumerate(sound)
            if name in each.measures
        }
        ranked.update(sorted(means, key=lambda number: -means[number])[:COMPARED])
    compared = [each for number, each in enumerate(sound) if number in ranked]
    wins = significant_wins({each.trial.label: each.measures for each in compared})
    return max(compared, key=lambda each: wins_minus_losses(wins, each.trial.label))


def _finite(mean: float) -> float:
    return mean if math.isfinite(mean) else -math.inf


def train_trial(sweep: Sweep, trial: Trial) -> TrialResult:
    """Train one model, and write its artifact into the folder of the sweep.

    If an ElboError ends the training, the result has its message, and there is no artifact.
    """
    began = time.monotonic()
    try:
        table = read(sweep.source, trial.config)
        fitted = fit_model(trial.config, table, SilentReporter(), split_seed=sweep.split_seed)
        content = fitted.assemble(SilentReporter()).content()
    except ElboError as error:
        return TrialResult(trial, time.monotonic() - began, error=str(error))
    _artifact_file(sweep.folder, trial).write_bytes(content)
    rows, scale = held_out_rows(fitted.data)
    measures = measure(fitted.chosen.pipeline, rows, scale, sweep.split_seed)
    return TrialResult(trial, time.monotonic() - began, measures, fitted.chosen.is_worse_than_mean)


def train_locally(sweep: Sweep, trials: Sequence[Trial], show: Show) -> list[TrialResult]:
    """Train the models one after another in this process."""
    results = []
    for trial in trials:
        results.append(train_trial(sweep, trial))
        show(results[-1])
    return results


def _artifact_file(folder: Path, trial: Trial) -> Path:
    return folder / f"{trial.index:04}.pt"


def _load_served(artifacts: Path, name: str, features: Sequence[str]) -> Artifact | None:
    """Return the newest version if it can be compared; see `is_comparable`. This is checked before the training."""
    present = versions(artifacts, name)
    if not present:
        return None
    try:
        artifact = load(version_folder(artifacts, name, present[-1]) / FILE_NAME)
    except ArtifactError:
        return None
    return artifact if is_comparable(artifact, features) else None


def _measure_served(artifact: Artifact, config: TrainConfig, source: str, split_seed: int) -> Measures | None:
    """Return the measures of the served version on the held-out rows; None if the prepared rows have other columns."""
    rows, scale = held_out_rows(split_data(config, read(source, config), split_seed))
    return measure_artifact(artifact, rows, scale, split_seed) if rows.shape[1] == artifact.manifest.width else None


def sweep_table(result: SweepResult) -> list[list[str]]:
    """Return the cells of a table of all models: a header, a line per trial, and a line for the served version."""
    names = list(result.results[0].trial.options)
    lines = [[*names, *MEANING, "seconds", ""]]
    for each in result.results:
        options = [each.trial.options[name] for name in names]
        note = each.error or ("best" if each is result.best else "")
        lines.append([*options, *cells_of(result.means.get(each.trial.label, {})), f"{each.seconds:.1f}", note])
    if SERVED in result.means:
        lines.append([SERVED, *[""] * (len(names) - 1), *cells_of(result.means[SERVED]), "", ""])
    return lines


def format_table(result: SweepResult) -> str:
    """Return the table as text, its columns aligned."""
    return align(sweep_table(result))


def sweep_page(result: SweepResult, name: str) -> str:
    """Return the table as one HTML page without scripts."""
    explanation = (
        "All models are measured on the same held-out rows. In the reconstruction error, the model unit of a column "
        "is its standard deviation in these rows."
    )
    return results_page(f"Sweep of {name}", describe(result, name), sweep_table(result), explanation, "best")


def describe(result: SweepResult, name: str) -> str:
    """Return one sentence on the best model, and whether it was published."""
    best = f"the best is {result.best.trial.label}"
    if result.path is None:
        return f"{best}, which was not published: {result.reason}"
    return f"{best}, published as {name}@{result.path.parent.name}: {result.reason}"
