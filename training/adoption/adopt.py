"""Adopt a network that was trained elsewhere: from a torch module to a published artifact."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import artifact
from models.errors import ArtifactError
from models.keys import PrivateKey
from models.manifest import FORMAT_VERSION, Adoption, CalibrationSize, Manifest, model_folder
from models.pipeline import Pipeline
from models.scaling import Scaling
from training.adoption.arguments import setting
from training.adoption.completing import with_completion_if_possible
from training.adoption.copying import copy_module, weights_of
from training.adoption.draws import without_noise
from training.adoption.inspection import Functions, Named, Spread, inspect_module
from training.adoption.rows import prepare_rows
from training.adoption.scripted import Interpreted
from training.adoption.statistics import BATCH, PriorOption, build_pipeline
from training.adoption.tracing import TOLERANCE, compile_functions
from training.data.moments import compute_moments
from training.errors import AdoptionError, RowsMadeConstant
from training.evaluation.metrics import squared_error
from training.evaluation.worth import MIN_ROWS, is_worse, threshold_warning, trimmed_mean
from training.fitting.latents import describe_latents
from training.fitting.pca import spectrum_from_moments
from training.fitting.prepared_data import MAX_COVARIANCE_FEATURES, SPECTRUM_SIZE, PreparedData
from training.progress import Reporter, SilentReporter
from training.publishing.compatibility import IN_PYTHON, refuse_other_features
from training.publishing.exhibits import make_exhibits
from training.publishing.onnx_export import export
from training.publishing.publish import describe_data, describe_features, software_versions

GOLDEN_ROWS = 3
CHECKED_ROWS = 2_000  # the artifact is compared with the module on at most this many rows
KIND = "adopted"


def adopt(
    module: nn.Module,
    calibration_rows: Any,
    *,
    name: str,
    artifacts: Path,
    fit_rows: Any = None,
    scaler: Any = None,
    prior: PriorOption = None,
    shape: Sequence[int] | None = None,
    feature_names: Sequence[str] | None = None,
    encode: Named = None,
    decode: Named = None,
    spread: Spread | None = None,
    images: bool | None = None,
    source: str = "rows in memory",
    seed: int = 0,
    key: PrivateKey | None = None,
    replace_features: bool = True,
    report: Reporter | None = None,
) -> Path:
    """Publish a trained module as an artifact. Return the path of the artifact.

    The module itself does not change: a copy of it is put into evaluation mode, converted to float32 and compiled. A
    draw of normal noise, as of a VAE, is replaced by its mean.

    The calibration set is two thirds of the distinct calibration rows, or half of them without `fit_rows`. Nothing else
    uses these rows. If the calibration rows did not train the network, at most alpha of the new rows that are
    exchangeable with them raise a false alarm, on average over calibration sets. The other calibration rows give the
    statistics of the score, because the residuals of rows that trained a network are too small.

    Args:
        module: the trained module. It has the methods encode and decode, or the parts encoder and decoder; or only a
            forward that returns a reconstruction, a tuple that has it, or a dict. The artifact then only reconstructs
            and scores rows.
        calibration_rows: normal rows that did not train the network, in raw units: an array or tensor [N, D] or
            [N, ...].
        name: name of the model.
        artifacts: artifact folder.
        fit_rows: rows that may have trained the network, in raw units. They give the prior, the noise of samples and
            the explanation. By default, a part of the calibration rows does.
        scaler: converts raw units to the units that the module takes: None, (mean, scale), a module with the methods
            forward and inverse, or a scaler of scikit-learn.
        prior: the distribution of the latents of samples: None to fit a mixture of Gaussians to the latents of
            `fit_rows`, "standard" for N(0, I).
        shape: the shape of one row, such as (28, 28) or (30, 8) for windows of 30 rows; by default, that of the array.
        feature_names: names of the features: one for each value of a row, or for each place in its last dimension.
        encode: the function of the encoder, if it has another name: a name, a part of the module, or a function of the
            module and its inputs. It returns a code, (mean, log_variance) or (mean, std).
        decode: the function of the decoder.
        spread: what `encode` returns besides the mean: "log_variance" or "std". By default, it is the logarithm of the
            variance if a value is negative.
        images: whether the rows are images; by default, this is recognised by their shape and values.
        source: where the rows come from, for the manifest.
        seed: seed of the split of the rows and of the fit of the prior.
        key: signs the artifact.
        replace_features: publish even if the newest version of `name` has other features.
        report: receives the progress and the notes.

    Raises:
        DataError: the newest version of `name` has other features, and `replace_features` is false.
        AdoptionError: the module or the rows cannot become an artifact. Nothing is published.
        ArtifactUnwritable: the model cannot be written to `artifacts`. This is checked first.
    """
    report = report or SilentReporter()
    model_folder(artifacts, name)  # refuses an invalid name
    artifact.require_writable(artifacts, name)
    options = None if shape is None else tuple(int(size) for size in shape)
    data, inner = prepare_rows(
        calibration_rows,
        fit_rows,
        shape=options,
        feature_names=feature_names,
        images=images,
        source=source,
        seed=seed,
    )
    if not replace_features:
        refuse_other_features(data.table, artifacts, name, IN_PYTHON)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # results then do not depend on the number of cores
    try:
        adopted = _adopt(
            module,
            data,
            inner,
            scaler=scaler,
            prior=prior,
            named=(encode, decode),
            spread=spread,
            seed=seed,
            trained_on_fit_rows=fit_rows is not None,
            report=report,
        )
        return _publish(adopted, name, artifacts, seed, key, report)
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True, kw_only=True)
class _Adopted:
    """An adopted model before it is published."""

    pipeline: Pipeline
    functions: Functions
    data: PreparedData
    adoption: Adoption
    notes: list[str]
    warnings: list[str]


def _adopt(
    module: nn.Module,
    data: PreparedData,
    inner: tuple[int, ...],
    *,
    scaler: Any,
    prior: PriorOption,
    named: tuple[Named, Named],
    spread: Spread | None,
    seed: int,
    trained_on_fit_rows: bool,
    report: Reporter,
) -> _Adopted:
    """Return the adopted model. Raises AdoptionError."""
    scaling = _scaling(scaler, data.table.x.width)
    rows = torch.cat((data.held_out, data.calibration, data.sample))[:CHECKED_ROWS]
    u = _scaled(scaling, rows)
    report.stage("compiling the module")
    copied = copy_module(module)
    functions = inspect_module(copied, module, inner, u, encode=named[0], decode=named[1], spread=spread)
    if functions.encode is None and prior is not None:
        raise AdoptionError(
            f"{setting('prior')} is given, but the module has no encoder and decoder: leave {setting('prior')} out, or "
            f"name its functions with {setting('encode')} and {setting('decode')}"
        )
    _check_precision(module, functions, u)
    network, notes = _compile(functions, module, inner, u, named, spread)
    report.stage("computing the score statistics")
    pipeline = build_pipeline(functions, network, scaling, data, prior, seed, trained_on_fit_rows=trained_on_fit_rows)
    _compare_with_module(pipeline, functions, rows, u)
    report.stage("calibrating the estimates of missing values")
    pipeline, without_completion = with_completion_if_possible(pipeline, data, seed)
    if without_completion is not None:
        notes = [
            *notes,
            f"the model does not complete rows, and replaces missing values by medians: {without_completion}",
        ]
    notes = [*functions.notes, *notes]
    if functions.spread is not None:
        what = "the logarithm of the variance" if functions.spread == "log_variance" else "the standard deviation"
        notes.append(
            f"the second result of the encoder is taken as {what} of the latents; "
            f"if it is not, give {setting('spread')}"
        )
    for note in [*data.table.notes, *data.table.warnings, *notes]:
        report.note(note)
    has_codes = functions.encode is not None
    adoption = Adoption(
        source=functions.source,
        functions=["encode", "decode"] if has_codes else ["forward"],
        spread=functions.spread,
        scaler=None if scaler is None else type(scaler).__name__,
        prior=None if not has_codes else "standard" if prior == "standard" else "fitted",
        without_completion=without_completion,
    )
    warnings = _find_warnings(pipeline, data)
    for warning in warnings:
        report.note(warning)
    return _Adopted(
        pipeline=pipeline, functions=functions, data=data, adoption=adoption, notes=notes, warnings=warnings
    )


def _scaling(scaler: Any, width: int) -> Scaling:
    """Return the module that converts raw rows to the units of the network. Raises AdoptionError."""
    if isinstance(scaler, nn.Module):
        if not callable(getattr(scaler, "inverse", None)):
            raise AdoptionError(
                f"the scaler {type(scaler).__name__} has no method inverse: expected a module whose forward converts "
                "raw rows and whose inverse converts them back"
            )
        return copy_module(scaler)  # type: ignore[return-value] # it has the interface of Scaling
    from training.adoption.scalers import scaling_module

    return scaling_module(scaler, width)


def _scaled(scaling: Scaling, x: Tensor) -> Tensor:
    """Return rows x [N, D] in model units. Raises AdoptionError if the scaler does not fit the rows."""
    try:
        with torch.no_grad():
            u = torch.cat([scaling(part) for part in x.split(BATCH)])
            back = scaling.inverse(u)
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise AdoptionError(f"the scaler cannot convert rows of {x.shape[1]} values: {reason}") from error
    for what, found in (("forward", u), ("inverse", back)):
        if found.shape != x.shape:
            raise AdoptionError(
                f"{what} of the scaler gives the shape {list(found.shape)} for rows of the shape {list(x.shape)}: "
                "expected the same shape"
            )
        if not bool(found.isfinite().all()):
            raise AdoptionError(f"{what} of the scaler gives values that are not finite for the rows given")
    return u.float()


def _check_precision(module: nn.Module, functions: Functions, u: Tensor) -> None:
    """Refuse a module in float64 whose results change when it is converted to float32."""
    if not any(weight.dtype == torch.float64 for weight in weights_of(module)):
        return
    double = replace(functions, module=copy_module(module, as_float32=False))
    with without_noise():
        some = u[:64]
        ours, theirs = _results(functions, some), _results(double, some.double())
    for found, expected in zip(ours, theirs, strict=True):
        error = float((found.double() - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
        if not error <= 1e-4:
            raise AdoptionError(
                f"the module gives other results in float32 than in float64 (relative difference {error:.2g}): train "
                "it in float32, or scale the rows"
            )


def _results(functions: Functions, u: Tensor) -> list[Tensor]:
    if functions.encode is None:
        return [functions.reconstruct_rows(u)[0]]
    code = functions.encode_rows(u)[0]
    return [code, functions.decode_rows(code)]


def _compile(
    functions: Functions,
    module: nn.Module,
    inner: tuple[int, ...],
    u: Tensor,
    named: tuple[Named, Named],
    spread: Spread | None,
) -> tuple[torch.jit.ScriptModule, list[str]]:
    """Return the compiled functions, and notes.

    The module is compiled to TorchScript first if the tracer makes a constant of the number of rows.

    Raises:
        AdoptionError: both ways fail. The message is that of the way without TorchScript.
    """
    try:
        return compile_functions(functions, u)
    except RowsMadeConstant:
        try:
            names = [name for name in ("forward", "encode", "decode") if callable(getattr(module, name, None))]
            scripted = Interpreted(artifact.script_methods(functions.module, names))
            again = inspect_module(scripted, module, inner, u, encode=named[0], decode=named[1], spread=spread)
            return compile_functions(again, u)
        except Exception:  # noqa: BLE001, S110 - torch raises many types for what it cannot script
            pass
        raise


def _compare_with_module(pipeline: Any, functions: Functions, x: Tensor, u: Tensor) -> None:
    """Refuse a model whose outputs differ from those of the module, in raw units, on rows x [N, D]."""
    with torch.no_grad(), without_noise():
        code, *others = _results(functions, u)
        decoded = others[0] if others else code
        expected = {"reconstruct": pipeline.scaling.inverse(decoded)}
        found = {"reconstruct": pipeline(x)}
        if others:
            expected["encode"], found["encode"] = code, pipeline.encode(x)[0]
    for name, ours in found.items():
        error = float((ours - expected[name]).abs().max()) / max(float(expected[name].abs().max()), 1e-6)
        if not error <= TOLERANCE:
            raise AdoptionError(
                f"{name} of the artifact differs from the module on the rows given (relative difference {error:.2g}): "
                "leave out of the module what depends on the number or the order of rows"
            )


def _find_warnings(pipeline: Pipeline, data: PreparedData) -> list[str]:
    """Return warnings: the model reconstructs badly, or too few rows calibrate it."""
    found = []
    if len(data.held_out) >= MIN_ROWS:
        with torch.no_grad():
            u = pipeline.scaling(data.held_out)
            errors = (u - pipeline.core.decode(pipeline.core.encode(u)[0])).double().square().mean(dim=1)
            mean = pipeline.scaling(data.moments.mean.float().unsqueeze(0))
            of_mean = (u - mean).double().square().mean(dim=1)
        if is_worse(errors, of_mean):
            found.append(
                "WARNING: the module reconstructs rows worse than predicting the mean of every feature: error "
                f"{trimmed_mean(errors)[0]:.4g} against {trimmed_mean(of_mean)[0]:.4g} (10 % trimmed means, model "
                "units); check the scaler, and whether the reconstruction lacks the last activation, such as a sigmoid"
            )
    if text := threshold_warning(pipeline.calibration):
        found.append(text)
    return found


def _publish(
    adopted: _Adopted, name: str, artifacts: Path, seed: int, key: PrivateKey | None, report: Reporter
) -> Path:
    """Publish the model, after a copy in a temporary folder has been loaded without an error."""
    pipeline, data = adopted.pipeline, adopted.data
    module = artifact.script(pipeline)
    rows = data.held_out[:GOLDEN_ROWS]
    random = np.random.RandomState(seed)
    noise = torch.from_numpy(random.standard_normal((len(rows), pipeline.prior.means.shape[1])).astype(np.float32))
    choice = torch.from_numpy(random.uniform(size=len(rows)).astype(np.float32))
    try:
        golden = artifact.record_golden(module, rows, noise, choice, must_be_finite=True)
    except ArtifactError as error:
        raise AdoptionError(
            f"the artifact of the module cannot be verified, so it is not published: {error}"
        ) from error
    manifest = _manifest(adopted, name, golden, artifact.weights_sha256(pipeline))
    report.stage("exporting the ONNX twin")
    twin = _twin(pipeline, rows, report)
    report.stage("writing the artifact")
    notes = [*data.notes, *adopted.notes]
    exhibits = make_exhibits(pipeline, manifest, data, notes)
    if twin is not None and (reason := _refusal(module, manifest, twin)) is not None:
        report.note(f"note: the artifact has no ONNX twin, so serving on a CPU is slower: {reason}")
        twin = None
    if twin is None and (reason := _refusal(module, manifest, None)) is not None:
        raise AdoptionError(f"the artifact of the module cannot be loaded, so it is not published: {reason}")
    return artifact.publish(module, manifest, artifacts, twin, exhibits, key)


def _refusal(module: torch.jit.ScriptModule, manifest: Manifest, twin: dict[str, artifact.Graph] | None) -> str | None:
    """Return why the artifact would be refused when it is loaded; None if it would be accepted."""
    with tempfile.TemporaryDirectory(prefix="elbo-") as folder:
        path = artifact.publish(module, manifest, Path(folder), twin)
        try:
            artifact.load(path)
        except ArtifactError as error:
            return str(error).replace(f"{path}: ", "")
    return None


def _twin(pipeline: Pipeline, rows: Tensor, report: Reporter) -> dict[str, artifact.Graph] | None:
    try:
        with torch.no_grad():
            return export(pipeline, rows, pipeline.encode(rows)[0])
    except Exception as error:  # noqa: BLE001 - the exporter raises many types, and the twin is optional
        reason = " ".join(str(error).split())[:200]
        report.note(
            f"note: the ONNX export failed ({reason}): the artifact has no ONNX twin, so serving on a CPU is slower"
        )
        return None


def _manifest(adopted: _Adopted, name: str, golden: Any, weights_sha256: str) -> Manifest:
    pipeline, data, functions = adopted.pipeline, adopted.data, adopted.functions
    table, calibration = data.table, len(data.split.calibration)
    has_codes = functions.encode is not None
    with torch.no_grad():
        u = _scaled(pipeline.scaling, data.held_out)
        x_hat = torch.cat([pipeline(part) for part in data.held_out.split(BATCH)])
        of_fit = _scaled(pipeline.scaling, data.sample)
    # Not `data.scaled_moments`, which needs an affine scaling.
    moments = compute_moments([of_fit.numpy()], with_covariance=of_fit.shape[1] <= MAX_COVARIANCE_FEATURES)
    spectrum = [] if moments.covariance is None else spectrum_from_moments(moments)[:SPECTRUM_SIZE].tolist()
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        kind=KIND,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        shape=list(table.shape),
        features=describe_features(data),
        latents=functions.latents if has_codes else 0,
        parts=list(pipeline.core.parts),
        pixel_range=table.pixel_range,
        training={},
        data=describe_data(data),
        metrics={
            "reconstruction_error": squared_error(data.held_out, x_hat),
            "baseline_error": squared_error(data.held_out, data.moments.mean.float()),
        },
        calibration=CalibrationSize(rows=calibration, floor=1.0 / (calibration + 1)),
        golden=golden,
        versions=software_versions(),
        weights_sha256=weights_sha256,
        latent_report=describe_latents(pipeline.core, u) if has_codes else [],
        spectrum=spectrum,
        total_variance=float(moments.variance.sum()),
        warnings=adopted.warnings,
        adoption=adopted.adoption,
    )
