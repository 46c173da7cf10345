"""The explorer in a real browser: each control is used, and changes what is shown and what the service is asked."""

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Route, expect

from service.app import create_app
from service.settings import Settings
from tests.service.browsing import Visit, colours, ink, write_rows
from tests.service.running import running

MAP = ".map-card .map canvas:last-child"
OUTPUT = ".point-card .output canvas"
PROJECTION = re.compile(r"−1\.6629.*−0\.2795.*1\.9424", re.DOTALL)


def press(page: Page, name: str) -> None:
    """Click the button that is called `name`."""
    page.get_by_role("button", name=name, exact=True).click()


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


def test_the_pointer_decodes_and_a_click_samples(visit: Visit) -> None:
    visit.open("?view=latent&model=vae&axes=0,1")
    page, map_ = visit.page, visit.page.locator(MAP)
    expect(page.locator(OUTPUT)).to_be_visible()
    box = map_.bounding_box()
    assert box
    asked = visit.asks(lambda: map_.hover(position={"x": 100, "y": 100}), "/decode", model="vae@1")
    z = asked.rows
    assert z.shape == (1, 16)
    assert z[0, 0] < 0 < z[0, 1]  # to the left and above the middle
    np.testing.assert_allclose(z[0, 0], -z[0, 1], rtol=1e-3)  # the map is square
    expect(page.locator(".point-card .z")).to_contain_text(f"{z[0, 0]:.2f}".replace("-", "−"))
    before = ink(page, OUTPUT)
    visit.asks(lambda: map_.click(position={"x": box["width"] - 60, "y": box["height"] / 2}), "/decode")
    expect(page.locator(".point-card dl")).to_contain_text("1 point")
    expect(page.locator(".tray canvas")).to_have_count(1)
    assert ink(page, OUTPUT) != before
    asked = visit.asks(lambda: press(page, "Sample here"), "/decode")
    expect(page.locator(".point-card dl")).to_contain_text("2 points")
    page.wait_for_timeout(400)  # the address follows when things have settled
    kept = [float(v) for v in re.findall(r"z=([^&]*)", page.url)[0].split(",")]
    np.testing.assert_allclose(kept, asked.rows[0], atol=1e-3)
    press(page, "Clear")
    expect(page.locator(".point-card dl")).to_contain_text("0 points")
    expect(page.locator(".tray canvas")).to_have_count(0)


def test_the_point_is_dragged_pushed_by_keys_and_set_by_sliders(visit: Visit) -> None:
    visit.open("?view=latent&model=vae&axes=0,1")
    page, map_ = visit.page, visit.page.locator(MAP)
    expect(page.locator(OUTPUT)).to_be_visible()
    box = map_.bounding_box()
    assert box
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    asked = visit.asks(lambda: page.mouse.move(box["x"] + 260, box["y"] + 160, steps=6), "/decode")
    page.mouse.up()
    first = page.locator(".sliders input").first
    visit.until("document.querySelector('.sliders input').value != 0")
    assert asked.rows[0, 0] < 0
    map_.focus()
    held = float(first.input_value())
    asked = visit.asks(lambda: page.keyboard.press("Shift+ArrowRight"), "/decode")
    assert asked.rows[0, 0] > held
    assert float(first.input_value()) > held
    press(page, "To the middle")
    expect(page.locator(".point-card .z")).to_contain_text("[0.00, 0.00")
    asked = visit.asks(lambda: visit.slide("z3", 1.0), "/decode")
    assert asked.rows[0, 2] == pytest.approx(1.0, abs=0.02)
    assert not np.delete(asked.rows[0], 2).any()
    visit.asks(lambda: map_.press("Enter"), "/decode")
    expect(page.locator(".point-card dl")).to_contain_text("1 point")


def test_the_map_shows_what_is_asked_for(visit: Visit) -> None:
    visit.open("?view=latent&model=vae")
    page, base = visit.page, ".map-card .map canvas:first-child"
    expect(page.locator(OUTPUT)).to_be_visible()
    assert colours(page, base) > 10  # ten labels, the contours, the axes
    for name in ("Codes", "Contours"):
        before = ink(page, base)
        press(page, name)
        assert ink(page, base) != before
        assert page.get_by_role("button", name=name, exact=True).get_attribute("aria-pressed") == "false"
    press(page, "Codes")
    before = ink(page, base)
    press(page, "3")
    assert ink(page, base) != before
    before = ink(page, base)
    press(page, "zoom in")
    assert ink(page, base) != before
    press(page, "zoom out")
    assert ink(page, base) == before
    press(page, "zoom in")
    press(page, "Whole")
    assert ink(page, base) == before
    asked = visit.asks(lambda: press(page, "Decodings"), "/decode")
    assert asked.rows.shape == (169, 16)
    visit.until("location.search.includes('grid=1')")
    page.get_by_label("Across").select_option("4")
    expect(page.get_by_label("Up")).not_to_have_value("pc")
    asked = visit.asks(lambda: page.get_by_label("Up").select_option("6"), "/decode")
    visit.until("location.search.includes('axes=4,6')")
    press(page, "Decodings")
    before = ink(page, base)
    assert page.evaluate("new URLSearchParams(location.search).get('axes')") == "4,6"


def test_two_points_are_joined_by_a_strip(visit: Visit) -> None:
    visit.open("?view=latent&model=vae&axes=0,1")
    page, map_ = visit.page, visit.page.locator(MAP)
    expect(page.locator(".strip").first).to_contain_text("Neither end is set")
    map_.click(position={"x": 150, "y": 150})
    press(page, "Set A")
    expect(page.locator(".strip").first).to_contain_text("A is set")
    map_.click(position={"x": 350, "y": 200})
    asked = visit.asks(lambda: map_.press("b"), "/interpolate", model="vae@1")
    body = asked.json
    assert (body["steps"], body["method"]) == (9, "linear")
    assert body["start"]["latent"][0] < body["end"]["latent"][0]
    expect(page.locator(".strip canvas")).to_have_count(9)
    asked = visit.asks(lambda: page.get_by_role("radio", name="Spherical").check(), "/interpolate")
    assert asked.json["method"] == "slerp"
    asked = visit.asks(lambda: visit.slide("Steps", 5), "/interpolate")
    assert asked.json["steps"] == 5
    expect(page.locator(".strip canvas")).to_have_count(5)


def test_draws_from_the_prior_follow_seed_and_temperature(visit: Visit) -> None:
    visit.open("?view=latent&model=vae")
    page = visit.page
    asked = visit.asks(lambda: press(page, "Draw"), "/sample", model="vae@1")
    assert asked.json == {"n": 16, "seed": 7, "temperature": 1}
    expect(page.locator(".samples canvas")).to_have_count(16)
    assert visit.asks(lambda: press(page, "Next seed"), "/sample", model="vae@1").json["seed"] == 8
    page.get_by_label("Seed").fill("42")
    assert visit.asks(lambda: page.get_by_label("Seed").press("Enter"), "/sample", model="vae@1").json["seed"] == 42
    asked = visit.asks(lambda: visit.slide("Temperature", 0), "/sample", model="vae@1")
    assert asked.json["temperature"] == 0
    visit.until("document.querySelectorAll('.samples canvas').length === 16")
    visit.asks(lambda: press(page, "go to sample 1"), "/decode")
    expect(page.locator(".point-card .z")).to_contain_text("[0.00, 0.00")  # at temperature 0 all is the middle


def test_the_kinds_stand_side_by_side(visit: Visit) -> None:
    visit.open("?view=latent&model=vae")
    page = visit.page
    page.get_by_role("heading", name="Side by side").scroll_into_view_if_needed()
    expect(page.locator(".small-map .output canvas")).to_have_count(4)
    assert {a.query["model"] for a in visit.asked if a.path == "/decode"} == {"ae@1", "linear@1", "pca@1", "vae@1"}
    small = page.get_by_label("small map of pca")
    asked = visit.asks(lambda: small.hover(position={"x": 30, "y": 30}), "/decode", model="pca@1")
    assert asked.rows.shape == (1, 16)
    seen = len(visit.asked)
    press(page, "Decodings of all")
    page.wait_for_timeout(300)
    assert sorted(a.rows.shape[0] for a in visit.asked[seen:] if a.path == "/decode" and len(a.rows) > 1) == [81] * 4


def test_the_map_bears_twenty_thousand_rows_of_ones_own(visit: Visit, tmp_path: Path, digits: np.ndarray) -> None:
    visit.open("?view=latent&model=vae")
    page = visit.page
    expect(page.locator(OUTPUT)).to_be_visible()
    rows = np.tile(digits, (12, 1))[:20_000]
    file = write_rows(tmp_path / "own.npy", rows + np.random.RandomState(0).normal(0, 0.05, rows.shape).astype("f4"))
    page.get_by_label("a file of rows to place on the map").set_input_files(file)
    expect(page.get_by_text("20000 rows of yours")).to_be_visible(timeout=20_000)
    sent = [a.rows for a in visit.asked if a.path == "/encode"]
    assert sum(map(len, sent)) == 20_000
    base = ".map-card .map canvas:first-child"
    before = ink(page, base)
    press(page, "Codes")
    assert ink(page, base) != before
    press(page, "Codes")
    assert ink(page, base) == before  # all of them, drawn again
    middle = page.locator(MAP).bounding_box()
    assert middle
    over = {"x": middle["width"] / 2, "y": middle["height"] / 2}
    visit.asks(lambda: page.locator(MAP).hover(position=over), "/decode")  # type: ignore[arg-type]
    expect(page.locator(".point-card")).to_contain_text("of your rows lies here")


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
    page.wait_for_timeout(200)
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
    page.wait_for_timeout(300)
    drawn = np.array([a for a in visit.asked if a.path == "/encode"][-1].json["inputs"][0]).reshape(8, 8)
    assert drawn[1:7, 3:5].mean() > 0.5  # a stroke down the middle
    assert drawn[:, 0].max() == 0
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


def test_the_example_of_pca_has_the_right_numbers(visit: Visit) -> None:
    visit.open("?view=pca&model=pca")
    page, text = visit.page, visit.page.locator(".step-text")
    expect(text).to_contain_text(PROJECTION)
    press(page, "Back")
    expect(text).to_contain_text("3.3081")
    expect(text).to_contain_text("0.0252")
    expect(text).to_contain_text(re.compile(r"0\.5449\s*0\.8385"))
    press(page, "3 Covariance")
    expect(text).to_contain_text("2.3333")
    press(page, "1 Data")
    page.get_by_label("row 3, column 2").fill("4")
    page.get_by_label("row 3, column 2").press("Enter")
    press(page, "4 Eigenvectors")
    values = np.linalg.eigvalsh(np.cov(np.array([[1, 2], [2, 3], [3, 4.0]]).T))
    expect(text).to_contain_text(f"{values[1]:.4f}")  # 2, and nothing beside it
    press(page, "1 Data")
    press(page, "The example's")
    for _ in range(4):
        press(page, "Next")
    expect(text).to_contain_text(PROJECTION)
    expect(page.get_by_role("button", name="Next", exact=True)).to_be_disabled()


def test_components_and_angles_are_those_of_the_loaded_models(visit: Visit, site: str) -> None:
    visit.open("?view=pca&model=pca")
    page = visit.page
    expect(page.locator(".components canvas")).to_have_count(16)
    decoded = {a.query["model"]: a.rows for a in visit.asked if a.path == "/decode"}
    np.testing.assert_array_equal(decoded["pca@1"], np.vstack((np.zeros(16), np.eye(16))))
    press(page, "component 2")
    expect(page.locator(".view-pca")).to_contain_text("Component 2: what one unit of its score adds")
    bases = []
    for name in ("pca", "linear"):
        outputs = page.request.post(f"{site}/decode?model={name}", data={"latents": decoded["pca@1"].tolist()}).json()
        x = np.array(outputs["outputs"])
        bases.append(np.linalg.qr((x[1:] - x[0]).T)[0])
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    largest = np.degrees(np.arccos(cosines.min().clip(-1, 1)))
    expect(page.locator(".view-pca")).to_contain_text(f"largest {largest:.1f}°")
    visit.asks(lambda: page.get_by_label("Compare with").select_option("vae"), "/decode", model="vae@1")
    expect(page.locator(".view-pca")).to_contain_text("with a curved decoder")


def test_a_verdict_is_shown_and_a_feature_perturbed(visit: Visit) -> None:
    visit.open("?view=anomaly&model=hosts")
    page = visit.page
    asked = visit.asks(lambda: press(page, "next row"), "/anomaly", model="hosts@1")
    assert asked.json["explain"] == 4
    expect(page.locator(".stamp")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("histogram of calibration scores; threshold"))).to_be_visible()
    expect(page.locator("table.reasons tbody tr")).to_have_count(4)
    asked = visit.asks(lambda: visit.slide("α", -2), "/anomaly")
    assert asked.json["alpha"] == pytest.approx(0.01)
    seen = len(visit.asked)
    page.locator("table.reasons").get_by_role("button", name="load").click()
    expect(page.get_by_role("img", name="score over values of load")).to_be_visible()
    sweep = next(a.json for a in visit.asked[seen:] if a.path == "/anomaly" and len(a.json["inputs"]) > 1)
    varied = np.array(sweep["inputs"])
    assert len(varied) == 41
    assert (np.ptp(varied, axis=0) > 0).tolist() == [False, False, False, True]
    asked = visit.asks(lambda: visit.slide("load", 60), "/anomaly")
    assert asked.json["inputs"][0][3] == pytest.approx(varied[-1, 3])  # at the end of its range
    expect(page.locator(".stamp")).to_have_text("Anomalous")
    press(page, "As it was")
    expect(page.locator(".stamp")).to_have_text("Normal")
    page.get_by_label("Feature").select_option("0")
    expect(page.get_by_role("img", name="score over values of cpu")).to_be_visible()


def test_a_pixel_is_perturbed_by_clicking_it(visit: Visit) -> None:
    visit.open("?view=anomaly&model=vae")
    page = visit.page
    seen_row = page.locator(".triple canvas").first
    expect(page.locator(".triple canvas")).to_have_count(3)
    box = seen_row.bounding_box()
    assert box
    seen_row.click(position={"x": box["width"] * 2.5 / 8, "y": box["height"] * 4.5 / 8})
    expect(page.get_by_label("Feature")).to_have_value(str(4 * 8 + 2))
    expect(page.get_by_role("img", name="score over values of pixel[4,2]")).to_be_visible()


def test_a_batch_lists_the_strangest_first(visit: Visit, tmp_path: Path, digits: np.ndarray) -> None:
    visit.open("?view=anomaly&model=vae")
    page = visit.page
    asked = visit.asks(lambda: press(page, "The held-out rows"), "/anomaly")
    if len(asked.json["inputs"]) == 1:
        asked = next(a for a in visit.asked[::-1] if a.path == "/anomaly" and len(a.json["inputs"]) > 1)
    assert len(asked.json["inputs"]) == 180
    expect(page.locator(".view-anomaly")).to_contain_text("of 180 rows are anomalous")
    rows = np.vstack((digits[:5], np.random.RandomState(0).uniform(size=(1, 64)), digits[5:9])).astype("f4")
    file = write_rows(tmp_path / "batch.npy", rows)
    page.get_by_label("a file of rows to judge").set_input_files(file)
    expect(page.locator(".view-anomaly")).to_contain_text("of 10 rows are anomalous")
    first = page.locator("table.batch tbody tr").first
    expect(first.locator("th")).to_have_text("5")  # the noise
    expect(first).to_contain_text("anomalous")
    seen = len(visit.asked)
    page.get_by_label("control the false discovery rate").check()
    page.wait_for_timeout(300)
    assert [a.json.get("fdr") for a in visit.asked[seen:] if a.path == "/anomaly"] == [0.05]
    asked = visit.asks(lambda: press(page, "look at row 5"), "/anomaly")
    np.testing.assert_allclose(asked.json["inputs"][0], rows[5], atol=1e-6)
    expect(page.locator(".stamp")).to_have_text("Anomalous")


def test_a_file_of_tables_is_read_by_its_header(visit: Visit, tmp_path: Path) -> None:
    visit.open("?view=anomaly&model=hosts")
    page = visit.page
    expect(page.locator(".stamp")).to_be_visible()
    (tmp_path / "rows.csv").write_text("load,cpu,memory/used,disk~io\n0,0,100,0\n90,0,100,0\n")
    page.get_by_label("a file of rows to judge").set_input_files(tmp_path / "rows.csv")
    expect(page.locator("table.batch tbody tr").first).to_contain_text("load")
    (tmp_path / "short.csv").write_text("load,cpu\n0,0\n")
    page.get_by_label("a file of rows to judge").set_input_files(tmp_path / "short.csv")
    expect(page.get_by_role("alert")).to_have_text("The header lacks memory/used, disk~io.")


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


@pytest.mark.parametrize(("quiz", "wrong", "right"), [("Quiz 1", 0, 1), ("Quiz 2", 1, 2)])
def test_an_answer_is_explained(visit: Visit, quiz: str, wrong: int, right: int) -> None:
    visit.open("?view=quizzes")
    card = visit.page.locator(".quiz", has=visit.page.get_by_role("heading", name=quiz))
    card.get_by_role("radio").nth(wrong).check()
    expect(card.locator(".verdict")).to_contain_text("✗")
    card.get_by_role("radio").nth(right).check()
    expect(card.locator(".verdict")).to_contain_text("✓ Right.")
    visit.until(f"location.search.includes('={right}')")
    visit.page.reload()
    expect(card.locator(".verdict")).to_contain_text("✓ Right.")
    card.get_by_role("button", name="Try again").click()
    expect(card.locator(".verdict")).to_be_empty()


def test_words_are_explained_to_pointer_and_keyboard(visit: Visit) -> None:
    visit.open("?view=latent&model=vae")
    word = visit.page.get_by_role("button", name="prior", exact=True)
    tip = visit.page.get_by_role("tooltip").filter(has_text="before it sees a row")
    expect(tip).to_be_hidden()
    word.hover()
    expect(tip).to_be_visible()
    visit.page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    word.focus()
    expect(tip).to_be_visible()
    visit.page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_light_and_dark_are_chosen_and_remembered(visit: Visit) -> None:
    visit.open("?view=quizzes")
    page = visit.page
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    press(page, "switch to dark colours")
    assert page.evaluate(paper) != light
    page.reload()
    expect(page.get_by_role("button", name="switch to light colours")).to_be_visible()
    page.get_by_role("button", name="switch to light colours").click()
    assert page.evaluate(paper) == light


def test_a_view_is_shared_by_its_address(visit: Visit, browser: Browser) -> None:
    visit.open("?view=latent&model=vae&axes=2,5")
    page = visit.page
    expect(page.locator(OUTPUT)).to_be_visible()
    visit.slide("z3", 1.2)
    visit.until("location.search.includes('z=0,0,1.')")
    page.wait_for_timeout(300)
    shown = ink(page, OUTPUT)
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        other = context.new_page()
        other.goto(page.url)
        expect(other.locator(OUTPUT)).to_be_visible()
        expect(other.get_by_label("Across")).to_have_value("2")
        assert ink(other, OUTPUT) == shown


def test_a_model_that_keeps_its_rows_to_itself_is_explored_all_the_same(visit: Visit) -> None:
    visit.open("?view=latent&model=secret")
    page = visit.page
    expect(page.locator(".view-latent")).to_contain_text("secret carries no held-out rows")
    expect(page.locator(".point-card .feature")).to_have_count(4)
    for view in ("reconstruct", "anomaly"):
        page.locator(f"nav a[data-view={view}]").click()
        expect(page.locator(f".view-{view}")).to_contain_text("carries no held-out rows")
    expect(page.locator(".stamp")).to_be_visible()
    assert not [a for a in visit.asked if a.path.endswith("held-out")]


def test_a_problem_is_a_sentence_with_the_requests_id(visit: Visit) -> None:
    visit.open("?view=reconstruct&model=hosts&from=paste&data=1e38,1e38,1e38,-1e38")
    alert = visit.page.locator("table.errors [role=alert]").first
    expect(alert).to_contain_text(re.compile(r"^[A-Z].*\. Request \w{16}$"))
    identity = alert.locator("code").inner_text()
    refusals = [a.request.response() for a in visit.asked if a.path == "/reconstruct"]
    told = [answer.json() for answer in refusals if answer and answer.status == 422]
    assert identity in [problem["request_id"] for problem in told]
    assert told[0]["detail"][1:] in alert.inner_text()
    assert visit.faults  # the browser's own lines about answers of 422
    assert all("422" in fault for fault in visit.faults)
    visit.faults.clear()


def test_what_is_no_longer_wanted_is_aborted(visit: Visit) -> None:
    visit.open("?view=reconstruct&model=vae")
    page = visit.page
    expect(page.locator("table.errors")).to_be_visible()
    given_up: list[str] = []
    page.on("requestfailed", lambda request: given_up.append(request.failure or ""))

    def late(route: Route) -> None:
        page.wait_for_timeout(150)
        route.continue_()

    page.route("**/encode*", late)
    for value in (0.1, 0.2, 0.3):
        visit.slide("Noise", value)
    page.wait_for_timeout(800)
    assert given_up
    assert set(given_up) == {"net::ERR_ABORTED"}
    expect(page.locator(".flow > li")).to_have_count(6)


def test_without_a_model_the_page_says_what_to_do(browser: Browser, tmp_path: Path) -> None:
    app = create_app(Settings(artifacts=tmp_path, log_level="error"))
    with running(app) as client, browser.new_context() as context:
        visit = Visit(context.new_page(), str(client.base_url))
        visit.open("?view=latent")
        expect(visit.page.locator(".nothing")).to_contain_text("elbo demo")
        assert visit.faults == []
