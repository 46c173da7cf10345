"""Accessibility, layout and size of every view, in both themes, in a wide and a narrow window.

The tests write a screenshot of every combination to `screenshots/`, which git ignores.
"""

from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.data import ROOT
from tests.service.explorer.browser import ExplorerPage

SCREENSHOTS = ROOT / "screenshots"
A = ",".join(["1.5", "0", "-1", *["0"] * 13])
B = ",".join(["-1", "1", "0.5", *["0"] * 13])
VIEWS = {  # query, and the selector of the element that appears last
    "models": ("?view=models", "article.model canvas"),
    "latent": (f"?view=latent&model=vae&a={A}&b={B}&seed=7", ".strip canvas"),
    "reconstruct": ("?view=reconstruct&model=vae&noise=0.2&draw=1", "table.errors"),
    "pca": ("?view=pca&model=pca&step=4&component=1", ".components canvas"),
    "anomaly": ("?view=anomaly&model=vae&feature=20", ".view-anomaly .chart >> nth=1"),
    "training": ("?view=training&model=vae", ".markdown h4"),
    "quizzes": ("?view=quizzes&q1=1&q2=0", ".feedback p"),
}
TABLES = {
    "latent": ("?view=latent&model=hosts", ".point-card .feature"),
    "reconstruct": ("?view=reconstruct&model=hosts", "table.errors"),
    "pca": ("?view=pca&model=hosts&component=1", ".components canvas"),
    "anomaly": ("?view=anomaly&model=hosts&feature=3", ".view-anomaly .chart >> nth=1"),
    "training": ("?view=training&model=hosts", ".markdown h4"),
}
MAX_BYTES = 150_000


def violations(page: Page) -> list[str]:
    """Return the serious and critical violations that axe-core finds."""
    found = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['html'][:120]} {node['failureSummary'][:200]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def check_view(explorer: ExplorerPage, name: str, query: str, selector: str) -> None:
    """Check a view and take a screenshot of it, in a wide and in a narrow window."""
    page = explorer.page
    explorer.open(query)
    expect(page.locator(selector).first).to_be_visible()
    if "latent" in name:
        page.get_by_role("heading", name="Side by side").scroll_into_view_if_needed()
        expect(page.locator(".small-map .output > *").first).to_be_visible()
    expect(page.locator("[aria-busy]")).to_have_count(0)
    explorer.wait_until_idle()
    assert violations(page) == []
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=SCREENSHOTS / f"{name}-wide.png", full_page=True)
    page.set_viewport_size({"width": 390, "height": 800})
    charts = "[...document.querySelectorAll('svg.chart:not(.square)')]"
    explorer.wait_for(charts + ".every(chart => chart.viewBox.baseVal.width === 380)")  # redrawn for this width
    explorer.wait_until_idle()
    bar = page.locator("nav").bounding_box()
    current = page.locator("nav a[aria-current]").bounding_box()
    assert bar
    assert current
    assert current["x"] >= bar["x"] - 1
    assert current["x"] + current["width"] <= bar["x"] + bar["width"] + 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # no horizontal scrolling
    assert violations(page) == []
    page.screenshot(path=SCREENSHOTS / f"{name}-narrow.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_view_of_an_image_model_is_accessible_and_fits_the_window(
    browser: Browser, site_url: str, view: str, scheme: Literal["light", "dark"]
) -> None:
    with browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme) as context:
        explorer = ExplorerPage(context.new_page(), site_url)
        check_view(explorer, f"{view}-{scheme}", *VIEWS[view])
        assert explorer.errors == []


@pytest.mark.parametrize("view", TABLES)
def test_view_of_a_table_model_is_accessible_and_fits_the_window(browser: Browser, site_url: str, view: str) -> None:
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        explorer = ExplorerPage(context.new_page(), site_url)
        check_view(explorer, f"table-{view}", *TABLES[view])
        assert explorer.errors == []


def test_view_loads_at_most_150_kb_of_static_files(explorer: ExplorerPage) -> None:
    sizes: dict[str, int] = {}
    for view in VIEWS:
        explorer.open(f"?view={view}")
        explorer.wait_until_idle()
        found: dict[str, int] = explorer.page.evaluate(
            """Object.fromEntries(performance.getEntries()
                 .filter(e => e.decodedBodySize && /[/]static[/]|[?]view=/.test(e.name))
                 .map(e => [new URL(e.name).pathname, e.decodedBodySize]))"""
        )
        assert "/" in found
        assert "/static/explorer/main.js" in found
        assert sum(found.values()) <= MAX_BYTES, view
        sizes |= found
    files = [path for path in (Path(ROOT) / "service" / "static").rglob("*") if path.is_file()]
    assert len(sizes) == len(files)  # every file is used by some view


FOCUSABLE = {  # names of some elements that the Tab key must reach
    "models": ("Skip to content", "HTTP reference"),
    "latent": ("map of the latent space", "Decoded grid", *(f"z{i + 1}" for i in range(16))),
    "reconstruct": ("Held-out row", "Noise", "Occlusion", "New noise"),
    "pca": ("4 Eigenvectors", "component 16", "Compare with"),
    "anomaly": ("file of rows to score", "control the false discovery rate"),
    "training": ("show the curve of step 9", "All"),
    "quizzes": ("Try again",),
}
FOCUS = """() => {
  const e = document.activeElement;
  if (e === document.body) return null;
  const name = e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.textContent;
  const visible = e.type === "radio" ? e.nextElementSibling ?? e : e; // a radio input itself is transparent
  return [name.trim(), [e, visible].some((one) => getComputedStyle(one).outlineStyle !== "none")];
}"""


@pytest.mark.parametrize("view", VIEWS)
def test_tab_key_reaches_the_controls_of_a_view_and_the_focus_is_visible(explorer: ExplorerPage, view: str) -> None:
    query, selector = VIEWS[view]
    explorer.open(query)
    expect(explorer.page.locator(selector).first).to_be_visible()
    explorer.wait_until_idle()
    reached = set()
    for _ in range(150):
        explorer.page.keyboard.press("Tab")
        focused = explorer.page.evaluate(FOCUS)
        if focused is None:
            break
        assert focused[1], f"no visible focus on {focused[0]}"
        reached.add(focused[0])
    for name in FOCUSABLE[view]:
        assert any(other.startswith(name) for other in reached), (name, sorted(reached))


def test_skip_link_and_footer_links_work(explorer: ExplorerPage) -> None:
    explorer.open("?view=quizzes")
    page = explorer.page
    page.locator("#view h2").evaluate("heading => { heading.dataset.kept = 'yes' }")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the skip link is the first element that Tab reaches
    explorer.wait_for("document.activeElement.id == 'view'")
    expect(page.locator("#view h2")).to_have_attribute("data-kept", "yes")  # the view was not rendered again
    for name, path, text in (
        ("Models as JSON", "/models", '"models"'),
        ("Metrics", "/metrics", "# HELP"),
        ("HTTP reference", "/docs", "swagger"),
    ):
        assert page.get_by_role("link", name=name).get_attribute("href") == path.removeprefix(
            "/"
        )  # relative: the page may lie behind a path prefix
        response = page.request.get(explorer.base_url + path)
        assert response.status == 200
        assert text in response.text()
