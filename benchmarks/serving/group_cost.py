"""Measure what it costs to judge a row together with the past of its host, and how much memory many hosts take.

    python -m benchmarks.serving.group_cost ARTIFACTS NAME [--hosts 1000] [--rows 40]

The model NAME is served in this process and without a network. The rows of a host come in order of time, the last one
now. The command prints the CPU time of requests, all included:

- requests with one row of one host, as a Telegraf agent on each host sends them;
- requests with one row of each of 100 hosts, as a central collector or remote write sends them: the time of one row;
- both with `inputs` in place of `records`, which need no past.

It also prints how much the memory of the process has grown, and the size of the files.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from pathlib import Path
from time import process_time, time
from typing import Any

import numpy as np

from models.manifest import read_manifest, resolve
from service.app import create_app
from service.settings import Settings

STEP = 10.0  # seconds between two rows of a host
ROWS_PER_REQUEST = (1, 100)


async def post(app: Any, query: str, body: bytes) -> float:
    """POST `body` to /anomaly, and return the CPU time in seconds. Raises AssertionError if the request fails."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/anomaly", "raw_path": b"/anomaly", "query_string": query.encode(), "root_path": "",
        "headers": [(b"host", b"elbo"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    answer: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # the client does not disconnect
        return messages.pop()

    async def send(message: dict[str, Any]) -> None:
        answer.append(message)

    started = process_time()
    await app(scope, receive, send)
    seconds = process_time() - started
    assert answer[0]["status"] == 200, answer
    return seconds


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def measure(artifacts: Path, name: str, hosts: int, rows: int) -> None:
    """Print the figures."""
    manifest = read_manifest(resolve(artifacts, name))
    assert manifest.timeline is not None, f"{name} was trained without --time"
    time_column, group_column = manifest.timeline.time_column, manifest.timeline.group_column or "host"
    features = [feature.name for feature in manifest.features]
    centre = np.array([feature.median for feature in manifest.features])
    spread = np.array([(feature.maximum - feature.minimum) / 20 for feature in manifest.features])
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(artifacts=artifacts, default_model=name, state=Path(folder), max_groups=max(10_000, hosts))
        app = create_app(settings.model_copy(update={"log_level": "warning"}))
        async with app.router.lifespan_context(app):
            entry = app.middleware_stack
            before, first = resident_bytes(), time() - STEP * rows * len(ROWS_PER_REQUEST)
            lines = []
            for number, count in enumerate(ROWS_PER_REQUEST):
                for row in range(number * rows, (number + 1) * rows):
                    values = centre + spread * random.standard_normal((hosts, len(features)))
                    times: list[float] = []
                    alone: list[float] = []  # only the last row is reported: the memory is full by then
                    for start in range(0, hosts, count):
                        part = values[start : start + count].tolist()
                        keys = {time_column: first + STEP * row}
                        records = [
                            {**dict(zip(features, one, strict=True)), **keys, group_column: f"host-{start + index}"}
                            for index, one in enumerate(part)
                        ]
                        seconds = await post(entry, "explain=3", json.dumps({"records": records}).encode())
                        times.append(seconds / len(part))
                        seconds = await post(entry, "explain=3", json.dumps({"inputs": part}).encode())
                        alone.append(seconds / len(part))
                lines.append(
                    f"{count} | {1e6 * statistics.median(times):.0f} us | {1e6 * statistics.median(alone):.0f} us"
                )
            grown = resident_bytes() - before
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
    window = manifest.window.rows if manifest.window else 1
    print(f"{name}: {len(features)} features, window of {window} rows, {hosts} hosts, {rows} rows each")
    print("rows of a request | CPU time of one row with its past | of one row in `inputs`", *lines, sep="\n")
    print(f"memory grown by {grown / 1e6:.0f} MB, files of {size / 1e6:.0f} MB")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("name")
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=40)
    options = parser.parse_args()
    asyncio.run(measure(options.artifacts, options.name, options.hosts, options.rows))


if __name__ == "__main__":
    main()
