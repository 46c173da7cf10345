"""Move a program from PyOD to Elbo: one import changes.

    # from pyod.models.auto_encoder import AutoEncoder
    from elbo.pyod import AutoEncoder

The rest of the program stays. The last lines show what Elbo adds: p-values, and a model that the server serves.

    python examples/pyod_migration.py
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score

from elbo.pyod import AutoEncoder


def main(artifacts: Path) -> None:
    """Run the example. The model is published to `artifacts`."""
    x, benign = load_breast_cancer(return_X_y=True)
    is_outlier = benign == 0
    order = np.random.RandomState(0).permutation(len(x))
    normal, outliers = order[~is_outlier[order]], order[is_outlier[order]][:30]
    train, test = np.r_[normal[:250], outliers[:10]], np.r_[normal[250:], outliers[10:]]

    # A program for PyOD, unchanged.
    clf = AutoEncoder(contamination=0.05, epoch_num=100, hidden_neuron_list=[64, 8], random_state=0)
    clf.fit(x[train])
    print(f"labels of the training rows: {clf.labels_.sum()} of {len(train)} are outliers")
    print(f"threshold: {clf.threshold_:.2f}")
    scores = clf.decision_function(x[test])  # the higher, the more anomalous
    print(f"AUROC on new rows: {roc_auc_score(is_outlier[test], scores):.3f}")
    labels, confidence = clf.predict(x[test], return_confidence=True)  # 1 is an outlier
    print(f"outliers among {len(test)} new rows: {labels.sum()}, mean confidence {confidence.mean():.2f}")
    print(f"probability of the first row: {clf.predict_proba(x[test])[0].round(2)}")

    # New with Elbo: p-values, which bound the false-alarm rate, and a model that the server serves.
    p_values = clf.detector_.p_value(x[test])
    print(f"false alarms at p <= 0.05: {(p_values <= 0.05)[~is_outlier[test]].mean():.3f}")
    path = clf.publish(artifacts, name="tumours-pyod")
    print(f"published as tumours-pyod@{path.parent.name}: elbo serve gives the scores of decision_function")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts"))
