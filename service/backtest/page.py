"""The report of a backtest as one HTML page that needs no other file: tables, and the series with their alarms as SVG.

The page has no scripts. Colours follow the light or dark scheme of the reader.
"""

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from service.backtest.incidents import Incident
from service.backtest.replay import Replay
from service.backtest.report import Alarm, Report, runs
from service.backtest.text import describe_causes, format_cause, format_duration, format_report, format_time

DRAWN_GROUPS = 24  # groups that are drawn: those with most alarms; the page stays below 1 MB
POINTS = 600  # points of a line; of the rows behind a point, the largest severity is drawn
CONTEXT_ROWS = 120  # rows that are drawn before and after an alarm
WIDTH, HEIGHT = 900, 96  # of a drawing, in pixels
BOTTOM = HEIGHT - 20  # lower end of the series; the marks of alarms and the times are below it
LOWEST, HIGHEST = 0.01, 100.0  # severities outside these are drawn at these
STYLE = """
:root { color-scheme: light dark; --line: #3b5bdb; --alarm: #e03131; --known: #ffd43b66; --rule: #8888; }
@media (prefers-color-scheme: dark) { :root { --line: #91a7ff; --alarm: #ff6b6b; --known: #fab00544; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; }
svg { width: 100%; height: auto; display: block; margin-bottom: 1rem; }
.line { fill: none; stroke: var(--line); stroke-width: 1; }
.limit { stroke: var(--rule); stroke-dasharray: 4 3; }
.alarm { fill: var(--alarm); }
.known { fill: var(--known); }
text { font-size: 10px; fill: currentColor; }
h3 { margin-bottom: .2rem; font-size: 1rem; }
"""

Doubles = npt.NDArray[np.float64]


def make_page(report: Report, replay: Replay, incidents: Sequence[Incident]) -> str:
    """Return the page.

    Args:
        report: the report of the replay.
        replay: the judged history.
        incidents: the known incidents.
    """
    title = escape(f"Backtest of {report.model}")
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>",
            f"<pre>{escape(format_report(report))}</pre>",
            *_group_drawings(report, replay, incidents),
            *_alarm_drawings(report, replay),
            "</body></html>\n",
        )
    )


def _group_drawings(report: Report, replay: Replay, incidents: Sequence[Incident]) -> Iterator[str]:
    alpha = f"{report.alphas[0].alpha:g}"
    yield (
        f"<h2>Severities</h2><p>A row is anomalous at alpha {alpha} above the dashed line. Red marks are alarms"
        f"{', yellow bands known incidents' if incidents else ''}. The scale is logarithmic.</p>"
    )
    alarms = runs(replay, 0)
    names = {name: index for index, name in enumerate(replay.history.groups)}
    for group in report.groups[:DRAWN_GROUPS]:
        rows = replay.history.rows_of(names[group.group])
        own = alarms[(alarms[:, 0] >= rows.start) & (alarms[:, 0] < rows.stop)]
        known = [incident for incident in incidents if incident.group in (None, group.group)]
        count = f"{group.alarms[0]:,} alarm{'s' * (group.alarms[0] != 1)}, {group.alarms_per_day[0]:.3g} a day"
        yield f"<h3>{escape(group.group or report.source)}: {count}</h3>"
        yield _severity_drawing(replay, rows, own, known)
    if len(report.groups) > DRAWN_GROUPS:
        yield f"<p>The {len(report.groups) - DRAWN_GROUPS:,} groups with fewer alarms are not drawn.</p>"


def _severity_drawing(replay: Replay, rows: slice, alarms: npt.NDArray[np.intp], incidents: Sequence[Incident]) -> str:
    """Return the severities of one group at the first alpha over time, with its alarms and known incidents."""
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
    starts, ends = x(replay.history.time[alarms[:, 0]]), x(replay.history.time[alarms[:, 1] - 1])
    marks = "".join(
        _rectangle("alarm", start, end, BOTTOM + 2, 4) for start, end in _joined(starts.tolist(), ends.tolist())
    )
    line = f"<path class='line' d='{_path(x(time[largest]), y(severity[largest]))}'/>"
    limit = f"<line class='limit' x1='0' x2='{WIDTH}' y1='{float(y(1.0)):.1f}' y2='{float(y(1.0)):.1f}'/>"
    return _svg(f"{bands}{line}{limit}{marks}{_time_labels(first, last)}", "severity over time")


def _alarm_drawings(report: Report, replay: Replay) -> Iterator[str]:
    if not report.worst_false_alarms:
        return
    is_known = report.alphas[0].incidents_found is not None
    yield f"<h2>Worst {'false alarms' if is_known else 'alarms'}</h2>"
    yield "<p>Drawn is the feature that contributes most to the most severe row, in its unit.</p>"
    names = {name: index for index, name in enumerate(replay.names)}
    for alarm in report.worst_false_alarms:
        length = f"{alarm.rows:,} row{'s' * (alarm.rows != 1)}, {format_duration(alarm.end - alarm.start)}"
        where = f"{alarm.group}, " if alarm.group else ""
        yield f"<h3>{escape(where)}{format_time(alarm.start)} UTC: severity {alarm.severity:.3g}, {length}</h3>"
        yield f"<p>{escape(describe_causes(alarm))}</p>"
        if alarm.causes:
            yield _feature_drawing(replay, alarm, names[alarm.causes[0].name])


def _feature_drawing(replay: Replay, alarm: Alarm, feature: int) -> str:
    """Return the values of the feature that caused an alarm, before, during and after the alarm."""
    history = replay.history
    group = history.rows_of(history.groups.index(alarm.group))
    first_alarm = int(np.searchsorted(history.time[group], alarm.start)) + group.start
    start = max(group.start, first_alarm - CONTEXT_ROWS)
    stop = min(group.stop, first_alarm + alarm.rows + CONTEXT_ROWS)
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
    left, right = ((float(np.clip(edge, first, last)) - first) * scale for edge in (alarm.start, alarm.end))
    mark = _rectangle("alarm", left, right, BOTTOM + 2, 4)
    limits = f"<text x='2' y='9'>{high:.4g}</text><text x='2' y='{BOTTOM - 4}'>{low:.4g}</text>"
    return _svg(
        f"{mark}<path class='line' d='{_path(x, y)}'/>{limits}{_time_labels(first, last)}",
        f"{format_cause(alarm.causes[0])} around the alarm",
    )


def _largest_per_point(severity: Doubles) -> npt.NDArray[np.intp]:
    """Return the rows to draw: of each of POINTS parts of the rows, the one with the largest severity."""
    if len(severity) <= POINTS:
        return np.arange(len(severity))
    edges = np.linspace(0, len(severity), POINTS + 1).astype(int)
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return np.array([start + int(severity[start:end].argmax()) for start, end in pairs])


def _joined(starts: Sequence[float], ends: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Yield the marks of alarms, in pixels. Marks that touch are joined, so there are at most as many as pixels."""
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
