"""Write, load and verify artifacts. An artifact is one TorchScript file that contains one version of a model.

A file is written atomically and sealed with a SHA-256. `load` verifies the seal, the format version, the weights and
the golden answers before it returns the model.

TorchScript does not support Python 3.14, so `torch.export` will have to replace it. All calls to `torch.jit` are in
this module, so that no other module will have to change then.
"""

import hashlib
import io
import json
import os
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit._recursive import create_script_module, infer_methods_to_compile, make_stub

from models.archive_check import open_archive
from models.baseline import Baseline
from models.errors import ArtifactCorrupt, ArtifactMismatch, ArtifactUnsafe, DeviceMissing, printable
from models.explanation import correlation_of
from models.inspection import Inspected, inspect_artifact
from models.keys import PrivateKey, PublicKey
from models.manifest import (
    DIGEST_LENGTH,
    FILE_NAME,
    MEMBER,
    SEAL,
    UNREADABLE,
    Golden,
    Manifest,
    model_folder,
    parse,
    read_digest,
    read_sealed,
    seal,
)
from models.onset import UsualCourse, describe_course
from models.signatures import TrustedKeys, identify, signer
from models.staging import staging_folder
from models.trial import IS_POSSIBLE, TrialLimits, Verdict, run_trial
from models.versions import claim_version, unwritable_as_artifact_error

METHODS = (
    "encode",
    "decode",
    "draw",
    "observe",
    "score",
    "log_weight",
    "p_value",
    "severity",
    "threshold",
)  # the exported methods, besides `forward`
WINDOW_METHODS = ("summarise", "score_summaries")  # further exported methods of a model with a window
COMPLETION_METHODS = ("impute", "complete", "score_gaps")  # further exported methods of a model that completes rows
OPTIONAL_METHODS = (*WINDOW_METHODS, *COMPLETION_METHODS)
TWIN_METHODS = ("encode", "decode", "score", "reconstruct")  # the methods of an ONNX twin (see `Twin`)
OPTIONAL_TWIN_METHODS = ("reconstruct",)  # twins written by earlier releases lack these methods
TWIN_MEMBER, TWIN_WEIGHTS_MEMBER = "extra/twin/{}.onnx", "extra/twin/{}.json"
# Exhibits are documents for people. No computation uses them, and an artifact may lack any of them.
HELD_OUT, CALIBRATION, CARD = "held-out.json", "calibration.json", "card.md"
DIRECTIONS = "directions.json"  # the mean latents of the labels of a table; `elbo directions` adds it
TRAINED_ROWS = "trained-rows.bin"  # hashes of rows that trained the model; for `elbo calibrate`, never shown
SHOWN_EXHIBITS = (HELD_OUT, CALIBRATION, CARD, DIRECTIONS)
EXHIBIT_MEMBER = "extra/exhibits/{}"
GOLDEN_ALPHA = 0.05
MAX_COMPLETED_VALUES = 1 << 18  # rows times features that are completed at once; each needs 64 numbers: 64 MB
TRIAL_BYTES = 1 << 20  # size of the file that `require_writable` writes: that of a typical artifact
# Largest allowed relative error of an output. The score divides by small variances, which amplifies rounding errors.
GOLDEN_TOLERANCE = 1e-3
ONNX_TYPES = {
    1: torch.float32,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
}  # the types of weights, as ONNX numbers them

_COMPILING = threading.Lock()  # in CPython 3.11, `ast.parse` can fail with a SystemError if two threads call it at once


@dataclass(frozen=True)
class Graph:
    """One method as an ONNX graph, and the names of the module's weights that the graph uses."""

    onnx: bytes
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Twin:
    """The ONNX twin of a model: a copy, for ONNX Runtime, of the methods that TWIN_METHODS lists.

    The twin has one graph per method. `weights` are the weights of the model's module, by name.
    """

    graphs: Mapping[str, Graph]
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class Artifact:
    """A loaded and verified model. `module` has the methods of `models.pipeline.Pipeline`.

    If the manifest has a window, x is [B, N, D] instead of [B, D], and `module` also has WINDOW_METHODS: see
    `models.windowed.Windowed`. Otherwise, it may have COMPLETION_METHODS: see `models.completion`.

    If the manifest has conditions, x is [B, D + C] and z is [B, K + C]: see `models.conditional`.

    `load` does not verify the twin. Before you use the twin, compare its outputs with the golden answers
    (`find_discrepancy`).
    """

    manifest: Manifest
    module: torch.jit.ScriptModule
    path: Path
    device: torch.device
    twin: Twin | None = None
    exhibits: Mapping[str, bytes] = field(default_factory=dict)  # documents by name, of SHOWN_EXHIBITS
    calibration: Mapping[str, Tensor] = field(default_factory=dict)  # the buffers of the module's calibration, by name
    baseline: Baseline | None = None  # what score is usual for a group and a time; None without times
    course: UsualCourse | None = None  # how features vary within a window; None if this is unknown
    sha256: str = ""  # of the file
    signed_by: PublicKey | None = None  # None if no signature was needed


def choose_device(requested: str) -> str:
    """Return the device, cpu or cuda, that `requested` (auto, cpu or cuda) selects on this machine.

    Raises:
        DeviceMissing: cuda was requested and torch finds no CUDA device.
    """
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise DeviceMissing("cuda was requested, but torch finds no CUDA device on this machine: use auto or cpu")
    return "cuda" if available and requested != "cpu" else "cpu"


def script(model: nn.Module) -> torch.jit.ScriptModule:
    """Compile `model` for inference, and export `forward` and METHODS. Afterwards, `model` tracks no gradients."""
    # The methods of the pipeline inside a model with a window are exported too, although nobody calls them there: torch
    # compiles a class once per process, and the next model may be such a pipeline without a window.
    for kind in {type(module) for module in model.modules()}:
        if all(hasattr(kind, method) for method in METHODS):
            for method in (*METHODS, *OPTIONAL_METHODS):
                if hasattr(kind, method):
                    torch.jit.export(getattr(kind, method))
    with _deprecations_silenced(), _COMPILING:
        scripted: torch.jit.ScriptModule = torch.jit.script(model.eval().requires_grad_(False))
    return scripted


def trace_methods(module: nn.Module, examples: Mapping[str, Tensor]) -> torch.jit.ScriptModule:
    """Return `module` with the methods that `examples` names, as torch's tracer records them for these inputs."""
    with _deprecations_silenced():
        traced: torch.jit.ScriptModule = torch.jit.trace_module(module, dict(examples), check_trace=False)
    return traced


def script_methods(module: nn.Module, names: Sequence[str]) -> torch.jit.ScriptModule:
    """Compile the methods `names` of `module`. Unlike `torch.jit.export`, this marks nothing in the module's class."""

    def stubs(part: nn.Module) -> list[Any]:
        if part is not module:
            return list(infer_methods_to_compile(part))
        return [make_stub(getattr(module, name), name) for name in names]

    with _deprecations_silenced():
        scripted: torch.jit.ScriptModule = create_script_module(module, stubs, share_types=False)
    return scripted


def copy_script(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Return a copy of `module` on the CPU."""
    buffer = io.BytesIO()
    with _deprecations_silenced():
        torch.jit.save(module, buffer)
        buffer.seek(0)
        copied: torch.jit.ScriptModule = torch.jit.load(buffer, map_location="cpu")
    return copied


def define_module(
    module: nn.Module, weights: Mapping[str, Tensor], methods: Mapping[str, str]
) -> torch.jit.ScriptModule:
    """Return `module`, scripted, with the buffers `weights`, and with `methods`, which are TorchScript by name."""
    for name, weight in weights.items():
        module.register_buffer(name, weight)
    with _deprecations_silenced():
        # A class of its own: torch would share the class with an earlier module that has weights of the same names, and
        # a class cannot get a method twice.
        scripted: torch.jit.ScriptModule = create_script_module(module.eval(), lambda _: [], share_types=False)
        scripted.define("\n".join(methods.values()))
    return scripted


def freeze(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Return `module` with its weights as constants. The methods that METHODS lists can still be called."""
    # Artifacts of earlier releases lack some of the methods.
    present = [method for method in (*METHODS, *OPTIONAL_METHODS) if hasattr(module, method)]
    with _deprecations_silenced():
        frozen: torch.jit.ScriptModule = torch.jit.freeze(module.eval(), preserved_attrs=present)
    return frozen


def weights_sha256(module: nn.Module) -> str:
    """Return the SHA-256 over the name, type, shape and bytes of every parameter and buffer, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def record_golden(
    module: torch.jit.ScriptModule, x: Tensor, noise: Tensor, choice: Tensor, *, must_be_finite: bool = False
) -> Golden:
    """Return the golden answers: the outputs of `module` for given x [B, D], noise [B, K] and choice [B].

    `load` later verifies that the module still gives the same outputs. If the model imputes missing values, x may
    contain NaN, which the manifest stores as null. Outputs that are all NaN, such as `log_weight` of an autoencoder,
    are omitted.

    Args:
        must_be_finite: refuse a module of which an output other than `log_weight` is not finite. A model that was
            trained here may overflow: the user was warned, and published it nevertheless.

    Raises:
        ArtifactCorrupt: an output must be finite, and is not.
    """
    computed = compute_outputs(module, x, noise, choice)
    for name, output in computed.items() if must_be_finite else ():
        if name != "log_weight" and not bool(output.isfinite().all()):
            raise ArtifactCorrupt(
                f"{name} of the module gives values that are not finite: check the rows and the weights"
            )
    outputs = {name: output for name, output in computed.items() if not bool(output.isnan().all())}
    return Golden(
        inputs={"x": x.tolist(), "noise": noise.tolist(), "choice": choice.tolist()},
        outputs={name: output.tolist() for name, output in outputs.items()},
    )


def require_writable(root: Path, name: str) -> None:
    """Check that the next version of model `name` can be published under `root`. Call this before long work.

    The check creates the model's folder, and writes and deletes a file of TRIAL_BYTES bytes there, because neither
    permissions nor the free space of a disk tell whether a user may write.

    Raises:
        ArtifactUnwritable: the disk is full, or this user may not write to the folder.
    """
    folder = model_folder(root, name)
    with unwritable_as_artifact_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with staging_folder(folder) as trial:
            _write_synced(trial / FILE_NAME, bytes(TRIAL_BYTES))


def publish(
    module: torch.jit.ScriptModule,
    manifest: Manifest,
    root: Path,
    twin: Mapping[str, Graph] | None = None,
    exhibits: Mapping[str, bytes] | None = None,
    key: PrivateKey | None = None,
) -> Path:
    """Write `module` (scripted, not frozen) as the next version of `manifest.name` under `root`. Return the path.

    The file is written, sealed and synced to disk in a staging folder. The folder is then renamed, so that a reader
    sees either the whole file or no file. Concurrent publishers get different versions.

    Args:
        module: the scripted model.
        manifest: the description of the model; `manifest.name` is the name of the model's folder.
        root: the artifact folder.
        twin: the ONNX twin, one graph per method in TWIN_METHODS.
        exhibits: documents by name. The names are those of SHOWN_EXHIBITS, and TRAINED_ROWS; each is optional.
        key: signs the version. The signature is there as soon as the version is.

    Raises:
        ArtifactUnwritable: the disk is full, or this user may not write to the folder.
    """
    return publish_content(archive(module, manifest, twin, exhibits), manifest.name, root, key)


def publish_content(content: bytes, name: str, root: Path, key: PrivateKey | None = None) -> Path:
    """Write `content`, the bytes of an artifact, as the next version of model `name` under `root`. See `publish`.

    Raises:
        ArtifactUnwritable: the disk is full, or this user may not write to the folder.
    """
    folder = model_folder(root, name)
    with unwritable_as_artifact_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with staging_folder(folder) as staging:
            staging.chmod(0o755)  # whatever the umask: a server that runs as another user reads the folder
            _write_synced(staging / FILE_NAME, content)
            version = claim_version(staging, root, name, signer(content, name, key))
        _sync_folder(folder)
    return folder / str(version) / FILE_NAME


def load(path: Path, device: str = "cpu", keys: TrustedKeys | None = None, digest: str | None = None) -> Artifact:
    """Load the artifact at `path` and verify its seal, signature, format version, weights and golden answers.

    Before torch sees the artifact, `models.inspection` refuses it if it could harm this machine.

    Args:
        path: the artifact, `<name>/<version>/model.pt`.
        device: "cpu" or "cuda".
        keys: one of these keys must have signed the artifact as `<version>` of `<name>`; None: no signature is needed.
        digest: the digest of the file if a trial process has inspected it and tried it out. The file must have this
            digest, and is not inspected again. None: there was no trial.

    Raises:
        ArtifactError: the file is missing or fails a verification. Each reason has a subclass in `models.errors`.
    """
    content = read_sealed(path)  # read once, so that the bytes that are loaded are the bytes that were verified
    if digest is not None and not content.endswith(digest.encode()):
        raise ArtifactCorrupt(f"{path} was changed while it was loaded: load it again")
    signed_by = None if keys is None else keys.verify(content, path, *identify(path))
    return replace(load_content(content, path, device, is_inspected=digest is not None), signed_by=signed_by)


def record_profiles(enabled: bool) -> None:
    """Choose whether torch records profiles when it compiles the methods of modules in this process.

    By default, torch compiles each method twice: first with code that records the types and shapes of its tensors, and
    then for what it has recorded. On a CPU, where torch fuses no operators, the second version is no faster and its
    results are equal to the bit (measured with PCA, autoencoders, VAEs and ensembles of 20 to 784 features). Without
    profiles, a model is loaded and warmed up in half the time.
    """
    torch._C._jit_set_profiling_executor(enabled)


def prepare_trials() -> None:
    """Make torch examine the processor now. Call this in the process from which trials are forked.

    Without this call, torch examines the processor when it first needs to. It reads /proc/cpuinfo, but a trial
    cannot open files. In a trial, torch would then choose another algorithm for convolutions, whose results differ from
    the golden answers.
    """
    torch.backends.nnpack.is_available()


def load_after_trial(path: Path, keys: TrustedKeys | None = None, limits: TrialLimits | None = None) -> Artifact:
    """Load the artifact at `path` on the CPU, after a child process has loaded it within `limits`. See `load`.

    Call this before torch has computed anything: the child is forked from this process.
    """
    if not IS_POSSIBLE:
        return load(path, keys=keys)
    if keys is None:
        digest = read_digest(path)
    else:  # nothing unsigned runs, not even in a trial, and not even if the file is replaced now
        signed = read_sealed(path)
        keys.verify(signed, path, *identify(path))
        digest = signed[-DIGEST_LENGTH:].decode()

    def read() -> bytes:
        content = read_sealed(path)
        if not content.endswith(digest.encode()):
            raise ArtifactCorrupt(f"{path} was changed while it was loaded: run the command again")
        return content

    def work(content: bytes) -> Verdict:
        torch.set_num_threads(1)  # a forked process has only the thread that forked it
        load_content(content, path)
        return {}

    prepare_trials()
    run_trial(path, read, work, limits or TrialLimits())
    return load(path, keys=keys, digest=digest)


def load_content(content: bytes, path: Path, device: str = "cpu", is_inspected: bool = False) -> Artifact:
    """Load an artifact from `content`, the bytes that `read_sealed` returned for `path`. See `load`.

    With `is_inspected`, the content was inspected and loaded before, in a trial process.
    """
    if device != "cpu":
        torch.backends.cudnn.allow_tf32 = False  # TF32 convolutions err by 1e-3; linear layers do not use TF32
    manifest = parse(content, path)
    inspected = None if is_inspected else inspect_artifact(content, path)
    try:
        with _deprecations_silenced():
            module = torch.jit.load(io.BytesIO(content), map_location=device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ArtifactCorrupt(f"{path}: torch {torch.__version__} cannot load the module: {reason}") from error
    if weights_sha256(module) != manifest.weights_sha256:
        raise ArtifactCorrupt(
            f"{path}: the SHA-256 of the weights differs from the one in the manifest; publish the model again"
        )
    weights = module.state_dict()
    if inspected:
        _check_twin_weights(inspected, weights, path)
    frozen = freeze(module)
    try:
        found = find_discrepancy(frozen, manifest.golden, device, GOLDEN_TOLERANCE)
    except (RuntimeError, TypeError, ValueError, KeyError, OverflowError) as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[-1][:200])
        raise ArtifactMismatch(
            f"{path}: the model cannot run on its golden inputs ({reason}); publish the model again"
        ) from error
    if found:
        raise ArtifactMismatch(
            f"{path}: {found} on {device} with torch {torch.__version__}; "
            "train the model again on this machine, or install the versions that the manifest lists"
        )
    prefix = part_prefix(manifest)
    return Artifact(
        manifest=manifest,
        module=frozen,
        path=path,
        device=torch.device(device),
        twin=_read_twin(content, weights, path),
        exhibits=_read_exhibits(content, path, SHOWN_EXHIBITS),
        calibration=_buffers_of(weights, f"{prefix}calibration."),
        baseline=_read_baseline(manifest, _buffers_of(weights, f"{prefix}baseline."), path),
        course=None if manifest.window is None else _read_course(manifest, weights),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def part_prefix(manifest: Manifest) -> str:
    """Return what the names of the buffers of the calibration and of the baseline begin with in a module."""
    return "" if manifest.window is None else "pipeline."


def _buffers_of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): buffer for name, buffer in weights.items() if name.startswith(prefix)}


def _read_baseline(manifest: Manifest, buffers: Mapping[str, Tensor], path: Path) -> Baseline | None:
    if not buffers and not manifest.groups and manifest.season is None:
        return None
    periods = manifest.season.periods if manifest.season else []
    try:
        baseline = Baseline(manifest.groups, periods, {name: buffer.cpu().numpy() for name, buffer in buffers.items()})
        if baseline.features is not None and baseline.features.width != manifest.width:
            raise ValueError(f"expected {manifest.width} features, got {baseline.features.width}")
    except ValueError as error:
        raise ArtifactCorrupt(
            f"{path}: the baseline does not fit the manifest ({error}); publish the model again"
        ) from error
    return baseline


def _read_course(manifest: Manifest, weights: Mapping[str, Tensor]) -> UsualCourse | None:
    """Return how the features vary within windows; None if the explanation of the model does not contain it."""
    double = {name: weight.detach().cpu().double() for name, weight in weights.items() if weight.is_floating_point()}
    mean, deviation = double.get("pipeline.explanation.mean"), double.get("pipeline.explanation.deviation")
    if mean is None or deviation is None or not bool((deviation > 0).all()):
        return None
    try:
        correlation = correlation_of(double["pipeline.explanation.weights"], deviation)
    except ValueError:
        return None
    copies = len(mean) // manifest.width
    row_scale, row_shift = double["scaling.scale"].repeat(copies), double["scaling.shift"].repeat(copies)
    level = (double["pipeline.scaling.shift"] + double["pipeline.scaling.scale"] * mean) * row_scale + row_shift
    deviation = deviation * double["pipeline.scaling.scale"] * row_scale
    return describe_course(level.numpy(), deviation.numpy(), correlation.numpy(), manifest.width)


def read_trained_rows(artifact: Artifact) -> bytes | None:
    """Return the document TRAINED_ROWS of `artifact`; None if there is none, as in artifacts of earlier releases."""
    return _read_exhibits(_read_again(artifact), artifact.path, (TRAINED_ROWS,)).get(TRAINED_ROWS)


def read_exhibits(content: bytes, path: Path) -> dict[str, bytes]:
    """Return all exhibits in `content`, the bytes of the artifact at `path`, by name, with TRAINED_ROWS."""
    return _read_exhibits(content, path, (*SHOWN_EXHIBITS, TRAINED_ROWS))


def thaw(artifact: Artifact) -> torch.jit.ScriptModule:
    """Load the module of `artifact` on the CPU without freezing it, so that it can be changed and published again."""
    return thaw_content(_read_again(artifact))  # it was inspected when it was loaded


def thaw_content(content: bytes) -> torch.jit.ScriptModule:
    """Load the module in `content`, the bytes of an artifact that was loaded before, on the CPU without freezing it."""
    with _deprecations_silenced():
        module: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(content), map_location="cpu")
    return module


def _read_again(artifact: Artifact) -> bytes:
    """Return the bytes from which `artifact` was loaded. Raise ArtifactCorrupt if the file has changed since."""
    content = read_sealed(artifact.path)
    if hashlib.sha256(content).hexdigest() != artifact.sha256:
        raise ArtifactCorrupt(f"{artifact.path} has changed since it was loaded: run the command again")
    return content


def compute_outputs(module: Any, x: Tensor, noise: Tensor, choice: Tensor) -> dict[str, Tensor]:
    """Return the outputs of all methods of `module` by name.

    Args:
        module: a Pipeline that is eager, scripted or frozen.
        x: rows [B, D], or windows [B, N, D] if the model has a window.
        noise: standard normal numbers, [B, K].
        choice: uniform numbers in [0, 1), [B].
    """
    with torch.inference_mode():
        mean, std = module.encode(x)
        score, parts, contribution, expected = module.score(x)
        # Artifacts of earlier releases lack log_weight.
        log_weight = {"log_weight": module.log_weight(x, noise)} if hasattr(module, "log_weight") else {}
        decoded = module.decode(mean)  # [B, D]
        # Artifacts of earlier releases also lack observe. The noise of a row repeats the noise of its latents.
        row_noise = noise.repeat(1, -(-decoded.shape[1] // noise.shape[1]))[:, : decoded.shape[1]]  # [B, D]
        observe = {"observe": module.observe(decoded, row_noise)} if hasattr(module, "observe") else {}
        return (
            log_weight
            | observe
            | _impute(module, x)
            | {
                "forward": module(x),
                "encode.mean": mean,
                "encode.std": std,
                "decode": decoded,
                "draw": module.draw(noise, choice),
                "score": score,
                "score.parts": parts,
                "score.contribution": contribution,
                "score.expected": expected,
                "p_value": module.p_value(score),
                "severity": module.severity(score, GOLDEN_ALPHA),
                "threshold": module.threshold(GOLDEN_ALPHA),
            }
        )


def _impute(module: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of `impute` for rows x [B, D] from which a third of the values is taken out.

    Return no outputs if the model has no method `impute`.
    """
    if not hasattr(module, "impute"):
        return {}
    rows, columns = torch.arange(len(x), device=x.device), torch.arange(x.shape[1], device=x.device)
    gaps = torch.where((rows[:, None] + columns) % 3 == 0, torch.nan, x)
    mean, deviation, low, high = module.impute(gaps)
    outputs = {"impute.mean": mean, "impute.deviation": deviation, "impute.low": low, "impute.high": high}
    if hasattr(module, "score_gaps"):  # artifacts of earlier releases lack it
        names = ("score_gaps", "score_gaps.parts", "score_gaps.contribution", "score_gaps.expected")
        outputs |= dict(zip(names, module.score_gaps(gaps), strict=True))
    return outputs


def score(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `Pipeline.score` returns for rows x [B, D]. Rows with missing values are scored by `score_gaps`.

    If the model has no `score_gaps`, its scaling replaces missing values.
    """
    if x.dim() == 2 and hasattr(module, "score_gaps"):
        has_gaps = x.isnan().any(dim=1)  # [B]
        if bool(has_gaps.any()):
            return _score_with_gaps(module, x, has_gaps)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = module.score(x)
    return outputs


def _score_with_gaps(module: Any, x: Tensor, has_gaps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `score` returns for rows x [B, D], of which those in the mask `has_gaps` [B] have missing values."""
    found = [module.score_gaps(rows) for rows in x[has_gaps].split(max(1, MAX_COMPLETED_VALUES // x.shape[1]))]
    if not bool(has_gaps.all()):
        found.append(module.score(x[~has_gaps]))
    # `order` has the place of row i of x among the scored rows, of which those with missing values come first.
    order = torch.cat((has_gaps.nonzero(), (~has_gaps).nonzero())).squeeze(1).argsort()  # [B]
    score, parts, contribution, expected = (torch.cat(outputs)[order] for outputs in zip(*found, strict=True))
    return score, parts, contribution, expected


def reconstruct(module: Any, x: Tensor, gaps: bool) -> tuple[Tensor, Tensor]:
    """Return two arrays for rows x [B, D]: the reconstruction [B, D], and its mean squared error per row, [B].

    With `gaps`, x may contain NaN, and the error is the mean over the values that are present. For windows x [B, N, D],
    the results are those of the newest rows. For rows with a condition, x [B, D + C], they are those of the features.
    """
    x_hat = module(x)
    if x.dim() == 3:
        x = x[:, -1]
    if x.shape[1] > x_hat.shape[1]:
        x = x[:, : x_hat.shape[1]]
    if not gaps:
        return x_hat, (x_hat - x).square().mean(dim=1)
    present = ~x.isnan()  # [B, D]
    squares = torch.where(present, (x_hat - x).square(), 0.0)  # [B, D]
    return x_hat, squares.sum(dim=1) / present.sum(dim=1)


def find_discrepancy(module: Any, golden: Golden, device: str, tolerance: float | Mapping[str, float]) -> str | None:
    """Compare the outputs of `module` with the golden answers.

    Args:
        module: an ONNX twin, or a Pipeline that is eager, scripted or frozen.
        golden: the inputs and the expected outputs.
        device: the device of `module`.
        tolerance: largest allowed error of an output, relative to the largest number in its golden answer; or this
            error for each output to compare.

    Returns:
        A message with the name and the error of the first output that differs; None if all outputs agree.
    """
    inputs = (_tensor(golden.inputs[name], device) for name in ("x", "noise", "choice"))
    for name, output in compute_outputs(module, *inputs).items():
        allowed = tolerance.get(name) if isinstance(tolerance, Mapping) else tolerance
        if name not in golden.outputs or allowed is None:
            continue
        expected = _tensor(golden.outputs[name], device)
        if output.shape != expected.shape:
            return f"{name} has the shape {list(output.shape)}, its golden answer has {list(expected.shape)}"
        scale = float(expected.abs().max())
        error = float((output - expected).abs().max())
        if not error <= allowed * max(scale, 1e-3):  # `not <=` instead of `>`, so that NaN also differs
            return f"{name} differs from its golden answer by {error:.3g} (scale {scale:.3g})"
    return None


def _tensor(values: Any, device: str) -> Tensor:
    """Convert nested lists of numbers to a float32 tensor; None becomes NaN."""
    return torch.from_numpy(np.array(values, np.float32)).to(device)


def _check_twin_weights(inspected: Inspected, weights: Mapping[str, Tensor], path: Path) -> None:
    """Check that each weight in the graphs of the ONNX twin is also in the module, with the same type and shape."""
    for name, used in inspected.twin_weights.items():
        for weight, (type_, shape) in used.items():
            tensor = weights.get(weight)
            if tensor is None or (ONNX_TYPES.get(type_), shape) != (tensor.dtype, tensor.shape):
                raise ArtifactUnsafe(f"{path}: the graph {name} has a weight {weight} that the module does not have")


def _read_twin(content: bytes, weights: Mapping[str, Tensor], path: Path) -> Twin | None:
    """Return the ONNX twin in `content`, the bytes of the artifact at `path`; None if there is no twin."""
    with open_archive(content) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist()}
        if TWIN_MEMBER.format(TWIN_METHODS[0]) not in members:
            return None
        try:
            graphs = {
                method: Graph(
                    archive.read(members[TWIN_MEMBER.format(method)]),
                    tuple(json.loads(archive.read(members[TWIN_WEIGHTS_MEMBER.format(method)]))),
                )
                for method in TWIN_METHODS
                if method not in OPTIONAL_TWIN_METHODS or TWIN_MEMBER.format(method) in members
            }
        except UNREADABLE as error:
            raise ArtifactCorrupt(f"{path}: the ONNX twin is incomplete ({error}); publish the model again") from error
    return Twin(graphs, weights)


def _read_exhibits(content: bytes, path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return the bytes of each exhibit in `names` that the artifact has, by name.

    Args:
        content: the bytes of the artifact at `path`.
    """
    with open_archive(content) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist()}
        wanted = {name: EXHIBIT_MEMBER.format(name) for name in names}
        try:
            return {name: archive.read(members[member]) for name, member in wanted.items() if member in members}
        except UNREADABLE as error:
            raise ArtifactCorrupt(f"{path}: the exhibits are damaged ({error}); publish the model again") from error


def archive(
    module: torch.jit.ScriptModule,
    manifest: Manifest,
    twin: Mapping[str, Graph] | None = None,
    exhibits: Mapping[str, bytes] | None = None,
) -> bytes:
    """Return the bytes of the artifact: TorchScript's zip archive with extra members, and the seal as its comment.

    The arguments are those of `publish`. `load_content` loads the result.
    """
    buffer = io.BytesIO()
    with _deprecations_silenced():
        torch.jit.save(module, buffer)
    with zipfile.ZipFile(buffer, "a") as file:
        prefix = file.namelist()[0].partition("/")[0]
        file.writestr(f"{prefix}/{MEMBER}", manifest.model_dump_json())
        for method, graph in (twin or {}).items():
            file.writestr(f"{prefix}/{TWIN_MEMBER.format(method)}", graph.onnx)
            file.writestr(f"{prefix}/{TWIN_WEIGHTS_MEMBER.format(method)}", json.dumps(graph.weights))
        for name, exhibit in (exhibits or {}).items():
            file.writestr(f"{prefix}/{EXHIBIT_MEMBER.format(name)}", exhibit, zipfile.ZIP_DEFLATED)
        file.comment = SEAL + b"0" * DIGEST_LENGTH
    return seal(buffer.getvalue())


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _deprecations_silenced() -> Iterator[None]:
    with warnings.catch_warnings():  # the artifact format depends on torch.jit until torch.export can replace it
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated", category=DeprecationWarning)
        yield
