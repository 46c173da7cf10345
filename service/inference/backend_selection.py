"""Select the backend of a model: the ONNX twin or TorchScript.

The ONNX twin is the copy of the networks for ONNX Runtime. By default, the twin is selected if the device is a CPU and
the twin is correct and faster than TorchScript.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from time import perf_counter

import numpy as np
import torch

from models.artifact import Artifact, Twin, compute_outputs, find_discrepancy
from models.errors import ArtifactMismatch
from models.manifest import Golden
from service.inference import operations
from service.inference.backends import Array, Backend, OnnxBackend, OnnxModule, TorchScriptBackend
from service.inference.calibration import Calibration, load_calibration

log = logging.getLogger("elbo.backends")
DECISIONS = "backend"  # the selected backends are stored in shared memory under this name; no metric may have it
BACKENDS = (TorchScriptBackend.name, OnnxBackend.name)
# The maximum error of each output of a twin, relative to the largest number in the golden answer. Scores divide by
# small variances, which amplifies rounding: the score of the autoencoder `linear` of `elbo demo` changes by up to
# 2.6e-5 if each number of its input changes by half a unit in the last place. Contributions
# are squared distances to the reconstruction, which amplify nothing.
TOLERANCES = {
    "forward": 1e-5, "encode.mean": 1e-5, "encode.std": 1e-5, "decode": 1e-5, "score": 1e-4, "score.parts": 1e-4,
    "score.contribution": 1e-5, "score.expected": 1e-5,
}  # fmt: skip
MIN_SPEEDUP = 1.1  # minimum speedup of the twin over TorchScript; smaller speedups may be measurement noise
MEASURED_ROWS = (1, 32)  # batch sizes at which the speedup is measured
WARM_UP_ROUNDS = 3  # TorchScript optimises during the second and third calls, which are therefore slow
MIN_ROUNDS = 3
MAX_ROUNDS = 20
SECONDS_PER_MEASUREMENT = 0.008  # no round starts after this time, except the first MIN_ROUNDS rounds
CLEAR = 1.5  # a speedup that differs from MIN_SPEEDUP by this factor after MIN_ROUNDS rounds is not measured longer


@dataclass(frozen=True)
class Selection:
    """The backend of a model, and why it was selected.

    Args:
        backend: the backend.
        reason: why it was selected, for the log and /models.
        errors: for bfloat16, the largest error of each output, relative to the largest number of that output in
            float32. Empty for float32.
    """

    backend: Backend
    reason: str
    errors: Mapping[str, float] = field(default_factory=dict)


class _UnusableTwin(Exception):
    """The ONNX twin cannot be run, or its outputs are wrong."""


def select_backend(
    artifact: Artifact, *, requested: str = "auto", threads: int = 1, precision: str = "float32"
) -> Selection:
    """Select the backend that runs `artifact`.

    Args:
        artifact: a loaded and verified artifact.
        requested: "torchscript", "onnx" or "auto". "onnx" selects the twin, regardless of its speed, if the artifact
            has a twin and the device is a CPU. "auto" selects the twin only if the twin is also faster.
        threads: threads per batch.
        precision: "float32" or "bfloat16". Only TorchScript supports "bfloat16".

    Raises:
        ArtifactMismatch: "onnx" was requested, but the twin cannot be run or does not give the golden answers.
    """
    calibration = load_calibration(artifact)
    torchscript = TorchScriptBackend(artifact.module, artifact.device, calibration, precision)
    if precision == "bfloat16":
        errors = _bfloat16_errors(torchscript, artifact.manifest.golden)
        return Selection(torchscript, "ELBO_PRECISION is bfloat16", errors)
    if requested == "torchscript":
        return Selection(torchscript, "requested by ELBO_BACKEND")
    if artifact.device.type != "cpu":
        return Selection(torchscript, f"the ONNX twin runs on CPUs only, and the device is {artifact.device.type}")
    if artifact.twin is None:
        return Selection(torchscript, "the artifact has no ONNX twin")
    try:
        onnx = _verified_onnx_backend(artifact, artifact.twin, calibration, threads)
    except _UnusableTwin as error:
        if requested == "onnx":
            message = f"{artifact.path}: {error}; train the model again, or set ELBO_BACKEND=torchscript"
            raise ArtifactMismatch(message) from error
        log.warning("%s: %s; serving it with TorchScript", artifact.path, error)
        return Selection(torchscript, str(error))
    if requested == "onnx":
        return Selection(onnx, "requested by ELBO_BACKEND")
    speedup = _measure_speedup(torchscript, onnx, artifact.manifest.golden, threads)
    rows = " and ".join(map(str, MEASURED_ROWS))
    reason = f"the ONNX twin is {speedup:.2f} times as fast as TorchScript, measured with {rows} rows"
    return Selection(onnx if speedup >= MIN_SPEEDUP else torchscript, reason)


def _bfloat16_errors(backend: TorchScriptBackend, golden: Golden) -> dict[str, float]:
    """Return the largest bfloat16 error of each output on the golden inputs.

    The error is relative to the largest number of that output in float32.
    """
    inputs = [
        torch.from_numpy(np.array(golden.inputs[name], np.float32)).to(backend.device)
        for name in ("x", "noise", "choice")
    ]
    exact = compute_outputs(backend.module, *inputs)
    with backend.autocast():
        rounded = compute_outputs(backend.module, *inputs)
    return {
        name: float((rounded[name].float() - output).abs().max() / output.abs().max().clamp_min(1e-3))
        for name, output in exact.items()
        if not output.isnan().all()
    }


def _verified_onnx_backend(artifact: Artifact, twin: Twin, calibration: Calibration, threads: int) -> OnnxBackend:
    """Compare the outputs of `twin` with the golden answers, and return a backend for `twin`.

    Raises:
        _UnusableTwin: the twin cannot be run or its outputs are wrong.
    """
    golden = artifact.manifest.golden
    try:
        module = OnnxModule(twin, artifact.module, threads)
        discrepancy = find_discrepancy(module, golden, "cpu", TOLERANCES)
        if discrepancy is None and not _reconstruction_errors_are_correct(module, golden):
            discrepancy = "reconstruction errors are not the mean squared errors of its reconstructions"
    except ImportError as error:
        raise _UnusableTwin("onnxruntime, which runs ONNX twins, is not installed") from error
    except Exception as error:  # the exceptions of ONNX Runtime have no common base class
        message = " ".join(str(error).split())[:200]
        raise _UnusableTwin(f"the ONNX twin cannot be run ({message})") from error
    if discrepancy:
        raise _UnusableTwin(f"the ONNX twin is wrong: its {discrepancy}")
    return OnnxBackend(module, calibration)


def _reconstruction_errors_are_correct(module: OnnxModule, golden: Golden) -> bool:
    """Return whether the errors from the `reconstruct` graph are the mean squared errors of its reconstructions.

    The golden answers contain no reconstruction errors, so this function computes the expected errors. It returns True
    for a twin without a `reconstruct` graph, such as the twins of earlier releases.
    """
    if "reconstruct" not in module.graphs:
        return True
    x = np.array(golden.inputs["x"], np.float32)
    x_hat, errors = module.graphs["reconstruct"](x)
    if x.ndim == 3:  # windows, of which the newest rows are reconstructed
        x = x[:, -1]
    x = x[:, : x_hat.shape[1]]  # remove the condition, if the rows have one
    expected = np.nanmean((x_hat - x).astype(np.float64) ** 2, axis=1)
    return np.allclose(errors, expected, rtol=1e-4, atol=0)


def _measure_speedup(torchscript: Backend, onnx: Backend, golden: Golden, threads: int) -> float:
    """Return the time of `torchscript` divided by the time of `onnx`.

    The result is the geometric mean of this ratio over operations and batch sizes. MIN_ROUNDS rounds suffice for most
    models: without more, loading takes 40 ms less.
    """
    torch.set_num_threads(threads)  # as many as in the inference thread, where the backends will run
    x = np.array(golden.inputs["x"], np.float32)  # [G, D], or windows [G, N, D]
    has_gaps = bool(np.isnan(x[..., -1, :]).any())
    measured = (operations.ENCODE, operations.reconstruct(has_gaps), operations.anomaly(0.05))
    speedup = 1.0
    for seconds in (0.0, SECONDS_PER_MEASUREMENT):
        log_speedups = []
        for operation, rows in product(measured, MEASURED_ROWS):
            inputs = (np.resize(x, (rows, *x.shape[1:])),)
            torchscript_seconds, onnx_seconds = _best_seconds(
                seconds,
                lambda: torchscript.run(operation, inputs),  # noqa: B023 (called before the next iteration)
                lambda: onnx.run(operation, inputs),  # noqa: B023
            )
            log_speedups.append(math.log(torchscript_seconds / onnx_seconds))
        speedup = math.exp(sum(log_speedups) / len(log_speedups))
        if not MIN_SPEEDUP / CLEAR < speedup < MIN_SPEEDUP * CLEAR:
            break
    return speedup


def _best_seconds(seconds: float, *functions: Callable[[], Array | tuple[Array, ...]]) -> list[float]:
    """Return the shortest duration of each function after a warm-up, in at least MIN_ROUNDS rounds and `seconds`.

    The functions are called in turn, so that load on the machine affects all functions equally.
    """
    for function in functions * WARM_UP_ROUNDS:
        function()
    best = [math.inf] * len(functions)
    end = perf_counter() + seconds
    for round_ in range(MAX_ROUNDS):
        if round_ >= MIN_ROUNDS and perf_counter() > end:
            break
        for index, function in enumerate(functions):
            started = perf_counter()
            function()
            best[index] = min(best[index], perf_counter() - started)
    return best
