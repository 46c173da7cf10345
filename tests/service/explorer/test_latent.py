"""The latent space view: map, current point, interpolation, samples, side-by-side maps, the user's own rows."""

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, FloatRect, Locator, Page, expect

from service.app import create_app
from service.settings import Settings
from tests.service.explorer.browser import (
    MAP,
    MAP_BASE,
    OUTPUT,
    ExplorerPage,
    canvas_hash,
    click_button,
    count_colours,
    save_npy,
)
from tests.service.running import running


def open_map(explorer: ExplorerPage) -> tuple[Page, Locator, FloatRect]:
    """Open the map of the first two latents; return the page, the map and its bounding box."""
    explorer.open("?view=latent&model=vae&axes=0,1")
    expect(explorer.page.locator(OUTPUT)).to_be_visible()
    map_ = explorer.page.locator(MAP)
    box = map_.bounding_box()
    assert box
    return explorer.page, map_, box


def test_hovering_over_the_map_decodes_a_point_and_clicking_adds_a_point(explorer: ExplorerPage) -> None:
    page, map_, box = open_map(explorer)
    request = explorer.expect_request(lambda: map_.hover(position={"x": 100, "y": 100}), "/decode", model="vae@1")
    z = request.rows
    assert z.shape == (1, 16)
    assert z[0, 0] < 0 < z[0, 1]  # left of the centre and above it
    np.testing.assert_allclose(z[0, 0], -z[0, 1], rtol=1e-3)  # the map is square
    expect(page.locator(".point-card .z")).to_contain_text(f"{z[0, 0]:.2f}".replace("-", "−"))
    before = canvas_hash(page, OUTPUT)
    explorer.expect_request(lambda: map_.click(position={"x": box["width"] - 60, "y": box["height"] / 2}), "/decode")
    expect(page.locator(".point-card dl")).to_contain_text("1 point")
    expect(page.locator(".tray canvas")).to_have_count(1)
    assert canvas_hash(page, OUTPUT) != before
    request = explorer.expect_request(lambda: click_button(page, "Sample here"), "/decode")
    expect(page.locator(".point-card dl")).to_contain_text("2 points")
    near = "z => Math.abs(parseFloat(new URLSearchParams(location.search).get('z')) - z) < 1e-3"
    explorer.wait_for(near, float(request.rows[0, 0]))  # the address is updated with a delay
    kept = [float(v) for v in re.findall(r"z=([^&]*)", page.url)[0].split(",")]
    np.testing.assert_allclose(kept, request.rows[0], atol=1e-3)
    click_button(page, "Clear")
    expect(page.locator(".point-card dl")).to_contain_text("0 points")
    expect(page.locator(".tray canvas")).to_have_count(0)


def test_point_is_moved_by_dragging_by_keys_and_by_sliders(explorer: ExplorerPage) -> None:
    page, map_, box = open_map(explorer)
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    request = explorer.expect_request(lambda: page.mouse.move(box["x"] + 260, box["y"] + 160, steps=6), "/decode")
    page.mouse.up()
    first = page.locator(".sliders input").first
    explorer.wait_for("document.querySelector('.sliders input').value != 0")
    assert request.rows[0, 0] < 0
    map_.focus()
    held = float(first.input_value())
    request = explorer.expect_request(lambda: page.keyboard.press("Shift+ArrowRight"), "/decode")
    assert request.rows[0, 0] > held
    assert float(first.input_value()) > held
    click_button(page, "Go to centre")
    expect(page.locator(".point-card .z")).to_contain_text("[0.00, 0.00")
    request = explorer.expect_request(lambda: explorer.set_slider("z3", 1.0), "/decode")
    assert request.rows[0, 2] == pytest.approx(1.0, abs=0.02)
    assert not np.delete(request.rows[0], 2).any()
    explorer.expect_request(lambda: map_.press("Enter"), "/decode")
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


def test_contours_are_circles_at_1_2_and_3_standard_deviations(explorer: ExplorerPage) -> None:
    page, map_, box = open_map(explorer)
    click_button(page, "Codes")
    tone = page.evaluate(CONTOUR)

    def latent_at(x: float) -> np.ndarray:
        rows = explorer.expect_request(lambda: map_.hover(position={"x": x, "y": 100}), "/decode").rows
        return np.asarray(rows[0, :2])

    at = [latent_at(100), latent_at(300)]
    scale = 200 / (at[1][0] - at[0][0])  # pixels per unit
    middle = np.array([100 - scale * at[0][0], 100 + scale * at[0][1]])
    base = page.locator(MAP_BASE)
    assert abs(middle - box["width"] / 2).max() < box["width"] / 4
    for radius, drawn in ((1, True), (2, True), (3, True), (0.5, False), (1.5, False), (2.5, False)):
        angles = np.array([0.6, 2.2, 3.7, 5.4])  # away from the axes and the text
        circle = middle + scale * radius * np.column_stack((np.cos(angles), -np.sin(angles)))
        inside = circle[((circle > 3) & (circle < box["width"] - 3)).all(1)]
        assert len(inside)
        assert set(base.evaluate(NEAR, [inside.tolist(), tone])) == {drawn}, radius


def test_map_controls_change_the_map(explorer: ExplorerPage) -> None:
    explorer.open("?view=latent&model=vae")
    page = explorer.page
    expect(page.locator(OUTPUT)).to_be_visible()
    assert count_colours(page, MAP_BASE) > 10  # colours of ten labels, the contours and the axes
    for name in ("Codes", "Contours"):
        before = canvas_hash(page, MAP_BASE)
        click_button(page, name)
        assert canvas_hash(page, MAP_BASE) != before
        assert page.get_by_role("button", name=name, exact=True).get_attribute("aria-pressed") == "false"
    click_button(page, "Codes")
    before = canvas_hash(page, MAP_BASE)
    click_button(page, "3")
    assert canvas_hash(page, MAP_BASE) != before
    before = canvas_hash(page, MAP_BASE)
    click_button(page, "zoom in")
    assert canvas_hash(page, MAP_BASE) != before
    click_button(page, "zoom out")
    assert canvas_hash(page, MAP_BASE) == before
    click_button(page, "zoom in")
    click_button(page, "Reset zoom")
    assert canvas_hash(page, MAP_BASE) == before
    request = explorer.expect_request(lambda: click_button(page, "Decoded grid"), "/decode")
    assert request.rows.shape == (169, 16)
    explorer.wait_for("location.search.includes('grid=1')")
    page.get_by_label("Horizontal axis").select_option("4")
    expect(page.get_by_label("Vertical axis")).not_to_have_value("pc")
    request = explorer.expect_request(lambda: page.get_by_label("Vertical axis").select_option("6"), "/decode")
    explorer.wait_for("location.search.includes('axes=4,6')")
    click_button(page, "Decoded grid")
    assert page.evaluate("new URLSearchParams(location.search).get('axes')") == "4,6"


def test_each_latent_has_a_slider_and_inactive_latents_are_marked(explorer: ExplorerPage, site_url: str) -> None:
    explorer.open("?view=latent&model=vae")
    page = explorer.page
    report = page.request.get(f"{site_url}/models/vae").json()["latent_report"]
    inactive = [f"z{k + 1}" for k, latent in enumerate(report) if not latent["active"]]
    assert 0 < len(inactive) < len(report)
    expect(page.locator(".sliders .slider")).to_have_count(len(report))
    assert page.locator(".sliders .is-inactive .name sub").all_inner_texts() == [name[1:] for name in inactive]
    expect(page.get_by_text(f"{len(inactive)} of {len(report)} are inactive")).to_be_visible()
    widths = page.locator(".sliders .activity > span").evaluate_all("all => all.map(e => parseFloat(e.style.width))")
    nats = np.array([latent["kl"] for latent in report])
    np.testing.assert_allclose(widths, 100 * nats / nats.max(), atol=0.01)


def test_interpolation_uses_the_chosen_ends_method_and_number_of_steps(explorer: ExplorerPage) -> None:
    explorer.open("?view=latent&model=vae&axes=0,1")
    page, map_ = explorer.page, explorer.page.locator(MAP)
    expect(page.locator(".strip").first).to_contain_text("Neither end is set")
    map_.click(position={"x": 150, "y": 150})
    click_button(page, "Set A")
    expect(page.locator(".strip").first).to_contain_text("A is set")
    map_.click(position={"x": 350, "y": 200})
    request = explorer.expect_request(lambda: map_.press("b"), "/interpolate", model="vae@1")
    body = request.json
    assert (body["steps"], body["method"]) == (9, "linear")
    assert body["start"]["latent"][0] < body["end"]["latent"][0]
    expect(page.locator(".strip canvas")).to_have_count(9)
    map_.click(position={"x": 250, "y": 300})
    moved = explorer.expect_request(lambda: click_button(page, "Set B"), "/interpolate").json
    assert moved["start"] == body["start"]
    assert moved["end"]["latent"][1] < body["end"]["latent"][1]  # lower on the map
    request = explorer.expect_request(lambda: page.get_by_role("radio", name="Spherical").check(), "/interpolate")
    assert request.json["method"] == "slerp"
    request = explorer.expect_request(lambda: explorer.set_slider("Steps", 5), "/interpolate")
    assert request.json["steps"] == 5
    expect(page.locator(".strip canvas")).to_have_count(5)


def test_samples_use_the_chosen_seed_and_temperature(explorer: ExplorerPage) -> None:
    explorer.open("?view=latent&model=vae")
    page = explorer.page
    request = explorer.expect_request(lambda: click_button(page, "Draw"), "/sample", model="vae@1")
    assert request.json == {"n": 16, "seed": 7, "temperature": 1}
    expect(page.locator(".samples canvas")).to_have_count(16)
    request = explorer.expect_request(lambda: click_button(page, "Next seed"), "/sample", model="vae@1")
    assert request.json["seed"] == 8
    seed = page.get_by_label("Seed")
    seed.fill("42")
    request = explorer.expect_request(lambda: seed.press("Enter"), "/sample", model="vae@1")
    assert request.json["seed"] == 42
    request = explorer.expect_request(lambda: explorer.set_slider("Temperature", 0), "/sample", model="vae@1")
    assert request.json["temperature"] == 0
    explorer.wait_for("document.querySelectorAll('.samples canvas').length === 16")
    explorer.expect_request(lambda: click_button(page, "go to sample 1"), "/decode")
    response = request.sent.response()
    assert response is not None
    decoded = explorer.requests_to("/decode")[-1].rows
    assert np.abs(decoded - np.float32(response.json()["latents"][0])).max(axis=1).min() < 1e-5


def test_models_are_shown_side_by_side(explorer: ExplorerPage) -> None:
    explorer.open("?view=latent&model=vae")
    page = explorer.page
    page.get_by_role("heading", name="Side by side").scroll_into_view_if_needed()
    expect(page.locator(".small-map .output canvas")).to_have_count(4)
    decoded = {request.query["model"] for request in explorer.requests_to("/decode")}
    assert decoded == {"ae@1", "linear@1", "pca@1", "vae@1"}
    small = page.get_by_label("small map of pca")
    request = explorer.expect_request(lambda: small.hover(position={"x": 30, "y": 30}), "/decode", model="pca@1")
    assert request.rows.shape == (1, 16)
    before = len(explorer.requests)
    click_button(page, "Decoded grids")
    explorer.wait_until_idle()
    counts = [len(request.rows) for request in explorer.requests_to("/decode", since=before)]
    assert [count for count in counts if count > 1] == [81] * 4


def test_map_shows_20000_rows_from_a_file(
    explorer: ExplorerPage, site_url: str, tmp_path: Path, digits: np.ndarray
) -> None:
    response = explorer.page.request.post(f"{site_url}/encode?model=vae", data={"inputs": [digits[0].tolist()]})
    latents = ",".join(str(value) for value in response.json()["latents"][0])
    explorer.open(f"?view=latent&model=vae&z={latents}")
    page = explorer.page
    expect(page.locator(OUTPUT)).to_be_visible()
    rows = np.tile(digits, (12, 1))[:20_000]
    file = save_npy(tmp_path / "own.npy", rows + np.random.RandomState(0).normal(0, 0.05, rows.shape).astype("f4"))
    page.get_by_label("file of rows to show on the map").set_input_files(file)
    expect(page.get_by_text("20000 rows from your file")).to_be_visible(timeout=20_000)
    sent = [request.rows for request in explorer.requests_to("/encode")]
    assert sum(map(len, sent)) == 20_000
    before = canvas_hash(page, MAP_BASE)
    click_button(page, "Codes")
    assert canvas_hash(page, MAP_BASE) != before
    click_button(page, "Codes")
    assert canvas_hash(page, MAP_BASE) == before  # all points are visible again
    middle = page.locator(MAP).bounding_box()
    assert middle
    click_button(page, "zoom in")  # the map is now centred on the latents of the first row
    explorer.expect_request(
        lambda: page.locator(MAP).hover(position={"x": middle["width"] / 2, "y": middle["height"] / 2}), "/decode"
    )
    expect(page.locator(".point-card")).to_contain_text("of your rows lies here")


def test_map_shows_only_the_first_20000_rows_of_a_long_file_and_a_note_says_so(
    explorer: ExplorerPage, tmp_path: Path
) -> None:
    explorer.open("?view=latent&model=hosts")
    file = save_npy(tmp_path / "long.npy", np.full((20_001, 4), [0, 0, 100, 0], np.float32))
    explorer.page.get_by_label("file of rows to show on the map").set_input_files(file)
    note = explorer.page.get_by_text("the first 20000 of 20001 rows from your file")
    expect(note).to_be_visible(timeout=20_000)
    assert sum(len(request.rows) for request in explorer.requests_to("/encode")) == 20_000


def test_rows_are_encoded_in_batches_that_the_service_accepts(
    browser: Browser, artifacts: Path, tmp_path: Path, digits: np.ndarray
) -> None:
    settings = Settings(artifacts=artifacts, max_rows=300, log_level="error", backend="torchscript")
    with running(create_app(settings)) as client, browser.new_context() as context:
        explorer = ExplorerPage(context.new_page(), str(client.base_url))
        explorer.open("?view=latent&model=vae")
        file = save_npy(tmp_path / "own.npy", digits[:1000])
        explorer.page.get_by_label("file of rows to show on the map").set_input_files(file)
        expect(explorer.page.get_by_text("1000 rows from your file")).to_be_visible()
        explorer.wait_until_idle()
        pairs = [(request.rows, request.sent.response()) for request in explorer.requests_to("/encode")]
        accepted = [rows for rows, response in pairs if response and response.status == 200]
        np.testing.assert_array_equal(np.vstack(accepted), digits[:1000])  # each row once, in order
        assert max(map(len, accepted)) <= 300
        assert all("413" in error for error in explorer.errors)


PLANE_AND_PRIOR = """async () => {
  const { createPlane, project } = await import("/static/explorer/map/projection.js");
  const { priorInPlane } = await import("/static/explorer/map/prior.js");
  const codes = [[5, 1, 0], [6, 2, 1], [9, 4, 1], [7, 3, 3]];
  const plane = createPlane(codes, "pc", [0, 0, 0]);
  return [project(plane, [0, 0, 0]), priorInPlane({ kind: "vae", latents: 3 }, plane, []).ellipse.centre];
}"""


def test_axes_of_the_map_cross_at_the_centre_of_the_contours_of_the_prior(explorer: ExplorerPage) -> None:
    explorer.open("?view=latent&model=vae")
    crossing, centre = explorer.page.evaluate(PLANE_AND_PRIOR)
    assert crossing == centre == [0, 0]
    box = explorer.page.get_by_label("Horizontal axis").bounding_box()
    assert box
    text = "e => { const c = document.createElement('canvas').getContext('2d'); c.font = getComputedStyle(e).font; "
    text += "return c.measureText(e.selectedOptions[0].text).width; }"
    assert explorer.page.get_by_label("Horizontal axis").evaluate(text) < box["width"] - 16  # the text is not cut


def test_neighbours_of_the_current_point_are_shown_and_chosen(explorer: ExplorerPage) -> None:
    page, _, _ = open_map(explorer)
    held_out = explorer.page.request.get(f"{page.url.partition('?')[0]}models/vae/held-out").json()
    latents = np.array(held_out["latents"])
    nearest = np.linalg.norm(latents, axis=1).argsort()[:8]  # the current point is the origin
    explorer.expect_request(lambda: click_button(page, "Find neighbours"), "/neighbours", model="vae@1")
    tiles = page.locator(".neighbours .tile-button")
    expect(tiles).to_have_count(8)
    expect(tiles.first).to_contain_text(f"{held_out['labels'][nearest[0]]}, at ")
    request = explorer.expect_request(lambda: tiles.nth(2).click(), "/decode")
    np.testing.assert_allclose(request.rows[0], latents[nearest[2]], atol=1e-5)


def test_walk_towards_a_label_shows_its_steps_and_their_path(explorer: ExplorerPage) -> None:
    page, _, _ = open_map(explorer)
    page.get_by_label("Towards").select_option("7")
    page.get_by_label("Away from").select_option("1")
    explorer.set_slider("Amount", 2.0)
    with page.expect_response(lambda response: "/edit" in response.url) as answered:
        click_button(page, "Walk")
    answer = answered.value.json()
    body = answered.value.request.post_data_json or {}
    assert (body["direction"], body["away_from"], body["amount"], body["steps"]) == ("7", "1", 2.0, 9)
    steps = page.locator(".strip .tile-button[aria-label^='go to step']")
    expect(steps).to_have_count(9)
    request = explorer.expect_request(steps.last.click, "/decode")
    np.testing.assert_allclose(request.rows[0], answer["latents"][-1], atol=1e-5)
