"""The explorer shows a model with a window: each row is the only row of its window."""

from pathlib import Path

import httpx
import numpy as np
import polars as pl
from playwright.sync_api import Browser, expect

from service.app import create_app
from service.settings import Settings
from tests.service.explorer.browser import OUTPUT, ExplorerPage, click_button, save_npy
from tests.service.running import post, running
from tests.training.reporters import RecordingReporter
from tests.training.series import host_metrics, save
from training.config import TrainConfig
from training.data.table import read_table
from training.train import train

WINDOW = 4  # so small that a row alone in its window can be anomalous


def test_views_of_a_model_with_a_window_show_rows_without_errors(browser: Browser, tmp_path: Path) -> None:
    table = read_table(save(tmp_path / "rows.parquet", host_metrics(400, 2)), time="ts", group="host")
    config = TrainConfig(model="pca", name="fleet", time="ts", group="host", window=WINDOW)
    train(config, table, tmp_path / "a", RecordingReporter())
    settings = Settings(artifacts=tmp_path / "a", log_level="error", backend="torchscript")
    with running(create_app(settings)) as client, browser.new_context() as context:
        explorer = ExplorerPage(context.new_page(), str(client.base_url))
        page = explorer.page
        explorer.open("?view=reconstruct&model=fleet")
        explorer.wait_until_idle()
        for path in ("/encode", "/reconstruct"):
            inputs = np.array(explorer.requests_to(path)[0].json["inputs"], np.float64)
            assert inputs.shape == (1, WINDOW, 3)
            assert np.isnan(inputs[0, :-1]).all()
            assert np.isfinite(inputs[0, -1]).all()
        explorer.open("?view=latent&model=fleet")
        expect(page.locator(OUTPUT).or_(page.locator(".point-card"))).to_be_visible()
        file = save_npy(tmp_path / "own.npy", np.ones((5, 3), np.float32))
        page.get_by_label("file of rows to show on the map").set_input_files(file)
        expect(page.get_by_text("5 rows from your file")).to_be_visible()
        explorer.wait_until_idle()
        assert explorer.requests_to("/encode")[-1].rows.shape == (5, WINDOW, 3)
        for view in ("anomaly", "models", "training", "pca"):
            explorer.open(f"?view={view}&model=fleet")
            explorer.wait_until_idle()
        assert explorer.errors == []
        explorer.open("?view=anomaly&model=fleet")
        page.get_by_label("Feature").select_option("2")
        explorer.set_slider("disk", 60)
        expect(page.locator(".verdict")).to_have_text("Anomalous")
        contributions = page.locator("table.contributions")
        expect(contributions.locator("th[scope=col]").last).to_have_text("since")
        expect(contributions.locator("tbody tr", has_text="disk").locator("td").last).to_have_text("this row")
        compare_peers(explorer, client)
        assert explorer.errors == []


def compare_peers(explorer: ExplorerPage, client: httpx.Client) -> None:
    """Compare hosts with their peers in the anomaly view, while two hosts send rows, and then while eight do."""
    card = explorer.page.locator("section.peers")
    # The simulated CPU of each host is different, and the model knows only two hosts: give all hosts the same CPU.
    frame = host_metrics(30, 8, seed=4).with_columns(pl.col("ts").dt.epoch("s"), pl.lit(0.0).alias("cpu"))
    rows = frame.to_dicts()
    for row in rows[-8:]:
        row["disk"] += 25.0 if row["host"] == "web-5" else 0.0
    post(client, "/anomaly", {"records": [row for row in rows if row["host"] in ("web-0", "web-1")]})
    click_button(explorer.page, "Compare now")
    expect(card.get_by_role("alert")).to_contain_text("2 of 2 remembered groups")
    explorer.errors.clear()  # the browser reports the status 409
    post(client, "/anomaly", {"records": [row for row in rows if row["host"] not in ("web-0", "web-1")]})
    click_button(explorer.page, "Compare now")
    expect(card.get_by_role("status")).to_contain_text("web-5 differs among 8 groups at 2024-01-01 04:50:00.")
    lines = card.get_by_role("region", name="groups by deviation").locator("tbody tr")
    expect(lines).to_have_count(8)
    expect(lines.first).to_contain_text("web-5")
    expect(lines.first).to_contain_text("disk 2")  # the value is 25 plus noise
