"""An artifact in words, for the person who holds one. Needs no torch."""

from collections.abc import Iterator
from pathlib import Path

from models.manifest import Manifest

KINDS = {"pca": "principal component analysis", "ae": "autoencoder", "vae": "variational autoencoder"}
FEATURES = 12  # listed before the rest is only counted


def describe(manifest: Manifest, path: Path) -> str:
    """A readable report of some fifteen lines on the artifact at `path`, whose seal has been checked."""
    facts = list(_facts(manifest, path))
    width = max(len(label) for label, _ in facts)
    lines = [f"{label:<{width}}  {text}" for label, text in facts]
    return "\n".join(lines + ([] if manifest.is_image else ["", *_feature_table(manifest)]))


def _facts(manifest: Manifest, path: Path) -> Iterator[tuple[str, str]]:
    data, calibration = manifest.data, manifest.calibration
    yield "model", f"{manifest.name}, {KINDS.get(manifest.kind, manifest.kind)}"
    yield "file", f"{path}, {path.stat().st_size / 1e6:.2f} MB, written {manifest.created}"
    yield "seal", "intact: the SHA-256 of the file is the one that it was published with"
    yield "row", _row(manifest)
    yield "code", f"{manifest.latents} latents"
    yield "data", f"{data.source}: {data.rows:,} rows, SHA-256 {data.fingerprint[:12]}"
    yield "split", f"{data.fit:,} fit, {data.held_out:,} held out, {data.calibration:,} calibration"
    yield "training", _joined(manifest.training)
    for index, (name, value) in enumerate(manifest.metrics.items()):
        yield "" if index else "held out", f"{name} {value:.6g}"
    yield "score", f"{' + '.join(manifest.parts)}, calibrated on {calibration.rows:,} rows"
    yield "p-value", f"at least {calibration.floor:.3g}: below that alpha the tail is extrapolated"
    yield "versions", _joined(manifest.versions)


def _row(manifest: Manifest) -> str:
    shape = " x ".join(map(str, manifest.shape))
    if manifest.pixel_range is None:
        return f"{shape} features"
    black, white = manifest.pixel_range
    return f"{shape} pixels, from {black:g} (black) to {white:g} (white)"


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
        yield f"and {len(manifest.features) - FEATURES} more: elbo inspect --json lists them all"
