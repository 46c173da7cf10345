"""The report of a backtest as text for a terminal."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from service.anomaly.alert_rule import MAX_ALERT_GROUPS
from service.backtest.replay import Cause
from service.backtest.report import Alert, AlertRules, AlphaSummary, GroupSummary, IncidentSummary, Report

LISTED = 20  # groups and incidents that are listed
UNITS = (("d", 86_400.0), ("h", 3600.0), ("min", 60.0))


def format_report(report: Report) -> str:
    """Return the report as lines of text."""
    return "\n".join(_lines(report))


def format_time(seconds: float) -> str:
    """Return Unix seconds as date and time in UTC, to the second."""
    try:
        return datetime.fromtimestamp(round(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):  # a year before 1 or after 9999
        return f"{seconds:.0f}"


def format_duration(seconds: float) -> str:
    """Return a duration in the largest unit that gives at least one: `2.5 h`."""
    unit, length = next(((unit, length) for unit, length in UNITS if seconds >= length), ("s", 1.0))
    return f"{seconds / length:.3g} {unit}"


def format_cause(cause: Cause) -> str:
    """Return a feature with its value and the expected one, and since when it deviates."""
    since = "" if cause.since is None else f" since {format_time(cause.since)}"
    value = "is missing" if cause.value is None else f"{cause.value:.4g}"
    return f"{cause.name} {value} (expected {cause.expected:.4g}){since}"


def _lines(report: Report) -> Iterator[str]:
    faulty = f", {report.faulty_rows:,} faulty rows left out" if report.faulty_rows else ""
    groups = f" of {len(report.groups):,} groups" if len(report.groups) > 1 else ""
    yield f"{report.model} on {report.source}: {report.rows:,} rows{groups}{faulty}"
    yield f"{format_time(report.first)} to {format_time(report.last)} UTC"
    if report.warming_up_rows:
        yield f"{report.warming_up_rows:,} rows have too short a window to be anomalous"
    yield describe_rules(report.rules)
    if note := note_on_shared_alerts(report):
        yield note
    yield ""
    yield from _alphas(report)
    if len(report.groups) > 1:
        yield ""
        yield from _groups(report.groups, report.alphas[0].alpha)
    if report.incidents:
        yield ""
        yield from _incidents(report.incidents, report.alphas)
    yield ""
    yield from _worst(report)


def _alphas(report: Report) -> Iterator[str]:
    has_incidents = report.alphas[0].incidents_found is not None
    header = ["alpha", "anomalous rows", "alerts", "a day and group"]
    header += ["false alerts", "false-alarm rate", "incidents found", "median delay"] if has_incidents else []
    rows = []
    for summary in report.alphas:
        row = [
            f"{summary.alpha:g}",
            f"{summary.anomalous_rows:,} ({summary.anomalous_share:.2%})",
            f"{summary.alerts:,}",
            f"{summary.alerts_per_day:.3g}",
        ]
        if has_incidents:
            delay = summary.median_delay_seconds
            row += [
                f"{summary.false_alerts:,}",
                f"{summary.false_rate:.2%}",
                f"{summary.incidents_found} of {len(report.incidents)}",
                "" if delay is None else format_duration(delay),
            ]
        rows.append(row)
    yield from _table(header, rows)


def _groups(groups: Sequence[GroupSummary], alpha: float) -> Iterator[str]:
    yield f"groups with most alerts at alpha {alpha:g}:"
    rows = [
        [
            group.group or "(no group)",
            f"{group.rows:,}",
            f"{group.alerts[0]:,}",
            f"{group.alerts_per_day[0]:.3g}",
            f"{group.false_rate[0]:.2%}",
            group.state or "",
        ]
        for group in groups[:LISTED]
    ]
    yield from _table(["group", "rows", "alerts", "a day", "false-alarm rate", "state at the end"], rows)
    if len(groups) > LISTED:
        yield f"and {len(groups) - LISTED:,} more groups: see --json"


def _incidents(incidents: Sequence[IncidentSummary], alphas: Sequence[AlphaSummary]) -> Iterator[str]:
    yield "incidents, and how long after their start they were found:"
    rows = []
    for incident in incidents[:LISTED]:
        delays = [
            "no rows" if not incident.rows else "not found" if delay is None else format_duration(delay)
            for delay in incident.delay_seconds
        ]
        rows.append([format_time(incident.start), format_time(incident.end), incident.group or "", *delays])
    yield from _table(["start", "end", "group", *(f"alpha {summary.alpha:g}" for summary in alphas)], rows)
    if len(incidents) > LISTED:
        yield f"and {len(incidents) - LISTED:,} more incidents: see --json"


def _worst(report: Report) -> Iterator[str]:
    alpha = report.alphas[0].alpha
    kind = "alerts" if report.alphas[0].incidents_found is None else "false alerts"
    if not report.worst_false_alerts:
        yield f"no {kind} at alpha {alpha:g}"
        return
    yield f"worst {kind} at alpha {alpha:g}:"
    rows = [
        [
            format_time(alert.start),
            alert.group,
            f"{alert.rows:,} row{'s' * (alert.rows != 1)}",
            f"severity {alert.severity:.3g}",
            describe_causes(alert),
        ]
        for alert in report.worst_false_alerts
    ]
    yield from _table([], rows)


def describe_causes(alert: Alert) -> str:
    """Return the causes of an alert on one line, and whether its rows became the new normal."""
    causes = ", ".join(format_cause(cause) for cause in alert.causes)
    return f"{causes}; these rows became the new normal" if alert.state == "changed" else causes


def describe_rules(rules: AlertRules) -> str:
    """Return on one line when an alert opens and ends."""
    half_life = f" of half-life {rules.half_life_rows:g} rows" if rules.half_life_rows else ""
    rows = f" for {rules.rows:,} rows" if rules.rows > 1 else ""
    seconds = f"{' and' if rows else ' for'} {format_duration(rules.seconds)}" if rules.seconds else ""
    budget = "" if rules.per_day is None else f"; the policy accepts {rules.per_day:g} a day and group"
    return (
        f"an alert opens when the mean severity{half_life} is above 1{rows}{seconds}, and ends after "
        f"{format_duration(rules.calm_seconds)} without such a row{budget}"
    )


def note_on_shared_alerts(report: Report) -> str | None:
    """Return the note that the alerts of the server differ from those of the report; None if they do not."""
    if len(report.groups) <= MAX_ALERT_GROUPS:
        return None
    return (
        f"note: the server sends alerts for the first {MAX_ALERT_GROUPS} groups that it sees. The other groups share "
        "the alert of the group 'other', so their alerts differ from those counted here"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table with aligned columns."""
    lines = [list(header), *rows] if header else list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
