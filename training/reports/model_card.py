"""The model card: what a person must know of a published model before trusting it, in Markdown. Needs no torch."""

import shlex
from collections.abc import Iterator, Sequence

from models.errors import join_names
from models.manifest import Manifest
from training.config import TrainConfig
from training.fitting.defaults import resolved_config
from training.reports.describe import KINDS, against_pca, latents_phrase

FEATURES = 40  # listed before the rest is only counted
FEW_CALIBRATION_ROWS = 100
MEASURES = {
    "reconstruction_error": ("reconstruction error", "mean square a value, raw units²"),
    "baseline_error": ("error of predicting the mean", "mean square a value, raw units²"),
    "pca_error": ("error of PCA with as many latents", "mean square a value, raw units²"),
    "elbo": ("ELBO", "nats a row"),
    "reconstruction": ("reconstruction term, minus the distortion", "nats a row"),
    "kl": ("KL, the rate", "nats a row"),
    "log_likelihood": ("log-likelihood", "nats a row"),
    "log_likelihood_se": ("its standard error over rows", "nats a row"),
    "bits_per_dimension": ("bits per dimension", "bits a value"),
    "active_latents": ("active latents", ""),
    "detection": ("detection of rows of which a tenth was swapped", "AUROC"),
}
CAPTIONS = {
    "losses": "Every term of the loss by epoch. The dotted line is the epoch that was kept.",
    "reconstructions": "Held-out rows beside what the model makes of them.",
    "samples": "Draws from the generative prior beside held-out rows.",
    "latents": "What each latent carries.",
    "map": "Codes of held-out rows.",
    "scree": "The spectrum of the fitted rows: what a linear model could keep.",
}


def card(manifest: Manifest, version: int | None, notes: Sequence[str], pictures: Sequence[str]) -> str:
    """The card of `manifest` as version `version`; None before it has one.

    Args:
        notes: what the user was told while it was trained.
        pictures: names of those that lie beside the card as <name>.png.
    """
    sections = {
        "What it is": _what(manifest),
        "Data": _data(manifest, notes),
        "How good it is": _quality(manifest),
        "Its latents": _latents(manifest),
        "Alarms": _alarms(manifest),
        "When not to trust it": (f"- {limit}" for limit in _limits(manifest)),
        "Make it again": ("```", *_commands(manifest), "```", "", f"with {_versions(manifest)}."),
        "Pictures": _pictures(pictures),
    }
    lines = [f"# {manifest.name}" + ("" if version is None else f", version {version}")]
    for title, text in sections.items():
        if content := list(text):
            lines += ["", f"## {title}", "", *content]
    return "\n".join(lines) + "\n"


def _what(manifest: Manifest) -> Iterator[str]:
    kind = KINDS.get(manifest.kind, manifest.kind)
    article = "an" if kind[0] in "aeiou" else "a"
    kind = kind if manifest.kind == "pca" else f"{article} {kind}"
    origin = manifest.recalibration
    when = f"{origin.trained} and calibrated anew {manifest.created}" if origin else manifest.created
    yield f"It is {kind} with {manifest.latents} latents, trained {when}."
    shape = " x ".join(map(str, manifest.shape))
    yield f"A row is {shape} {'pixels' if manifest.is_image else 'features'}."
    if chosen := list(_chosen(manifest)):
        yield "Options that differ from the defaults: " + ", ".join(f"{name} {text}" for name, text in chosen) + "."
    else:
        yield "Every option has its default."


def _data(manifest: Manifest, notes: Sequence[str]) -> Iterator[str]:
    data = manifest.data
    yield f"- source: {data.source}, {data.rows:,} rows"
    yield f"- SHA-256 of the values: `{data.fingerprint}`"
    yield f"- split: {data.fit:,} rows fitted it, {data.held_out:,} were held out, {data.calibration:,} calibrated it"
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
        yield f"and {len(manifest.features) - FEATURES} more: `elbo inspect --json` lists them all."


def _quality(manifest: Manifest) -> Iterator[str]:
    yield f"On the {manifest.data.held_out:,} rows that were held out:"
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
        yield f"A code costs {rate:.4g} nats (the rate) and leaves {distortion:.4g} nats to say (the distortion)."


def _alarms(manifest: Manifest) -> Iterator[str]:
    rows, floor = manifest.calibration.rows, manifest.calibration.floor
    yield f"The score is {' + '.join(manifest.parts)}; higher is stranger."
    if origin := manifest.recalibration:
        yield f"{rows:,} of {origin.rows:,} rows of {origin.source} calibrated it: networks and weights are those of"
        yield f"{origin.parent}. SHA-256 of those rows: `{origin.fingerprint}`."
    else:
        yield f"{rows:,} rows that trained nothing calibrated it."
    yield "An alarm at alpha 0.05 rings for at most 5 % of the rows that are like those, on average over calibrations."
    yield f"No p-value is below {floor:.3g}; for a smaller alpha the severity goes on along a fitted tail."


DENOISING = (
    "It learnt to take noise away, for its scores' sake, and reconstructs rows less exactly than PCA with as many "
    "latents: where reconstructions matter more, train with `--noise 0`."
)


def _limits(manifest: Manifest) -> Iterator[str]:
    """What the figures of this very model give reason to doubt, then what holds for all."""
    error, rival = manifest.metrics.get("reconstruction_error"), manifest.metrics.get("pca_error")
    if manifest.kind != "pca" and error is not None and rival is not None and error >= rival:
        if _denoises(manifest):
            yield DENOISING
        else:
            yield "It reconstructs no better than PCA with as many latents: use `--model pca`, or train longer."
    dead = sum(not latent.active for latent in manifest.latent_report)
    if dead:
        yield f"{dead} of {manifest.latents} latents carry nothing: ask for fewer, or lower `--beta`."
    if manifest.calibration.rows < FEW_CALIBRATION_ROWS:
        yield f"Only {manifest.calibration.rows} rows calibrate it: the rate of false alarms is uncertain."
    if gaps := [feature.name for feature in manifest.features if feature.missing]:
        yield f"Where a value is missing the training median stands in for it: {join_names(gaps)}."
    grey = manifest.training.get("likelihood") == "bernoulli" and not manifest.training.get("binarise")
    if manifest.kind == "vae" and grey:
        yield "Grey values count as probabilities: its likelihood is no density of them; compare it only with its like."
    if manifest.kind in ("ae", "ensemble"):
        yield "An autoencoder has no density: draws come from a mixture fitted on its codes; there is no likelihood."
    yield "When the world drifts away from the calibration rows its p-values do not hold: `elbo calibrate` it or train."
    yield "Anomalies among the rows that it was trained on count as normal."
    if manifest.kind != "pca" and resolved_config(manifest).kept == "best":
        yield "The held-out rows also chose the best epoch, so their figures flatter it a little."


def _denoises(manifest: Manifest) -> bool:
    """Whether it learnt from rows with noise, chosen or by default."""
    return manifest.kind in ("ae", "ensemble") and bool(resolved_config(manifest).noise)


def _chosen(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The options of its training that are not the defaults, as they are typed."""
    for name, field in TrainConfig.model_fields.items():
        value = manifest.training.get(name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if name in ("model", "name") or value == field.default:
            continue
        if name == "size" and isinstance(value, tuple):
            yield name, "x".join(map(str, value))
        elif isinstance(value, tuple):
            yield name, ",".join(map(str, value)) or "none"
        else:
            yield name, str(value)


def _commands(manifest: Manifest) -> Iterator[str]:
    yield command_of(manifest)
    if origin := manifest.recalibration:
        yield shlex.join(["elbo", "calibrate", origin.parent, origin.source])


def command_of(manifest: Manifest) -> str:
    """The command that trains this model again."""
    words = ["elbo", "train", manifest.data.source, "--model", str(manifest.training.get("model", manifest.kind))]
    words += ["--name", manifest.name]
    for name, text in _chosen(manifest):
        words += [f"--{name.replace('_', '-')}", *([] if text == "True" else [text])]
    return shlex.join(words)


def _versions(manifest: Manifest) -> str:
    return ", ".join(f"{name} {version}" for name, version in manifest.versions.items())


def _pictures(names: Sequence[str]) -> Iterator[str]:
    for place, name in enumerate(names):
        caption = CAPTIONS.get(name, name)
        yield from ([""] if place else [])
        yield f"![{caption}]({name}.png)"
        yield ""
        yield caption


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
