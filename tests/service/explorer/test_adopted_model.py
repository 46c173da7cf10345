"""The explorer shows adopted models, with and without latents."""

from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, expect
from torch import nn

from service.app import create_app
from service.settings import Settings
from tests.service.explorer.browser import ExplorerPage
from tests.service.running import running
from training.adoption.adopt import adopt

pytestmark = pytest.mark.slow
VIEWS = ("models", "latent", "reconstruct", "pca", "anomaly", "training")


class Autoencoder(nn.Module):
    """An autoencoder whose parts have the usual names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.decoder(self.encoder(x))
        return found


def test_views_of_adopted_models_show_what_they_can_do_without_errors(browser: Browser, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    module = Autoencoder()
    adopt(module, rows, name="whole", artifacts=tmp_path)
    adopt(nn.Sequential(module.encoder, module.decoder), rows, name="without", artifacts=tmp_path)
    settings = Settings(artifacts=tmp_path, log_level="error", backend="torchscript")
    with running(create_app(settings)) as client, browser.new_context() as context:
        explorer = ExplorerPage(context.new_page(), str(client.base_url))
        for name in ("whole", "without"):
            for view in VIEWS:
                explorer.open(f"?view={view}&model={name}")
                explorer.wait_until_idle()
                message = explorer.page.get_by_text("without only reconstructs and scores rows")
                is_empty = name == "without" and view in ("latent", "reconstruct", "pca")
                expect(message).to_have_count(1 if is_empty else 0)
        expect(explorer.page.get_by_text("This network was trained elsewhere")).to_be_visible()
        assert explorer.errors == []
