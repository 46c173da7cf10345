"""Robust training on rows that contain anomalies: the rows that it keeps, and the scores of its models."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.covariance import MinCovDet
from sklearn.metrics import roc_auc_score

from training.config import EVERY_KIND, Kind, TrainConfig
from training.data.table import read_table, split_rows
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import prepare_data
from training.fitting.whitening import KEPT_PERCENT, most_concentrated_rows
from training.progress import SilentReporter

pytestmark = pytest.mark.slow

D, NORMAL, ANOMALIES = 6, 900, 100
MIXING = np.eye(D) + 0.5 * np.triu(np.ones((D, D)))


def contaminated(seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return shuffled rows and their labels.

    A tenth of the rows are anomalies: a cluster that contradicts the correlations of the normal rows.
    """
    random = np.random.RandomState(seed)
    normal = random.standard_normal((NORMAL, D)) @ MIXING
    cluster = 3.0 * np.linalg.norm(MIXING, axis=0) * np.array([1, -1] * (D // 2)) + 0.5 * random.standard_normal(
        (ANOMALIES, D)
    )
    order = random.permutation(NORMAL + ANOMALIES)
    labels = np.repeat([0, 1], [NORMAL, ANOMALIES])[order]
    return np.concatenate((normal, cluster))[order].astype(np.float32), labels


def test_most_concentrated_rows_have_the_minimum_covariance_determinant() -> None:
    x, labels = contaminated()
    kept = most_concentrated_rows(torch.from_numpy(x), torch.tensor(1.0)).numpy()
    assert len(kept) == len(x) * KEPT_PERCENT // 100
    assert labels[kept].sum() == 0
    reference = MinCovDet(support_fraction=KEPT_PERCENT / 100, random_state=0).fit(x)
    ours, theirs = np.linalg.slogdet(np.cov(x[kept].T))[1], np.linalg.slogdet(reference.raw_covariance_)[1]
    assert ours == pytest.approx(theirs, abs=0.1)


def test_robust_preparation_changes_only_the_fit_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", contaminated()[0])
    table = read_table(str(tmp_path / "rows.npy"))
    rows = split_rows(len(table.x), 0)
    plain, robust = prepare_data(table, rows), prepare_data(table, rows, robust=True)
    assert set(robust.split.fit) < set(plain.split.fit)
    assert len(robust.split.fit) == -(-len(plain.split.fit) * KEPT_PERCENT // 100)
    assert torch.equal(robust.held_out, plain.held_out)
    assert torch.equal(robust.calibration, plain.calibration)
    assert robust.moments.variance.max() < plain.moments.variance.max()


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_robust_training_detects_anomalies_among_the_training_rows(kind: Kind, tmp_path: Path) -> None:
    x, labels = contaminated()
    np.save(tmp_path / "rows.npy", x)
    table = read_table(str(tmp_path / "rows.npy"))

    def auroc(robust: bool) -> float:
        config = TrainConfig(model=kind, name=kind, robust=robust, epochs=60)
        pipeline = fit_pipeline(config, prepare_data(table, split_rows(len(table.x), 0), robust), SilentReporter())
        with torch.inference_mode():
            return float(roc_auc_score(labels, pipeline.score(torch.from_numpy(x))[0].numpy()))

    assert auroc(robust=True) > 0.99
    assert auroc(robust=True) >= auroc(robust=False)
