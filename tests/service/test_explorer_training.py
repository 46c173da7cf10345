"""The explorer's training view: eleven steps, curves, card."""

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
    expect(page.locator(".view-training")).to_contain_text("16 latents")
    page.get_by_label("Model").select_option("pca")
    expect(page.locator(".view-training")).to_contain_text("PCA has no curve")
    assert "model=pca" in page.url
