"""The trials, and the options of groups, that `tests/test_ray.py` trains on Ray and in its own process."""

from training.config import TrainConfig
from training.sweep import Trial

TRIALS = [
    Trial(index, {"latents": str(latents)}, TrainConfig(model="pca", name="swept", latents=latents))
    for index, latents in enumerate((1, 2, 9))  # nine latents of five columns: this trial fails
]

GROUPS = TrainConfig(model="pca", name="hosts", latents=2, time="time", group="host")
