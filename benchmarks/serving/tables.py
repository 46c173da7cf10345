"""The Markdown tables of `compare_servers.py`. Figures are medians over the rounds, most with minimum and maximum."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from statistics import median
from typing import Any

from benchmarks.serving.load_generators import Sample
from benchmarks.serving.lower_bounds import least_cost
from benchmarks.serving.measurement import ANOMALY_CONNECTIONS, Column, Results
from benchmarks.serving.servers import ServerKind
from benchmarks.serving.targets import Target

MIB = 2**20
MISSING = "–"


def print_closed_loop(servers: Mapping[str, ServerKind], columns: Sequence[Column], results: Results) -> None:
    """Print the rates, latencies and processor times of each server, and Elbo's rate divided by the server's rate."""
    samples = results.samples
    head = ["", *(column.title for column in columns)]
    measured = [name for name in servers if samples.get(name)]
    for title, format_cell in (
        ("Correct responses per second, median (min, max), and their share of the requests if below 100 %", _rate),
        ("Latency, ms: median / 99th percentile", _latency),
        ("Processor time per response, ms of one core", _cost),
    ):
        rows = [
            [servers[name].title, *(format_cell(samples[name].get(column)) for column in columns)] for name in measured
        ]
        _print_table(title, head, rows)
    if "elbo" in measured:
        others = [name for name in measured if name != "elbo"]
        rows = [[servers[name].title, *(_ratio(samples, name, column) for column in columns)] for name in others]
        _print_table("Elbo's rate / the server's rate in the same round, median (min, max)", head, rows)


def print_anomaly(results: Results) -> None:
    """Print the rates of /anomaly and /reconstruct, and their ratio."""
    samples = results.anomaly_samples
    if not samples:
        return
    reconstruct, anomaly = dict.fromkeys(path for path, _ in samples)
    rows = [[path, *(_rate(samples[path, count]) for count in ANOMALY_CONNECTIONS)] for path in (reconstruct, anomaly)]
    ratios = []
    for count in ANOMALY_CONNECTIONS:
        pairs = zip(samples[anomaly, count], samples[reconstruct, count], strict=False)
        ratios.append(_spread([a.rate / b.rate for a, b in pairs if b.rate], ".2f"))
    head = ["", *(f"c={count}, 1 row JSON" for count in ANOMALY_CONNECTIONS)]
    title = "Elbo with a model of 20 features: correct responses per second"
    _print_table(title, head, [*rows, ["/anomaly / /reconstruct", *ratios]])


def print_lower_bounds(columns: Sequence[Column], results: Results) -> None:
    """Print the rates without a server, the least processor time per response, and the time that Elbo adds to it."""
    parts = list(dict.fromkeys(part for part, _ in results.lower_bounds))
    sizes = list(dict.fromkeys(size for _, size in results.lower_bounds))
    _print_table(
        "Without a server, in one thread: rows per second",
        ["", *(f"batches of {size}" for size in sizes)],
        [[part, *(_spread(results.lower_bounds[part, size]) for size in sizes)] for part in parts],
    )
    least = [least_cost(column, results) for column in columns]
    samples = [results.samples.get("elbo", {}).get(column) for column in columns]
    if not all(least) or not all(samples):
        return
    rows = [[part, *(f"{costs[part]:.3f}" for costs in least)] for part in least[0]]
    totals = [1e3 * median(sample.cost for sample in column_samples or ()) for column_samples in samples]
    added = [f"{total - sum(costs.values()):.3f}" for total, costs in zip(totals, least, strict=True)]
    title = "The least processor time of a response with these libraries, and what Elbo adds, ms of one core"
    _print_table(title, ["", *(column.title for column in columns)], [*rows, ["added by Elbo", *added]])


def print_open_loop(outcomes: Mapping[str, Sequence[Mapping[str, Any]]], rows: int, seconds: float) -> None:
    """Print one line for the outcome of each open loop."""
    if not outcomes:
        return
    head = [
        "", "rate / capacity", "due/s", "sent/s", "correct/s (/ capacity)", "p50 / p99, ms", "responses by status",
        "lost", "refusals: p99 / slowest, ms", "without Retry-After", "RSS before / peak / after, MiB",
        "client delay, ms", "processor time of client + server, cores", "refusals in the server: p99, ms",
    ]  # fmt: skip
    lines = [_open_loop_row(title, outcome) for title, several in outcomes.items() for outcome in several]
    _print_table(f"Open loop, {'1 row' if rows == 1 else f'{rows} rows'} JSON, {seconds:g} s", head, lines)
    print(
        "\nCapacity is the rate of a closed loop of 32 connections with the same client. Latency of correct responses"
        "\ncounts from the time when the request was due, that of refusals from the time when it was sent."
        "\n`client delay` is the largest delay of the client itself, which shares the cores with the server. If both"
        "\ntogether use all cores, requests wait in their sockets. The time of refusals in the server counts from the"
        "\ntime when it has read the head, without the intended delay of repeated refusals (at most 64 ms)."
    )


def print_targets(targets: Iterable[Target]) -> None:
    """Print the targets, and whether they are met."""
    rows = [
        [target.title, target.target, f"{target.measured:.3g}", "met" if target.met else "missed"] for target in targets
    ]
    if rows:
        _print_table("Targets", ["", "target", "measured", ""], rows)


def _open_loop_row(title: str, outcome: Mapping[str, Any]) -> list[str]:
    seconds = outcome["seconds"]
    rate = outcome["good"] / seconds
    due = outcome["share"] * outcome["capacity"]
    return [
        title,
        f"{outcome['share']:.0%}",
        f"{due:,.0f}",
        f"{outcome['sent'] / seconds:,.0f}",
        f"{rate:,.0f} ({rate / outcome['capacity']:.0%})",
        f"{1e3 * outcome['p50']:.1f} / {1e3 * outcome['p99']:.1f}",
        ", ".join(f"{status}: {count:,}" for status, count in outcome["statuses"].items()),
        f"{outcome['broken'] + outcome['unanswered'] + outcome['wrong_size']:,}",
        f"{1e3 * outcome['p99_refusal']:.1f} / {1e3 * outcome['longest_refusal']:.1f}",
        f"{outcome['without_retry_after']:,}",
        " / ".join(f"{outcome[moment] / MIB:,.0f}" for moment in ("before", "peak", "after")),
        f"{1e3 * outcome['lag']:.0f}",
        f"{outcome['client_seconds'] / seconds:.2f} + {outcome['server_seconds'] / seconds:.2f}",
        MISSING if isnan(outcome["server_refusal"]) else f"≤ {1e3 * outcome['server_refusal']:g}",
    ]


def _rate(samples: Sequence[Sample] | None) -> str:
    if not samples:
        return MISSING
    correct_share = min(sample.correct_share for sample in samples)
    rate = _spread([sample.rate for sample in samples])
    return rate if correct_share > 0.9999 else f"{rate} {correct_share:.1%} correct"


def _latency(samples: Sequence[Sample] | None) -> str:
    if not samples:
        return MISSING
    p50, p99 = median(sample.p50 for sample in samples), median(sample.p99 for sample in samples)
    return f"{1e3 * p50:.2f} / {1e3 * p99:.1f}"


def _cost(samples: Sequence[Sample] | None) -> str:
    return _spread([1e3 * sample.cost for sample in samples], ".3f") if samples else MISSING


def _ratio(samples: Mapping[str, Mapping[Column, Sequence[Sample]]], name: str, column: Column) -> str:
    elbo, other = samples["elbo"].get(column, ()), samples[name].get(column, ())
    pairs = zip(elbo, other, strict=False)  # a server that failed has fewer samples than Elbo
    return _spread([a.rate / b.rate for a, b in pairs if b.rate], ".2f")


def _spread(values: Sequence[float], form: str = ",.0f") -> str:
    if not values:
        return MISSING
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{median(values):{form}} ({min(values):{form}}, {max(values):{form}})"


def _print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}:\n")
    print(f"| {' | '.join(head)} |")
    print(f"|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
