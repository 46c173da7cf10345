"""Measure the explorer page in Chromium: latency from pointer to image, first paint, page size, and frame times.

    python benchmarks/serving/explorer_latency.py                         # trains the demonstration models first
    python benchmarks/serving/explorer_latency.py --artifacts artifacts   # uses the models of `elbo demo`
    python benchmarks/serving/explorer_latency.py --smoke                 # brief training, few moves

The pointer moves over the map of the latent space. For each move, the browser's clock measures the latency: the time
from the pointer event until the frame with the new image. Frame times are measured while the map shows 20,000 rows from
a file. The page size excludes the models' data.

The benchmark needs Chromium (`apt-get install chromium`) and the packages that the tests need. It prints Markdown.
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
from training.config import DEMONSTRATIONS
from training.data.table import read_table
from training.progress import PlainReporter
from training.train import train

ROWS = 20_000
RECORD_LATENCIES = """() => {
  window.times = [];
  let stamp = null;
  addEventListener("pointermove", (event) => { stamp = event.timeStamp; }, true);
  new MutationObserver(() => {
    const since = stamp;
    stamp = null;
    if (since !== null) requestAnimationFrame(() => setTimeout(() => times.push(performance.now() - since)));
  }).observe(document.querySelector(".point-card .output"), { childList: true });
}"""
RECORD_FRAMES = """() => {
  window.frames_ = [];
  let last = performance.now();
  const tick = (now) => { frames_.push(now - last); last = now; requestAnimationFrame(tick); };
  requestAnimationFrame(tick);
}"""
MODELS = [config for source, config in DEMONSTRATIONS if source == "digits" and not config.condition]


def measure_moves(page: Page, moves: int) -> list[float]:
    """Move the pointer `moves` times, and wait for the new image after each move. Return all latencies in ms."""
    box = page.locator(".map-card .map").bounding_box()
    assert box
    random = np.random.RandomState(0).uniform(0.1, 0.9, (moves, 2))
    for x, y in random:
        count = page.evaluate("times.length")
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        while page.evaluate("times.length") == count:
            page.wait_for_timeout(1)
    times: list[float] = page.evaluate("times")
    return times


def measure_latency(browser: Browser, base: str, model: str, moves: int) -> str:
    """Measure the latencies for `model`, and return the table row of `model`."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(f"{base}?view=latent&model={model}")
    page.wait_for_selector(".point-card .output > *")
    page.evaluate(RECORD_LATENCIES)
    measure_moves(page, 10)  # warm-up
    page.evaluate("times.length = 0")
    times = measure_moves(page, moves)
    page.close()
    return f"| {model} | {statistics.median(times):.1f} | {np.quantile(times, 0.95):.1f} | {len(times)} |"


def measure_opening(browser: Browser, base: str) -> tuple[float, float, int]:
    """Return the times of first paint and first contentful paint in ms, and the size of the latent view in bytes."""
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
    total = sum(size for name, size in entries if "/static/" in name or name.endswith("?view=latent"))
    return paints["first-paint"], paints["first-contentful-paint"], total


def measure_frames(browser: Browser, base: str, rows: int, moves: int) -> list[float]:
    """Move the pointer over a map that shows `rows` rows from a file. Return the frame times in ms."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(f"{base}?view=latent&model=vae")
    page.wait_for_selector(".point-card .output > *")
    digits = read_table("digits").x.read_range(0, 1797)
    x = np.tile(digits, (rows // len(digits) + 1, 1))[:rows]
    content = io.BytesIO()
    np.save(content, x + np.random.RandomState(0).normal(0, 0.05, x.shape).astype(np.float32))
    file = {"name": "rows.npy", "mimeType": "application/octet-stream", "buffer": content.getvalue()}
    page.get_by_label("file of rows to show on the map").set_input_files(file)  # type: ignore[arg-type] # a dict instead of a TypedDict
    page.get_by_text(f"{rows} rows from your file").wait_for(timeout=120_000)
    page.evaluate(RECORD_FRAMES)
    box = page.locator(".map-card .map").bounding_box()
    assert box
    for step in range(moves):
        page.mouse.move(box["x"] + 60 + 3 * (step % 100), box["y"] + 60 + step % 90)
    frames: list[float] = page.evaluate("frames_")
    page.close()
    return frames


def measure(root: Path, executable: str, moves: int, rows: int) -> None:
    """Measure the page with the models in `root`, and print the results."""
    app = create_app(Settings(artifacts=root, log_level="error"))
    with running(app) as client, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        base = str(client.base_url)
        first_paint, contentful_paint, size = measure_opening(browser, base)
        print("| model | pointer to image, median ms | 95th percentile, ms | moves |\n|---|---|---|---|")
        for config in MODELS:
            print(measure_latency(browser, base, config.name, moves), flush=True)
        frames = measure_frames(browser, base, rows, moves)
        print(f"\nFirst paint {first_paint:.0f} ms, first contentful paint {contentful_paint:.0f} ms, {size:,} bytes.")
        print(f"{rows:,} rows: median frame {statistics.median(frames):.1f} ms, longest {max(frames):.0f} ms.")
        browser.close()


def main() -> None:
    """Train the models unless an artifact folder is given. Then measure the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="brief, to check that the benchmark works")
    parser.add_argument("--artifacts", type=Path, help="an artifact folder with the models of `elbo demo`")
    options = parser.parse_args()
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        raise SystemExit("Chromium is missing: install it with apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        root = options.artifacts or Path(folder)
        for config in MODELS if options.artifacts is None else ():
            brief = {"epochs": 2, "hidden": config.hidden if config.hidden == () else (48,)} if options.smoke else {}
            train(config.model_copy(update=brief), read_table("digits"), root, PlainReporter())
        moves, rows = (5, 2_000) if options.smoke else (200, ROWS)
        measure(root, executable, moves, rows)


if __name__ == "__main__":
    main()
