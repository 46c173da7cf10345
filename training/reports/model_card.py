"""The model card: a description of a published model in Markdown, with its limits. This module imports no torch."""

import csv
import io
import shlex
from collections.abc import Iterator, Sequence

from models.errors import join_names
from models.manifest import SERIES_CORRELATION, Manifest, Timeline, Window
from training.config import AUTO_CROSS_ROWS, TrainConfig
from training.fitting.defaults import resolved_config
from training.reports.describe import (
    DEFAULT_ALPHA,
    KIND_NAMES,
    adoption_lines,
    against_pca,
    condition_lines,
    few_calibration_rows,
    latents_phrase,
    period,
    period_lines,
    policy_lines,
)

FEATURES = 40  # number of features that are listed; further features are only counted
FEW_CALIBRATION_ROWS = 100  # with fewer, the card warns that the false-alarm rate is uncertain
MEASURES = {  # title and unit of each metric
    "reconstruction_error": ("reconstruction error", "mean square per value, raw units²"),
    "baseline_error": ("error of predicting the mean", "mean square per value, raw units²"),
    "pca_error": ("error of PCA with as many latents", "mean square per value, raw units²"),
    "elbo": ("ELBO", "nats per row"),
    "reconstruction": ("reconstruction term, minus the distortion", "nats per row"),
    "kl": ("KL, the rate", "nats per row"),
    "log_likelihood": ("log-likelihood", "nats per row"),
    "log_likelihood_se": ("standard error of the log-likelihood", "nats per row"),
    "bits_per_dimension": ("bits per dimension", "bits per value"),
    "active_latents": ("active latents", ""),
    "sample_density": ("density of samples", "1 if they are as typical as held-out rows"),
    "sample_coverage": ("coverage by samples", "share of held-out rows with a sample near them"),
    "expected_coverage": ("coverage to expect of samples like the rows", "share of held-out rows"),
    "copy_p_value": ("p-value of the hypothesis that samples copy no fit row", ""),
    "detection": ("detection of rows with a tenth of their values swapped", "AUROC"),
}
CAPTIONS = {
    "losses": "Every term of the loss by epoch. The dotted line marks the published epoch.",
    "reconstructions": "Held-out rows and their reconstructions.",
    "samples": "Samples from the generative prior beside held-out rows.",
    "latents": "The information that each latent carries.",
    "map": "Latents of held-out rows.",
    "scree": "The spectrum of the fit rows: how much of their variance a linear model can explain.",
}


def card(manifest: Manifest, version: int | None, notes: Sequence[str], plots: Sequence[str]) -> str:
    """Return the model card for `manifest`, as Markdown.

    Args:
        version: the published version, or None before publication.
        notes: messages about the data and the training.
        plots: names of the plots, which are the files <name>.png beside the card.
    """
    sections = {
        "What it is": _summary(manifest),
        "Data": _data(manifest, notes),
        "How good it is": _quality(manifest),
        "Latents": _latents(manifest),
        "Alarms": _alarms(manifest),
        "When not to trust it": (f"- {limit}" for limit in _limits(manifest)),
        "Reproduce it": _reproduction(manifest),
        "Plots": _plots(plots),
    }
    lines = [f"# {manifest.name}" + ("" if version is None else f", version {version}")]
    for title, text in sections.items():
        if content := list(text):
            lines += ["", f"## {title}", "", *content]
    return "\n".join(lines) + "\n"


def _summary(manifest: Manifest) -> Iterator[str]:
    kind = KIND_NAMES.get(manifest.kind, manifest.kind)
    article = "an" if kind[0] in "aeiou" else "a"
    kind = kind if manifest.kind == "pca" else f"{article} {kind}"
    origin = manifest.recalibration
    when = f"{origin.trained} and recalibrated {manifest.created}" if origin else manifest.created
    adoption = manifest.adoption
    if adoption is None:
        yield f"It is {kind} with {manifest.latents} latents, trained {when}."
    else:
        yield f"It is {article} {kind} ({adoption.source}), adopted {when}: it was trained elsewhere."
        yield from (f"{line}." for line in adoption_lines(manifest))
    shape = " x ".join(map(str, manifest.shape))
    yield f"A row has {shape} {'pixels' if manifest.is_image else 'features'}."
    if manifest.window is not None:
        yield from _window(manifest.window)
    if manifest.conditions is not None:
        yield "It knows the condition of a row, which is not a feature:"
        yield from (f"{line}." for line in condition_lines(manifest.conditions))
    if adoption is not None:
        return
    if changed := list(_changed_options(manifest)):
        yield "Options that differ from the defaults: " + ", ".join(f"{name} {text}" for name, text in changed) + "."
    else:
        yield "All options have their default values."


def _window(window: Window) -> Iterator[str]:
    scales = join_names([str(scale) for scale in window.scales])
    yield f"It judges each row together with up to {window.rows - 1} rows before it in its group: by the values of the"
    yield f"row, and by their means and standard deviations over the last {scales} rows. A row with fewer than"
    yield f"{window.least_rows - 1} rows before it is not judged. Latents and score are those of these summaries."


def _data(manifest: Manifest, notes: Sequence[str]) -> Iterator[str]:
    data = manifest.data
    yield f"- source: {data.source}, {data.rows:,} rows"
    yield f"- SHA-256 of the values: `{data.fingerprint}`"
    if data.distinct is not None and data.distinct < data.rows:
        yield f"- distinct rows: {data.distinct:,}"
    uses = "rows to fit" if manifest.adoption is None else "rows for the prior and the explanation"
    yield f"- split: {data.fit:,} {uses}, {data.held_out:,} held out, {data.calibration:,} to calibrate"
    if manifest.timeline is not None:
        yield from (f"- {line}" for line in _periods(manifest.timeline))
    yield from (f"- {note}" for note in notes)
    if manifest.is_image:
        return
    yield ""
    yield "| feature | unit | minimum | median | maximum | missing |"
    yield "|---|---|---|---|---|---|"
    for feature in manifest.features[:FEATURES]:
        figures = f"{feature.minimum:.4g} | {feature.median:.4g} | {feature.maximum:.4g} | {feature.missing}"
        yield f"| {_cell(feature.name)} | {_cell(feature.unit or '')} | {figures} |"
    if len(manifest.features) > FEATURES:
        yield ""
        yield f"and {len(manifest.features) - FEATURES} more: `elbo inspect --json` lists all."


def _periods(timeline: Timeline) -> Iterator[str]:
    yield from (f"{what}: {periods}" for what, periods in period_lines(timeline))
    rows = "1 row" if timeline.gap_rows == 1 else f"{timeline.gap_rows:,} rows"
    yield (
        f"between two parts, {rows} of each group left out"
        if timeline.group_column
        else f"between two parts, {rows} left out"
    )


def _quality(manifest: Manifest) -> Iterator[str]:
    if manifest.timeline is not None and manifest.timeline.blocks:
        yield "Rows of the same days fit the model, so figures on held-out rows are better than those on later rows"
        yield "will be. Measure later rows with `elbo evaluate`."
        yield ""
    yield f"On the {manifest.data.held_out:,} held-out rows:"
    yield ""
    others = {kind: measures for kind, measures in manifest.comparison.items() if kind != manifest.kind}
    own = manifest.metrics | manifest.comparison.get(manifest.kind, {})
    yield f"| measure | this model | {''.join(f'{kind} | ' for kind in others)}unit |"
    yield f"|---|---|{'---|' * len(others)}---|"
    for name in dict.fromkeys([*own, *(name for measures in others.values() for name in measures)]):
        title, unit = MEASURES.get(name, (name.replace("_", " "), ""))
        figures = (f"{measures[name]:.6g}" if name in measures else "" for measures in (own, *others.values()))
        yield f"| {title} | {' | '.join(figures)} | {unit} |"
    if manifest.kind != "pca" and (verdict := against_pca(manifest.metrics)):
        yield ""
        yield f"Does it reconstruct better than PCA with as many latents? {verdict}."


def _latents(manifest: Manifest) -> Iterator[str]:
    if not manifest.latent_report:
        return
    yield f"{latents_phrase(manifest)}."
    if "kl" in manifest.metrics:
        rate, distortion = manifest.metrics["kl"], -manifest.metrics["reconstruction"]
        yield f"Encoding a row takes {rate:.4g} nats for its latents (the rate) and {distortion:.4g} nats for the rest"
        yield "(the distortion)."


def _calibration(manifest: Manifest) -> Iterator[str]:
    """Yield sentences about the calibration set: its rows, and whether they trained the model."""
    rows = manifest.calibration.rows
    if origin := manifest.recalibration:
        yield f"It was recalibrated on {rows:,} of {origin.rows:,} rows of {origin.source}. Its networks and weights"
        yield f"are those of {origin.parent}. SHA-256 of the calibration rows: `{origin.fingerprint}`."
    elif folds := manifest.calibration.folds:
        yield f"It was calibrated on {rows:,} rows, each scored by one of {folds} other models that were fitted without"
        yield "it (cross-conformal calibration). The published model was then fitted to 90 % of"
        yield "all rows; the others are held out."
    elif manifest.adoption is not None:
        yield f"It was calibrated on {rows:,} rows. Nothing else here used them. Whether they trained the network is"
        yield "not known: if they did, more rows raise a false alarm than promised."
    else:
        yield f"It was calibrated on {rows:,} rows that were not used for training."


def _alarms(manifest: Manifest) -> Iterator[str]:
    yield f"The score is {' + '.join(manifest.parts)}; higher is more anomalous."
    yield from _calibration(manifest)
    if lines := list(policy_lines(manifest)):
        yield "A policy applies before the score is computed, so the rate of false alarms holds for these rules:"
        yield ""
        yield from (f"- {line}" for line in lines)
        yield ""
    if not manifest.calibration.reaches(DEFAULT_ALPHA):
        yield f"**{few_calibration_rows(manifest.calibration)}**"
    if manifest.calibration.folds:
        yield "At alpha 0.05, about 5 % of the normal rows that are exchangeable with the calibration rows raise a"
        yield "false alarm, on average over tables. This is measured, and not guaranteed: the published model is not"
        yield "one of the models that scored the calibration rows."
    else:
        yield "At alpha 0.05, at most 5 % of the normal rows that are exchangeable with the calibration rows raise a"
        yield "false alarm, on average over calibration sets."
    timeline = manifest.timeline
    if timeline is not None and timeline.calibration is not None:
        yield f"The calibration rows are from {period(timeline.calibration)}. Rows that follow each other resemble each"
        yield "other, so the share of false alarms differs from day to day."
        if timeline.blocks and manifest.recalibration is None:
            yield "The fit rows include other rows of the same days, so more than alpha of the later rows may raise a"
            yield "false alarm. Measure it on later rows with `elbo backtest`, and calibrate on them with"
            yield "`elbo calibrate`."
        yield from _baseline(manifest)
        if manifest.incident_rows is not None:
            yield f"An incident of a group that lasts {manifest.incident_rows} rows counts as a change: its rows become"
            yield "the new normal."
    elif _is_series(manifest):
        yield "**Rows of other days are not exchangeable with these rows, which are a series: see below.**"
    yield f"The smallest possible p-value is {manifest.calibration.floor:.3g}. At a smaller alpha, no row is anomalous"
    yield "unless `extrapolated` is requested: the threshold then comes from a fitted tail, without a guarantee."


def _baseline(manifest: Manifest) -> Iterator[str]:
    if manifest.groups:
        yield f"{len(manifest.groups):,} groups have a baseline of their own, which is the location and the scale of"
        yield "their scores. Other groups have that of all groups together."
        if manifest.training.get("scale_by_group"):
            yield "Rows of these groups are converted into common units before the model sees them. Others are judged"
            yield "as they are."
    if season := manifest.season:
        hours = "time of day" if season.periods == ["day"] else "time of the week"
        yield f"The baseline depends on the {hours} in the time zone {season.time_zone}. For a row without a time, it"
        yield "is the mean over all hours."


DENOISING = (
    "It was trained to remove noise. This improves its scores, but it reconstructs rows less exactly than PCA with as "
    "many latents. If reconstructions matter more to you, train with `--noise 0`."
)


def _limits(manifest: Manifest) -> Iterator[str]:
    """Yield the reasons not to trust the model: first those of this model, then those of all models."""
    yield from (f"**{warning}**" for warning in manifest.warnings)
    yield from _series_limits(manifest)
    error, pca_error = manifest.metrics.get("reconstruction_error"), manifest.metrics.get("pca_error")
    if manifest.kind != "pca" and error is not None and pca_error is not None and error >= pca_error:
        if _denoises(manifest):
            yield DENOISING
        else:
            yield "It reconstructs no better than PCA with as many latents: use `--model pca`, or train longer."
    dead = sum(not latent.active for latent in manifest.latent_report)
    if dead:
        yield f"{dead} of {manifest.latents} latents carry no information: lower `--latents` or `--beta`."
    if manifest.calibration.rows < FEW_CALIBRATION_ROWS:
        yield f"It was calibrated on only {manifest.calibration.rows} rows: the false-alarm rate is uncertain."
    if gaps := [feature.name for feature in manifest.features if feature.missing]:
        yield f"In training, the median of the column took the place of missing values: {join_names(gaps)}."
    grey = manifest.training.get("likelihood") == "bernoulli" and not manifest.training.get("binarise")
    if manifest.kind == "vae" and grey:
        yield "Its likelihood treats grey values as probabilities: compare it only with other Bernoulli models."
    if manifest.adoption is not None and not manifest.only_reconstructs:
        yield "The likelihood of its network is not known, so it has no log-likelihood. Samples come from its prior."
    if manifest.kind in ("ae", "ensemble"):
        yield "An autoencoder has no likelihood. Samples come from a Gaussian mixture that is fitted to its latents."
    yield (
        "p-values hold only while new rows resemble the calibration rows. After drift, run `elbo calibrate`, or train "
        "again."
    )
    yield "It treats anomalies in the training data as normal."
    if manifest.adoption is None and manifest.kind != "pca" and resolved_config(manifest).kept == "best":
        yield "The held-out rows also served to choose the epoch, so metrics on them are slightly optimistic."


def _series_limits(manifest: Manifest) -> Iterator[str]:
    """If the training rows depend on each other, yield when the false-alarm rate does not hold."""
    if manifest.timeline is not None:
        yield (
            "Its rows are a series: the false-alarm rate holds only while new rows behave as in the period of the "
            "calibration rows. Measure it on later rows with `elbo evaluate`, and calibrate on them with "
            "`elbo calibrate`."
        )
    elif _is_series(manifest):
        yield (
            "**The rows that trained it depend on each other: the rank correlation of a row and a row near it is "
            f"{manifest.data.neighbour_correlation:.2f}. The false-alarm rate does not hold for rows of other days: "
            "measure it with `elbo evaluate`, and calibrate on other days with `elbo calibrate`.**"
        )


def _is_series(manifest: Manifest) -> bool:
    """Return whether neighbouring rows of the training data resemble each other, as in a time series."""
    return (manifest.data.neighbour_correlation or 0.0) >= SERIES_CORRELATION


def _denoises(manifest: Manifest) -> bool:
    """Return whether the model was trained to denoise."""
    return manifest.kind in ("ae", "ensemble") and bool(resolved_config(manifest).noise)


def _changed_options(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield name and value of each training option that differs from its default, the value as on the command line."""
    for name, field in TrainConfig.model_fields.items():
        value = manifest.training.get(name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if name in ("model", "name") or value == field.default:
            continue
        if name == "size" and isinstance(value, tuple):
            yield name, "x".join(map(str, value))
        elif isinstance(value, tuple):
            yield name, _as_list(value) or "none"
        else:
            yield name, str(value)


def _as_list(cells: Sequence[object]) -> str:
    """Return a list as the command line takes it: a line of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def _reproduction(manifest: Manifest) -> Iterator[str]:
    if manifest.adoption is None or manifest.recalibration is not None:
        yield from ("```", *_commands(manifest), "```", "")
    if manifest.adoption is not None:
        yield "The network was trained elsewhere. Adopt its module again with `elbo.adopt`, with the same rows and"
        yield f"options: the SHA-256 of the weights is `{manifest.weights_sha256}`. Adopted"
    yield f"with {_versions(manifest)}."


def _commands(manifest: Manifest) -> Iterator[str]:
    if manifest.adoption is None:
        yield command_of(manifest)
    if origin := manifest.recalibration:
        yield shlex.join(["elbo", "calibrate", origin.parent, origin.source])


def command_of(manifest: Manifest) -> str:
    """Return the command that trains this model again."""
    words = ["elbo", "train", manifest.data.source, "--model", str(manifest.training.get("model", manifest.kind))]
    words += ["--name", manifest.name]
    if _would_be_cross(manifest):
        words += ["--calibration", "split"]
    for name, text in _changed_options(manifest):
        words += [f"--{name.replace('_', '-')}", *([] if text == "True" else [text])]
    return shlex.join(words)


def _would_be_cross(manifest: Manifest) -> bool:
    """Return whether `elbo train` would use cross-conformal calibration by default, but did not for this model."""
    distinct = manifest.data.rows if manifest.data.distinct is None else manifest.data.distinct
    is_small = manifest.timeline is None and not manifest.is_image and distinct <= AUTO_CROSS_ROWS
    return is_small and manifest.conditions is None and manifest.training.get("calibration", "split") == "split"


def _versions(manifest: Manifest) -> str:
    return ", ".join(f"{name} {version}" for name, version in manifest.versions.items())


def _plots(names: Sequence[str]) -> Iterator[str]:
    for index, name in enumerate(names):
        caption = CAPTIONS.get(name, name)
        yield from ([""] if index else [])
        yield f"![{caption}]({name}.png)"
        yield ""
        yield caption


def _cell(text: str) -> str:
    """Return `text` escaped for a Markdown table."""
    return text.replace("|", "\\|")
