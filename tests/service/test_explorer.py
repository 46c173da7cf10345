"""The explorer as a page: words explained, light and dark, addresses that are shared, problems told, requests given up.

Each view's own tests are in `test_explorer_<view>.py`.
"""

import re
from pathlib import Path

from playwright.sync_api import Browser, Route, expect

from service.app import create_app
from service.settings import Settings
from tests.service.browsing import MAP, OUTPUT, Visit, ink, press
from tests.service.running import running


def test_words_are_explained_to_pointer_and_keyboard(visit: Visit) -> None:
    visit.open("?view=latent&model=vae")
    word = visit.page.get_by_role("button", name="prior", exact=True)
    tip = visit.page.get_by_role("tooltip").filter(has_text="before it sees a row")
    expect(tip).to_be_hidden()
    word.hover()
    expect(tip).to_be_visible()
    visit.page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    word.focus()
    expect(tip).to_be_visible()
    visit.page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_light_and_dark_are_chosen_and_remembered(visit: Visit) -> None:
    visit.open("?view=quizzes")
    page = visit.page
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    press(page, "switch to dark colours")
    assert page.evaluate(paper) != light
    page.reload()
    expect(page.get_by_role("button", name="switch to light colours")).to_be_visible()
    page.get_by_role("button", name="switch to light colours").click()
    assert page.evaluate(paper) == light


def test_nothing_is_lost_when_the_colours_change(visit: Visit) -> None:
    visit.open("?view=latent&model=vae&axes=0,1")
    page, base = visit.page, ".map-card .map canvas:first-child"
    visit.asks(lambda: page.locator(MAP).click(position={"x": 150, "y": 150}), "/decode")
    expect(page.locator(".tray canvas")).to_have_count(1)
    page.mouse.move(0, 0)  # leaving the map decodes the point again
    visit.settle()
    light, swatch = ink(page, base), page.locator(".labels .swatch").first
    tint = swatch.evaluate("e => getComputedStyle(e).backgroundColor")
    seen = len(visit.asked)
    press(page, "switch to dark colours")
    assert ink(page, base) != light
    assert swatch.evaluate("e => getComputedStyle(e).backgroundColor") != tint
    expect(page.locator(".point-card dl")).to_contain_text("1 point")
    expect(page.locator(".tray canvas")).to_have_count(1)
    press(page, "switch to light colours")
    assert ink(page, base) == light
    assert len(visit.asked) == seen  # nothing is asked again


def test_a_view_is_shared_by_its_address(visit: Visit, browser: Browser) -> None:
    visit.open("?view=latent&model=vae&axes=2,5")
    page = visit.page
    expect(page.locator(OUTPUT)).to_be_visible()
    visit.slide("z3", 1.2)
    visit.until("location.search.includes('z=0,0,1.')")
    visit.settle()
    shown = ink(page, OUTPUT)
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        other = context.new_page()
        other.goto(page.url)
        expect(other.locator(OUTPUT)).to_be_visible()
        expect(other.get_by_label("Across")).to_have_value("2")
        assert ink(other, OUTPUT) == shown


def test_a_model_that_keeps_its_rows_to_itself_is_explored_all_the_same(visit: Visit) -> None:
    visit.open("?view=latent&model=secret")
    page = visit.page
    expect(page.locator(".view-latent")).to_contain_text("secret carries no held-out rows")
    expect(page.locator(".point-card .feature")).to_have_count(4)
    for view in ("reconstruct", "anomaly"):
        page.locator(f"nav a[data-view={view}]").click()
        expect(page.locator(f".view-{view}")).to_contain_text("carries no held-out rows")
    expect(page.locator(".stamp")).to_be_visible()
    assert not [a for a in visit.asked if a.path.endswith("held-out")]


def test_a_problem_is_a_sentence_with_the_requests_id(visit: Visit) -> None:
    visit.open("?view=reconstruct&model=hosts&from=paste&data=1e38,1e38,1e38,-1e38")
    alert = visit.page.locator("table.errors [role=alert]").first
    expect(alert).to_contain_text(re.compile(r"^[A-Z].*\. Request \w{16}$"))
    identity = alert.locator("code").inner_text()
    refusals = [a.request.response() for a in visit.asked if a.path == "/reconstruct"]
    told = [answer.json() for answer in refusals if answer and answer.status == 422]
    assert identity in [problem["request_id"] for problem in told]
    assert told[0]["detail"][1:] in alert.inner_text()
    assert visit.faults  # the browser's own lines about answers of 422
    assert all("422" in fault for fault in visit.faults)
    visit.faults.clear()


def test_what_is_no_longer_wanted_is_aborted(visit: Visit) -> None:
    visit.open("?view=reconstruct&model=vae")
    page = visit.page
    expect(page.locator("table.errors")).to_be_visible()
    given_up: list[str] = []
    page.on("requestfailed", lambda request: given_up.append(request.failure or ""))

    def late(route: Route) -> None:
        page.wait_for_timeout(150)
        route.continue_()

    page.route("**/encode*", late)
    for value in (0.1, 0.2, 0.3):
        visit.slide("Noise", value)
    visit.settle()
    assert given_up
    assert set(given_up) == {"net::ERR_ABORTED"}
    expect(page.locator(".flow > li")).to_have_count(6)


def test_without_a_model_the_page_says_what_to_do(browser: Browser, tmp_path: Path) -> None:
    app = create_app(Settings(artifacts=tmp_path, log_level="error"))
    with running(app) as client, browser.new_context() as context:
        visit = Visit(context.new_page(), str(client.base_url))
        visit.open("?view=latent")
        expect(visit.page.locator(".nothing")).to_contain_text("elbo demo")
        assert visit.faults == []
