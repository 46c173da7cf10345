"""The performance targets of Elbo's server, compared with the measurements."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.serving.lower_bounds import TORCHSCRIPT
from benchmarks.serving.measurement import COLUMNS, Column, Results

C1_1_ROW, C32_1_ROW, C32_32_ROWS, C32_32_ROWS_BINARY, C8_256_ROWS_BINARY = COLUMNS


class Target(NamedTuple):
    """A target: what is measured, the required value, the measured value, and whether the target is met."""

    title: str
    target: str
    measured: float
    met: bool


# For each column, a tuple per other server: its name, its title, and the minimum of Elbo's rate / this server's rate.
RATE_RATIOS: Mapping[Column, Sequence[tuple[str, str, float]]] = {
    C32_1_ROW: (("pytriton", "PyTriton", 3.5), ("litserve", "LitServe", 25), ("echo", "the echo server", 0.45)),
    C32_32_ROWS: (("pytriton", "PyTriton", 5.5), ("litserve", "LitServe", 40), ("plain", "plain FastAPI", 40)),
    C32_32_ROWS_BINARY: (("pytriton", "PyTriton, binary protocol", 5),),
    C8_256_ROWS_BINARY: (("pytriton", "PyTriton, binary protocol", 6),),
    C1_1_ROW: (("pytriton", "PyTriton", 12),),
}


def evaluate_targets(results: Results, outcomes: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Target]:
    """Yield the targets for which there are measurements."""
    yield from _closed_loop_targets(results)
    yield from _lower_bound_targets(results)
    yield from _anomaly_targets(results)
    for outcome in outcomes.get("Elbo", ()):
        yield from _open_loop_targets(outcome)


def _closed_loop_targets(results: Results) -> Iterator[Target]:
    elbo = results.samples.get("elbo", {})
    for column, ratios in RATE_RATIOS.items():
        for name, title, least in ratios:
            others = results.samples.get(name, {}).get(column, ())
            pairs = [(a.rate, b.rate) for a, b in zip(elbo.get(column, ()), others, strict=False) if b.rate]
            if pairs:
                ratio = median(a / b for a, b in pairs)
                yield Target(f"{column.title}: rate / rate of {title}", f"≥ {least:g}", ratio, ratio >= least)
    if elbo.get(C32_1_ROW):
        ratio = median(sample.p99 / sample.p50 for sample in elbo[C32_1_ROW])
        yield Target(f"{C32_1_ROW.title}: p99 / p50", "≤ 3", ratio, ratio <= 3)


def _lower_bound_targets(results: Results) -> Iterator[Target]:
    elbo, echo = results.samples.get("elbo", {}), results.samples.get("echo-fastapi", {})
    bounds = results.lower_bounds
    if elbo.get(C1_1_ROW) and echo.get(C1_1_ROW) and (TORCHSCRIPT, 1) in bounds:
        bound = median(sample.p50 for sample in echo[C1_1_ROW]) + 1 / median(bounds[TORCHSCRIPT, 1])
        ratio = median(sample.p50 for sample in elbo[C1_1_ROW]) / bound
        title = f"{C1_1_ROW.title}: p50 / (p50 of the FastAPI echo server + one forward pass in this process)"
        yield Target(title, "≤ 2", ratio, ratio <= 2)
    if elbo.get(C8_256_ROWS_BINARY) and (TORCHSCRIPT, 256) in bounds:
        rows = 256 * median(sample.rate for sample in elbo[C8_256_ROWS_BINARY])
        ratio = rows / (2 * median(bounds[TORCHSCRIPT, 256]))
        title = f"{C8_256_ROWS_BINARY.title}: rows per second / twice those of the module in this process on one core"
        yield Target(title, "> 1", ratio, ratio > 1)


def _anomaly_targets(results: Results) -> Iterator[Target]:
    for (path, connections), samples in results.anomaly_samples.items():
        if not path.startswith("/anomaly"):
            continue
        reconstruct = next(
            others
            for (other_path, other_connections), others in results.anomaly_samples.items()
            if other_connections == connections and other_path != path
        )
        ratio = median(a.rate / b.rate for a, b in zip(samples, reconstruct, strict=True) if b.rate)
        title = f"20 features, c={connections}: rate of /anomaly / rate of /reconstruct"
        yield Target(title, "≥ 0.8", ratio, ratio >= 0.8)


def _open_loop_targets(outcome: Mapping[str, Any]) -> Iterator[Target]:
    title = f"open loop at {outcome['share']:.0%}"
    if outcome["share"] < 1:
        failed = outcome["broken"] + outcome["unanswered"] + outcome["refused"]
        yield Target(f"{title}: failed requests", "0", failed, not failed)
        ratio = outcome["p99"] / outcome["p50"]
        yield Target(f"{title}: p99 / p50", "≤ 5", ratio, ratio <= 5)
        return
    share = outcome["good"] / outcome["seconds"] / outcome["capacity"]
    yield Target(f"{title}: rate of correct responses / capacity", "≥ 0.85", share, share >= 0.85)
    refused, without_header = outcome["refused"], outcome["without_retry_after"]
    yield Target(f"{title}: refusals (the next two figures need some)", "> 0", refused, refused > 0)
    p99 = outcome["p99_refusal"]
    yield Target(f"{title}: p99 of refusals, ms", "≤ 100", 1e3 * p99, refused > 0 and p99 <= 0.1)
    met = refused > 0 and not without_header
    yield Target(f"{title}: refusals without Retry-After", "0", without_header, met)
    growth = outcome["after"] / outcome["before"]
    yield Target(f"{title}: memory after / before", "≤ 1.1", growth, growth <= 1.1)
