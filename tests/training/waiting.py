"""Wait for files that another process writes."""

import subprocess
import time
from pathlib import Path


def wait_until_newer(path: Path, than: int, process: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> None:
    """Wait until `process` has written `path` three times.

    Args:
        than: ignore writes up to this modification time, in nanoseconds.
    """
    for _ in range(3):
        deadline = time.monotonic() + 180
        while not (path.exists() and path.stat().st_mtime_ns > than):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        than = path.stat().st_mtime_ns
