"""What a model's operations run on: its TorchScript module, or on a CPU its ONNX twin where that is true and faster."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.artifact import Artifact, Graph, Twin, discrepancy
from models.errors import ArtifactMismatch
from service import operations
from service.operations import Operation

if TYPE_CHECKING:
    import onnxruntime

log = logging.getLogger("elbo.backends")
Array = npt.NDArray[np.float32]
TOLERANCE = 1e-5  # of a twin's golden answers, relative to the largest number in each
TWIN_ANSWERS = (
    "forward", "encode.mean", "encode.std", "decode", "score", "score.parts", "score.contribution", "score.expected",
)  # fmt: skip
FASTER = 1.1  # a smaller gain may be the machine's mood
MEASURED_ROWS = (1, 32)
WARM_ROUNDS = 3  # TorchScript re-optimises on its second and third call: 1.4 ms, 5.3 ms, then 60 us
MEASURED_ROUNDS = (3, 20)  # at least and at most
MEASURED_SECONDS = 0.05


@dataclass(frozen=True, eq=False)
class Backend:
    """Runs operations on one model.

    Args:
        name: torchscript or onnx.
        reason: why this one.
        module: has the methods of the artifact contract.
        device: where `module` wants its rows.
    """

    name: str
    reason: str
    module: Any
    device: torch.device

    def run(self, operation: Operation, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        """`operation` on `inputs`, each [B, ...]."""
        with torch.inference_mode():
            tensors = [torch.from_numpy(array).to(self.device) for array in inputs]
            outputs = operation.function(self.module, *tensors, *operation.arguments)
            return tuple(output.contiguous().cpu().numpy() for output in outputs)


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

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rest, name)

    def __call__(self, x: Tensor) -> Tensor:
        """The reconstruction of x [B, D], [B, D]."""
        return self.decode(self.encode(x)[0])

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
        outputs = self._sessions[method].run(None, {"rows": rows.numpy()})
        return tuple(torch.from_numpy(output) for output in outputs)


def choose(artifact: Artifact, asked: str, threads: int) -> Backend:
    """What `artifact` runs on.

    Args:
        artifact: loaded and verified.
        asked: auto is the twin if it agrees with the golden answers and is measured faster; onnx is the twin wherever
            there is one and the CPU computes, however fast; torchscript is the artifact's own module.
        threads: for one batch.

    Raises ArtifactMismatch if onnx is asked for and the twin does not agree or cannot be run.
    """
    plain = Backend("torchscript", "", artifact.module, artifact.device)
    if asked == "torchscript":
        return _because(plain, "ELBO_BACKEND asks for it")
    if artifact.device.type != "cpu":
        return _because(plain, f"the ONNX twin is for CPUs, and this is {artifact.device.type}")
    if artifact.twin is None:
        return _because(plain, "the artifact has no ONNX twin")
    twin, fault = _twin(artifact, artifact.twin, threads)
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
    return Backend(backend.name, reason, backend.module, backend.device)


def _twin(artifact: Artifact, twin: Twin, threads: int) -> tuple[Backend | None, str]:
    """The twin, if it can be trusted; and if not, what is wrong with it."""
    try:
        module = OnnxModule(twin, artifact.module, threads)
        found = discrepancy(module, artifact.manifest.golden, "cpu", TOLERANCE, TWIN_ANSWERS)
    except ImportError:
        return None, "onnxruntime, which runs ONNX twins, is not installed"
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common root of their own
        return None, f"the ONNX twin cannot be run ({' '.join(str(error).split())[:200]})"
    if found:
        return None, f"the ONNX twin is not used: its {found}"
    return Backend("onnx", "", module, artifact.device), ""


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
    torch.set_num_threads(threads)  # as the engine's thread will, so that both are measured as they will run
    x = np.array(artifact.manifest.golden.inputs["x"], np.float32)  # [G, D]
    gaps = bool(np.isnan(x).any())
    asked = (operations.ENCODE, operations.reconstruct(gaps), operations.anomaly(0.05))
    gains = []
    for operation, rows in product(asked, MEASURED_ROWS):
        inputs = (np.resize(x, (rows, x.shape[1])),)
        slow, fast = _best(lambda: plain.run(operation, inputs), lambda: twin.run(operation, inputs))  # noqa: B023
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
