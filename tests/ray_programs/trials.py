"""The sweep that is trained on Ray and on this machine."""

from training.config import TrainConfig
from training.sweep import Trial

TRIALS = [
    Trial(index, {"latents": str(latents)}, TrainConfig(model="pca", name="swept", latents=latents))
    for index, latents in enumerate((1, 2, 9))  # the table has five columns, so the last trial fails
]
