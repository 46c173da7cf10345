"""The network that `benchmarks.serving.adopted_model` adopts, and what people save beside it.

The programs of the other servers load the network from `model.pth`, the scaler from `scaler.joblib` or, where
scikit-learn is not installed, from `scaler.pt`, and the threshold from `threshold.txt`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

FEATURES = 64
WARM_UP_ROWS = (1, 32)


class Autoencoder(nn.Module):
    """A fully connected autoencoder of rows with 64 features, with a code of 8 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction [B, FEATURES] of x [B, FEATURES]."""
        x_hat: Tensor = self.decoder(self.encoder(x))
        return x_hat


def load_network(folder: Path) -> Autoencoder:
    """Return the network whose weights are in `folder`, on one thread and warmed up."""
    torch.set_num_threads(1)
    network = Autoencoder()
    network.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
    network.eval()
    with torch.inference_mode():
        for rows in WARM_UP_ROWS:
            network(torch.rand(rows, FEATURES))
    return network
