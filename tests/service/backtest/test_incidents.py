"""The list of incidents that `elbo backtest --labels` reads."""

from pathlib import Path

import pytest

from service.backtest.incidents import Incident, IncidentsInvalid, read_incidents


def test_incidents_with_times_in_several_forms_and_groups_are_read(tmp_path: Path) -> None:
    path = tmp_path / "incidents.csv"
    path.write_text(
        "\ufeffname,group,start,end\na,web,2026-01-01T00:00:00Z,1767229200\n\nb,,1767225600000,1767225601\n"
    )
    assert read_incidents(path) == [Incident(1767225600.0, 1767229200.0, "web"), Incident(1767225600.0, 1767225601.0)]


def test_column_of_groups_may_have_the_name_of_the_history(tmp_path: Path) -> None:
    path = tmp_path / "incidents.csv"
    path.write_text("start,end,host\n1,2,web\n")
    assert read_incidents(path, "host") == [Incident(1.0, 2.0, "web")]
    assert read_incidents(path) == [Incident(1.0, 2.0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column start, end"),
        (b"start,stop\n1,2\n", "has no column end"),
        (b"start,end\n1,2\nyesterday,2\n", "line 3: start is 'yesterday'"),
        (b"start,end\n1\n", "line 2: end is ''"),
        (b"start,end\n2,1\n", r"line 2: the incident ends \(1\) before it starts \(2\)"),
        (b"\xff\xfe", "cannot read the incidents"),
    ],
)
def test_invalid_file_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "incidents.csv"
    path.write_bytes(content)
    with pytest.raises(IncidentsInvalid, match=message):
        read_incidents(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncidentsInvalid, match=r"cannot read the incidents.*No such file"):
        read_incidents(tmp_path / "none.csv")
