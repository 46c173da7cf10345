"""The explorer's way of a row through a model: held out, drawn or pasted, spoiled and rebuilt."""

import re

import numpy as np
from playwright.sync_api import expect

from tests.service.browsing import Visit, press


def test_a_held_out_row_flows_through_the_model(visit: Visit) -> None:
    visit.open("?view=reconstruct&model=vae")
    page = visit.page
    expect(page.locator(".flow > li")).to_have_count(6)  # input, encoder, code, sample, decoder, output
    assert page.locator(".network").first.get_attribute("aria-label") == "encoder: 64 to 48 to 32"
    expect(page.locator("table.errors tbody tr")).to_have_count(5)
    asked = visit.asks(lambda: press(page, "next row"), "/encode", model="vae@1")
    row = asked.json["inputs"][0]
    held = [a for a in visit.asked if a.path == "/models/vae@1/held-out"]
    assert len(held) == 1
    answer = held[0].request.response()
    assert answer is not None
    np.testing.assert_allclose(row, answer.json()["inputs"][1])
    asked = visit.asks(lambda: press(page, "previous row"), "/reconstruct", model="pca@1")
    np.testing.assert_allclose(asked.json["inputs"][0], answer.json()["inputs"][0])
    visit.asks(lambda: press(page, "a row at random"), "/encode")
    number = page.get_by_label("row, 0 to 179")
    wanted = 6 if number.input_value() == "5" else 5  # another than chance has chosen
    number.fill(str(wanted))
    asked = visit.asks(lambda: number.press("Enter"), "/encode")
    np.testing.assert_allclose(asked.json["inputs"][0], answer.json()["inputs"][wanted])
    expect(page.locator(".source")).to_contain_text(f"label {answer.json()['labels'][wanted]}")
    visit.until(f"location.search.includes('row={wanted}')")


def test_noise_occlusion_and_draws_change_what_flows(visit: Visit) -> None:
    visit.open("?view=reconstruct&model=vae")
    page = visit.page
    clean = np.array(visit.asks(lambda: press(page, "next row"), "/encode").json["inputs"][0])
    noisy = np.array(visit.asks(lambda: visit.slide("Noise", 0.3), "/encode").json["inputs"][0])
    assert 0.1 < np.std(noisy - clean) < 0.4
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    expect(page.locator("table.errors tr", has_text="spoiled")).not_to_contain_text(re.compile(r"spoiled\s*0$"))
    other = np.array(visit.asks(lambda: press(page, "Other noise"), "/encode").json["inputs"][0])
    assert (other != noisy).any()
    visit.asks(lambda: visit.slide("Noise", 0), "/encode")
    hidden = np.array(visit.asks(lambda: visit.slide("Occlusion", 0.25), "/encode").json["inputs"][0]).reshape(8, 8)
    assert not hidden[2:6, 2:6].any()  # a quarter of the picture, at its middle
    np.testing.assert_array_equal(hidden[:2], clean.reshape(8, 8)[:2])
    seen = len(visit.asked)
    press(page, "Draw")
    visit.until("document.querySelector('.flow').textContent.includes('a draw')")
    drawn = [a.json for a in visit.asked[seen:] if a.path == "/encode" and a.json.get("sample")]
    assert len(drawn) == 1
    seen = len(visit.asked)
    press(page, "draw again")
    visit.settle()
    again = [a.json for a in visit.asked[seen:] if a.path == "/encode" and a.json.get("sample")]
    assert again[0]["seed"] != drawn[0]["seed"]


def test_a_row_is_drawn_with_the_pointer_and_with_keys(visit: Visit) -> None:
    visit.open("?view=reconstruct&model=vae")
    page = visit.page
    page.get_by_role("radio", name="Draw").check()
    board = page.get_by_label("draw a picture of 8 by 8 pixels")
    box = board.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 20, steps=8)
    page.mouse.up()
    visit.settle()
    drawn = np.array([a for a in visit.asked if a.path == "/encode"][-1].json["inputs"][0]).reshape(8, 8)
    assert drawn[1:7, 3:5].mean() > 0.5  # a stroke down the middle
    assert drawn[:, 0].max() == 0
    page.keyboard.down("Shift")  # rubs out
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.up()
    page.keyboard.up("Shift")
    visit.settle()
    rubbed = np.array([a for a in visit.asked if a.path == "/encode"][-1].json["inputs"][0]).reshape(8, 8)
    assert rubbed[3:5, 3:5].sum() < drawn[3:5, 3:5].sum()
    asked = visit.asks(lambda: press(page, "Clear"), "/encode")
    assert not np.any(asked.json["inputs"][0])
    board.focus()
    page.keyboard.press("ArrowLeft")
    asked = visit.asks(lambda: page.keyboard.press("Space"), "/encode")
    assert np.argmax(asked.json["inputs"][0]) == 4 * 8 + 3
    asked = visit.asks(lambda: page.keyboard.press("Delete"), "/encode")
    assert not np.any(asked.json["inputs"][0])


def test_a_row_is_pasted_and_a_wrong_one_explained(visit: Visit) -> None:
    visit.open("?view=reconstruct&model=hosts")
    page = visit.page
    page.get_by_role("radio", name="Paste").check()
    area = page.get_by_label("a row of 4 numbers, as CSV or JSON")
    area.fill("1, 2, 3")
    press(page, "Use this row")
    expect(page.get_by_role("alert")).to_have_text("Row 1 has 3 numbers; hosts expects 4.")
    area.fill("load,cpu [%],memory/used [MB],disk~io\n2,0.5,110,1")
    asked = visit.asks(lambda: press(page, "Use this row"), "/encode", model="hosts@1")
    assert asked.json["inputs"] == [[0.5, 110, 1, 2]]  # by name, in the model's order
    expect(page.locator(".flow .feature").first).to_contain_text("0.5 %")
    visit.until("location.search.includes('data=0.5,110,1,2')")
    page.reload()
    expect(page.locator(".flow .feature").first).to_contain_text("0.5 %")
    area.fill('{"inputs": [[0.25, 90, 2, 1]]}')
    asked = visit.asks(lambda: press(page, "Use this row"), "/encode", model="hosts@1")
    assert asked.json["inputs"] == [[0.25, 90, 2, 1]]
