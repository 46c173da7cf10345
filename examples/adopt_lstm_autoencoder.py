# %% [markdown]
# # Adopt an LSTM autoencoder of windows
#
# The network reconstructs windows of 20 steps of 3 sensors. It has only `forward`, so the model reconstructs and scores
# windows, and has no latents.

# %%
import numpy as np
import torch
from torch import nn

import elbo

# %% [markdown]
# ## The data: three sensors of a machine that turns

# %%
STEPS, SENSORS = 20, 3
random = np.random.default_rng(0)


def record(windows: int) -> np.ndarray:
    """Return windows [N, STEPS, SENSORS] of a machine that turns with a varying speed."""
    speed = random.uniform(0.2, 0.5, size=(windows, 1, 1))
    start = random.uniform(0.0, 2 * np.pi, size=(windows, 1, 1))
    angle = start + speed * np.arange(STEPS)[:, np.newaxis] + np.array([0.0, 1.0, 2.0])
    return (np.sin(angle) + 0.05 * random.normal(size=(windows, STEPS, SENSORS))).astype(np.float32)


train, normal = record(1500), record(600)

# %% [markdown]
# ## The trained network

# %%


class LstmAutoencoder(nn.Module):
    """The last state of an LSTM is repeated as the input of a second LSTM."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.reader = nn.LSTM(SENSORS, hidden, batch_first=True)
        self.writer = nn.LSTM(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, SENSORS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction [B, STEPS, SENSORS] of x."""
        _, (state, _) = self.reader(x)
        repeated = state[-1].unsqueeze(1).repeat(1, STEPS, 1)
        return self.head(self.writer(repeated)[0])


torch.manual_seed(0)
network = LstmAutoencoder()
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for _ in range(12):
    for batch in torch.tensor(train)[torch.randperm(len(train))].split(64):
        loss = (network(batch) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"loss {loss:.3f}")

# %% [markdown]
# ## Adopt it

# %%
model = elbo.adopt(network, normal, name="machine", fit_rows=train, feature_names=["x", "y", "z"], images=False)
print(model)

# %% [markdown]
# ## Use it: one sensor stands still

# %%
new = record(500)
stuck = new.copy()
stuck[:, 8:, 1] = stuck[:, 8:9, 1]
false_alarms, found = (float((model.p_value(rows) <= 0.05).mean()) for rows in (new, stuck))
print(f"false alarms: {false_alarms:.1%}, alarms with a stuck sensor: {found:.1%}")
assert false_alarms < 0.10
assert found > 0.8
