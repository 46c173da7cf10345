"""The reconstruction view: a held-out, drawn or pasted row is corrupted, encoded and decoded."""

import re

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.service.explorer.browser import ExplorerPage, click_button


def test_held_out_row_is_encoded_and_decoded(explorer: ExplorerPage) -> None:
    explorer.open("?view=reconstruct&model=vae")
    page = explorer.page
    expect(page.locator(".flow > li")).to_have_count(6)  # input, encoder, latents, sample, decoder, output
    assert page.locator(".network").first.get_attribute("aria-label") == "encoder: 64 to 48 to 32"
    expect(page.locator("table.errors tbody tr")).to_have_count(5)
    request = explorer.expect_request(lambda: click_button(page, "next row"), "/encode", model="vae@1")
    row = request.json["inputs"][0]
    held = explorer.requests_to("/models/vae@1/held-out")
    assert len(held) == 1
    response = held[0].sent.response()
    assert response is not None
    np.testing.assert_allclose(row, response.json()["inputs"][1])
    request = explorer.expect_request(lambda: click_button(page, "previous row"), "/reconstruct", model="pca@1")
    np.testing.assert_allclose(request.json["inputs"][0], response.json()["inputs"][0])
    explorer.expect_request(lambda: click_button(page, "random row"), "/encode")
    number = page.get_by_label("row, 0 to 179")
    wanted = 6 if number.input_value() == "5" else 5  # differs from the random row
    number.fill(str(wanted))
    request = explorer.expect_request(lambda: number.press("Enter"), "/encode")
    np.testing.assert_allclose(request.json["inputs"][0], response.json()["inputs"][wanted])
    expect(page.locator(".source")).to_contain_text(f"label {response.json()['labels'][wanted]}")
    explorer.wait_for(f"location.search.includes('row={wanted}')")


def test_noise_occlusion_and_sampling_change_the_row(explorer: ExplorerPage) -> None:
    explorer.open("?view=reconstruct&model=vae")
    page = explorer.page
    clean = np.array(explorer.expect_request(lambda: click_button(page, "next row"), "/encode").json["inputs"][0])
    noisy = np.array(explorer.expect_request(lambda: explorer.set_slider("Noise", 0.3), "/encode").json["inputs"][0])
    assert 0.1 < np.std(noisy - clean) < 0.4
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    expect(page.locator("table.errors tr", has_text="corrupted")).not_to_contain_text(re.compile(r"corrupted\s*0$"))
    other = np.array(explorer.expect_request(lambda: click_button(page, "New noise"), "/encode").json["inputs"][0])
    assert (other != noisy).any()
    explorer.expect_request(lambda: explorer.set_slider("Noise", 0), "/encode")
    hidden = np.array(
        explorer.expect_request(lambda: explorer.set_slider("Occlusion", 0.25), "/encode").json["inputs"][0]
    ).reshape(8, 8)
    assert not hidden[2:6, 2:6].any()  # a quarter of the image, at its centre
    np.testing.assert_array_equal(hidden[:2], clean.reshape(8, 8)[:2])
    before = len(explorer.requests)
    click_button(page, "Draw")
    explorer.wait_for("document.querySelector('.flow').textContent.includes('a sample')")
    drawn = [request.json for request in explorer.requests_to("/encode", since=before) if request.json.get("sample")]
    assert len(drawn) == 1
    before = len(explorer.requests)
    click_button(page, "Draw again")
    explorer.wait_until_idle()
    again = [request.json for request in explorer.requests_to("/encode", since=before) if request.json.get("sample")]
    assert again[0]["seed"] != drawn[0]["seed"]


def test_row_can_be_drawn_with_pointer_or_keyboard(explorer: ExplorerPage) -> None:
    explorer.open("?view=reconstruct&model=vae")
    page = explorer.page
    page.get_by_role("radio", name="Draw").check()
    board = page.get_by_label("draw an image of 8 by 8 pixels")
    explorer.wait_until_idle()  # the board moves when the figures above it are drawn
    board.scroll_into_view_if_needed()
    box = board.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 20, steps=8)
    page.mouse.up()
    explorer.wait_until_idle()
    drawn = np.array(explorer.requests_to("/encode")[-1].json["inputs"][0]).reshape(8, 8)
    assert drawn[1:7, 3:5].mean() > 0.5  # a stroke down the middle
    assert drawn[:, 0].max() == 0
    page.keyboard.down("Shift")  # Shift erases
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.up()
    page.keyboard.up("Shift")
    explorer.wait_until_idle()
    erased = np.array(explorer.requests_to("/encode")[-1].json["inputs"][0]).reshape(8, 8)
    assert erased[3:5, 3:5].sum() < drawn[3:5, 3:5].sum()
    request = explorer.expect_request(lambda: click_button(page, "Clear"), "/encode")
    assert not np.any(request.json["inputs"][0])
    board.focus()
    page.keyboard.press("ArrowLeft")
    request = explorer.expect_request(lambda: page.keyboard.press("Space"), "/encode")
    assert np.argmax(request.json["inputs"][0]) == 4 * 8 + 3
    request = explorer.expect_request(lambda: page.keyboard.press("Delete"), "/encode")
    assert not np.any(request.json["inputs"][0])


def test_pasted_row_is_used_if_valid_and_rejected_if_invalid(explorer: ExplorerPage) -> None:
    explorer.open("?view=reconstruct&model=hosts")
    page = explorer.page
    page.get_by_role("radio", name="Paste").check()
    area = page.get_by_label("a row of 4 numbers, as CSV or JSON")
    area.fill("1, 2, 3")
    click_button(page, "Use this row")
    expect(page.get_by_role("alert")).to_have_text("Row 1 has 3 numbers; hosts expects 4.")
    area.fill("load,cpu [%],memory/used [MB],disk~io\n2,0.5,110,1")
    request = explorer.expect_request(lambda: click_button(page, "Use this row"), "/encode", model="hosts@1")
    assert request.json["inputs"] == [[0.5, 110, 1, 2]]  # matched by name, in the model's order
    expect(page.locator(".flow .feature").first).to_contain_text("0.5 %")
    explorer.wait_for("location.search.includes('data=0.5,110,1,2')")
    page.reload()
    expect(page.locator(".flow .feature").first).to_contain_text("0.5 %")
    area.fill('{"inputs": [[0.25, 90, 2, 1]]}')
    request = explorer.expect_request(lambda: click_button(page, "Use this row"), "/encode", model="hosts@1")
    assert request.json["inputs"] == [[0.25, 90, 2, 1]]


@pytest.mark.parametrize(("model", "has_kl"), [("vae", True), ("ae", False), ("pca", False)])
def test_introduction_shows_the_loss_that_trained_the_model(explorer: ExplorerPage, model: str, has_kl: bool) -> None:
    explorer.open(f"?view=reconstruct&model={model}")
    lead = explorer.page.locator(".lead")
    expect(lead).to_contain_text("Training minimises the loss")
    assert ("KL" in (lead.text_content() or "")) == has_kl
