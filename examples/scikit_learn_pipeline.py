"""Tune a detector in a grid search, publish it, and use latents in a pipeline.

The data are 569 breast tumours from scikit-learn: 30 measurements each. Benign tumours are the normal rows. The example
needs pandas: pip install 'elbo[train]' pandas

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

import elbo
from elbo.sklearn import PCADetector, VAETransformer


def main(artifacts: Path) -> None:
    """Run the example. The model is published to `artifacts`."""
    frame, benign = load_breast_cancer(return_X_y=True, as_frame=True)
    labels = np.where(benign == 1, 1, -1)  # scikit-learn's labels: 1 is normal, -1 is an outlier
    rows, test, y, test_labels = train_test_split(frame, labels, test_size=0.3, stratify=labels, random_state=0)

    # 1. Fit a detector to normal rows, and evaluate it by the labels.
    detector = PCADetector(alpha=0.05).fit(rows[y == 1])
    outliers = detector.predict(test) == -1
    print(f"false alarms on benign tumours: {outliers[test_labels == 1].mean():.3f} (alpha is {detector.alpha})")
    print(f"malignant tumours found:        {outliers[test_labels == -1].mean():.3f}")
    print(f"AUROC:                          {roc_auc_score(test_labels, detector.decision_function(test)):.3f}")

    # 2. Choose the number of latents in a grid search. Its training rows contain outliers, which `robust` tolerates.
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    grid = {"latents": [2, 5, 10], "robust": [False, True]}
    search = GridSearchCV(PCADetector(calibration="split"), grid, scoring="roc_auc", cv=folds).fit(rows, y)
    print(f"best with outliers among the training rows: {search.best_params_}, AUROC {search.best_score_:.3f}")

    # 3. Publish the detector. `elbo.load` and the server then give its scores.
    path = detector.publish(artifacts, name="tumours")
    published = elbo.load(path)
    assert np.allclose(published.score(test), -detector.score_samples(test), rtol=1e-4)
    print(f"published as {published.name}@{path.parent.name}, with the scores of the detector")

    # 4. Use the latents of a VAE as features for a classifier. The VAE scales the rows itself.
    classifier = make_pipeline(VAETransformer(latents=8, epochs=100), LogisticRegression())
    accuracy = cross_val_score(classifier, rows, y, cv=folds).mean()
    print(f"accuracy of logistic regression on 8 latents: {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts"))
