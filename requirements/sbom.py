"""Write the bills of materials (CycloneDX) of what serving and training need: versions and licences.

Usage: sbom.py CYCLONEDX_PY PYTHON FOLDER. The packages are those of the lock file and torch, as PYTHON has them
installed. The images install the same packages. Their base image adds packages of Debian, which are not listed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def names_in(lock: str) -> set[str]:
    """Return the names of the packages in requirements/<lock>.lock, and torch."""
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    return {"torch", *map(canonical, re.findall(r"^([\w.-]+)==", text, re.MULTILINE))}


def canonical(name: str) -> str:
    """Return the name of a package in one spelling, because `-`, `_` and `.` mean the same."""
    return re.sub(r"[-_.]+", "-", name).lower()


def reduced(document: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return `document` with only the components whose names are in `names`.

    Raises:
        SystemExit: one of `names` is not installed.
    """
    components = [each for each in document["components"] if canonical(each["name"]) in names]
    if missing := names - {canonical(each["name"]) for each in components}:
        sys.exit(f"not installed, so not in the bill of materials: {', '.join(sorted(missing))}; run make check first")
    kept = {each["bom-ref"] for each in components} | {document["metadata"]["component"]["bom-ref"]}
    dependencies = [
        {**each, "dependsOn": [ref for ref in each.get("dependsOn", []) if ref in kept]}
        for each in document["dependencies"]
        if each["ref"] in kept
    ]
    return {**document, "components": components, "dependencies": dependencies}


def main(cyclonedx: str, python: str, folder: Path) -> None:
    """Write serve.cdx.json and train.cdx.json into `folder`."""
    options = ["--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible", "--of", "JSON"]
    command = [cyclonedx, "environment", *options, python]
    result = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - from the Makefile
    folder.mkdir(parents=True, exist_ok=True)
    for lock in ("serve", "train"):
        path = folder / f"{lock}.cdx.json"
        path.write_text(json.dumps(reduced(json.loads(result.stdout), names_in(lock)), indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
