"""The artifact: one sealed TorchScript file, written atomically, trusted only after it has proved itself.

Every call of `torch.jit` in the project is in this module, so that `torch.export` can take over behind the same
contract when Python 3.14 ends TorchScript.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.errors import ArtifactCorrupt, ArtifactMismatch, DeviceMissing
from models.manifest import (
    DIGEST_LENGTH,
    FILE_NAME,
    MEMBER,
    SEAL,
    UNREADABLE,
    Golden,
    Manifest,
    parse,
    read_sealed,
    seal,
    versions,
)

METHODS = ("encode", "decode", "draw", "score", "log_weight", "p_value", "severity", "threshold")  # besides forward
TWIN_METHODS = ("encode", "decode", "score", "reconstruct")  # what an ONNX twin computes
LATER_TWIN_METHODS = ("reconstruct",)  # what earlier ones lack
TWIN_MEMBER, TWIN_WEIGHTS_MEMBER = "extra/twin/{}.onnx", "extra/twin/{}.json"
# What people look at, and nothing computes with. Each may be missing.
HELD_OUT, CALIBRATION, CARD = "held-out.json", "calibration.json", "card.md"
EXHIBIT_MEMBER = "extra/exhibits/{}"
GOLDEN_ALPHA = 0.05
GOLDEN_TOLERANCE = 1e-3  # relative; other processors round differently, and T2 divides by small variances


@dataclass(frozen=True)
class Graph:
    """A method in ONNX, and the names of the module's weights that it takes from there."""

    onnx: bytes
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Twin:
    """The same model in ONNX: the graph of each of TWIN_METHODS, and the module's weights by name."""

    graphs: Mapping[str, Graph]
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class Artifact:
    """A model that is ready to answer: `module` has the methods of `models.pipeline.Pipeline`.

    Whether its `twin` says the same is for whoever runs it to find out: see `discrepancy`.
    """

    manifest: Manifest
    module: torch.jit.ScriptModule
    path: Path
    device: torch.device
    twin: Twin | None = None
    exhibits: Mapping[str, bytes] = field(default_factory=dict)  # of HELD_OUT, CALIBRATION, CARD
    calibration: Mapping[str, Tensor] = field(default_factory=dict)  # the buffers of the module's calibration, by name


def choose_device(asked: str) -> str:
    """What auto, cpu or cuda means here: cpu or cuda. Raises DeviceMissing if cuda is asked for and there is none."""
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise DeviceMissing("cuda was asked for, but torch sees no CUDA device here: use auto or cpu")
    return "cuda" if available and asked != "cpu" else "cpu"


def script(model: nn.Module) -> torch.jit.ScriptModule:
    """`model` compiled, with `forward` and METHODS as its methods. From here on it is for inference: no gradients."""
    for method in METHODS:
        torch.jit.export(getattr(type(model), method))
    with _deprecations_silenced():
        scripted: torch.jit.ScriptModule = torch.jit.script(model.eval().requires_grad_(False))
    return scripted


def freeze(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """`module` with its weights folded in as constants, for inference only, with those of METHODS that it has."""
    present = [method for method in METHODS if hasattr(module, method)]  # earlier artifacts have fewer
    with _deprecations_silenced():
        frozen: torch.jit.ScriptModule = torch.jit.freeze(module.eval(), preserved_attrs=present)
    return frozen


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over every parameter and buffer, in order of name: what the model has learnt, and nothing else."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def golden(module: torch.jit.ScriptModule, x: Tensor, noise: Tensor, choice: Tensor) -> Golden:
    """What `module` answers now to rows x [B, D], noise [B, K] and choice [B], for every later load to repeat.

    x may hold NaN where the model imputes: the manifest says null there. An answer that a model has not, as an
    autoencoder has no log_weight, is left out.
    """
    outputs = {name: o for name, o in answers(module, x, noise, choice).items() if not bool(o.isnan().all())}
    return Golden(
        inputs={"x": x.tolist(), "noise": noise.tolist(), "choice": choice.tolist()},
        outputs={name: output.tolist() for name, output in outputs.items()},
    )


def publish(
    module: torch.jit.ScriptModule,
    manifest: Manifest,
    root: Path,
    twin: Mapping[str, Graph] | None = None,
    exhibits: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `module` (scripted, not frozen) as the next version of `manifest.name` under `root`; returns the file.

    `twin` is a graph for each of TWIN_METHODS, if there is one; `exhibits` are any of HELD_OUT, CALIBRATION and CARD.

    The file is complete, synced and sealed before its folder gets its name, so a reader sees all of it or nothing.
    Two publishers at once get two versions.
    """
    folder = root / manifest.name
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    try:
        staging.chmod(0o755)  # mkdtemp's 0700 would lock out a server that runs as another user
        _write_synced(staging / FILE_NAME, _archive(module, manifest, twin or {}, exhibits or {}))
        version = _claim_version(staging, folder, versions(root, manifest.name))
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already if it was renamed
    _sync_folder(folder)
    return folder / str(version) / FILE_NAME


def load(path: Path, device: str = "cpu") -> Artifact:
    """The artifact at `path`, verified: its seal, its format version, its weights' hash, its golden answers.

    Raises the errors of `models.errors.ArtifactError`.
    """
    if device != "cpu":
        torch.backends.cudnn.allow_tf32 = False  # cuDNN's convolutions would round to 1e-3, linear layers do not
    content = read_sealed(path)  # once: what was checked is what is loaded, whatever happens to the file meanwhile
    manifest = parse(content, path)
    try:
        with _deprecations_silenced():
            module = torch.jit.load(io.BytesIO(content), map_location=device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ArtifactCorrupt(f"{path}: torch {torch.__version__} cannot load it: {reason}") from error
    if weights_sha256(module) != manifest.weights_sha256:
        raise ArtifactCorrupt(f"{path}: its weights are not those that its manifest names; publish the model again")
    weights = module.state_dict()
    frozen = freeze(module)
    if found := discrepancy(frozen, manifest.golden, device, GOLDEN_TOLERANCE):
        raise ArtifactMismatch(
            f"{path}: {found} on {device} with torch {torch.__version__}; "
            "do not serve it: train it again here, or use the versions in its manifest"
        )
    twin, exhibits = _twin(content, weights, path), _exhibits(content, path)
    start = "calibration."
    calibration = {name.removeprefix(start): buffer for name, buffer in weights.items() if name.startswith(start)}
    return Artifact(manifest, frozen, path, torch.device(device), twin, exhibits, calibration)


def thaw(artifact: Artifact) -> torch.jit.ScriptModule:
    """The module of `artifact` on the CPU as it was published, not frozen: to be changed, and published again."""
    with _deprecations_silenced():
        module: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(read_sealed(artifact.path)), map_location="cpu")
    if weights_sha256(module) != artifact.manifest.weights_sha256:
        raise ArtifactCorrupt(f"{artifact.path} has changed since it was loaded: start again")
    return module


def answers(module: Any, x: Tensor, noise: Tensor, choice: Tensor) -> dict[str, Tensor]:
    """Every method's answer by name: `module` is a Pipeline, scripted or frozen or neither."""
    with torch.inference_mode():
        mean, std = module.encode(x)
        score, parts, contribution, expected = module.score(x)
        later = {"log_weight": module.log_weight(x, noise)} if hasattr(module, "log_weight") else {}
        return later | {
            "forward": module(x),
            "encode.mean": mean,
            "encode.std": std,
            "decode": module.decode(mean),
            "draw": module.draw(noise, choice),
            "score": score,
            "score.parts": parts,
            "score.contribution": contribution,
            "score.expected": expected,
            "p_value": module.p_value(score),
            "severity": module.severity(score, GOLDEN_ALPHA),
            "threshold": module.threshold(GOLDEN_ALPHA),
        }


def reconstruction(module: Any, x: Tensor, gaps: bool) -> tuple[Tensor, Tensor]:
    """x [B, D] to its reconstruction [B, D] and mean squared error [B], with `gaps` of the values that are there."""
    x_hat = module(x)
    if not gaps:
        return x_hat, (x_hat - x).square().mean(dim=1)
    there = ~x.isnan()  # [B, D]
    squares = torch.where(there, (x_hat - x).square(), 0.0)  # [B, D]
    return x_hat, squares.sum(dim=1) / there.sum(dim=1)


def discrepancy(
    module: Any, pairs: Golden, device: str, tolerance: float, only: Collection[str] | None = None
) -> str | None:
    """What of `module`'s answers differs from the golden ones, and by how much; None if nothing does.

    tolerance: relative to the largest number in an answer.
    only: the names of the answers that count; all if None.
    """
    inputs = (_tensor(pairs.inputs[name], device) for name in ("x", "noise", "choice"))
    for name, answer in answers(module, *inputs).items():
        if name not in pairs.outputs or (only is not None and name not in only):
            continue  # no log_weight has an autoencoder, nor an earlier artifact
        expected = _tensor(pairs.outputs[name], device)
        scale = float(expected.abs().max())
        error = float((answer - expected).abs().max())
        if not error <= tolerance * max(scale, 1e-3):  # written so that NaN fails too
            return f"{name} differs from its golden answer by {error:.3g} (scale {scale:.3g})"
    return None


def _tensor(values: Any, device: str) -> Tensor:
    """Nested lists of numbers as float32; null is NaN."""
    return torch.from_numpy(np.array(values, np.float32)).to(device)


def _twin(content: bytes, weights: Mapping[str, Tensor], path: Path) -> Twin | None:
    """The twin in the bytes of the artifact at `path`, if one was published with it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
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
                if method not in LATER_TWIN_METHODS or TWIN_MEMBER.format(method) in members
            }
        except UNREADABLE as error:
            raise ArtifactCorrupt(f"{path}: its ONNX twin is not whole ({error}); publish the model again") from error
    return Twin(graphs, weights)


def _exhibits(content: bytes, path: Path) -> dict[str, bytes]:
    """What the artifact at `path` shows, by name; earlier artifacts show nothing."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist()}
        wanted = {name: EXHIBIT_MEMBER.format(name) for name in (HELD_OUT, CALIBRATION, CARD)}
        try:
            return {name: archive.read(members[member]) for name, member in wanted.items() if member in members}
        except UNREADABLE as error:
            raise ArtifactCorrupt(f"{path}: its exhibits are not whole ({error}); publish the model again") from error


def _archive(
    module: torch.jit.ScriptModule, manifest: Manifest, twin: Mapping[str, Graph], exhibits: Mapping[str, bytes]
) -> bytes:
    """The file's bytes: TorchScript's own zip archive, everything else as more members, the seal as its comment."""
    buffer = io.BytesIO()
    with _deprecations_silenced():
        torch.jit.save(module, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        prefix = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{prefix}/{MEMBER}", manifest.model_dump_json())
        for method, graph in twin.items():
            archive.writestr(f"{prefix}/{TWIN_MEMBER.format(method)}", graph.onnx)
            archive.writestr(f"{prefix}/{TWIN_WEIGHTS_MEMBER.format(method)}", json.dumps(graph.weights))
        for name, exhibit in exhibits.items():
            archive.writestr(f"{prefix}/{EXHIBIT_MEMBER.format(name)}", exhibit, zipfile.ZIP_DEFLATED)
        archive.comment = SEAL + b"0" * DIGEST_LENGTH
    return seal(buffer.getvalue())


def _claim_version(staging: Path, folder: Path, present: list[int]) -> int:
    version = max(present, default=0) + 1
    while True:
        try:
            staging.rename(folder / str(version))
        except OSError:
            if not (folder / str(version)).exists():
                raise
            version += 1  # another publisher was faster
        else:
            return version


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
    with warnings.catch_warnings():  # the format rests on torch.jit until torch.export can carry one
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated", category=DeprecationWarning)
        yield
