"""Wait for files that another process writes."""

import subprocess
import time
from pathlib import Path


def wait_until_newer(path: Path, modified_ns: int, process: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> None:
    """Wait until `process` has written `path` three times.

    Args:
        modified_ns: a modification time in nanoseconds. Writes up to this time do not count.
    """
    for _ in range(3):
        deadline = time.monotonic() + 180
        while not (path.exists() and path.stat().st_mtime_ns > modified_ns):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        modified_ns = path.stat().st_mtime_ns
