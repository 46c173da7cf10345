"""What the serving benchmark prints: Markdown tables of medians over the rounds."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.serving.contestants import Contestant
from benchmarks.serving.limits import least
from benchmarks.serving.load import Sample
from benchmarks.serving.measures import FEW_COLUMNS, Column, Results
from benchmarks.serving.targets import Line

MIB = 2**20


def closed_loop(people: Mapping[str, Contestant], columns: Sequence[Column], results: Results) -> None:
    """Rates, the times of an answer, and Elbo's rate over that of the others."""
    samples = results.samples
    titles = [column.title for column in columns]
    measured = [name for name in people if samples.get(name)]
    _table(
        "Right answers a second (rounds from, to), with their share of the requests where it is not all",
        ["", *titles],
        [[people[name].title, *(_rate(samples[name].get(column)) for column in columns)] for name in measured],
    )
    _table(
        "Time of an answer, ms: median / 99 of 100",
        ["", *titles],
        [[people[name].title, *(_times(samples[name].get(column)) for column in columns)] for name in measured],
    )
    _table(
        "Processor time of an answer, ms of one core",
        ["", *titles],
        [[people[name].title, *(_cost(samples[name].get(column)) for column in columns)] for name in measured],
    )
    if "elbo" in measured:
        others = [name for name in measured if name != "elbo"]
        rows = [[people[name].title, *(_ratio(samples, name, column) for column in columns)] for name in others]
        _table("Elbo's rate over theirs, of the same round (rounds from, to)", ["", *titles], rows)


def anomaly(results: Results) -> None:
    """/anomaly against /reconstruct."""
    if not results.few:
        return
    paths = list(dict.fromkeys(path for path, _ in results.few))
    rows = [[path, *(_rate(results.few[path, connections]) for connections in FEW_COLUMNS)] for path in paths]
    pairs = [zip(*(results.few[path, connections] for path in paths), strict=False) for connections in FEW_COLUMNS]
    shares = [_spread([theirs.rate / ours.rate for ours, theirs in pair if ours.rate], ".2f") for pair in pairs]
    titles = ["", *(f"c={connections}, 1 row JSON" for connections in FEW_COLUMNS)]
    _table("Elbo, a model of 20 features: right answers a second", titles, [*rows, ["second over first", *shares]])


def limits(columns: Sequence[Column], results: Results) -> None:
    """What there is without a server; and how much of an answer's processor time that leaves to be Elbo's own."""
    works = list(dict.fromkeys(work for work, _ in results.limits))
    sizes = list(dict.fromkeys(size for _, size in results.limits))
    _table(
        "In this process, on one thread: rows a second",
        ["", *(f"{size} at a time" for size in sizes)],
        [[work, *(_spread(results.limits[work, size]) for size in sizes)] for work in works],
    )
    shares = [least(column, results) for column in columns]
    ours = [results.samples.get("elbo", {}).get(column) for column in columns]
    if not all(shares) or not all(ours):
        return
    own = [1e3 * median(sample.cost for sample in samples or ()) for samples in ours]
    lines = [[name, *(f"{share[name]:.3f}" for share in shares)] for name in shares[0]]
    rest = [f"{mine - sum(share.values()):.3f}" for mine, share in zip(own, shares, strict=True)]
    title = "The least that an answer costs with these libraries, and what Elbo adds, ms of one core"
    _table(title, ["", *(column.title for column in columns)], [*lines, ["Elbo's own", *rest]])


def open_loop(outcomes: Mapping[str, Sequence[Mapping[str, Any]]], rows: int, seconds: float) -> None:
    """The open loops: a line each."""
    lines = [_open_line(title, outcome) for title, several in outcomes.items() for outcome in several]
    titles = [
        "", "of its capacity", "due/s", "sent/s", "right/s (of capacity)", "p50 / p99, ms", "answers by status",
        "lost", "refusals: p99 / longest, ms", "without Retry-After", "RSS MiB before / peak / after",
        "client late, ms",
    ]  # fmt: skip
    row = "1 row" if rows == 1 else f"{rows} rows"
    if lines:
        _table(f"Open loop, {row} JSON, {seconds:g} s", titles, lines)
        print(
            "\nThe capacity is what a closed loop of 32 connections by the same client reaches. Times of right answers"
            "\ncount from when the request was due, those of refusals from when it was sent. `client late` is how far"
            "\nthe client itself fell behind its plan at worst: it shares the cores with the server."
        )


def targets(found: Iterable[Line]) -> None:
    """What was aimed at, and what was reached."""
    rows = [[what, target, f"{value:.3g}", "met" if met else "missed"] for what, target, value, met in found]
    if rows:
        _table("Targets", ["", "target", "measured", ""], rows)


def _open_line(title: str, outcome: Mapping[str, Any]) -> list[str]:
    seconds, good = outcome["seconds"], outcome["good"] / outcome["seconds"]
    due = outcome["share"] * outcome["capacity"]
    return [
        title,
        f"{outcome['share']:.0%}",
        f"{due:,.0f}",
        f"{outcome['sent'] / seconds:,.0f}",
        f"{good:,.0f} ({good / outcome['capacity']:.0%})",
        f"{1e3 * outcome['p50']:.1f} / {1e3 * outcome['p99']:.1f}",
        ", ".join(f"{status}: {count:,}" for status, count in outcome["statuses"].items()),
        f"{outcome['broken'] + outcome['unanswered'] + outcome['wrong_size']:,}",
        f"{1e3 * outcome['p99_refusal']:.1f} / {1e3 * outcome['longest_refusal']:.1f}",
        f"{outcome['without_retry_after']:,}",
        " / ".join(f"{outcome[moment] / MIB:,.0f}" for moment in ("before", "peak", "after")),
        f"{1e3 * outcome['lag']:.0f}",
    ]


def _rate(samples: Sequence[Sample] | None) -> str:
    if not samples:
        return "–"
    right = min(sample.right for sample in samples)
    return _spread([sample.rate for sample in samples]) + ("" if right > 0.9999 else f" {right:.1%} right")


def _times(samples: Sequence[Sample] | None) -> str:
    if not samples:
        return "–"
    middle, tail = median(sample.p50 for sample in samples), median(sample.p99 for sample in samples)
    return f"{1e3 * middle:.2f} / {1e3 * tail:.1f}"


def _cost(samples: Sequence[Sample] | None) -> str:
    return _spread([1e3 * sample.cost for sample in samples], ".3f") if samples else "–"


def _ratio(samples: Mapping[str, Mapping[Column, Sequence[Sample]]], name: str, column: Column) -> str:
    ours, theirs = (samples[who].get(column, ()) for who in ("elbo", name))
    pairs = zip(ours, theirs, strict=False)  # one may have dropped out
    ratios = [first.rate / second.rate for first, second in pairs if second.rate]
    return _spread(ratios, ".2f") if ratios else "–"


def _spread(values: Sequence[float], form: str = ",.0f") -> str:
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{median(values):{form}} ({min(values):{form}}, {max(values):{form}})" if values else "–"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}:\n")
    print(f"| {' | '.join(head)} |")
    print(f"|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
