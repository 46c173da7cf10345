"""The start view: the served models and the links to the other views."""

import re

import httpx
from playwright.sync_api import expect

from tests.plain_http import NO_AUTHORITIES
from tests.service.explorer.browser import ExplorerPage, canvas_hash, click_button


def test_buttons_of_a_model_draw_new_samples_copy_a_command_and_open_a_view(explorer: ExplorerPage) -> None:
    explorer.open()
    page = explorer.page
    expect(page.locator("article.model h3")).to_have_count(6)
    expect(page.locator("article.model").filter(has_text="default model")).to_contain_text("vae")
    expect(page.get_by_label("12 samples from pca")).to_be_visible()
    first = "[aria-label='12 samples from vae'] canvas"
    before = canvas_hash(page, first)
    request = explorer.expect_request(
        lambda: click_button(page, "sample again from vae"), "/sample", model="vae@1", n="12"
    )
    assert request.sent.headers["accept"] == "application/x-npy"
    expect(page.locator(f"{first} >> nth=0")).to_be_visible()
    assert canvas_hash(page, first) != before
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    click_button(page, "copy the command for vae")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == f"curl -X POST '{explorer.base_url}/sample?model=vae&n=2'"
    for takeaway in ("Learn compressed representations", "richer features", "by sampling"):
        expect(page.locator("#view")).to_contain_text(takeaway)
    for use in ("Reduce dimensions", "Compress"):
        expect(page.get_by_role("link", name=use, exact=True)).to_be_visible()
    page.get_by_role("link", name="Detect anomalies").click()
    expect(page.locator("#view h2")).to_have_text("Anomaly")
    page.go_back()
    expect(page.locator("#view h2")).to_have_text("Models")
    click_button(page, "explore ae")
    expect(page.locator("#view h2")).to_have_text("Latent space")
    assert "model=ae" in page.url
    expect(page.locator("#model")).to_have_value("ae")


def test_card_of_each_model_shows_its_warnings(explorer: ExplorerPage) -> None:
    explorer.open()
    models = httpx.get(f"{explorer.base_url}/models", verify=NO_AUTHORITIES).json()["models"]
    assert any("worse than PCA" in warning for model in models for warning in model["warnings"])
    for model in models:
        heading = explorer.page.get_by_role("heading", name=re.compile(f"^{model['name']} version"))
        card = explorer.page.locator("article.model").filter(has=heading)
        expect(card.locator("p.warning")).to_have_text(model["warnings"])


def test_card_of_a_table_model_shows_sampled_rows_by_feature(explorer: ExplorerPage) -> None:
    explorer.open()
    card = explorer.page.locator("article.model").filter(has=explorer.page.get_by_role("heading", name="hosts"))
    expect(card.locator("table.sampled tr")).to_have_count(4)
    expect(card.locator("table.sampled th").first).to_have_text("cpu")
    before = card.locator("table.sampled").text_content()
    request = explorer.expect_request(
        lambda: click_button(explorer.page, "sample again from hosts"), "/sample", model="hosts@1"
    )
    assert request.json["n"] == 3
    explorer.wait_for("old => document.querySelector('table.sampled').textContent !== old", before)
