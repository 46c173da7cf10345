"""Look all locked packages up in the index of advisories with pip-audit. Exit with 1 if one has a known vulnerability.

Usage: audit.py PIP_AUDIT. If the index cannot be reached, the reason is printed, and the exit code is 0.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ACCEPTED: dict[str, str] = {}  # id of an advisory that does not concern Elbo, and the reason


def locked() -> dict[str, set[str]]:
    """Return the versions of each package in the lock files. The accelerator, as in torch 2.13.0+cpu, is left out."""
    pins: dict[str, set[str]] = {}
    for lock in FOLDER.glob("*.lock"):
        for name, version in re.findall(r"^([\w.-]+)==([^\s+]+)", lock.read_text(), re.MULTILINE):
            pins.setdefault(name, set()).add(version)
    return pins


def look_up(pip_audit: str, pins: dict[str, set[str]]) -> tuple[list[dict[str, Any]], str]:
    """Return what pip-audit says about each package, and the reason if pip-audit failed, otherwise ""."""
    found: list[dict[str, Any]] = []
    versions = [f"{name}=={version}" for name, numbers in sorted(pins.items()) for version in sorted(numbers)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(versions))
        file.flush()
        command = [pip_audit, "--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json", "-r", file.name]
        result = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - from the Makefile
    try:
        found = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        return [], (result.stderr.strip().splitlines() or ["pip-audit printed nothing"])[-1]
    return found, ""


def main(pip_audit: str) -> int:
    """Print the vulnerable packages. Return the exit code."""
    pins = locked()
    found, failure = look_up(pip_audit, pins)
    unknown = [each for each in found if "skip_reason" in each]
    if failure or len(unknown) == len(found):
        reason = failure or (unknown[0]["skip_reason"] if unknown else "it has no package")
        print(f"audit skipped: the index of advisories cannot be reached: {reason}")
        return 0
    if unknown:
        print(f"not in the index of advisories: {', '.join(each['name'] for each in unknown)}")
    status = 0
    for each in found:
        for advisory in each.get("vulns", []):
            fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
            names = [advisory["id"], *advisory["aliases"]]
            accepted = next((ACCEPTED[name] for name in names if name in ACCEPTED), None)
            status = status if accepted else 1
            verdict = f"accepted: {accepted}" if accepted else f"fixed in {fixed}"
            print(f"{each['name']} {each['version']}: {advisory['id']}, {verdict}")
    print(f"audited {len(found) - len(unknown)} packages: {'none is vulnerable' if not status else 'see above'}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
