"""Write a published model as files that other runtimes load, in the layout of a Triton model repository.

Each exported model is a folder `NAME` with `config.pbtxt` and `VERSION/model.onnx`, or with `VERSION/model.pt2`. The
outputs of the exported files are compared with those of the artifact, and a folder appears only when it is complete.
"""

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from models.artifact import Artifact, thaw
from models.manifest import Manifest
from models.staging import staging_folder
from training.adoption.scripted import run_method
from training.errors import ExportError
from training.exporting.module import Weights, WholeModel, input_shape, output_shapes

FORMATS = ("onnx", "onnx-pipeline", "pt2")
OPSET = 18
TRACED_ROWS = 3
CHECKED_ROWS = 7  # another number than TRACED_ROWS: a number of rows that became a constant would be found
TOLERANCES = {"onnx": 1e-5, "onnx-pipeline": 1e-5, "pt2": 1e-6}
MAX_BATCH = 1024  # rows that Triton's dynamic batcher joins


class Part(NamedTuple):
    """One exported model.

    Args:
        name: the name of its folder.
        module: computes the outputs.
        example: its input, [TRACED_ROWS, ...].
        check: another input, [CHECKED_ROWS, ...].
        outputs: the lengths of each output after the number of rows, by name.
        expected: the outputs of the artifact for `check`.
    """

    name: str
    module: nn.Module
    example: Tensor
    check: Tensor
    outputs: Mapping[str, list[int]]
    expected: Sequence[Tensor]


class Method(nn.Module):
    """One method of a scripted module, run in Python.

    Args:
        script: the module of the artifact, thawed.
        name: the name of the method; "reconstruct" is not a method of the module, but its encode and decode.
        count: how many of the results to return.
    """

    def __init__(self, script: torch.jit.ScriptModule, name: str, count: int) -> None:
        super().__init__()
        self.weights = Weights(script)
        object.__setattr__(self, "_script", script)
        self._name, self._count = name, count

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the results of the method for rows [B, ...]."""
        found = run_method(self.__dict__["_script"], self._name, self.weights, rows)
        return tuple(found[: self._count]) if isinstance(found, tuple) else (found,)


def export(artifact: Artifact, name: str, version: int, chosen: str, out: Path) -> list[Path]:
    """Write a model into the folder `out`; return the files of the exported models.

    - onnx-pipeline: one model `NAME` that maps rows to all outputs, with preprocessing, score and p-value inside.
    - onnx: a model for each method: `NAME-encode`, `NAME-decode` and `NAME-score`.
    - pt2: the same as onnx-pipeline, for `torch.export.load`.

    Args:
        artifact: the model.
        name: the name of the exported model.
        version: its version.
        chosen: the format, one of FORMATS.
        out: the folder, which is created if it is missing.

    Raises:
        ExportError: the model cannot be exported, its outputs differ from those of the artifact, or this version has
            been exported before.
    """
    if artifact.baseline is not None and artifact.baseline.features is not None:
        raise ExportError(
            f"{name}@{version} cannot be exported: it was trained with --scale-by-group, and an exported model does "
            "not know the groups of rows; train it without this option"
        )
    suffix = "pt2" if chosen == "pt2" else "onnx"
    parts = _parts(artifact, name, chosen)
    for part in parts:
        target = out / part.name / str(version)
        if target.exists():
            raise ExportError(f"{target} exists already: remove it, or export into another folder")
    contents = [_content(part, chosen, f"{name}@{version}") for part in parts]
    out.mkdir(parents=True, exist_ok=True)
    return [
        _publish(out / part.name, version, f"model.{suffix}", content, _config(part, chosen))
        for part, content in zip(parts, contents, strict=True)
    ]


def _parts(artifact: Artifact, name: str, chosen: str) -> list[Part]:
    """Return the models to export."""
    manifest, script = artifact.manifest, thaw(artifact).eval()
    shapes = output_shapes(manifest)
    example, check = (_rows(manifest, rows) for rows in (TRACED_ROWS, CHECKED_ROWS))
    if chosen != "onnx":
        scores = None if chosen == "pt2" else artifact.calibration["scores"].cpu()
        whole = WholeModel(script, manifest, scores)
        return [Part(name, whole, example, check, shapes, _outputs_of_artifact(artifact, check, list(shapes)))]
    methods: dict[str, tuple[str, ...]] = {"score": ("score", "parts", "contribution", "expected")}
    if not manifest.only_reconstructs:
        methods = {"encode": ("mean", "std"), **methods}
    parts = []
    for method, outputs in methods.items():
        expected = _outputs_of_artifact(artifact, check, outputs)
        of_method = {output: shapes[output] for output in outputs}
        module = Method(script, method, len(outputs))
        parts.append(Part(f"{name}-{method}", module, example, check, of_method, expected))
    if not manifest.only_reconstructs:
        width = manifest.latents + manifest.condition_width
        generator = torch.Generator().manual_seed(1)
        example, check = (torch.randn(rows, width, generator=generator) for rows in (TRACED_ROWS, CHECKED_ROWS))
        with torch.inference_mode():
            decoded = [artifact.module.decode(check)]
        outputs_of_decode = {"x_hat": [manifest.width]}
        parts.append(Part(f"{name}-decode", Method(script, "decode", 1), example, check, outputs_of_decode, decoded))
    return parts


def _rows(manifest: Manifest, rows: int) -> Tensor:
    """Return rows or windows [rows, ...] around the medians of the training data, without conditions and NaN."""
    generator = torch.Generator().manual_seed(rows)
    low = torch.tensor([feature.minimum for feature in manifest.features])
    high = torch.tensor([feature.maximum for feature in manifest.features])
    lengths = input_shape(manifest)
    x = torch.zeros(rows, *lengths)
    x[..., : manifest.width] = low + (high - low) * torch.rand(rows, *lengths[:-1], manifest.width, generator=generator)
    return x


def _outputs_of_artifact(artifact: Artifact, x: Tensor, names: Sequence[str]) -> list[Tensor]:
    module: Any = artifact.module
    with torch.inference_mode():
        mean, std = module.encode(x)
        score, parts, contribution, expected = module.score(x)
        found = {
            "x_hat": module.decode(mean), "mean": mean, "std": std, "score": score, "p_value": module.p_value(score),
            "parts": parts, "contribution": contribution, "expected": expected,
        }  # fmt: skip
    return [found[name] for name in names]


def _content(part: Part, chosen: str, reference: str) -> bytes:
    """Return the file of an exported model, whose outputs have been checked."""
    write = _pt2 if chosen == "pt2" else _onnx
    try:
        with torch.no_grad(), _warnings_ignored():
            content, run = write(part)
            outputs = run(part.check)
    except Exception as error:  # whatever the exporters raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ExportError(f"{reference} cannot be exported as {chosen}: {reason[:300]}") from error
    for name, got, expected in zip(part.outputs, outputs, part.expected, strict=True):
        difference = relative_difference(got, expected)
        if not difference <= TOLERANCES[chosen]:
            raise ExportError(
                f"{reference} cannot be exported as {chosen}: {name} differs from that of the artifact by "
                f"{difference:.1e} of its size, expected at most {TOLERANCES[chosen]:g}"
            )
    return content


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest absolute value in `expected` or 1. NaN equals NaN."""
    if not expected.numel():
        return 0.0
    scale = expected.nan_to_num().abs().max().clamp(min=1.0)
    same = (got == expected) | (got.isnan() & expected.isnan())
    return float(torch.where(same, 0.0, (got - expected).abs() / scale).max())


def _pt2(part: Part) -> tuple[bytes, Any]:
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(part.module, (part.example,), dynamic_shapes=({0: rows},), strict=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    content = buffer.getvalue()
    return content, torch.export.load(io.BytesIO(content)).module()


def _onnx(part: Part) -> tuple[bytes, Any]:
    import onnxruntime

    buffer = io.BytesIO()
    torch.onnx.export(
        part.module,
        (part.example,),
        buffer,  # type: ignore[arg-type] # the annotation fits only the other exporter
        dynamo=False,
        opset_version=OPSET,
        input_names=[_input_name(part)],
        output_names=list(part.outputs),
        dynamic_axes={name: {0: "rows"} for name in (_input_name(part), *part.outputs)},
    )
    content = buffer.getvalue()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(each) for each in session.run(list(part.outputs), {_input_name(part): x.numpy()})]

    return content, run


def _input_name(part: Part) -> str:
    return "z" if part.name.endswith("-decode") and list(part.outputs) == ["x_hat"] else "x"


def _config(part: Part, chosen: str) -> str | None:
    """Return the configuration for Triton; None for a format that Triton does not load."""
    if chosen == "pt2":
        return None

    def tensor(name: str, lengths: Sequence[int]) -> str:
        if lengths:
            return f'  {{ name: "{name}", data_type: TYPE_FP32, dims: {list(lengths)} }}'
        # Triton needs at least one length; the model has only the number of rows.
        return f'  {{ name: "{name}", data_type: TYPE_FP32, dims: [ 1 ], reshape: {{ shape: [ ] }} }}'

    inputs = tensor(_input_name(part), list(part.example.shape[1:]))
    outputs = ",\n".join(tensor(name, lengths) for name, lengths in part.outputs.items())
    return (
        f'name: "{part.name}"\nbackend: "onnxruntime"\nmax_batch_size: {MAX_BATCH}\n'
        f"input [\n{inputs}\n]\noutput [\n{outputs}\n]\ndynamic_batching {{ }}\n"
    )


def _publish(folder: Path, version: int, file_name: str, content: bytes, config: str | None) -> Path:
    """Write one exported model; return the path of its file. A version appears only when it is complete.

    Raises:
        ExportError: another process has exported this version meanwhile.
    """
    with staging_folder(folder.parent) as staging:
        inner = staging / str(version)
        inner.mkdir()
        _write_synced(inner / file_name, content)
        if config is not None:
            _write_synced(staging / "config.pbtxt", config.encode())
        try:
            if not folder.exists():
                staging.rename(folder)
            else:
                inner.rename(folder / str(version))
                if config is not None:
                    (staging / "config.pbtxt").replace(folder / "config.pbtxt")
        except OSError as error:
            raise ExportError(f"cannot create {folder / str(version)}: {error.strerror}") from error
    return folder / str(version) / file_name


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _warnings_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # the exporters use deprecated functions
        warnings.filterwarnings("ignore", category=TracerWarning)  # numbers of Python become constants of the graph
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        yield
