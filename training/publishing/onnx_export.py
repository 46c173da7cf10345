"""The ONNX twin of a pipeline: graphs of its costly methods, which an artifact carries beside its TorchScript.

The graphs name the weights of the TorchScript module and hold none themselves, so nothing stands twice in the file.
They come from torch's exporter by tracing; the one on top of `torch.export` takes 10 s a graph, for the same nodes.
"""

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.jit._trace import TracerWarning

from models.artifact import TWIN_METHODS, Graph, reconstruct
from models.pipeline import Pipeline
from models.scaling import ImputingScaling

OPSET = 18


def export(pipeline: Pipeline, x: Tensor, z: Tensor) -> dict[str, Graph]:
    """The graph of each of TWIN_METHODS by name, for any number of rows.

    Args:
        pipeline: on the CPU, in evaluation mode.
        x: rows [B, D] to trace with; where the model imputes they may hold NaN.
        z: latents [B, K].

    Raises ImportError without onnx, and what the exporter raises for operations that it does not know.
    """
    return {method: _graph(pipeline, method, z if method == "decode" else x) for method in TWIN_METHODS}


def _graph(pipeline: Pipeline, method: str, rows: Tensor) -> Graph:
    import onnx

    part = copy.copy(pipeline)  # shares every weight, under the same name
    work = partial(_reconstruct, pipeline) if method == "reconstruct" else getattr(pipeline, method)
    part.forward = work  # type: ignore[assignment, method-assign] # the exporter traces forward alone
    buffer = io.BytesIO()
    with torch.inference_mode(), _warnings_silenced():
        torch.onnx.export(
            part,
            (rows,),
            buffer,  # type: ignore[arg-type] # annotated for the other exporter
            dynamo=False,
            opset_version=OPSET,
            do_constant_folding=False,  # folded weights would be copies
            input_names=["rows"],
            dynamic_axes={"rows": {0: "B"}},
        )
    model = onnx.load_from_string(buffer.getvalue())
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="model.pt")  # where who loads it takes the weights from
    names = tuple(tensor.name for tensor in model.graph.initializer)
    return Graph(model.SerializeToString(deterministic=True), names)


def _reconstruct(pipeline: Pipeline, x: Tensor) -> tuple[Tensor, Tensor]:
    return reconstruct(pipeline, x, isinstance(pipeline.scaling, ImputingScaling))


@contextmanager
def _warnings_silenced() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of the exporter, as of all of TorchScript
        warnings.filterwarnings("ignore", category=TracerWarning)  # on numbers that no row can change
        yield
