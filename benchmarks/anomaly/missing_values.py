"""Measure false alarms and AUROC on rows of which some values are missing.

    python benchmarks/anomaly/missing_values.py
    python benchmarks/anomaly/missing_values.py --sets wine,cardio
    python benchmarks/anomaly/missing_values.py --smoke    # one small data set

Half of the normal rows of each data set train a model of each kind. From the other rows, normal and anomalous, values
are taken out at random. The columns `medians` are for rows in which training medians replace the missing values, as in
models without `score_gaps`.

The benchmark prints Markdown: a line for each data set, kind and share of missing values, and then the means over the
data sets.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.anomaly.datasets import LabelledSplit, labelled_splits
from models import artifact
from models.artifact import Artifact
from training.config import EVERY_KIND, TrainConfig
from training.data.table import read_table
from training.progress import SilentReporter
from training.train import train

SHARES = (0.0, 0.1, 0.3, 0.5)  # of the values that are missing
ALPHAS = (0.1, 0.05)
MAX_NORMAL, MAX_ANOMALOUS = 1000, 300  # rows
HEADER = (
    "| data set | missing | kind | false alarms at 0.1 | medians | at 0.05 | medians | AUROC | medians |\n"
    "|---|---|---|---|---|---|---|---|---|"
)

Doubles = npt.NDArray[np.float64]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small data set, two kinds, few epochs")
    parser.add_argument("--sets", type=lambda text: text.lower().split(","), help="only these data sets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    splits = labelled_splits(range(1), bundled=options.smoke)
    chosen = islice(splits, 1) if options.smoke else splits
    kinds = ("pca", "vae") if options.smoke else EVERY_KIND
    found: dict[tuple[float, str], list[Doubles]] = defaultdict(list)
    print(HEADER)
    for split in chosen:
        if options.sets is None or split.name.lower() in options.sets:
            for share, kind, figures in measure(split, kinds, epochs=3 if options.smoke else None):
                found[share, kind].append(figures)
                report(split.name, share, kind, figures)
    print()
    print(HEADER)
    for (share, kind), of_sets in sorted(found.items()):
        report(f"mean of {len(of_sets)}", share, kind, np.nanmean(of_sets, axis=0))


def measure(split: LabelledSplit, kinds: Sequence[str], epochs: int | None) -> list[tuple[float, str, Doubles]]:
    """Return the share of missing values, the kind, and the figures of a line, for each kind and share."""
    normal, anomalous = split.test[split.labels == 0][:MAX_NORMAL], split.test[split.labels == 1][:MAX_ANOMALOUS]
    test = np.concatenate((normal, anomalous))
    is_anomaly = np.arange(len(test)) >= len(normal)
    medians = np.median(split.train, axis=0)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        np.save(rows := Path(folder, "rows.npy"), split.train.astype(np.float32))
        table = read_table(str(rows))
        for kind in kinds:
            config = TrainConfig(model=kind, name=kind, epochs=epochs)
            model = artifact.load(train(config, table, Path(folder, "artifacts"), SilentReporter()))
            for share in SHARES:
                missing = np.random.RandomState(0).uniform(size=test.shape) < share
                missing[missing.all(axis=1), 0] = False
                scores = [score(model, np.where(missing, fill, test)) for fill in (np.nan, medians)]
                rates = [[alarms(model, each[~is_anomaly], alpha) for each in scores] for alpha in ALPHAS]
                areas = [roc_auc_score(is_anomaly, each) for each in scores]
                lines.append((share, kind, np.array([*rates[0], *rates[1], *areas])))
    return lines


def score(model: Artifact, x: Doubles) -> npt.NDArray[np.float32]:
    """Return the scores [N] of rows x [N, D], whose missing values are NaN."""
    with torch.inference_mode():
        found = [artifact.score(model.module, part)[0] for part in torch.from_numpy(x).float().split(1024)]
    return torch.cat(found).clamp(max=torch.finfo(torch.float32).max).numpy()


def alarms(model: Artifact, scores: npt.NDArray[np.float32], alpha: float) -> float:
    """Return the share of the scores with a p-value of at most `alpha`; NaN if there are too few calibration rows."""
    if not model.manifest.calibration.reaches(alpha):
        return float("nan")
    with torch.inference_mode():
        return float((model.module.p_value(torch.from_numpy(scores)) <= alpha).float().mean())


def report(name: str, share: float, kind: str, figures: Doubles) -> None:
    """Print a line of the table."""
    rates = " | ".join(f"{figure:.3f}" for figure in figures)
    print(f"| {name} | {100 * share:.0f} % | {kind} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
