"""PyOD's PCA, VAE and autoencoder on splits that lie in a folder: run by the Python that has PyOD.

`python anomaly_pyod.py FOLDER` reads each <n>.npz (train, test) there and writes scores/<n>.npz: a score a test row by
the name of the detector, of which higher is stranger. Everything has PyOD's defaults, on one thread.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from pyod.models.auto_encoder import AutoEncoder
from pyod.models.pca import PCA
from pyod.models.vae import VAE

DETECTORS = {"PyOD PCA": PCA, "PyOD VAE": VAE, "PyOD AE": AutoEncoder}


def main(folder: Path) -> None:
    """Score every split."""
    torch.set_num_threads(1)
    (folder / "scores").mkdir(exist_ok=True)
    for path in sorted(folder.glob("*.npz")):
        file, found = np.load(path), {}
        for name, detector in DETECTORS.items():
            torch.manual_seed(0)
            np.random.seed(0)
            found[name] = detector().fit(file["train"]).decision_function(file["test"])
        np.savez(folder / "scores" / path.name, **found)
        print(path.stem, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
