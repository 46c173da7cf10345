"""What all views of the explorer share: tooltips, themes, shareable addresses, error messages, aborted requests."""

import re
from pathlib import Path

from playwright.sync_api import Browser, Route, expect

from service.app import create_app
from service.settings import Settings
from tests.service.explorer.browser import MAP, MAP_BASE, OUTPUT, ExplorerPage, canvas_hash, click_button
from tests.service.running import running


def test_tooltip_opens_for_pointer_and_keyboard(explorer: ExplorerPage) -> None:
    explorer.open("?view=latent&model=vae")
    word = explorer.page.get_by_role("button", name="prior", exact=True)
    tooltip = explorer.page.get_by_role("tooltip").filter(has_text="assumes for latents")
    expect(tooltip).to_be_hidden()
    word.hover()
    expect(tooltip).to_be_visible()
    explorer.page.mouse.move(0, 0)
    expect(tooltip).to_be_hidden()
    word.focus()
    expect(tooltip).to_be_visible()
    explorer.page.keyboard.press("Escape")
    expect(tooltip).to_be_hidden()


def test_chosen_theme_is_remembered(explorer: ExplorerPage) -> None:
    explorer.open("?view=quizzes")
    page = explorer.page
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    click_button(page, "switch to dark colours")
    assert page.evaluate(background) != light
    page.reload()
    expect(page.get_by_role("button", name="switch to light colours")).to_be_visible()
    page.get_by_role("button", name="switch to light colours").click()
    assert page.evaluate(background) == light


def test_theme_change_repaints_the_map_and_keeps_the_state(explorer: ExplorerPage) -> None:
    explorer.open("?view=latent&model=vae&axes=0,1")
    page = explorer.page
    explorer.expect_request(lambda: page.locator(MAP).click(position={"x": 150, "y": 150}), "/decode")
    expect(page.locator(".tray canvas")).to_have_count(1)
    page.mouse.move(0, 0)  # when the pointer leaves the map, the point is decoded again
    explorer.wait_until_idle()
    light, swatch = canvas_hash(page, MAP_BASE), page.locator(".labels .swatch").first
    tint = swatch.evaluate("e => getComputedStyle(e).backgroundColor")
    before = len(explorer.requests)
    click_button(page, "switch to dark colours")
    assert canvas_hash(page, MAP_BASE) != light
    assert swatch.evaluate("e => getComputedStyle(e).backgroundColor") != tint
    expect(page.locator(".point-card dl")).to_contain_text("1 point")
    expect(page.locator(".tray canvas")).to_have_count(1)
    click_button(page, "switch to light colours")
    assert canvas_hash(page, MAP_BASE) == light
    assert len(explorer.requests) == before


def test_address_restores_the_view(explorer: ExplorerPage, browser: Browser) -> None:
    explorer.open("?view=latent&model=vae&axes=2,5")
    page = explorer.page
    expect(page.locator(OUTPUT)).to_be_visible()
    explorer.set_slider("z3", 1.2)
    explorer.wait_for("location.search.includes('z=0,0,1.')")
    explorer.wait_until_idle()
    shown = canvas_hash(page, OUTPUT)
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        other = context.new_page()
        other.goto(page.url)
        expect(other.locator(OUTPUT)).to_be_visible()
        expect(other.get_by_label("Horizontal axis")).to_have_value("2")
        assert canvas_hash(other, OUTPUT) == shown


def test_private_model_can_be_explored_without_held_out_rows(explorer: ExplorerPage) -> None:
    explorer.open("?view=latent&model=secret")
    page = explorer.page
    expect(page.locator(".view-latent")).to_contain_text("secret has no held-out rows")
    expect(page.locator(".point-card .feature")).to_have_count(4)
    for view in ("reconstruct", "anomaly"):
        page.locator(f"nav a[data-view={view}]").click()
        expect(page.locator(f".view-{view}")).to_contain_text("has no held-out rows")
    expect(page.locator(".verdict")).to_be_visible()
    assert not [request for request in explorer.requests if request.path.endswith("held-out")]


def test_error_message_has_the_request_id(explorer: ExplorerPage) -> None:
    explorer.open("?view=reconstruct&model=hosts&from=paste&data=1e38,1e38,1e38,-1e38")
    alert = explorer.page.locator("table.errors [role=alert]").first
    expect(alert).to_contain_text(re.compile(r"^[A-Z].*\. Request \w{16}$"))
    request_id = alert.locator("code").inner_text()
    responses = [request.sent.response() for request in explorer.requests_to("/reconstruct")]
    problems = [response.json() for response in responses if response and response.status == 422]
    assert request_id in [problem["request_id"] for problem in problems]
    assert problems[0]["detail"][1:] in alert.inner_text()
    assert explorer.errors  # Chromium logs responses with status 422
    assert all("422" in error for error in explorer.errors)
    explorer.errors.clear()


def test_outdated_request_is_aborted(explorer: ExplorerPage) -> None:
    explorer.open("?view=reconstruct&model=vae")
    page = explorer.page
    expect(page.locator("table.errors")).to_be_visible()
    failures: list[str] = []
    page.on("requestfailed", lambda request: failures.append(request.failure or ""))

    def delay(route: Route) -> None:
        page.wait_for_timeout(150)
        route.continue_()

    page.route("**/encode*", delay)
    for value in (0.1, 0.2, 0.3):
        explorer.set_slider("Noise", value)
    explorer.wait_until_idle()
    assert failures
    assert set(failures) == {"net::ERR_ABORTED"}
    expect(page.locator(".flow > li")).to_have_count(6)


def test_page_without_models_shows_how_to_train_one(browser: Browser, tmp_path: Path) -> None:
    app = create_app(Settings(artifacts=tmp_path, log_level="error"))
    with running(app) as client, browser.new_context() as context:
        explorer = ExplorerPage(context.new_page(), str(client.base_url))
        explorer.open("?view=latent")
        expect(explorer.page.locator(".empty")).to_contain_text("elbo demo")
        assert explorer.errors == []


def test_page_and_reference_load_nothing_from_another_host(browser: Browser, site_url: str) -> None:
    requested: list[str] = []
    with browser.new_context() as context:
        page = context.new_page()
        page.on("request", lambda request: requested.append(request.url))
        for view in ("models", "reconstruct", "latent", "anomaly", "training", "pca", "quizzes"):
            page.goto(f"{site_url}/?view={view}")
            page.wait_for_load_state("networkidle")
        page.goto(f"{site_url}/docs")
        expect(page.locator(".opblock").first).to_be_visible()
        page.wait_for_load_state("networkidle")
    assert f"{site_url}/openapi.json" in requested
    assert [url for url in requested if not url.startswith((site_url, "data:", "blob:"))] == []


def test_model_published_after_the_page_was_opened_appears_without_a_reload(
    browser: Browser, artifacts: Path, tmp_path: Path
) -> None:
    app = create_app(Settings(artifacts=tmp_path, log_level="error", backend="torchscript", poll_seconds=0.2))
    with running(app) as client, browser.new_context() as context:
        explorer = ExplorerPage(context.new_page(), str(client.base_url))
        explorer.open("?view=models")
        expect(explorer.page.locator(".empty")).to_contain_text("elbo demo")
        (tmp_path / "pca").symlink_to(artifacts / "pca")
        expect(explorer.page.locator("article.model h3")).to_contain_text("pca")
        assert explorer.errors == []


def test_view_that_cannot_be_loaded_says_so_and_appears_when_the_server_is_back(
    browser: Browser, site_url: str
) -> None:
    with browser.new_context() as context:
        explorer = ExplorerPage(context.new_page(), site_url)
        explorer.open("?view=quizzes")
        context.set_offline(True)  # the browser cannot reach the server
        explorer.page.locator("nav a[data-view=training]").click()
        expect(explorer.page.get_by_role("alert")).to_contain_text("the server does not answer")
        context.set_offline(False)
        expect(explorer.page.locator(".algorithm li").first).to_be_visible()


def test_rejected_row_removes_the_results_of_the_previous_row(explorer: ExplorerPage) -> None:
    for view, result in (("anomaly", ".verdict"), ("reconstruct", ".flow > li")):
        explorer.open(f"?view={view}&model=hosts&from=paste&data=0.5,110,1,2")
        page = explorer.page
        expect(page.locator(result).first).to_be_visible()
        page.get_by_label("a row of 4 numbers, as CSV or JSON").fill("1, 2, 3")
        click_button(page, "Use this row")
        expect(page.get_by_role("alert")).to_contain_text("Row 1 has 3 numbers")
        expect(page.locator(result)).to_have_count(0)
        page.get_by_label("a row of 4 numbers, as CSV or JSON").fill("1, 110, 2, 3")
        click_button(page, "Use this row")
        expect(page.locator(result).first).to_be_visible()
