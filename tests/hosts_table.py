"""A CSV file with rows of several hosts at regular times."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.commands import two_factor_rows

COLUMNS = "cpu,memory,disk,network,errors"
START = datetime(2025, 3, 3, tzinfo=UTC)


def write_hosts(path: Path, rows: Mapping[str, int], seeds: Mapping[str, int] | None = None) -> str:
    """Write a row every minute for each host in `rows`, as many as its value. Return the path.

    Args:
        seeds: the seed of the rows of a host; by default, its place in `rows`.
    """
    lines = [f"time,host,{COLUMNS}"]
    for place, (host, count) in enumerate(rows.items()):
        values = two_factor_rows(count, seed=(seeds or {}).get(host, place))
        for minute, row in enumerate(values):
            moment = (START + timedelta(minutes=minute)).isoformat()
            lines.append(f"{moment},{host},{','.join(f'{value:.6g}' for value in row)}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)
