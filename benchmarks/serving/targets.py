"""What Elbo's serving is held to, beside what was measured: one line a target, met or missed."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.serving.limits import TORCHSCRIPT
from benchmarks.serving.measures import COLUMNS, Column, Results

ALONE, ONE, JSON32, NPY32, NPY256 = COLUMNS
Line = tuple[str, str, float, bool]  # what, the target, what was measured, whether that meets it

AT_LEAST: Mapping[Column, Sequence[tuple[str, str, float]]] = {
    ONE: (("triton", "Triton", 3.5), ("litserve", "LitServe", 25), ("echo", "the echo", 0.45)),
    JSON32: (("triton", "Triton", 5.5), ("litserve", "LitServe", 40), ("plain", "plain FastAPI", 40)),
    NPY32: (("triton", "Triton's binary protocol", 5),),
    NPY256: (("triton", "Triton's binary protocol", 6),),
    ALONE: (("triton", "Triton", 12),),
}


def lines(results: Results, outcomes: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Line]:
    """Those that can be judged by what was measured."""
    ours = results.samples.get("elbo", {})
    for column, rivals in AT_LEAST.items():
        for name, called, target in rivals:
            theirs = results.samples.get(name, {}).get(column, ())
            pairs = [(a.rate, b.rate) for a, b in zip(ours.get(column, ()), theirs, strict=False) if b.rate]
            if pairs:
                ratio = median(a / b for a, b in pairs)
                yield f"{column.title}: rate over {called}'s", f"≥ {target:g}", ratio, ratio >= target
    if ours.get(ONE):
        tail = median(sample.p99 / sample.p50 for sample in ours[ONE])
        yield f"{ONE.title}: p99 over p50", "≤ 3", tail, tail <= 3
    yield from _against_limits(results)
    for outcome in outcomes.get("Elbo", ()):
        yield from _under_load(outcome)


def _against_limits(results: Results) -> Iterator[Line]:
    ours, echo = results.samples.get("elbo", {}), results.samples.get("echo-fastapi", {})
    if ours.get(ALONE) and echo.get(ALONE) and (TORCHSCRIPT, 1) in results.limits:
        bare = median(sample.p50 for sample in echo[ALONE]) + 1 / median(results.limits[TORCHSCRIPT, 1])
        share = median(sample.p50 for sample in ours[ALONE]) / bare
        yield f"{ALONE.title}: p50 over that of a FastAPI echo and one forward in-process", "≤ 2", share, share <= 2
    if ours.get(NPY256) and (TORCHSCRIPT, 256) in results.limits:
        rows = 256 * median(sample.rate for sample in ours[NPY256]) / (2 * median(results.limits[TORCHSCRIPT, 256]))
        yield f"{NPY256.title}: rows over twice those of a module in-process on one core", "> 1", rows, rows > 1
    for (path, connections), samples in results.few.items():
        if path.startswith("/anomaly"):
            plain = next(rest for (other, c), rest in results.few.items() if c == connections and other != path)
            share = median(a.rate / b.rate for a, b in zip(samples, plain, strict=True) if b.rate)
            yield f"/anomaly over /reconstruct, 20 features, c={connections}", "≥ 0.8", share, share >= 0.8


def _under_load(outcome: Mapping[str, Any]) -> Iterator[Line]:
    title = f"open loop at {outcome['share']:.0%}"
    failed = outcome["broken"] + outcome["unanswered"] + outcome["wrong_size"]
    if outcome["share"] < 1:
        failed += outcome["refused"] - outcome["wrong_size"]
        yield f"{title}: failures", "0", failed, not failed
        tail = outcome["p99"] / outcome["p50"]
        yield f"{title}: p99 over p50", "≤ 5", tail, tail <= 5
        return
    good = outcome["good"] / outcome["seconds"] / outcome["capacity"]
    yield f"{title}: right answers over capacity", "≥ 0.9", good, good >= 0.9
    refused, without = outcome["refused"], outcome["without_retry_after"]
    yield f"{title}: refusals, without which the next two say nothing", "> 0", refused, refused > 0
    longest = outcome["longest_refusal"]
    yield f"{title}: longest refusal, ms", "≤ 50", 1e3 * longest, refused > 0 and longest <= 0.05
    yield f"{title}: refusals without Retry-After", "0", without, refused > 0 and not without
    growth = outcome["after"] / outcome["before"]
    yield f"{title}: memory after over before", "≤ 1.05", growth, growth <= 1.05
