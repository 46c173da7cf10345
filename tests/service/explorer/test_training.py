"""The training view: algorithm, loss curves, model card, and active latents."""

import re

import pytest
from playwright.sync_api import expect

from tests.service.explorer.browser import ExplorerPage, click_button


def test_button_of_an_algorithm_step_selects_the_loss_curve_of_the_step(explorer: ExplorerPage) -> None:
    explorer.open("?view=training&model=vae")
    page = explorer.page
    expect(page.locator(".algorithm li")).to_have_count(11)
    curves = page.get_by_role("img", name=re.compile("over 15 epochs"))
    expect(curves).to_have_attribute("aria-label", re.compile("reconstruction.*KL.*ELBO"))
    click_button(page, "show the curve of step 9")
    expect(curves).to_have_attribute("aria-label", re.compile("^KL from"))
    page.get_by_role("radio", name="reconstruction", exact=True).check()
    expect(curves).to_have_attribute("aria-label", re.compile("^reconstruction from"))
    explorer.wait_for("location.search.includes('terms=reconstruction')")
    page.get_by_role("radio", name="All").check()
    expect(page.locator(".markdown")).to_contain_text("On the 180 held-out rows")
    page.get_by_label("Model").select_option("pca")
    expect(page.locator(".algorithm li")).to_have_count(5)
    expect(page.get_by_role("heading", name="Loss curves")).to_have_count(0)
    assert "model=pca" in page.url


def test_training_of_an_autoencoder_has_its_own_steps_and_no_kl_term(explorer: ExplorerPage) -> None:
    explorer.open("?view=training&model=ae")
    page = explorer.page
    expect(page.locator(".view-training")).to_contain_text("Training an autoencoder in eight steps")
    expect(page.locator(".algorithm li")).to_have_count(8)
    expect(page.locator(".view-training")).not_to_contain_text("ELBO")
    expect(page.locator(".view-training")).not_to_contain_text("Posterior collapse")
    click_button(page, "show the curve of step 7")
    curves = page.get_by_role("img", name=re.compile("over 15 epochs"))
    expect(curves).to_have_attribute("aria-label", re.compile("squared error from"))


@pytest.mark.parametrize(("model", "kept"), [("ae", "best"), ("secret", "last")])
def test_mark_in_the_loss_curves_names_the_epoch_that_was_published(
    explorer: ExplorerPage, model: str, kept: str
) -> None:
    explorer.open(f"?view=training&model={model}")
    expect(explorer.page.locator("svg.chart").first).to_contain_text(f"{kept} epoch")


def test_card_of_active_latents_shows_the_report_of_the_artifact(explorer: ExplorerPage, site_url: str) -> None:
    explorer.open("?view=training&model=vae")
    report = explorer.page.request.get(f"{site_url}/models/vae").json()["latent_report"]
    inactive = [i for i, latent in enumerate(report) if not latent["active"]]
    assert 0 < len(inactive) < 16
    card = explorer.page.locator("section", has=explorer.page.get_by_role("heading", name="Active latents"))
    expect(card).to_contain_text(f"{len(inactive)} of 16 latents are inactive.")
    expect(card).to_contain_text(f"The latents of a row cost {sum(latent['kl'] for latent in report):.1f} nats")
    order = sorted(range(16), key=lambda i: -report[i]["kl"])
    expect(card).to_contain_text(", ".join(f"{i + 1} (inactive)" if i in inactive else f"{i + 1}" for i in order))
    expect(card.locator("svg rect")).to_have_count(16)
