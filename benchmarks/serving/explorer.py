"""From the pointer to the decoded picture, in a real Chromium on the demonstration models; what the page costs to open.

Each move of the pointer over the map of the latent space is timed by the browser's own clock: from the event to the
frame after the new picture is in the page. Also the first paint of the page, its weight without models' data, and
frames while 20,000 rows lie on the map. Prints Markdown. `--smoke` trains briefly and moves a few times only.
"""

import argparse
import io
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright

from service.app import create_app
from service.settings import Settings
from tests.service.explorer.browser import FLAGS
from tests.service.running import running
from training.config import DEMONSTRATION
from training.data.table import read_table
from training.progress import PlainReporter
from training.train import train

ROWS = 20_000
WATCH = """() => {
  window.times = [];
  let stamp = null;
  addEventListener("pointermove", (event) => { stamp = event.timeStamp; }, true);
  new MutationObserver(() => {
    const since = stamp;
    stamp = null;
    if (since !== null) requestAnimationFrame(() => setTimeout(() => times.push(performance.now() - since)));
  }).observe(document.querySelector(".point-card .output"), { childList: true });
}"""
FRAMES = """() => {
  window.frames_ = [];
  let last = performance.now();
  const tick = (now) => { frames_.push(now - last); last = now; requestAnimationFrame(tick); };
  requestAnimationFrame(tick);
}"""


def moved(page: Page, moves: int) -> list[float]:
    """Milliseconds from each of `moves` moves of the pointer to its picture; one waits for the other."""
    box = page.locator(".map-card .map").bounding_box()
    assert box
    random = np.random.RandomState(0).uniform(0.1, 0.9, (moves, 2))
    for x, y in random:
        seen = page.evaluate("times.length")
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        while page.evaluate("times.length") == seen:
            page.wait_for_timeout(1)
    times: list[float] = page.evaluate("times")
    return times


def latency(browser: Browser, base: str, model: str, moves: int) -> str:
    """A line of the table."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(f"{base}?view=latent&model={model}")
    page.wait_for_selector(".point-card .output > *")
    page.evaluate(WATCH)
    moved(page, 10)
    page.evaluate("times.length = 0")
    times = moved(page, moves)
    page.close()
    return f"| {model} | {statistics.median(times):.1f} | {np.quantile(times, 0.95):.1f} | {len(times)} |"


def opening(browser: Browser, base: str) -> tuple[float, float, int]:
    """First paint and first contentful paint in ms, and bytes of the heaviest view without models' data."""
    page = browser.new_page()
    page.goto(f"{base}?view=latent")
    page.wait_for_selector(".point-card .output > *")
    paints: dict[str, float] = page.evaluate(
        "Object.fromEntries(performance.getEntriesByType('paint').map(e => [e.name, e.startTime]))"
    )
    entries: list[Any] = page.evaluate(
        "performance.getEntries().filter(e => e.decodedBodySize).map(e => [e.name, e.decodedBodySize])"
    )
    page.close()
    weight = sum(size for name, size in entries if "/static/" in name or name.endswith("?view=latent"))
    return paints["first-paint"], paints["first-contentful-paint"], weight


def crowded(browser: Browser, base: str, rows: int, moves: int) -> list[float]:
    """Milliseconds between frames while the pointer moves over a map with `rows` rows of a file."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(f"{base}?view=latent&model=vae")
    page.wait_for_selector(".point-card .output > *")
    digits = read_table("digits").x.span(0, 1797)
    x = np.tile(digits, (rows // len(digits) + 1, 1))[:rows]
    content = io.BytesIO()
    np.save(content, x + np.random.RandomState(0).normal(0, 0.05, x.shape).astype(np.float32))
    file = {"name": "rows.npy", "mimeType": "application/octet-stream", "buffer": content.getvalue()}
    page.get_by_label("file of rows to show on the map").set_input_files(file)  # type: ignore[arg-type] # a dict where playwright has its own
    page.get_by_text(f"{rows} rows from your file").wait_for(timeout=120_000)
    page.evaluate(FRAMES)
    box = page.locator(".map-card .map").bounding_box()
    assert box
    for step in range(moves):
        page.mouse.move(box["x"] + 60 + 3 * (step % 100), box["y"] + 60 + step % 90)
    frames: list[float] = page.evaluate("frames_")
    page.close()
    return frames


def measure(root: Path, executable: str, moves: int, rows: int) -> None:
    """Print everything about the models in `root`."""
    app = create_app(Settings(artifacts=root, log_level="error"))
    with running(app) as client, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        base = str(client.base_url)
        first, contentful, weight = opening(browser, base)
        print("| model | pointer to picture, median ms | 95 % | moves |\n|---|---|---|---|")
        for config in DEMONSTRATION:
            print(latency(browser, base, config.name, moves), flush=True)
        frames = crowded(browser, base, rows, moves)
        print(f"\nfirst paint {first:.0f} ms, contentful {contentful:.0f} ms; {weight:,} bytes before models' data")
        print(f"{rows:,} rows: {statistics.median(frames):.1f} ms a frame, the longest {max(frames):.0f} ms")
        browser.close()


def main() -> None:
    """Train what is served where it is missing, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="brief, to see that it works")
    parser.add_argument("--artifacts", type=Path, help="a folder where elbo demo has been, to train nothing")
    options = parser.parse_args()
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        raise SystemExit("benchmarks/serving/explorer.py needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        root = options.artifacts or Path(folder)
        for config in DEMONSTRATION if options.artifacts is None else ():
            brief = {"epochs": 2, "hidden": config.hidden if config.hidden == () else (48,)} if options.smoke else {}
            train(config.model_copy(update=brief), read_table("digits"), root, PlainReporter())
        moves, rows = (5, 2_000) if options.smoke else (200, ROWS)
        measure(root, executable, moves, rows)


if __name__ == "__main__":
    main()
