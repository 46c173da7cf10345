"""Tune a detector in a grid search, publish it, and use latents in a pipeline.

The data are 569 breast tumours from scikit-learn: 30 measurements each. Benign tumours are the normal rows.

    python examples/scikit_learn_pipeline.py
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import elbo
from elbo.sklearn import PCADetector, VAETransformer


def main(artifacts: Path) -> None:
    """Run the example. The model is published to `artifacts`."""
    frame, benign = load_breast_cancer(return_X_y=True, as_frame=True)
    labels = np.where(benign == 1, 1, -1)  # as scikit-learn has them: 1 is normal, -1 is an outlier
    rows, test, y, test_labels = train_test_split(frame, labels, test_size=0.3, stratify=labels, random_state=0)

    # 1. A detector learns from normal rows. The labels only judge it.
    detector = PCADetector(alpha=0.05).fit(rows[y == 1])
    outliers = detector.predict(test) == -1
    print(f"false alarms on benign tumours: {outliers[test_labels == 1].mean():.3f} (alpha is {detector.alpha})")
    print(f"malignant tumours found:        {outliers[test_labels == -1].mean():.3f}")
    print(f"AUROC:                          {roc_auc_score(test_labels, detector.decision_function(test)):.3f}")

    # 2. A grid search chooses the number of latents. Here, the training rows contain outliers: robust ignores them.
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    grid = {"latents": [2, 5, 10], "robust": [False, True]}
    search = GridSearchCV(PCADetector(calibration="split"), grid, scoring="roc_auc", cv=folds).fit(rows, y)
    print(f"best of the grid: {search.best_params_}, AUROC {search.best_score_:.3f}")

    # 3. The detector is published as it is. The server, or this program, then gives its scores.
    path = detector.publish(artifacts, name="tumours")
    published = elbo.load(path)
    assert np.allclose(published.score(test), -detector.score_samples(test), rtol=1e-4)
    print(f"published as {published.name}@{path.parent.name}, with the scores of the detector")

    # 4. Latents of a VAE are features for a classifier.
    classifier = make_pipeline(StandardScaler(), VAETransformer(latents=8, epochs=100), LogisticRegression())
    accuracy = cross_val_score(classifier, rows, y, cv=folds).mean()
    print(f"accuracy of logistic regression on 8 latents: {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts"))
