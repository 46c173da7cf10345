"""The explorer's first view: what is served, and the ways in."""

from playwright.sync_api import expect

from tests.service.browsing import Visit, press


def test_the_first_view_shows_what_is_served_and_leads_inside(visit: Visit) -> None:
    visit.open()
    page = visit.page
    expect(page.locator("article.model h3")).to_have_count(6)
    expect(page.locator("article.model").filter(has_text="answers by default")).to_contain_text("vae")
    expect(page.get_by_alt_text("12 samples from pca")).to_be_visible()
    before = page.get_by_alt_text("12 samples from vae").get_attribute("src")
    asked = visit.asks(lambda: press(page, "sample again from vae"), "/sample", model="vae@1", n="12")
    assert asked.request.headers["accept"] == "image/png"
    visit.until("old => document.querySelector('[alt=\"12 samples from vae\"]').src !== old", before)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    press(page, "copy the request to vae")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == f"curl -X POST '{visit.base}/sample?model=vae&n=2'"
    page.get_by_role("link", name="Find anomalies").click()
    expect(page.locator("#view h2")).to_have_text("Anomaly")
    page.go_back()
    expect(page.locator("#view h2")).to_have_text("Models")
    press(page, "look inside ae")
    expect(page.locator("#view h2")).to_have_text("Latent space")
    assert "model=ae" in page.url
    expect(page.locator("#model")).to_have_value("ae")
