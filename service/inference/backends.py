"""Backends, which run the operations of a model.

`TorchScriptBackend` runs the artifact's module on a CPU or a GPU. `OnnxBackend` runs the artifact's ONNX twin with ONNX
Runtime on a CPU. `service.inference.backend_selection` chooses between them.
"""

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.artifact import Graph, Twin
from service.inference.calibration import Calibration
from service.inference.latency import LatencyEstimate
from service.inference.operations import Operation

if TYPE_CHECKING:
    import onnxruntime

log = logging.getLogger("elbo.backends")
Array = npt.NDArray[np.float32]
# Texts in the out-of-memory messages of three sources: CUDA, then cuBLAS and cuDNN, then torch on a CPU.
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


class Backend(ABC):
    """Runs operations on one model.

    Args:
        module: an object with the methods of the artifact contract (`models.pipeline.Pipeline`).
        device: the device of `module`.
        calibration: p-values and severities of the model's scores.
        precision: precision of matrix products, float32 or bfloat16; everything else is float32.

    Attributes:
        latency: how long batches take, measured by `clock`.
        max_rows: the maximum number of rows per batch. It is lowered if a batch does not fit in the device's memory.
    """

    name: ClassVar[str]

    def __init__(self, module: Any, device: torch.device, calibration: Calibration, precision: str = "float32") -> None:
        self.module = module
        self.device = device
        self.calibration = calibration
        self.precision = precision
        self.latency = LatencyEstimate()
        self.max_rows = sys.maxsize
        # On a CPU, the clock measures the CPU time of the thread, so that time spent waiting for a core does not count.
        self.clock: Callable[[], float] = thread_time if device.type == "cpu" else perf_counter

    def run(self, operation: Operation, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """Return the results of `operation` for `inputs`; all arrays are [B, ...]."""
        return operation.finish(self._compute(operation, inputs), self.calibration)

    @abstractmethod
    def _compute(self, operation: Operation, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """Return the outputs of `operation.function` for `inputs`."""

    def limit_rows(self, rows: int) -> None:
        """Lower `max_rows` to half of `rows`, after a batch of `rows` rows did not fit in the device's memory."""
        self.max_rows = max(1, min(self.max_rows, rows // 2))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning(
            "a batch of %d rows does not fit in the memory of %s: batches have at most %d rows from now on",
            rows,
            self.device,
            self.max_rows,
        )


class TorchScriptBackend(Backend):
    """Runs the artifact's module."""

    name = "torchscript"

    def _compute(self, operation: Operation, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        with torch.inference_mode(), self.autocast():
            if self.device.type == "cuda":
                return self._compute_on_gpu(operation, inputs)
            return _compute_on_cpu(self.module, operation, inputs)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which matrix products have this backend's precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """The CUDA stream of this model. Every model has its own stream, so that models do not wait for each other."""
        return torch.cuda.Stream(self.device)

    def _compute_on_gpu(self, operation: Operation, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """Compute on the GPU. Copies to and from the GPU are asynchronous, because they use pinned memory."""
        with torch.cuda.stream(self._stream):
            tensors = [_to_tensor(x).pin_memory().to(self.device, non_blocking=True) for x in inputs]
            outputs = [output.float() for output in operation.function(self.module, *tensors)]
            copies = [torch.empty(o.shape, pin_memory=True).copy_(o, non_blocking=True) for o in outputs]
            self._stream.synchronize()
        return tuple([copy.numpy() for copy in copies])


class OnnxBackend(Backend):
    """Runs the graphs of the ONNX twin, which is the copy of the networks for ONNX Runtime.

    An operation without a graph calls the methods of the `OnnxModule`.

    Args:
        module: the ONNX twin.
        calibration: p-values and severities of the model's scores.
    """

    name = "onnx"

    def __init__(self, module: "OnnxModule", calibration: Calibration) -> None:
        super().__init__(module, torch.device("cpu"), calibration)
        self._graphs = module.graphs

    def _compute(self, operation: Operation, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        graph = self._graphs.get(operation.onnx_method)
        if graph is not None:
            return tuple(graph(*inputs))
        with torch.inference_mode():
            return _compute_on_cpu(self.module, operation, inputs)


class OnnxModule:
    """A module with the methods of the artifact contract: methods with a graph run in ONNX Runtime, others in torch.

    Args:
        twin: the graphs and their weights.
        module: the frozen module of the artifact, which runs the methods that the twin lacks.
        threads: the number of ONNX Runtime threads per batch.

    Attributes:
        graphs: for each method with a graph, a function that runs the graph on rows.
    """

    def __init__(self, twin: Twin, module: torch.jit.ScriptModule, threads: int) -> None:
        # ONNX Runtime sessions use the memory of these arrays, but do not keep the arrays alive.
        self._weights = {name: weight.contiguous().numpy() for name, weight in twin.weights.items()}
        self._module = module
        self.graphs: dict[str, Callable[[Array], list[Array]]] = {
            method: _runner(_create_session(graph, self._weights, threads)) for method, graph in twin.graphs.items()
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the reconstruction [B, D] of x [B, D]."""
        if "reconstruct" in self.graphs:
            return self._run("reconstruct", x)[0]
        return self.decode(self.encode(x)[0])

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return two arrays for x [B, D]: the posterior mean [B, K] and the posterior standard deviation [B, K]."""
        return self._run("encode", x)

    def decode(self, z: Tensor) -> Tensor:
        """Return the rows [B, D] that z [B, K] decodes to: the mean of x given z."""
        return self._run("decode", z)[0]

    def score(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return four arrays for x [B, D]: score [B], parts [B, P], contribution [B, D] and expected [B, D]."""
        return self._run("score", x)

    def _run(self, method: str, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(output) for output in self.graphs[method](rows.numpy()))


def is_out_of_memory(error: Exception) -> bool:
    """Return whether `error` means that memory ran out, so that a smaller batch may succeed.

    TorchScript raises a RuntimeError in place of the original error, with the original message.
    """
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(message in text for message in OUT_OF_MEMORY)
    )


def _compute_on_cpu(module: Any, operation: Operation, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
    outputs = operation.function(module, *map(_to_tensor, inputs))
    return tuple([output.float().contiguous().numpy() for output in outputs])


def _to_tensor(rows: Array) -> Tensor:
    """Return `rows` as a tensor. Read-only rows, such as those in request bodies, are copied; other rows are not."""
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())


def _runner(session: "onnxruntime.InferenceSession") -> Callable[[Array], list[Array]]:
    """Return a function that runs a graph on rows."""
    return partial(_run_session, session, [output.name for output in session.get_outputs()])


def _run_session(session: "onnxruntime.InferenceSession", outputs: list[str], rows: Array) -> list[Array]:
    """Return the outputs with these names. Without the names, each run would list them again."""
    found: list[Array] = session.run(outputs, {"rows": rows})
    return found


def _create_session(graph: Graph, weights: dict[str, npt.NDArray[Any]], threads: int) -> "onnxruntime.InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # the arena never frees the memory of the largest batch
    options.enable_mem_pattern = False  # ONNX Runtime would store a memory plan per batch size
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads must not use a core
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(weights[name]) for name in graph.weights]
    options.add_external_initializers(list(graph.weights), values)
    return onnxruntime.InferenceSession(graph.onnx, options, providers=["CPUExecutionProvider"])
