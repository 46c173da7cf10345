"""The README is short, and its code blocks run and print the output that it shows."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require
from tests.data import ROOT
from tests.docs.snippets import BLOCK, run_page, serving

pytestmark = pytest.mark.slow

README = ROOT / "README.md"
MAX_WORDS = 500  # outside code blocks


def test_every_code_block_of_the_readme_runs(demonstration: Path, tmp_path: Path) -> None:
    require(shutil.which("curl"), "the README's examples use curl")
    artifacts = tmp_path / "artifacts"
    shutil.copytree(demonstration, artifacts)
    with serving(artifacts) as servers:
        outputs = run_page(README, servers, tmp_path)
    assert len(outputs) == 3
    assert json.loads(outputs[2])["model"] == "web"


def test_first_screen_has_an_image_a_command_a_request_and_a_response() -> None:
    text = README.read_text().split("\n## ")[0]
    (image,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert (ROOT / image).read_bytes().startswith(b"\x89PNG")
    assert [language for language, _ in BLOCK.findall(text)] == ["console", "bash", "json"]


def test_every_make_target_that_the_readme_names_exists() -> None:
    text = README.read_text()
    console = "\n".join(code for language, code in BLOCK.findall(text) if language == "console")
    targets = re.findall(r"^make ([\w-]+)", console, re.MULTILINE) + re.findall(r"`make ([\w-]+)", text)
    assert "run" in targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_readme_is_short() -> None:
    assert len(BLOCK.sub("", README.read_text()).split()) <= MAX_WORDS
