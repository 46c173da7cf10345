"""Export the ONNX twin of a pipeline: a copy of its expensive methods as graphs for ONNX Runtime.

The graphs are stored beside the TorchScript module. They contain no weights, but refer by name to the weights of that
module, so each weight is stored only once. torch's tracing exporter makes the graphs, because the exporter based on
`torch.export` takes 10 s per graph and gives the same nodes.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from models.artifact import TWIN_METHODS, Graph, reconstruct
from models.pipeline import Pipeline
from models.windowed import Windowed

OPSET = 18
PREFIX = "pipeline_of_method."


def export(pipeline: Pipeline | Windowed, x: Tensor, z: Tensor) -> dict[str, Graph]:
    """Return the graphs of TWIN_METHODS by method name. Each graph takes any number of rows.

    Args:
        pipeline: the pipeline to export, on the CPU and in evaluation mode.
        x: rows [B, D], or windows [B, N, D], to trace with, which may contain NaN if the model imputes missing values.
        z: latents [B, K] to trace with.

    Raises:
        ImportError: onnx is not installed.
        Exception: whatever the exporter raises for an operator that it does not support.
    """
    return {method: _graph(pipeline, method, z if method == "decode" else x) for method in TWIN_METHODS}


def _graph(pipeline: Pipeline | Windowed, method: str, rows: Tensor) -> Graph:
    import onnx

    buffer = io.BytesIO()
    with torch.inference_mode(), _ignore_warnings():
        traced: nn.Module = _Method(pipeline, method)
        if any(isinstance(part, torch.jit.ScriptModule) for part in pipeline.modules()):
            # The exporter cannot trace modules that come from an artifact, but it can export what torch.jit traced.
            traced = torch.jit.trace(traced, (rows,), check_trace=False)
        torch.onnx.export(
            traced,
            (rows,),
            buffer,  # type: ignore[arg-type] # the annotation fits only the other exporter
            dynamo=False,
            opset_version=OPSET,
            do_constant_folding=False,  # folding would copy weights into the graph
            input_names=["rows"],
            dynamic_axes={"rows": {0: "B"}},
        )
    model = onnx.load_from_string(buffer.getvalue())
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="model.pt")  # placeholder: the loader takes the module's weights
    _remove_prefix(model.graph)
    names = tuple(tensor.name for tensor in model.graph.initializer)
    return Graph(model.SerializeToString(deterministic=True), names)


class _Method(nn.Module):
    """One method of a pipeline as a module. The names of its weights begin with PREFIX."""

    def __init__(self, pipeline: Pipeline | Windowed, method: str) -> None:
        super().__init__()
        self.pipeline_of_method = pipeline
        self._method = method

    def forward(self, rows: Tensor) -> Any:
        """Return the results of the method for rows [B, ...]."""
        pipeline = self.pipeline_of_method
        return _reconstruct(pipeline, rows) if self._method == "reconstruct" else getattr(pipeline, self._method)(rows)


def _remove_prefix(graph: Any) -> None:
    """Remove PREFIX from the names of the weights, so that they have the names that they have in the artifact."""
    for tensor in graph.initializer:
        tensor.name = tensor.name.removeprefix(PREFIX)
    for node in graph.node:
        for names in (node.input, node.output):  # an output has such a name if two weights are equal
            names[:] = [name.removeprefix(PREFIX) for name in names]


def _reconstruct(pipeline: Pipeline | Windowed, x: Tensor) -> tuple[Tensor, Tensor]:
    return reconstruct(pipeline, x, hasattr(pipeline.scaling, "fill"))


@contextmanager
def _ignore_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # the exporter is deprecated
        # The tracer warns that Python numbers become constants of the graph. These numbers are the same for all rows.
        warnings.filterwarnings("ignore", category=TracerWarning)
        # A traced module has no signature, by which the exporter would check the number of the inputs.
        warnings.filterwarnings("ignore", message="no signature found", category=UserWarning)
        yield
