"""`elbo inspect`: describe an artifact in text. This module imports no torch."""

import textwrap
from collections.abc import Iterable, Iterator
from datetime import time
from itertools import chain, repeat
from pathlib import Path

from models.errors import join_names
from models.manifest import CalibrationSize, Conditions, Manifest, Period, Timeline, Window, calibration_rows_needed
from models.policy_rules import Silence
from training.config import TrainConfig

KIND_NAMES = {
    "pca": "principal component analysis",
    "ae": "autoencoder",
    "vae": "variational autoencoder",
    "ensemble": "ensemble of an autoencoder and nearest neighbours",
    "adopted": "adopted network",
}
LINE_WIDTH = 100  # characters; longer lists continue on further lines
DEFAULT_ALPHA = 0.05  # of /anomaly and `elbo score`
LISTED_LEVELS = 20  # number of levels of a condition that are listed; further levels are only counted
FEATURES = 12  # number of features that are listed; further features are only counted


def describe(manifest: Manifest, path: Path) -> str:
    """Return a description of the artifact at `path`, in lines of text. The caller must have verified the seal."""
    facts = list(_facts(manifest, path))
    width = max(len(label) for label, _ in facts)
    lines = [f"{label:<{width}}  {text}" for label, text in _wrapped(facts, LINE_WIDTH - width - 2)]
    return "\n".join(lines + ([] if manifest.is_image else ["", *_feature_table(manifest)]))


def _wrapped(facts: Iterable[tuple[str, str]], width: int) -> Iterator[tuple[str, str]]:
    """Yield the facts, with long texts broken into lines of at most `width` characters under an empty label."""
    for label, text in facts:
        lines = [text]
        if label in ("WARNING", "warning", "training", "versions", "policy"):
            lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
        yield from zip([label, *[""] * (len(lines) - 1)], lines, strict=True)


def _facts(manifest: Manifest, path: Path) -> Iterator[tuple[str, str]]:
    data, calibration = manifest.data, manifest.calibration
    yield "model", f"{manifest.name}, {KIND_NAMES.get(manifest.kind, manifest.kind)}"
    for warning in manifest.warnings:
        label, _, text = warning.partition(": ")
        yield label, text
    yield "file", f"{path}, {path.stat().st_size / 1e6:.2f} MB, written {manifest.created}"
    yield "seal", "intact: the SHA-256 of the file is the one recorded at publication"
    yield "row", _row(manifest)
    yield from zip(chain(["condition"], repeat("")), condition_lines(manifest.conditions), strict=False)
    has_report = manifest.latent_report and manifest.kind != "pca"  # all latents of PCA are active
    if manifest.window is not None:
        yield "window", window_phrase(manifest.window)
    latents = (
        "none: the model only reconstructs and scores rows" if manifest.only_reconstructs else str(manifest.latents)
    )
    yield "latents", latents_phrase(manifest) if has_report else latents
    yield "data", f"{data.source}: {data.rows:,} rows, SHA-256 {data.fingerprint[:12]}"
    yield "split", f"{data.fit:,} fit, {data.held_out:,} held out, {data.calibration:,} calibration"
    if manifest.timeline is not None:
        yield from _split_by_time(manifest.timeline)
        yield from _baseline(manifest)
    if manifest.adoption is None:
        yield "training", _joined(_given_options(manifest.training))
    else:
        yield "adopted", f"from {manifest.adoption.source}, trained elsewhere"
        yield from (("", line) for line in adoption_lines(manifest))
    for index, (name, value) in enumerate(manifest.metrics.items()):
        yield "" if index else "held out", f"{name} {value:.6g}"
    if "kl" in manifest.metrics:
        rate, distortion = manifest.metrics["kl"], -manifest.metrics["reconstruction"]
        yield "ELBO", f"-(distortion {distortion:.4g} + rate {rate:.4g}) nats per row"
    if verdict := against_pca(manifest.metrics):
        yield "beats PCA", f"with as many latents: {verdict}"
    cross = "" if calibration.folds is None else f", each scored by one of {calibration.folds} models fitted without it"
    yield "score", f"{' + '.join(manifest.parts)}, calibrated on {calibration.rows:,} rows{cross}"
    if origin := manifest.recalibration:
        rows = f"{calibration.rows:,} of {origin.rows:,} rows of {origin.source}, SHA-256 {origin.fingerprint[:12]}"
        yield "calibration", f"{rows}; the networks are those of {origin.parent}"
    yield from zip(chain(["policy"], repeat("")), policy_lines(manifest), strict=False)
    yield (
        "p-value",
        f"at least {calibration.floor:.3g}; below this alpha, no row is anomalous without `extrapolated`",
    )
    yield "versions", _joined(manifest.versions)


def adoption_lines(manifest: Manifest) -> Iterator[str]:
    """Yield how a module was adopted, a line for each fact; nothing if the model was trained by Elbo."""
    adoption = manifest.adoption
    if adoption is None:
        return
    yield f"Functions of the module: {join_names(adoption.functions)}"
    if manifest.only_reconstructs:
        yield "It only reconstructs and scores rows: its module has no encoder and decoder"
    if adoption.spread is not None:
        what = "the logarithm of the variance" if adoption.spread == "log_variance" else "the standard deviation"
        yield f"The encoder gives the mean and {what} of the latents"
    yield "It takes raw rows" if adoption.scaler is None else f"Rows are scaled by {adoption.scaler}, inside the model"
    if adoption.prior is not None:
        prior = "N(0, I)" if adoption.prior == "standard" else "a Gaussian mixture that is fitted to the latents"
        yield f"The prior of samples is {prior}"


def condition_lines(conditions: Conditions | None) -> Iterator[str]:
    """Yield a line for each column of conditions, with its levels."""
    for column in conditions.columns if conditions else ():
        yield f"{column.name!r}: {join_names([repr(level) for level in column.levels], LISTED_LEVELS)}"


def window_phrase(window: Window) -> str:
    """Return how many rows a model judges together, and how it summarises them."""
    scales = ", ".join(map(str, window.scales))
    return f"{window.rows} rows: each row, and its means and deviations over {scales} rows, from {window.least_rows} on"


def _split_by_time(timeline: Timeline) -> Iterator[tuple[str, str]]:
    """Yield the columns of times and groups, and the period of each part of the rows."""
    group = "" if timeline.group_column is None else f", {timeline.groups:,} groups by {timeline.group_column!r}"
    step = timeline.usual_step_seconds
    yield "time", f"{timeline.time_column!r}{'' if step is None else f', a row every {step:g} s'}{group}"
    yield from (("", f"{what} {periods}") for what, periods in period_lines(timeline))


def _baseline(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield what a verdict depends on besides the row: baselines of groups, the season, and incidents."""
    if manifest.groups:
        yield "baseline", f"{len(manifest.groups):,} groups have their own; other groups have the common baseline"
        if manifest.training.get("scale_by_group"):
            yield "", "rows of these groups are converted into common units before the model sees them"
    if manifest.season:
        yield "season", f"{' and '.join(manifest.season.periods)}, time zone {manifest.season.time_zone}"
    if manifest.incident_rows is not None:
        yield "incidents", f"an incident of a group that lasts {manifest.incident_rows} rows counts as a change"


def period_lines(timeline: Timeline) -> Iterator[tuple[str, str]]:
    """Yield each part of the rows with the period that it covers, or with its period in each block of the history."""
    yield "fit", _listed(timeline, "fit")
    yield "held out", _listed(timeline, "held_out")
    if timeline.calibration is not None:
        yield "calibration", _listed(timeline, "calibration")


def _listed(timeline: Timeline, use: str) -> str:
    """Return the periods of the rows for one use. After a recalibration, the blocks have no calibration rows."""
    periods = [found for block in timeline.blocks if (found := getattr(block, use)) is not None]
    return ", ".join(period(each) for each in periods or [getattr(timeline, use)])


def period(times: Period) -> str:
    """Return a period of the manifest in text, to the minute: `2024-01-01 00:00 to 2024-01-20 23:59 UTC`."""
    first, last = (moment.replace("T", " ").removesuffix("+00:00") for moment in (times.first, times.last))
    minutes = len("2024-01-01 00:00")
    is_short = first[:minutes] == last[:minutes]
    return f"{first} to {last} UTC" if is_short else f"{first[:minutes]} to {last[:minutes]} UTC"


def policy_lines(manifest: Manifest) -> Iterator[str]:
    """Yield the rules of the policy, one a line: features, silences, alarms, and the rows that did not calibrate."""
    policy = manifest.policy
    if policy is None:
        return
    units = {feature.name: f" {feature.unit}" if feature.unit else "" for feature in manifest.features}
    for name, rule in policy.rules.features.items():
        parts = [] if rule.direction == "both" else [f"only {rule.direction} values matter"]
        parts += [f"deviations below {rule.least:g}{units[name]} do not matter"] if rule.least else []
        parts += [] if rule.minimum is None else [f"at least {rule.minimum:g}{units[name]} is valid"]
        parts += [] if rule.maximum is None else [f"at most {rule.maximum:g}{units[name]} is valid"]
        parts += [] if rule.alone else ["never raises an alarm alone"]
        if parts:
            yield f"{name}: {', '.join(parts)}"
    for silence in policy.rules.silences:
        yield f"silence{f' {silence.name!r}' if silence.name else ''}: {_silence(silence)}"
    alarms = policy.rules.alarms
    if alarms.rows > 1 or alarms.seconds:
        seconds = f" over {alarms.seconds:g} s" if alarms.seconds else ""
        yield f"an alert needs {alarms.rows} anomalous row{'s' * (alarms.rows != 1)} in a row{seconds}"
    if policy.alpha is not None:
        yield f"at most {alarms.per_day:g} false alarms a day and group, so the default alpha is {policy.alpha:.3g}"
    if policy.outside or policy.silenced:
        yield (
            f"left out of the calibration: {policy.outside:,} rows with a value outside of its valid range, and "
            f"{policy.silenced:,} silenced rows"
        )


def _silence(silence: Silence) -> str:
    """Return when and for which groups a silence holds."""
    words = [] if silence.is_every_day else [f"on {', '.join(silence.days)}"]
    if silence.start is not None or silence.end is not None:
        start, end = (f"{moment or time():%H:%M:%S}".removesuffix(":00") for moment in (silence.start, silence.end))
        words.append(f"from {start} to {end}")
    words += [] if silence.first is None else [f"from {silence.first}"]
    words += [] if silence.last is None else [f"until {silence.last}"]
    words += [] if silence.groups is None else [f"for {', '.join(silence.groups)}"]
    return " ".join([*words, f"({silence.zone})"])


def few_calibration_rows(calibration: CalibrationSize, alpha: float = DEFAULT_ALPHA) -> str:
    """Return the warning that there are too few calibration rows to call any row anomalous at `alpha`."""
    warning = (
        f"WARNING: no row is called anomalous at alpha {alpha:g}: the smallest possible p-value is "
        f"{calibration.floor:.3g}, because there are only {calibration.rows} calibration rows"
    )
    if not alpha:
        return f"{warning}; use an alpha above 0"
    needed = calibration_rows_needed(alpha)
    if calibration.method == "cross":
        return f"{warning}, and this alpha needs at least {needed}: train on at least {needed} distinct rows"
    return (
        f"{warning}, and this alpha needs at least {needed}. Train on at least {5 * needed} distinct rows, of which a "
        f"fifth calibrates, or with --calibration cross on at least {needed}, or run elbo calibrate with at least "
        f"{needed} new rows"
    )


def against_pca(metrics: dict[str, float]) -> str | None:
    """Return whether the held-out error is lower than that of PCA with as many latents; None if either is unknown."""
    error, pca_error = metrics.get("reconstruction_error"), metrics.get("pca_error")
    if error is None or pca_error is None:
        return None
    return f"{'yes' if error < pca_error else 'NO'}, {error:.3g} against {pca_error:.3g}"


def latents_phrase(manifest: Manifest) -> str:
    """Return how many latents are active, and the range of their KL: `14 of 16 active, each 0.52 to 2.31 nats`."""
    report = manifest.latent_report
    active = [latent for latent in report if latent.active]
    text = f"{len(active)} of {len(report)} active"
    nats = [latent.kl for latent in active if latent.kl is not None]
    return f"{text}, each {min(nats):.3g} to {max(nats):.3g} nats" if nats else text


def _row(manifest: Manifest) -> str:
    shape = " x ".join(map(str, manifest.shape))
    if manifest.pixel_range is None:
        return f"{shape} features"
    black, white = manifest.pixel_range
    return f"{shape} pixels, from {black:g} (black) to {white:g} (white)"


def _given_options(training: dict[str, object]) -> dict[str, object]:
    """Return the options of the training that differ from their defaults. `elbo inspect --json` lists all."""
    fields = TrainConfig.model_fields
    return {
        name: value
        for name, value in training.items()
        if name in ("model", "name", "seed") or name not in fields or value != _as_json(fields[name].default)
    }


def _as_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _joined(values: dict[str, object] | dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _feature_table(manifest: Manifest) -> Iterator[str]:
    shown = manifest.features[:FEATURES]
    names = [f"{feature.name} [{feature.unit}]" if feature.unit else feature.name for feature in shown]
    width = max(map(len, [*names, "feature"]))
    yield f"{'feature':<{width}}  {'minimum':>10}  {'median':>10}  {'maximum':>10}"
    for name, feature in zip(names, shown, strict=True):
        yield f"{name:<{width}}  {feature.minimum:>10.4g}  {feature.median:>10.4g}  {feature.maximum:>10.4g}"
    if len(manifest.features) > FEATURES:
        yield f"and {len(manifest.features) - FEATURES} more: `elbo inspect --json` lists all"
