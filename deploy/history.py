"""Export recorded Prometheus series as a training CSV: one row per host and time, with the columns time and host
and one column per feature.

python deploy/history.py deploy/elbo/remote-write.toml node --url http://127.0.0.1:9090 --hours 24 > node.csv
"""

import argparse
import csv
import json
import sys
import time
import tomllib
import urllib.parse
import urllib.request
from pathlib import Path

MAX_POINTS = 11_000  # maximum number of points per series in one query; Prometheus refuses a query for more points


def query_range(url: str, selector: str, start: float, end: float, step: float) -> list[dict]:
    """Return the series that match `selector`. Each query covers a time range that is short enough for Prometheus.

    A series appears once per time range, as {"metric": labels, "values": [[Unix seconds, value], ...]}.
    """
    series = []
    while start < end:
        until = min(end, start + step * (MAX_POINTS - 1))
        query = urllib.parse.urlencode({"query": selector, "start": start, "end": until, "step": step})
        with urllib.request.urlopen(f"{url}/api/v1/query_range?{query}", timeout=60) as response:
            series += json.load(response)["data"]["result"]
        start = until + step
    return series


def main() -> None:
    """Write the rows that have every feature to standard output, and the number of such rows to standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mapping", type=Path, help="the file that ELBO_REMOTE_WRITE points to")
    parser.add_argument("model", help="the name of a table in that file")
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="URL of Prometheus")
    parser.add_argument("--hours", type=float, default=24.0, help="hours of history to export")
    parser.add_argument("--step", type=float, default=15.0, help="seconds between rows")
    arguments = parser.parse_args()
    table = tomllib.loads(arguments.mapping.read_text())[arguments.model]
    features = table["features"]
    group_labels = table.get("group", ["instance"])
    end = time.time()
    rows: dict[tuple[str, float], dict[str, str]] = {}  # by host and timestamp
    for feature, selector in features.items():
        for series in query_range(arguments.url, selector, end - 3600 * arguments.hours, end, arguments.step):
            host = ",".join(series["metric"].get(label, "") for label in group_labels)
            for timestamp, value in series["values"]:
                rows.setdefault((host, timestamp), {})[feature] = value
    complete = [
        {"time": timestamp, "host": host, **row}
        for (host, timestamp), row in sorted(rows.items(), key=lambda item: (item[0][1], item[0][0]))
        if len(row) == len(features)
    ]
    writer = csv.DictWriter(sys.stdout, ["time", "host", *features])
    writer.writeheader()
    writer.writerows(complete)
    print(f"{len(complete)} complete rows of {len({host for host, _ in rows})} hosts", file=sys.stderr)


if __name__ == "__main__":
    main()
