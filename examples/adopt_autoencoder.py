# %% [markdown]
# # Adopt an autoencoder with its scaler
#
# A network was trained with PyTorch, on rows that a `StandardScaler` of scikit-learn had scaled. Elbo publishes both as
# one model, with a calibration, so that an alarm has a known false-alarm rate.

# %%
import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import nn

import elbo

# %% [markdown]
# ## The trained network
#
# The rows are eight metrics of a server, which follow two hidden loads.

# %%
random = np.random.default_rng(0)
mixing = random.normal(size=(2, 8))


def measure(rows: int) -> np.ndarray:
    """Return normal rows [N, 8]."""
    loads = random.normal(size=(rows, 2))
    return 50.0 + 10.0 * (loads @ mixing) + random.normal(size=(rows, 8))


class Autoencoder(nn.Module):
    """An encoder and a decoder of dense layers."""

    def __init__(self, features: int, code: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, code))
        self.decoder = nn.Sequential(nn.Linear(code, 16), nn.ReLU(), nn.Linear(16, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of x."""
        return self.decoder(self.encoder(x))


torch.manual_seed(0)
train, normal = measure(2000), measure(1000)
scaler, network = StandardScaler().fit(train), Autoencoder(features=8, code=2)
units = torch.tensor(scaler.transform(train), dtype=torch.float32)
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for _ in range(100):
    loss = (network(units) - units).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss:.3f}")

# %% [markdown]
# ## Adopt it
#
# `normal` are rows that did not train the network. They give the calibration.

# %%
names = ["cpu", "memory", "disk", "network", "errors", "latency", "queue", "sessions"]
model = elbo.adopt(network, normal, name="metrics", fit_rows=train, scaler=scaler, feature_names=names)
print(model)

# %% [markdown]
# ## Use it
#
# The model takes raw rows. Of new normal rows, at most 5 % have a p-value of 5 % or less.

# %%
new = measure(2000)
false_alarms = (model.p_value(new) <= 0.05).mean()
print(f"false alarms: {false_alarms:.1%}")

broken = new.copy()
broken[:, 5] += 30.0  # the latency no longer follows the loads
found = (model.p_value(broken) <= 0.05).mean()
print(f"alarms with a broken metric: {found:.1%}")
assert false_alarms < 0.08
assert found > 0.9

# %% [markdown]
# The artifact is in `artifacts/metrics/1`. `elbo serve` serves it; neither the class `Autoencoder` nor scikit-learn is
# needed there.

# %%
expected = scaler.inverse_transform(network(torch.tensor(scaler.transform(new), dtype=torch.float32)).detach().numpy())
difference = np.abs(model.reconstruct(new) - expected).max()
print(f"largest difference from the network: {difference:.1e}")
assert difference < 1e-3
