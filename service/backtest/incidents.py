"""Read the list of known incidents, against which a backtest compares the alarms."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import ElboError, join_names
from models.timestamps import to_unix_seconds

START, END, GROUP = "start", "end", "group"  # names of the columns


class IncidentsInvalid(ElboError):
    """The file of incidents cannot be used."""

    code = "incidents_invalid"


@dataclass(frozen=True)
class Incident:
    """A known incident: a period in which alarms are correct.

    Args:
        start: Unix seconds of its first moment.
        end: Unix seconds of its last moment.
        group: the group that it concerns; None if it concerns all groups.
    """

    start: float
    end: float
    group: str | None = None


def read_incidents(path: Path, group_column: str | None = None) -> list[Incident]:
    """Return the incidents in a CSV file with the columns `start` and `end`, and perhaps a column of groups.

    Times are timestamps that `to_unix_seconds` reads. An empty group stands for all groups.

    Args:
        path: the file.
        group_column: the name of the column of groups if the file has no column `group`; None for no other name.

    Raises:
        IncidentsInvalid: the file cannot be read, has no column `start` or `end`, or has an invalid line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise IncidentsInvalid(f"cannot read the incidents in {path}: {error}") from error
    header = [cell.strip() for cell in lines[0]] if lines else []
    missing = [name for name in (START, END) if name not in header]
    if missing:
        raise IncidentsInvalid(
            f"{path} has no column {join_names(missing)}: expected a CSV file whose first line is start,end or "
            f"start,end,group, got {','.join(header)[:200]!r}"
        )
    groups = next((header.index(name) for name in (GROUP, group_column) if name in header), None)
    return [
        _incident(path, number, line, header.index(START), header.index(END), groups)
        for number, line in enumerate(lines[1:], 2)
        if any(cell.strip() for cell in line)
    ]


def _incident(path: Path, number: int, line: Sequence[str], start: int, end: int, group: int | None) -> Incident:
    """Return the incident in `line`, which has this number in the file. `start`, `end`, `group`: indices of columns."""

    def cell(column: int) -> str:
        return line[column].strip() if column < len(line) else ""

    first, last = to_unix_seconds(cell(start)), to_unix_seconds(cell(end))
    for name, text, seconds in ((START, cell(start), first), (END, cell(end), last)):
        if seconds != seconds:
            raise IncidentsInvalid(
                f"{path}, line {number}: {name} is {text!r}: expected a timestamp in Unix seconds or in ISO 8601, such "
                "as 2026-01-03T12:00:00Z"
            )
    if last < first:
        raise IncidentsInvalid(
            f"{path}, line {number}: the incident ends ({cell(end)}) before it starts ({cell(start)}): correct one"
        )
    return Incident(first, last, None if group is None else cell(group) or None)
