"""The explorer's training view: eleven steps, curves, card, and which latents live."""

import re

from playwright.sync_api import expect

from tests.service.browsing import Visit, press


def test_training_is_told_in_eleven_steps_beside_its_curves(visit: Visit) -> None:
    visit.open("?view=training&model=vae")
    page = visit.page
    expect(page.locator(".algorithm li")).to_have_count(11)
    curves = page.get_by_role("img", name=re.compile("over 15 epochs"))
    expect(curves).to_have_attribute("aria-label", re.compile("reconstruction.*KL.*ELBO"))
    press(page, "show the curve of step 9")
    expect(curves).to_have_attribute("aria-label", re.compile("^KL from"))
    page.get_by_role("radio", name="reconstruction", exact=True).check()
    expect(curves).to_have_attribute("aria-label", re.compile("^reconstruction from"))
    visit.until("location.search.includes('terms=reconstruction')")
    page.get_by_role("radio", name="All").check()
    expect(page.locator(".markdown")).to_contain_text("On the 180 rows that were held out")
    page.get_by_label("Model").select_option("pca")
    expect(page.locator(".view-training")).to_contain_text("PCA has no curve")
    assert "model=pca" in page.url


def test_the_collapse_report_is_that_of_the_artifact(visit: Visit, site: str) -> None:
    visit.open("?view=training&model=vae")
    report = visit.page.request.get(f"{site}/models/vae").json()["latent_report"]
    dead = [i for i, latent in enumerate(report) if not latent["active"]]
    assert 0 < len(dead) < 16
    card = visit.page.locator("section", has=visit.page.get_by_role("heading", name="Which latents live"))
    expect(card).to_contain_text(f"{len(dead)} of 16 latents are dead.")
    expect(card).to_contain_text(f"A code costs {sum(latent['kl'] for latent in report):.1f} nats")
    order = sorted(range(16), key=lambda i: -report[i]["kl"])
    expect(card).to_contain_text(", ".join(f"{i + 1} (dead)" if i in dead else f"{i + 1}" for i in order))
    expect(card.locator("svg rect")).to_have_count(16)
