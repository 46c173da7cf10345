"""The past of recorded series as a CSV to train on: a row for each host and moment, a column for each feature.

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

MOST_POINTS = 11_000  # of one series in one answer of Prometheus


def samples(url: str, selector: str, start: float, end: float, step: float) -> list[dict]:
    """What a range query answers, asked for in parts that Prometheus is willing to give."""
    found = []
    while start < end:
        until = min(end, start + step * (MOST_POINTS - 1))
        query = urllib.parse.urlencode({"query": selector, "start": start, "end": until, "step": step})
        with urllib.request.urlopen(f"{url}/api/v1/query_range?{query}", timeout=60) as answer:
            found += json.load(answer)["data"]["result"]
        start = until + step
    return found


def main() -> None:
    """Read the arguments, ask Prometheus, write the rows that are whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mapping", type=Path, help="the file that ELBO_REMOTE_WRITE names")
    parser.add_argument("model", help="its table")
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="of Prometheus")
    parser.add_argument("--hours", type=float, default=24.0, help="how far back")
    parser.add_argument("--step", type=float, default=15.0, help="seconds between rows")
    asked = parser.parse_args()
    table = tomllib.loads(asked.mapping.read_text())[asked.model]
    features, group = table["features"], table.get("group", ["instance"])
    end = time.time()
    rows: dict[tuple[str, float], dict[str, str]] = {}
    for feature, selector in features.items():
        for series in samples(asked.url, selector, end - 3600 * asked.hours, end, asked.step):
            host = ",".join(series["metric"].get(label, "") for label in group)
            for moment, value in series["values"]:
                rows.setdefault((host, moment), {})[feature] = value
    whole = [row for _, row in sorted(rows.items()) if len(row) == len(features)]
    writer = csv.DictWriter(sys.stdout, list(features))
    writer.writeheader()
    writer.writerows(whole)
    print(f"{len(whole)} rows of {len({host for host, _ in rows})} hosts", file=sys.stderr)


if __name__ == "__main__":
    main()
