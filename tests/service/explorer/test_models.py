"""The start view: the served models and the links to the other views."""

from playwright.sync_api import expect

from tests.service.explorer.browser import ExplorerPage, click_button


def test_buttons_of_a_model_draw_new_samples_copy_a_command_and_open_a_view(explorer: ExplorerPage) -> None:
    explorer.open()
    page = explorer.page
    expect(page.locator("article.model h3")).to_have_count(6)
    expect(page.locator("article.model").filter(has_text="default model")).to_contain_text("vae")
    expect(page.get_by_alt_text("12 samples from pca")).to_be_visible()
    before = page.get_by_alt_text("12 samples from vae").get_attribute("src")
    request = explorer.expect_request(
        lambda: click_button(page, "sample again from vae"), "/sample", model="vae@1", n="12"
    )
    assert request.sent.headers["accept"] == "image/png"
    explorer.wait_for("old => document.querySelector('[alt=\"12 samples from vae\"]').src !== old", before)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    click_button(page, "copy the command for vae")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == f"curl -X POST '{explorer.base_url}/sample?model=vae&n=2'"
    page.get_by_role("link", name="Detect anomalies").click()
    expect(page.locator("#view h2")).to_have_text("Anomaly")
    page.go_back()
    expect(page.locator("#view h2")).to_have_text("Models")
    click_button(page, "explore ae")
    expect(page.locator("#view h2")).to_have_text("Latent space")
    assert "model=ae" in page.url
    expect(page.locator("#model")).to_have_value("ae")
