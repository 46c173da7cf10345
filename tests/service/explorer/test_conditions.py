"""The latent space view of a conditional model: the visitor chooses a level, and all decoded rows are of this level."""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, Request, expect

from service.app import create_app
from service.settings import Settings
from tests.service.explorer.browser import OUTPUT, ExplorerPage, canvas_hash, click_button
from tests.service.running import running

LEVELS = "label.field:has(> .name:text-is('label')) select"


@pytest.fixture
def explorer(browser: Browser, conditional_models: Path) -> Iterator[ExplorerPage]:
    settings = Settings(artifacts=conditional_models / "artifacts", log_level="error", backend="torchscript")
    with running(create_app(settings)) as client:
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        explorer = ExplorerPage(context.new_page(), str(client.base_url))
        yield explorer
        context.close()
        assert explorer.errors == []


def condition_of(request: Request) -> object:
    query = parse_qs(urlsplit(request.url).query)
    return json.loads(query["condition"][0]) if "condition" in query else None


def test_samples_and_decoded_rows_are_of_the_level_that_is_chosen(explorer: ExplorerPage) -> None:
    explorer.open("?view=latent&model=digits")
    page = explorer.page
    expect(page.locator(OUTPUT)).to_be_visible()
    before = canvas_hash(page, OUTPUT)
    chosen = page.locator(LEVELS)
    with page.expect_request("**/sample?*") as sampled, page.expect_request("**/decode?*") as decoded:
        chosen.select_option("7")
    assert condition_of(sampled.value) == condition_of(decoded.value) == {"label": "7"}
    expect(page.locator(".samples canvas")).to_have_count(16)
    assert canvas_hash(page, OUTPUT) != before
    explorer.wait_for("() => location.search.includes('condition')")
    explorer.page.reload()
    expect(page.locator(OUTPUT)).to_be_visible()
    expect(chosen).to_have_value("7")
    with page.expect_request("**/sample?*") as sampled:
        chosen.select_option("")
    assert condition_of(sampled.value) is None


def test_clicking_a_sample_of_any_level_decodes_with_its_level(explorer: ExplorerPage) -> None:
    explorer.open("?view=latent&model=digits")
    page = explorer.page
    expect(page.locator(OUTPUT)).to_be_visible()
    with page.expect_response("**/sample?*") as response:
        click_button(page, "Draw")
    conditions = response.value.json()["conditions"]
    with page.expect_request("**/decode?*") as decoded:
        page.get_by_label("go to sample 3").click()
    assert condition_of(decoded.value) == conditions[2]
    expect(page.locator(LEVELS)).to_have_value(conditions[2]["label"])
