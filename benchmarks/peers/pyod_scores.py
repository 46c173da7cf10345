"""Scores of PyOD's detectors, in the environment of the peers: python pyod_scores.py ROWS.npz SCORES.npz NAME..."""

import sys
from typing import Any

import numpy as np


def detector(name: str) -> Any:
    """The detector with its own defaults."""
    if name == "knn":
        from pyod.models.knn import KNN

        return KNN()
    if name == "pca":
        from pyod.models.pca import PCA

        return PCA()
    if name == "ae":
        from pyod.models.auto_encoder import AutoEncoder

        return AutoEncoder(verbose=0)
    from pyod.models.vae import VAE

    return VAE(verbose=0)


def main() -> None:
    """Fit each on the rows `train`, score the rows `test`."""
    import torch

    torch.set_num_threads(1)
    rows, scores = np.load(sys.argv[1]), {}
    for name in sys.argv[3:]:
        torch.manual_seed(0)
        np.random.seed(0)
        scores[name] = detector(name).fit(rows["train"]).decision_function(rows["test"])
    np.savez(sys.argv[2], **scores)


if __name__ == "__main__":
    main()
