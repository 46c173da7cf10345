"""The code blocks of the tutorials and how-to guides run, and print the output that the pages show."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import require
from tests.data import ROOT
from tests.docs.snippets import Servers, run_page

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"
FIRST_TUTORIAL = DOCS / "tutorials" / "serve-and-sample.md"
PAGES = sorted({*(DOCS / "tutorials").glob("*.md"), *(DOCS / "how-to").glob("*.md")} - {FIRST_TUTORIAL})


@pytest.fixture(autouse=True)
def _programs() -> None:
    require(shutil.which("curl"), "the examples use curl")
    require(shutil.which("node"), "an example is in JavaScript (Debian package nodejs)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_code_block_of_a_page_runs(page: Path, servers: Servers, files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(files, folder)
    outputs = run_page(page, servers, folder)
    assert outputs, f"{page} has no block that a reader can run"


def test_first_tutorial_ends_with_an_anomaly_and_three_images(servers: Servers, tmp_path: Path) -> None:
    outputs = run_page(FIRST_TUTORIAL, servers, tmp_path)
    assert [line.split()[0] for line in outputs[-1].splitlines()] == ["False", "True"]
    for name in ("digits.png", "cleaner.png", "walk.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
