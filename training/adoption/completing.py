"""Decide whether an adopted model completes rows, and fit what it needs for that."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.artifact import MAX_COMPLETED_VALUES
from models.completion import CHAINS, FIRST_STEPS, KEPT_STEPS, SCORED_STEPS
from models.core import Core
from models.pipeline import Pipeline
from training.fitting.completion import CALIBRATED_ROWS, GAP_LEVELS, GAP_ROWS, MISSING_SHARES, with_completion
from training.fitting.prepared_data import PreparedData

# Operators that a method which completes rows may have; an artifact could have three times as many. Loading an LSTM of
# 12 steps and four layers, with 4,400 operators, takes 3.8 s of processor time, and 0.5 s without completion.
MOST_CALLS = 6_000
RUNS = KEPT_STEPS + 3  # how often the code of `impute` or `complete` has the network
MAX_WORK = 5e11  # floating-point operations for the calibration of the completion; about 20 s on one core
MIN_ROWS = 60  # rows that calibrate the completion; with fewer, its intervals are too uncertain
MOST_ROWS = GAP_ROWS  # rows that are completed at once; a server completes at most ELBO_MAX_BATCH_ROWS, 256 by default
MAX_BYTES = 1 << 29  # memory for the largest tensor while rows are completed
# How often the network runs, at most, to calibrate the completion with one row.
ROW_RUNS = CHAINS * (len(MISSING_SHARES) * (FIRST_STEPS + KEPT_STEPS) + GAP_LEVELS * (SCORED_STEPS + 1))


def with_completion_if_possible(pipeline: Pipeline, data: PreparedData, seed: int) -> tuple[Pipeline, str | None]:
    """Return `pipeline`, which also completes rows if the network is small enough, and the reason if it does not.

    Completing a row runs the network many times. An artifact may have a limited number of operators, and the
    calibration of the completion, like each completed row, takes as many times the work of one row.
    """
    if data.table.x.width < 2:
        return pipeline, "a row has only one value"
    network: Any = pipeline.core.network
    calls = RUNS * _operators(network)
    if calls > MOST_CALLS:
        return pipeline, (
            f"the network has too many operators: completing rows would take {calls:,}, and at most {MOST_CALLS:,} "
            "load in a few seconds"
        )
    with torch.no_grad():
        work, largest = _work_of_a_row(pipeline.core, pipeline.scaling(data.held_out[:1]))
    at_once = min(max(1, MAX_COMPLETED_VALUES // data.table.x.width), MOST_ROWS)
    if CHAINS * at_once * largest * 4 > MAX_BYTES:
        return pipeline, f"the network needs too much memory: {largest:,} numbers for a row in one layer"
    rows = min(max(CALIBRATED_ROWS, GAP_ROWS), int(MAX_WORK / max(1.0, ROW_RUNS * work)))
    if rows < min(MIN_ROWS, len(data.calibration)):
        return pipeline, f"the network is too slow: {work:,.0f} floating-point operations for a row"
    return with_completion(pipeline, data.held_out, data.calibration[:rows], seed), None


def _operators(network: Any) -> int:
    """Return the number of operators of all functions of a compiled network."""
    methods = [getattr(network, name) for name in ("encode", "decode", "reconstruct") if hasattr(network, name)]
    return sum(1 for method in methods for node in method.graph.nodes() if node.kind().startswith("aten::"))


class _LargestTensor(TorchDispatchMode):
    """Records the number of numbers in the largest result of an operator."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in given:  # no view, such as W.T
            self.size = max(self.size, found.numel())
        return found


def _work_of_a_row(core: Core, u: Tensor) -> tuple[float, int]:
    """Return the floating-point operations for one row u [1, D], and the numbers in the largest tensor."""
    with FlopCounterMode(display=False) as work, _LargestTensor() as largest:  # type: ignore[no-untyped-call]
        core.decode(core.encode(u)[0])
    return float(work.get_total_flops()), largest.size
