"""The explorer shows a model with a window: each row is the only row of its window."""

from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, expect

from service.app import create_app
from service.settings import Settings
from tests.service.explorer.browser import OUTPUT, ExplorerPage, save_npy
from tests.service.running import running
from tests.training.reporters import RecordingReporter
from tests.training.series import host_metrics, save
from training.config import TrainConfig
from training.data.table import read_table
from training.train import train

WINDOW = 12


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
