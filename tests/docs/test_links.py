"""Links and paths in the documents lead to files that exist, and the architecture page explains every dependency."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from docs.generate import on_page_markdown
from tests.data import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FOLDERS = "service|training|models|tests|benchmarks|deploy|requirements|docs"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")
NAME_IN_FILE = re.compile(r"`(\w+)` in\s+`([\w./-]+\.\w+)`")
GLOSSARY_LINES = 46


def anchors(page: Path) -> set[str]:
    """Return the anchors that MkDocs and GitHub give the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", on_page_markdown(page.read_text())), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_target_of_every_link_exists(page: Path) -> None:
    broken = []
    for link, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        target = page.parent / link if link else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(f"{link}#{anchor}")
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    named = PATH.findall(FENCE.sub("", page.read_text()))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_file_that_contributing_gives_for_a_name_contains_the_name() -> None:
    named = NAME_IN_FILE.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 10
    assert [(name, path) for name, path in named if not re.search(rf"\b{name}\b", (ROOT / path).read_text())] == []


def test_architecture_page_names_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    listed = [*project["dependencies"], *(line for lines in extras for line in lines)]
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Dependencies")[1]
    names = [Requirement(line).name for line in listed]
    assert [name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", section)] == []


def test_glossary_is_short_and_sorted() -> None:
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Glossary")[1].split("\n## ")[0]
    terms = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")][1:]
    assert terms == sorted(terms, key=str.lower)
    assert 20 <= len(terms) <= GLOSSARY_LINES


def test_section_on_the_path_of_a_request_fits_on_a_screen_and_names_at_most_ten_files() -> None:
    section = (ROOT / "docs" / "architecture.md").read_text().split("## The path of a request")[1].split("\n## ")[0]
    assert len(section.splitlines()) <= 30
    assert 5 <= len(set(PATH.findall(section))) <= 10
