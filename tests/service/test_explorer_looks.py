"""How the explorer looks: accessible in every view, light and dark, wide and narrow; light in bytes; with pictures.

The pictures are left in `screenshots/` for people to look at; git ignores them.
"""

from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.data import ROOT
from tests.service.browsing import Visit

SCREENSHOTS = ROOT / "screenshots"
A = ",".join(["1.5", "0", "-1", *["0"] * 13])
B = ",".join(["-1", "1", "0.5", *["0"] * 13])
VIEWS = {  # with something to see in each; and what tells that it is there
    "models": ("?view=models", "article.model img"),
    "latent": (f"?view=latent&model=vae&a={A}&b={B}&seed=7", ".strip canvas"),
    "reconstruct": ("?view=reconstruct&model=vae&noise=0.2&draw=1", "table.errors"),
    "pca": ("?view=pca&model=pca&step=4&component=1", ".components canvas"),
    "anomaly": ("?view=anomaly&model=vae&feature=20", ".view-anomaly .chart >> nth=1"),
    "training": ("?view=training&model=vae", ".markdown h4"),
    "quizzes": ("?view=quizzes&q1=1&q2=0", ".verdict p"),
}
TABLES = {
    "latent": ("?view=latent&model=hosts", ".point-card .feature"),
    "reconstruct": ("?view=reconstruct&model=hosts", "table.errors"),
    "pca": ("?view=pca&model=hosts&component=1", ".components canvas"),
    "anomaly": ("?view=anomaly&model=hosts&feature=3", ".view-anomaly .chart >> nth=1"),
    "training": ("?view=training&model=hosts", ".markdown h4"),
}
MOST_BYTES = 150_000


def faults(page: Page) -> list[str]:
    """What axe-core finds serious or critical."""
    found = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['html'][:120]} {node['failureSummary'][:200]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def look(visit: Visit, name: str, query: str, sign: str) -> None:
    """Open a view, wide and narrow; judge it and leave a picture of each."""
    page = visit.page
    visit.open(query)
    expect(page.locator(sign).first).to_be_visible()
    if "latent" in name:
        page.get_by_role("heading", name="Side by side").scroll_into_view_if_needed()
        expect(page.locator(".small-map .output > *").first).to_be_visible()
    expect(page.locator("[aria-busy]")).to_have_count(0)
    visit.settle()
    assert faults(page) == []
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=SCREENSHOTS / f"{name}-wide.png", full_page=True)
    page.set_viewport_size({"width": 390, "height": 800})
    charts = "[...document.querySelectorAll('svg.chart:not(.square)')]"
    visit.until(charts + ".every(chart => chart.viewBox.baseVal.width === 380)")  # drawn anew, for words to be read
    visit.settle()
    bar = page.locator("nav").bounding_box()
    current = page.locator("nav a[aria-current]").bounding_box()
    assert bar
    assert current
    assert current["x"] >= bar["x"] - 1
    assert current["x"] + current["width"] <= bar["x"] + bar["width"] + 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing to scroll to sideways
    assert faults(page) == []
    page.screenshot(path=SCREENSHOTS / f"{name}-narrow.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_accessible_and_fits(
    browser: Browser, site: str, view: str, scheme: Literal["light", "dark"]
) -> None:
    with browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme) as context:
        visit = Visit(context.new_page(), site)
        look(visit, f"{view}-{scheme}", *VIEWS[view])
        assert visit.faults == []


@pytest.mark.parametrize("view", TABLES)
def test_every_view_suits_a_table(browser: Browser, site: str, view: str) -> None:
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        visit = Visit(context.new_page(), site)
        look(visit, f"table-{view}", *TABLES[view])
        assert visit.faults == []


def test_the_page_is_light(visit: Visit) -> None:
    sizes: dict[str, int] = {}
    for view in VIEWS:
        visit.open(f"?view={view}")
        visit.settle()
        found: dict[str, int] = visit.page.evaluate(
            """Object.fromEntries(performance.getEntries()
                 .filter(e => e.decodedBodySize && /[/]static[/]|[?]view=/.test(e.name))
                 .map(e => [new URL(e.name).pathname, e.decodedBodySize]))"""
        )
        assert "/" in found
        assert "/static/explorer/main.js" in found
        assert sum(found.values()) <= MOST_BYTES, view
        sizes |= found
    files = [path for path in (Path(ROOT) / "service" / "static").rglob("*") if path.is_file()]
    assert len(sizes) == len(files)  # each file is used, and was counted


REACHED = {  # by the Tab key, among others
    "models": ("Skip to the view", "HTTP reference"),
    "latent": ("map of the latent space", "Decodings", *(f"z{i + 1}" for i in range(16))),
    "reconstruct": ("Held-out row", "Noise", "Occlusion", "Other noise"),
    "pca": ("4 Eigenvectors", "component 16", "Compare with"),
    "anomaly": ("a file of rows to judge", "control the false discovery rate"),
    "training": ("show the curve of step 9", "All"),
    "quizzes": ("Try again",),
}
FOCUS = """() => {
  const e = document.activeElement;
  if (e === document.body) return null;
  const words = e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.textContent;
  const stand = e.type === "radio" ? e.nextElementSibling ?? e : e; // what stands for a hidden radio
  return [words.trim(), [e, stand].some((one) => getComputedStyle(one).outlineStyle !== "none")];
}"""


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_is_reached_by_the_pointer_alone(visit: Visit, view: str) -> None:
    query, sign = VIEWS[view]
    visit.open(query)
    expect(visit.page.locator(sign).first).to_be_visible()
    visit.settle()
    reached = set()
    for _ in range(150):
        visit.page.keyboard.press("Tab")
        where = visit.page.evaluate(FOCUS)
        if where is None:
            break
        assert where[1], f"no focus is to be seen on {where[0]}"
        reached.add(where[0])
    for name in REACHED[view]:
        assert any(words.startswith(name) for words in reached), (name, sorted(reached))


def test_the_links_around_a_view_lead_where_they_say(visit: Visit) -> None:
    visit.open("?view=quizzes")
    page = visit.page
    page.locator("#view h2").evaluate("heading => { heading.dataset.seen = 'yes' }")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first stop is the link that skips the bar
    visit.until("document.activeElement.id == 'view'")
    expect(page.locator("#view h2")).to_have_attribute("data-seen", "yes")  # nothing was drawn anew
    for name, path, words in (
        ("Models as JSON", "/models", '"models"'),
        ("Metrics", "/metrics", "# HELP"),
        ("HTTP reference", "/docs", "swagger"),
    ):
        assert page.get_by_role("link", name=name).get_attribute("href") == path
        answer = page.request.get(visit.base + path)
        assert answer.status == 200
        assert words in answer.text()
