"""The documentation site: it builds without a warning, and loads nothing from another host."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.data import ROOT
from tests.service.explorer.browser import TIMEOUT, chromium

pytestmark = pytest.mark.slow

LOADING = {"src", "srcset", "data", "poster", "manifest"}  # attributes that make a browser load a file
EXTERNAL = re.compile(r"(?:https?:)?//\w", re.IGNORECASE)
STYLE_LOADS = re.compile(r"(?:url\(\s*[\"']?|@import\s+[\"'])((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)
# Hosts that Material's scripts name but do not contact from this site. The scripts contact api.github.com only if
# mkdocs.yml names a repository, and unpkg.com only for Mermaid diagrams or for old browsers. This site names no
# repository and has no Mermaid diagrams.
UNCONTACTED = {"api.github.com", "unpkg.com"}
COMMENTS = re.compile(r"/\*.*?\*/", re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `make docs` does; return its folder."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return target


class Loads(HTMLParser):
    """The addresses that a browser loads to show a page, and the CSS classes of the page's elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.classes |= set(values.get("class", "").split())
        self.found += [value for name, value in values.items() if name in LOADING]
        if tag == "link":
            self.found.append(values.get("href", ""))
        self.found += STYLE_LOADS.findall(values.get("style", ""))


def files(site: Path, suffix: str) -> Iterator[tuple[str, str]]:
    found = sorted(site.rglob(f"*{suffix}"))
    assert found
    return ((str(path.relative_to(site)), path.read_text()) for path in found)


def test_site_has_every_page_and_no_python_file(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()
    assert not list(site.rglob("*.py"))


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    found = {(name, load) for name, text in files(site, ".html") for load in Loads(text).found if EXTERNAL.match(load)}
    assert found == set()


def test_no_style_sheet_loads_anything_from_another_host(site: Path) -> None:
    sheets = {(name, load) for name, text in files(site, ".css") for load in STYLE_LOADS.findall(text)}
    inline = {
        (name, load)
        for name, text in files(site, ".html")
        for style in re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL)
        for load in STYLE_LOADS.findall(style)
    }
    assert sheets | inline == set()


def test_no_script_names_a_host_from_which_it_could_load_a_file(site: Path) -> None:
    pattern = re.compile(r"[\"'`]https?://([\w.-]+)")
    scripts = [(name, COMMENTS.sub("", text)) for name, text in files(site, ".js") if "search_index" not in name]
    hosts = {(name, host) for name, text in scripts for host in pattern.findall(text)}
    assert {(name, host) for name, host in hosts if host not in {*UNCONTACTED, "www.w3.org"}} == set()
    for _, text in files(site, ".html"):
        assert "mermaid" not in Loads(text).classes
        assert 'data-md-component="source"' not in text


@pytest.fixture
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def test_search_works_and_no_host_is_contacted_if_the_site_is_opened_as_a_file(site: Path, browser: Browser) -> None:
    requested: list[str] = []

    def refuse(route: Route) -> None:
        requested.append(route.request.url)
        route.abort()

    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.route(re.compile(r"^(?!file:|data:|blob:)"), refuse)
    page.goto((site / "index.html").as_uri())
    page.keyboard.press("/")
    page.get_by_placeholder("Search").press_sequentially("ELBO_QUEUE_SECONDS", timeout=TIMEOUT)
    expect(page.locator(".md-search-result__item").first).to_be_visible()
    page.goto((site / "reference" / "http.html").as_uri())
    expect(page.get_by_role("heading", name="POST /anomaly").first).to_be_visible()
    assert requested == []
