"""The explorer's latent space: the map and its point, interpolation, draws, kinds side by side, one's own rows."""

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, FloatRect, Locator, Page, expect

from service.app import create_app
from service.settings import Settings
from tests.service.browsing import MAP, OUTPUT, Visit, colours, ink, press, write_rows
from tests.service.running import running


def mapped(visit: Visit) -> tuple[Page, Locator, FloatRect]:
    """The map of two latents, once the point on it is decoded: the page, the map, and where it lies."""
    visit.open("?view=latent&model=vae&axes=0,1")
    expect(visit.page.locator(OUTPUT)).to_be_visible()
    map_ = visit.page.locator(MAP)
    box = map_.bounding_box()
    assert box
    return visit.page, map_, box


def test_the_pointer_decodes_and_a_click_samples(visit: Visit) -> None:
    page, map_, box = mapped(visit)
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
    near = "z => Math.abs(parseFloat(new URLSearchParams(location.search).get('z')) - z) < 1e-3"
    visit.until(near, float(asked.rows[0, 0]))  # the address follows when things have settled
    kept = [float(v) for v in re.findall(r"z=([^&]*)", page.url)[0].split(",")]
    np.testing.assert_allclose(kept, asked.rows[0], atol=1e-3)
    press(page, "Clear")
    expect(page.locator(".point-card dl")).to_contain_text("0 points")
    expect(page.locator(".tray canvas")).to_have_count(0)


def test_the_point_is_dragged_pushed_by_keys_and_set_by_sliders(visit: Visit) -> None:
    page, map_, box = mapped(visit)
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


CONTOUR = """() => {
  document.head.style.color = "var(--contour)";
  return getComputedStyle(document.head).color.match(/\\d+/g).map(Number);
}"""
NEAR = """(canvas, [points, [r, g, b]]) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  return points.map(([x, y]) => {
    const near = copy.getImageData(Math.round(x) - 2, Math.round(y) - 2, 5, 5).data;
    for (let i = 0; i < near.length; i += 4)
      if (Math.abs(near[i] - r) + Math.abs(near[i + 1] - g) + Math.abs(near[i + 2] - b) < 60) return true;
    return false;
  });
}"""


def test_the_contours_are_those_of_a_standard_normal(visit: Visit) -> None:
    """Circles of one, two and three standard deviations about zero; nothing between them."""
    page, map_, box = mapped(visit)
    press(page, "Codes")
    tone = page.evaluate(CONTOUR)
    at = [visit.asks(lambda x=x: map_.hover(position={"x": x, "y": 100}), "/decode").rows[0, :2] for x in (100, 300)]  # type: ignore[misc] # a default binds x
    scale = 200 / (at[1][0] - at[0][0])  # pixels a unit
    middle = np.array([100 - scale * at[0][0], 100 + scale * at[0][1]])
    base = page.locator(".map-card .map canvas:first-child")
    assert abs(middle - box["width"] / 2).max() < box["width"] / 4
    for radius, drawn in ((1, True), (2, True), (3, True), (0.5, False), (1.5, False), (2.5, False)):
        angles = np.array([0.6, 2.2, 3.7, 5.4])  # away from the axes and the words
        circle = middle + scale * radius * np.column_stack((np.cos(angles), -np.sin(angles)))
        inside = circle[((circle > 3) & (circle < box["width"] - 3)).all(1)]
        assert len(inside)
        assert set(base.evaluate(NEAR, [inside.tolist(), tone])) == {drawn}, radius


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


def test_each_latent_has_a_slider_and_the_dead_are_marked(visit: Visit, site: str) -> None:
    visit.open("?view=latent&model=vae")
    page = visit.page
    report = page.request.get(f"{site}/models/vae").json()["latent_report"]
    dead = [f"z{k + 1}" for k, latent in enumerate(report) if not latent["active"]]
    assert 0 < len(dead) < len(report)
    expect(page.locator(".sliders .slider")).to_have_count(len(report))
    assert page.locator(".sliders .is-dead .name sub").all_inner_texts() == [name[1:] for name in dead]
    expect(page.get_by_text(f"{len(dead)} of {len(report)} are dead")).to_be_visible()
    widths = page.locator(".sliders .activity > span").evaluate_all("all => all.map(e => parseFloat(e.style.width))")
    nats = np.array([latent["kl"] for latent in report])
    np.testing.assert_allclose(widths, 100 * nats / nats.max(), atol=0.01)


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
    map_.click(position={"x": 250, "y": 300})
    moved = visit.asks(lambda: press(page, "Set B"), "/interpolate").json
    assert moved["start"] == body["start"]
    assert moved["end"]["latent"][1] < body["end"]["latent"][1]  # lower on the map
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
    visit.settle()
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
    visit.asks(lambda: page.locator(MAP).hover(position=over), "/decode")  # type: ignore[arg-type] # a dict where playwright has its own
    expect(page.locator(".point-card")).to_contain_text("of your rows lies here")


def test_a_file_too_long_for_the_map_is_said_to_be_cut(visit: Visit, tmp_path: Path) -> None:
    visit.open("?view=latent&model=hosts")
    file = write_rows(tmp_path / "long.npy", np.full((20_001, 4), [0, 0, 100, 0], np.float32))
    visit.page.get_by_label("a file of rows to place on the map").set_input_files(file)
    told = visit.page.get_by_text("the first 20000 of 20001 rows of yours")
    expect(told).to_be_visible(timeout=20_000)
    assert sum(len(a.rows) for a in visit.asked if a.path == "/encode") == 20_000


def test_a_service_that_takes_few_rows_gets_few_at_a_time(
    browser: Browser, artifacts: Path, tmp_path: Path, digits: np.ndarray
) -> None:
    settings = Settings(artifacts=artifacts, max_rows=300, log_level="error", backend="torchscript")
    with running(create_app(settings)) as client, browser.new_context() as context:
        visit = Visit(context.new_page(), str(client.base_url))
        visit.open("?view=latent&model=vae")
        file = write_rows(tmp_path / "own.npy", digits[:1000])
        visit.page.get_by_label("a file of rows to place on the map").set_input_files(file)
        expect(visit.page.get_by_text("1000 rows of yours")).to_be_visible()
        visit.settle()
        answered = [(a, a.request.response()) for a in visit.asked if a.path == "/encode"]
        taken = np.vstack([a.rows for a, answer in answered if answer and answer.status == 200])
        np.testing.assert_array_equal(taken, digits[:1000])  # each once, in order
        assert max(len(a.rows) for a, answer in answered if answer and answer.status == 200) <= 300
        assert all("413" in fault for fault in visit.faults)
