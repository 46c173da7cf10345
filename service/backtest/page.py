"""The report of a backtest as one HTML page that needs no other file: tables, and the series with their alerts as SVG.

The page has no scripts. Colours follow the light or dark scheme of the reader.
"""

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.backtest.incidents import Incident
from service.backtest.replay import Replay
from service.backtest.report import Alert, Report, find_alert_rows
from service.backtest.text import describe_causes, format_cause, format_duration, format_report, format_time
from service.codec.long_work import pause_if_due

DRAWN_GROUPS = 24  # groups that are drawn: those with most alerts; the page stays below 1 MB
POINTS = 600  # points of a line; of the rows behind a point, the largest severity is drawn
CONTEXT_ROWS = 120  # rows that are drawn before and after an alert
WIDTH, HEIGHT = 900, 96  # of a drawing, in pixels
BOTTOM = HEIGHT - 20  # lower end of the series; the marks of alerts and the times are below it
LOWEST, HIGHEST = 0.01, 100.0  # severities outside these are drawn at these
STYLE = """
:root { color-scheme: light dark; --line: #3b5bdb; --alert: #e03131; --known: #ffd43b66; --rule: #8888; }
@media (prefers-color-scheme: dark) { :root { --line: #91a7ff; --alert: #ff6b6b; --known: #fab00544; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; }
svg { width: 100%; height: auto; display: block; margin-bottom: 1rem; }
.line { fill: none; stroke: var(--line); stroke-width: 1; }
.limit { stroke: var(--rule); stroke-dasharray: 4 3; }
.alert { fill: var(--alert); }
.known { fill: var(--known); }
text { font-size: 10px; fill: currentColor; }
h3 { margin-bottom: .2rem; font-size: 1rem; }
"""

Doubles = npt.NDArray[np.float64]


class Drawings(NamedTuple):
    """The drawings of a report, as SVG.

    Args:
        groups: the severities of the first DRAWN_GROUPS groups of the report, with their alerts.
        alerts: for each of the worst alerts of the report, the feature that caused it; "" if it is unknown.
    """

    groups: list[str]
    alerts: list[str]


def draw(report: Report, replay: Replay, incidents: Sequence[Incident]) -> Drawings:
    """Return the drawings of a report. See `make_page` for the arguments."""
    alerts, groups = find_alert_rows(replay, 0), []
    names = {name: index for index, name in enumerate(replay.history.groups)}
    for group in report.groups[:DRAWN_GROUPS]:
        pause_if_due()
        rows = replay.history.rows_of(names[group.group])
        own = alerts[(alerts[:, 0] >= rows.start) & (alerts[:, 0] < rows.stop)]
        known = [incident for incident in incidents if incident.group in (None, group.group)]
        groups.append(_severity_drawing(replay, rows, own, known))
    features = {name: index for index, name in enumerate(replay.names)}
    causes = (alert.causes[0].name if alert.causes else None for alert in report.worst_false_alerts)
    drawn = (
        "" if cause is None else _feature_drawing(replay, alert, features[cause])
        for alert, cause in zip(report.worst_false_alerts, causes, strict=True)
    )
    return Drawings(groups, list(drawn))


def make_page(report: Report, replay: Replay, incidents: Sequence[Incident]) -> str:
    """Return the page.

    Args:
        report: the report of the replay.
        replay: the judged history.
        incidents: the known incidents.
    """
    title = escape(f"Backtest of {report.model}")
    drawings = draw(report, replay, incidents)
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>",
            f"<pre>{escape(format_report(report))}</pre>",
            *_groups(report, drawings.groups, has_incidents=bool(incidents)),
            *_alerts(report, drawings.alerts),
            "</body></html>\n",
        )
    )


def _groups(report: Report, drawings: Sequence[str], *, has_incidents: bool) -> Iterator[str]:
    alpha = f"{report.alphas[0].alpha:g}"
    yield (
        f"<h2>Severities</h2><p>A row is anomalous at alpha {alpha} above the dashed line. Red marks are alerts"
        f"{', yellow bands known incidents' if has_incidents else ''}. The scale is logarithmic.</p>"
    )
    for group, drawing in zip(report.groups, drawings, strict=False):
        count = f"{group.alerts[0]:,} alert{'s' * (group.alerts[0] != 1)}, {group.alerts_per_day[0]:.3g} a day"
        yield f"<h3>{escape(group.group or report.source)}: {count}</h3>{drawing}"
    if len(report.groups) > DRAWN_GROUPS:
        yield f"<p>The {len(report.groups) - DRAWN_GROUPS:,} groups with fewer alerts are not drawn.</p>"


def _severity_drawing(replay: Replay, rows: slice, alerts: npt.NDArray[np.intp], incidents: Sequence[Incident]) -> str:
    """Return the severities of one group at the first alpha over time, with its alerts and known incidents."""
    time, severity = replay.history.time[rows], replay.severity[0, rows].astype(np.float64)
    first, last = float(time[0]), float(time[-1])

    def x(seconds: npt.ArrayLike) -> Doubles:
        return np.asarray((np.clip(seconds, first, last) - first) / max(last - first, 1e-9) * WIDTH)

    def y(values: npt.ArrayLike) -> Doubles:
        share = np.log(np.clip(values, LOWEST, HIGHEST) / LOWEST) / np.log(HIGHEST / LOWEST)
        return np.asarray(BOTTOM - share * (BOTTOM - 4))

    largest = _largest_per_point(severity)
    bands = "".join(
        _rectangle("known", float(x(incident.start)), float(x(incident.end)), 0, BOTTOM)
        for incident in incidents
        if incident.end >= first and incident.start <= last
    )
    starts, ends = x(replay.history.time[alerts[:, 0]]), x(replay.history.time[alerts[:, 1] - 1])
    marks = "".join(
        _rectangle("alert", start, end, BOTTOM + 2, 4) for start, end in _joined(starts.tolist(), ends.tolist())
    )
    line = f"<path class='line' d='{_path(x(time[largest]), y(severity[largest]))}'/>"
    limit = f"<line class='limit' x1='0' x2='{WIDTH}' y1='{float(y(1.0)):.1f}' y2='{float(y(1.0)):.1f}'/>"
    return _svg(f"{bands}{line}{limit}{marks}{_time_labels(first, last)}", "severity over time")


def _alerts(report: Report, drawings: Sequence[str]) -> Iterator[str]:
    if not report.worst_false_alerts:
        return
    is_known = report.alphas[0].incidents_found is not None
    yield f"<h2>Worst {'false alerts' if is_known else 'alerts'}</h2>"
    yield "<p>Drawn is the feature that contributes most to the most severe row, in its unit.</p>"
    for alert, drawing in zip(report.worst_false_alerts, drawings, strict=True):
        length = f"{alert.rows:,} row{'s' * (alert.rows != 1)}, {format_duration(alert.end - alert.start)}"
        where = f"{alert.group}, " if alert.group else ""
        yield f"<h3>{escape(where)}{format_time(alert.start)} UTC: severity {alert.severity:.3g}, {length}</h3>"
        yield f"<p>{escape(describe_causes(alert))}</p>{drawing}"


def _feature_drawing(replay: Replay, alert: Alert, feature: int) -> str:
    """Return the values of the feature that caused an alert, before, during and after the alert."""
    history = replay.history
    group = history.rows_of(history.groups.index(alert.group))
    start = max(group.start, alert.first_row - CONTEXT_ROWS)
    stop = min(group.stop, alert.first_row + alert.rows + CONTEXT_ROWS)
    time, values = history.time[start:stop], history.x[start:stop, feature].astype(np.float64)
    present = np.isfinite(values)
    if present.sum() < 2:
        return ""
    time, values = time[present], values[present]
    first, last = float(time[0]), float(time[-1])
    low, high = float(values.min()), float(values.max())
    kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), POINTS)).astype(int))
    scale = WIDTH / max(last - first, 1e-9)  # pixels per second
    x = (time[kept] - first) * scale
    y = BOTTOM - 2 - (values[kept] - low) / max(high - low, 1e-30) * (BOTTOM - 16)
    left, right = ((float(np.clip(edge, first, last)) - first) * scale for edge in (alert.start, alert.end))
    mark = _rectangle("alert", left, right, BOTTOM + 2, 4)
    limits = f"<text x='2' y='9'>{high:.4g}</text><text x='2' y='{BOTTOM - 4}'>{low:.4g}</text>"
    return _svg(
        f"{mark}<path class='line' d='{_path(x, y)}'/>{limits}{_time_labels(first, last)}",
        f"{format_cause(alert.causes[0])} around the alert",
    )


def _largest_per_point(severity: Doubles) -> npt.NDArray[np.intp]:
    """Return the rows to draw: of each of POINTS parts of the rows, the one with the largest severity."""
    if len(severity) <= POINTS:
        return np.arange(len(severity))
    edges = np.linspace(0, len(severity), POINTS + 1).astype(int)
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return np.array([start + int(severity[start:end].argmax()) for start, end in pairs])


def _joined(starts: Sequence[float], ends: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Yield the marks of alerts, in pixels. Marks that touch are joined, so there are at most as many as pixels."""
    begin = end = None
    for start, stop in zip(starts, ends, strict=True):
        if end is not None and start <= end + 1.0:
            end = max(end, stop)
            continue
        if begin is not None and end is not None:
            yield begin, end
        begin, end = start, stop
    if begin is not None and end is not None:
        yield begin, end


def _path(x: Doubles, y: Doubles) -> str:
    points = (f"{left:.1f},{top:.1f}" for left, top in zip(x.tolist(), y.tolist(), strict=True))
    return "M" + "L".join(points)


def _rectangle(kind: str, left: float, right: float, top: float, height: float) -> str:
    """Return a rectangle that is at least 1.5 pixels wide."""
    width = max(right - left, 1.5)
    return f"<rect class='{kind}' x='{left:.1f}' y='{top:.1f}' width='{width:.1f}' height='{height:.1f}'/>"


def _time_labels(first: float, last: float) -> str:
    return (
        f"<text x='0' y='{HEIGHT - 3}'>{format_time(first)}</text>"
        f"<text x='{WIDTH}' y='{HEIGHT - 3}' text-anchor='end'>{format_time(last)}</text>"
    )


def _svg(content: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">{content}</svg>'
