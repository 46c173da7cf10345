"""What a model's operations run on: its TorchScript module, or on a CPU its ONNX twin where that is true and faster.

On a CPU NumPy computes what scores mean, whichever of the two computes the scores.
"""

import logging
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.artifact import Artifact, Graph, Twin, compute_outputs, find_discrepancy
from models.errors import ArtifactMismatch
from service.inference import operations
from service.inference.calibration import ByModule, Calibration, calibration_of
from service.inference.latency import LatencyEstimate
from service.inference.operations import Operation

if TYPE_CHECKING:
    import onnxruntime

log = logging.getLogger("elbo.backends")
Array = npt.NDArray[np.float32]
BACKENDS = ("torchscript", "onnx")
TOLERANCE = 1e-5  # of a twin's golden answers, relative to the largest number in each
TWIN_ANSWERS = (
    "forward", "encode.mean", "encode.std", "decode", "score", "score.parts", "score.contribution", "score.expected",
)  # fmt: skip
GOLDEN_INPUTS = ("x", "noise", "choice")
FASTER = 1.1  # a smaller gain may be the machine's mood
MEASURED_ROWS = (1, 32)
WARM_ROUNDS = 3  # TorchScript re-optimises on its second and third call: 1.4 ms, 5.3 ms, then 60 us
MEASURED_ROUNDS = (3, 20)  # at least and at most
MEASURED_SECONDS = 0.05
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # CUDA, cuBLAS and cuDNN, the CPU


@dataclass(eq=False)
class Backend:
    """Runs operations on one model.

    Args:
        name: torchscript or onnx.
        reason: why this one.
        module: has the methods of the artifact contract.
        device: where `module` wants its rows.
        calibration: says what scores mean.
        precision: of matrix products, float32 or bfloat16; all else is float32.
        errors: of answers in bfloat16 against float32, relative to the largest number in each, by name.
        pace: how long batches take.
        most_rows: for which the device's memory is large enough, as far as is known.
        graphs: of a twin by name: rows to outputs, without torch.
    """

    name: str
    reason: str
    module: Any
    device: torch.device
    calibration: Calibration | ByModule
    precision: str = "float32"
    errors: Mapping[str, float] = field(default_factory=dict)
    pace: LatencyEstimate = field(default_factory=LatencyEstimate)
    most_rows: int = sys.maxsize
    graphs: Mapping[str, Callable[[Array], list[Array]]] = field(default_factory=dict)

    def run(self, operation: Operation, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """`operation` on `inputs`, each [B, ...]."""
        outputs = self._outputs(operation, inputs)
        return operation.finish(self.calibration, outputs, *operation.arguments) if operation.finish else outputs

    def _outputs(self, operation: Operation, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        if operation.graph in self.graphs:
            return tuple(self.graphs[operation.graph](*inputs))
        with torch.inference_mode(), self.rounding():
            if self.device.type == "cuda":
                return self._run_on_gpu(operation, inputs)
            tensors = operation.function(self.module, *map(_tensor, inputs))
            return tuple([tensor.float().contiguous().numpy() for tensor in tensors])

    @property
    def clock(self) -> Callable[[], float]:
        """By which its batches are judged long or short: the time of a processor, which no other process lengthens."""
        return thread_time if self.device.type == "cpu" else perf_counter

    def rounding(self) -> AbstractContextManager[Any]:
        """In which matrix products have this backend's precision."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()

    def too_many(self, rows: int) -> None:
        """The device's memory was too small for `rows` at once."""
        self.most_rows = max(1, min(self.most_rows, rows // 2))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning(
            "the memory of %s is too small for %d rows at once: %d from now on", self.device, rows, self.most_rows
        )

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Its own, so that it waits for no other model's work."""
        return torch.cuda.Stream(self.device)

    def _run_on_gpu(self, operation: Operation, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """Through pinned memory, which torch keeps for the next batch: copies run without a stop on the way."""
        with torch.cuda.stream(self._stream):
            tensors = [_tensor(x).pin_memory().to(self.device, non_blocking=True) for x in inputs]
            outputs = [o.float() for o in operation.function(self.module, *tensors)]
            answers = [torch.empty(o.shape, pin_memory=True).copy_(o, non_blocking=True) for o in outputs]
            self._stream.synchronize()
        return tuple([answer.numpy() for answer in answers])


def _tensor(rows: Array) -> Tensor:
    """The same numbers: a copy only where they may not be written, as in a body that is an array."""
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy())


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller batch may succeed. What fails inside TorchScript arrives as a RuntimeError with its text."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)
    )


class OnnxModule:
    """The methods of the artifact contract: those that have a graph by ONNX Runtime, the rest by TorchScript.

    Args:
        twin: the graphs and their weights.
        rest: the frozen module.
        threads: for one batch.
    """

    def __init__(self, twin: Twin, rest: torch.jit.ScriptModule, threads: int) -> None:
        self._weights = {name: weight.contiguous().numpy() for name, weight in twin.weights.items()}  # outlive sessions
        self._sessions = {method: _session(graph, self._weights, threads) for method, graph in twin.graphs.items()}
        self._rest = rest
        self.graphs = {method: partial(_run, session) for method, session in self._sessions.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rest, name)

    def __call__(self, x: Tensor) -> Tensor:
        """The reconstruction of x [B, D], [B, D]."""
        return self._run("reconstruct", x)[0] if "reconstruct" in self.graphs else self.decode(self.encode(x)[0])

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Posterior mean and standard deviation of x [B, D]: two of [B, K]."""
        return self._run("encode", x)

    def decode(self, z: Tensor) -> Tensor:
        """[B, K] to [B, D]."""
        return self._run("decode", z)[0]

    def score(self, x: Tensor) -> tuple[Tensor, ...]:
        """Score [B], parts [B, P], contribution [B, D] and expected [B, D] of x [B, D]."""
        return self._run("score", x)

    def _run(self, method: str, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(output) for output in self.graphs[method](rows.numpy()))


def choose(artifact: Artifact, asked: str, threads: int, precision: str = "float32") -> Backend:
    """What `artifact` runs on.

    Args:
        artifact: loaded and verified.
        asked: auto is the twin if it agrees with the golden answers and is measured faster; onnx is the twin wherever
            there is one and the CPU computes, however fast; torchscript is the artifact's own module.
        threads: for one batch.
        precision: float32, or bfloat16, which is TorchScript's alone.

    Raises ArtifactMismatch if onnx is asked for and the twin does not agree or cannot be run.
    """
    meaning = calibration_of(artifact) or ByModule(artifact.module, artifact.device)
    plain = Backend("torchscript", "", artifact.module, artifact.device, meaning)
    if precision == "bfloat16":
        return _rounded(plain, artifact)
    if asked == "torchscript":
        return _because(plain, "ELBO_BACKEND asks for it")
    if artifact.device.type != "cpu":
        return _because(plain, f"the ONNX twin is for CPUs, and this is {artifact.device.type}")
    if artifact.twin is None:
        return _because(plain, "the artifact has no ONNX twin")
    twin, fault = _twin(artifact, artifact.twin, meaning, threads)
    if twin is None:
        if asked == "onnx":
            raise ArtifactMismatch(f"{artifact.path}: {fault}; train it again, or set ELBO_BACKEND=torchscript")
        log.warning("%s: %s; TorchScript serves", artifact.path, fault)
        return _because(plain, fault)
    if asked == "onnx":
        return _because(twin, "ELBO_BACKEND asks for it")
    gain = _gain(plain, twin, artifact, threads)
    told = f"measured {gain:.2f} times as fast as TorchScript at {' and '.join(map(str, MEASURED_ROWS))} rows"
    return _because(twin, told) if gain >= FASTER else _because(plain, f"the ONNX twin was {told}")


def _because(backend: Backend, reason: str) -> Backend:
    return replace(backend, reason=reason)


def _rounded(plain: Backend, artifact: Artifact) -> Backend:
    """In bfloat16, with its errors on the golden inputs."""
    pairs = artifact.manifest.golden
    rounded = replace(plain, precision="bfloat16", reason="ELBO_PRECISION asks for bfloat16")
    inputs = [torch.from_numpy(np.array(pairs.inputs[name], np.float32)).to(plain.device) for name in GOLDEN_INPUTS]
    exact = compute_outputs(plain.module, *inputs)
    with rounded.rounding():
        found = compute_outputs(plain.module, *inputs)
    errors = {name: _error(found[name].float(), answer) for name, answer in exact.items() if not answer.isnan().all()}
    return replace(rounded, errors=errors)


def _error(found: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - exact).abs().max() / exact.abs().max().clamp_min(1e-3))


def _twin(
    artifact: Artifact, twin: Twin, calibration: Calibration | ByModule, threads: int
) -> tuple[Backend | None, str]:
    """The twin, if it can be trusted; and if not, what is wrong with it."""
    try:
        module = OnnxModule(twin, artifact.module, threads)
        found = find_discrepancy(module, artifact.manifest.golden, "cpu", TOLERANCE, TWIN_ANSWERS)
        found = found or _miscounted(module, np.array(artifact.manifest.golden.inputs["x"], np.float32))
    except ImportError:
        return None, "onnxruntime, which runs ONNX twins, is not installed"
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common root of their own
        return None, f"the ONNX twin cannot be run ({' '.join(str(error).split())[:200]})"
    if found:
        return None, f"the ONNX twin is not used: its {found}"
    return Backend("onnx", "", module, artifact.device, calibration, graphs=module.graphs), ""


def _miscounted(module: OnnxModule, x: Array) -> str | None:
    """Whether its errors of reconstructions are not those of the rows x [G, D] that it gives."""
    if "reconstruct" not in module.graphs:  # an earlier artifact
        return None
    x_hat, errors = module.graphs["reconstruct"](x)
    exact = np.nanmean((x_hat - x).astype(np.float64) ** 2, axis=1)
    return None if np.allclose(errors, exact, rtol=1e-4, atol=0) else "errors of reconstructions are not theirs"


def _run(session: "onnxruntime.InferenceSession", rows: Array) -> list[Array]:
    outputs: list[Array] = session.run(None, {"rows": rows})
    return outputs


def _session(graph: Graph, weights: dict[str, npt.NDArray[Any]], threads: int) -> "onnxruntime.InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_cpu_mem_arena = False  # it would keep the memory of the largest batch for ever
    options.enable_mem_pattern = False  # it would keep a plan for every batch size
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a waiting thread leaves the core alone
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(weights[name]) for name in graph.weights]
    options.add_external_initializers(list(graph.weights), values)
    return onnxruntime.InferenceSession(graph.onnx, options, providers=["CPUExecutionProvider"])


def _gain(plain: Backend, twin: Backend, artifact: Artifact, threads: int) -> float:
    """How many times as fast `twin` is: the geometric mean over operations and batch sizes, best of several turns."""
    torch.set_num_threads(threads)  # as the batcher's thread will, so that both are measured as they will run
    x = np.array(artifact.manifest.golden.inputs["x"], np.float32)  # [G, D]
    gaps = bool(np.isnan(x).any())
    asked = (operations.ENCODE, operations.reconstruct(gaps), operations.anomaly(0.05))
    gains = []
    for operation, rows in product(asked, MEASURED_ROWS):
        inputs = (np.resize(x, (rows, x.shape[1])),)
        slow, fast = _best(lambda: plain.run(operation, inputs), lambda: twin.run(operation, inputs))  # noqa: B023 - both run before the next turn
        gains.append(math.log(slow / fast))
    return math.exp(sum(gains) / len(gains))


def _best(*works: Callable[[], object]) -> list[float]:
    """The fewest seconds that each of `works` took, all of them warm and in turns."""
    for work in works * WARM_ROUNDS:
        work()
    best = [math.inf] * len(works)
    least, most = MEASURED_ROUNDS
    end = perf_counter() + MEASURED_SECONDS / (3 * len(MEASURED_ROWS))
    for turn in range(most):
        if turn >= least and perf_counter() > end:
            break
        for index, work in enumerate(works):
            started = perf_counter()
            work()
            best[index] = min(best[index], perf_counter() - started)
    return best
