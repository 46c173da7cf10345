"""The report of a backtest, compared with alerts and incidents that are counted by hand."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from models.policy_rules import AlarmRule
from service.backtest.history import sort_history
from service.backtest.incidents import Incident
from service.backtest.page import DRAWN_GROUPS, make_page
from service.backtest.replay import Cause, Options, Replay
from service.backtest.report import Report, find_alert_rows, make_report
from service.backtest.text import format_duration, format_report, format_time
from service.monitoring.anomaly_metrics import MAX_LABELS

DAY = 86_400.0


def replayed(severities: dict[str, list[float]], step: float = 3600.0) -> Replay:
    """Return a replay in which the groups have these severities at alpha 0.05, with a row every `step` seconds.

    The severities at alpha 0.01 are half as large. An alert opens at an anomalous row, and ends at the next row that
    is not.
    """
    groups = [name for name, values in severities.items() for _ in values]
    time = np.concatenate([step * np.arange(len(values)) for values in severities.values()])
    x = np.arange(2 * len(time), dtype=np.float32).reshape(-1, 2)
    history = sort_history(x, time, groups, np.arange(len(time)))
    severity = np.concatenate([severities[name] for name in history.groups]).astype(np.float32)
    rows = np.flatnonzero(severity > 1)
    return Replay(
        history=history,
        options=Options((0.05, 0.01), alert_half_life=0.0),
        alarm_rule=AlarmRule(),
        calm_seconds=step,
        severity=np.stack((severity, severity / 2)),
        p_value=np.exp(-3 * severity),
        is_alarm=np.stack((severity > 1, severity > 2)),
        is_incident=np.zeros(len(time), bool),
        is_warming_up=np.zeros(len(time), bool),
        states=["usual"] * len(time),
        causes_rows=rows,
        causes_features=np.tile([1, 0], (len(rows), 1)),
        causes_numbers=np.tile(np.array([[5, 1, 3], [4, 4, 0]], np.float32), (len(rows), 1, 1)),
        causes_since=np.tile([3600.0, np.nan], (len(rows), 1)),
        names=["cpu", "disk"],
    )


def report_of(replay: Replay, incidents: list[Incident] | None = None) -> Report:
    return make_report(replay, incidents, "hosts@1", "history.csv", 0)


def test_history_is_sorted_by_group_and_time() -> None:
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    history = sort_history(x, np.array([3.0, 1, 2, 1, 1]), ["b", "b", "a", None, "b"], np.arange(5))
    assert history.groups == ["", "a", "b"]
    assert history.source_rows.tolist() == [3, 2, 1, 4, 0]
    assert [history.rows_of(group) for group in range(3)] == [slice(0, 1), slice(1, 2), slice(2, 5)]
    np.testing.assert_array_equal(history.x, x[[3, 2, 1, 4, 0]])


def test_alert_is_a_run_of_alarms_of_one_group() -> None:
    replay = replayed({"a": [2, 0, 2, 2], "b": [2, 2, 0, 0]})
    assert find_alert_rows(replay, 0).tolist() == [[0, 1], [2, 4], [4, 6]]
    assert find_alert_rows(replay, 1).tolist() == []
    assert find_alert_rows(replayed({"a": [0, 0]}), 0).tolist() == []


def test_alerts_per_day_of_a_group_are_its_alerts_divided_by_the_days_that_its_rows_cover() -> None:
    report = report_of(replayed({"a": [0.0] * 48, "b": [*[0.0] * 10, 3.0, *[0.0] * 5, 4.0, *[0.0] * 7]}))
    first, second = report.groups
    assert (first.group, first.days, first.alerts, first.alerts_per_day) == ("b", 1.0, [2, 2], [2.0, 2.0])
    assert (second.group, second.days, second.alerts) == ("a", 2.0, [0, 0])
    assert report.alphas[0].alerts_per_day == pytest.approx(2 / 3)
    assert report.alphas[0].anomalous_rows == 2
    assert report.alphas[0].false_rate == pytest.approx(2 / 72)
    assert report.alphas[0].incidents_found is None


def test_incident_is_found_at_the_first_alarm_in_it_and_alerts_in_it_are_not_false() -> None:
    replay = replayed({"a": [0, 0, 0, 1.5, 1.5, 0, 0, 3, 0], "b": [0] * 9})
    incidents = [Incident(2 * 3600, 4 * 3600, "a"), Incident(5 * 3600, 8 * 3600), Incident(0, 1e6, "b")]
    report = report_of(replay, [*incidents, Incident(0, 1e6, "c"), Incident(1e7, 1e8)])
    assert [incident.delay_seconds for incident in report.incidents] == [
        [3600.0, None], [7200.0, 7200.0], [None, None], [None, None], [None, None],
    ]  # fmt: skip
    assert [incident.rows for incident in report.incidents] == [3, 8, 9, 0, 0]
    assert (report.alphas[0].incidents_found, report.alphas[1].incidents_found) == (2, 1)
    assert report.alphas[0].median_delay_seconds == 5400.0
    assert (report.alphas[0].alerts, report.alphas[0].false_alerts) == (2, 0)
    assert report.worst_false_alerts == []


def test_worst_false_alerts_are_sorted_and_name_the_features_that_caused_them() -> None:
    replay = replayed({"a": [0, 2, 5, 0, 9, 0], "b": [3, 0, 0, 0, 0, 0]})
    report = report_of(replay, [Incident(4 * 3600, 4 * 3600, "a")])
    assert [(alert.group, alert.start, alert.rows, alert.severity) for alert in report.worst_false_alerts] == [
        ("a", 3600.0, 2, 5.0),
        ("b", 0.0, 1, 3.0),
    ]
    assert report.worst_false_alerts[0].causes == (Cause("disk", 5.0, 1.0, 3.0, 3600.0), Cause("cpu", 4.0, 4.0, 0.0))


def test_report_as_text_and_as_json_has_the_same_figures() -> None:
    replay = replayed({"a": [0, 2, 5, 0, 9, 0], "b": [3, 0, 0, 0, 0, 0]})
    report = report_of(replay, [Incident(4 * 3600, 4 * 3600, "a")])
    text = format_report(report)
    assert "hosts@1 on history.csv: 12 rows of 2 groups" in text
    assert re.search(r"0\.05 +4 \(33\.33%\) +3 +6 +2 +27\.27% +1 of 1 +0 s", text)
    assert "disk 5 (expected 1) since 1970-01-01 01:00:00, cpu 4 (expected 4)" in text
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["alphas"][0]["false_alerts"] == 2
    assert found["worst_false_alerts"][0]["causes"][0] == {
        "name": "disk", "value": 5.0, "expected": 1.0, "contribution": 3.0, "since": 3600.0,
    }  # fmt: skip


def test_report_as_text_lists_at_most_20_groups_and_incidents_and_counts_the_others() -> None:
    report = report_of(
        replayed({f"host-{index:02}": [0, 2, 0] for index in range(23)}),
        [Incident(3600, 7200, f"host-{index:02}") for index in range(22)],
    )
    text = format_report(report)
    assert "and 3 more groups: see --json" in text
    assert "and 2 more incidents: see --json" in text
    assert len(re.findall(r"1970-01-01 01:00:00 +1970-01-01 02:00:00 +host", text)) == 20


def test_time_beyond_the_calendar_is_written_in_seconds() -> None:
    assert format_time(86_400.4) == "1970-01-02 00:00:00"
    assert format_time(1e12) == "1000000000000"


@pytest.mark.parametrize("groups", [MAX_LABELS, MAX_LABELS + 1])
def test_report_says_that_alerts_are_shared_if_the_server_has_fewer_alert_labels_than_groups(groups: int) -> None:
    text = format_report(report_of(replayed({f"host-{index}": [0, 2, 0] for index in range(groups)})))
    assert ("the first 100 groups" in text) == (groups > MAX_LABELS)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59, "59 s"), (90, "1.5 min"), (7200, "2 h"), (3 * DAY, "3 d")]
)
def test_duration_is_written_in_the_largest_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_page_shows_alerts_and_incidents_in_valid_svg_and_loads_no_other_files() -> None:
    replay = replayed({"<web> & 'co'": [0, 2, 5, 0, 9, 0], "b": [3, 0, 0, 0, 0, 0]})
    incidents = [Incident(4 * 3600, 4 * 3600, "b")]
    page = make_page(report_of(replay, incidents), replay, incidents)
    drawings = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    kinds = [[element.get("class") for element in drawing.iter() if element.get("class")] for drawing in drawings]
    assert kinds[0] == ["line", "limit", "alert", "alert"]  # rows 1 and 2 are one alert
    assert kinds[1] == ["known", "line", "limit", "alert"]
    assert len(drawings) == 2 + 3  # two groups, three false alerts
    assert "&lt;web&gt; &amp; &#x27;co&#x27;: 2 alerts" in page
    assert not re.search(r"<web>|https?://|<script|src=|@import|url\(", page)


def test_page_of_many_groups_and_alerts_is_below_a_megabyte() -> None:
    random = np.random.default_rng(0)
    replay = replayed({f"host-{number}": random.exponential(0.4, 3000).tolist() for number in range(60)}, step=60.0)
    page = make_page(report_of(replay), replay, [])
    assert page.count("<svg") == DRAWN_GROUPS + 10
    assert len(page.encode()) < 1_000_000
    assert "The 36 groups with fewer alerts are not drawn." in page


def test_history_of_one_row_is_reported() -> None:
    replay = replayed({"": [2.0]})
    report = report_of(replay)
    assert (report.rows, report.alphas[0].alerts, report.alphas[0].alerts_per_day) == (1, 1, 0.0)
    assert "hosts@1 on history.csv: 1 rows" in format_report(report)
    assert "<svg" in make_page(report, replay, [])
