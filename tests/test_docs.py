"""The documentation is true: its code runs, and its tables miss nothing."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from packaging.requirements import Requirement

from models.manifest import names
from tests.conftest import require
from tests.data import ROOT
from tests.waiting import wait_until

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@contextmanager
def server(artifacts: Path) -> Iterator[int]:
    """`python -m service` on a free port, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    settings = {"ELBO_ARTIFACTS": str(artifacts), "ELBO_PORT": str(port), "ELBO_POLL_SECONDS": "0.1"}
    process = subprocess.Popen([sys.executable, "-m", "service"], cwd=ROOT, env=os.environ | settings)
    try:
        wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200, 60, httpx.TransportError)
        yield port
    finally:
        process.terminate()
        assert process.wait(20) == 0


def served(port: int) -> set[str]:
    """Names of the models that the server lists."""
    return {model["name"] for model in httpx.get(f"http://127.0.0.1:{port}/models").json()["models"]}


def test_every_code_block_of_the_readme_runs(demonstration: Path, tmp_path: Path) -> None:
    require(shutil.which("curl"), "the README's examples use curl")
    artifacts = tmp_path / "artifacts"
    shutil.copytree(demonstration, artifacts)
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": tools, "ELBO_ARTIFACTS": str(artifacts), "PYTHONWARNINGS": "ignore"}
    outputs = []
    with server(artifacts) as port:
        for language, written in BLOCK.findall(README):
            if language == "console":
                continue
            code = written.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace(
                "curl -s", "curl -sS --fail-with-body"
            )
            command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
            outputs.append(done.stdout)
            wait_until(lambda: served(port) == set(names(artifacts)), 60, httpx.TransportError)
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert len(outputs) == 5
    verdicts = [line.split()[2] for line in outputs[2].splitlines()[1:]]
    assert verdicts == ["False", "True"]  # the digit is one, the noise is none


def test_the_console_commands_of_the_readme_exist() -> None:
    blocks = [code for language, code in BLOCK.findall(README) if language == "console"]
    targets = re.findall(r"^make (\w+)", "\n".join(blocks), re.MULTILINE)
    assert targets == ["run", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    assert len(pages) >= 5
    broken = [
        f"{page.name}: {link}"
        for page in pages
        for link in LINK.findall(page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not broken


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["train"], *extras["dev"], *extras["browser"]]
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Dependencies")[1]
    missing = [name for name in (Requirement(line).name for line in listed) if not re.search(rf"\b{name}\b", section)]
    assert not missing


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 800
