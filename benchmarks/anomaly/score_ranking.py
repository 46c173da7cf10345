"""Compare AUROC and average precision of the anomaly scores of Elbo, PyOD and scikit-learn.

    python benchmarks/anomaly/score_ranking.py             # `make bench-anomaly` also installs PyOD
    python benchmarks/anomaly/score_ranking.py --robust    # anomalies among the training rows
    python benchmarks/anomaly/score_ranking.py --smoke     # small data sets, few epochs

Elbo's models have the defaults of `elbo train`. `datasets.py` describes the data sets and their splits. Elbo splits the
training rows into 70 % fit, 10 % held-out and 20 % calibration rows. The other detectors are fitted to all training
rows.

PyOD runs in its own environment. Without this environment, the tables lack PyOD's detectors. The benchmark prints
Markdown tables.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import wilcoxon
from sklearn.ensemble import IsolationForest
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors

from benchmarks.anomaly.datasets import LabelledSplit, labelled_splits
from benchmarks.data import ROOT, describe_machine
from models.pipeline import Pipeline
from training.config import TrainConfig
from training.data.table import read_table, split_rows
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import prepare_data
from training.progress import SilentReporter

KINDS = ("pca", "vae", "ae", "ensemble")
BASELINE = "kNN"
TIE = 0.05  # largest difference in percentage points that counts as a tie
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Scores = npt.NDArray[np.float64]
Figures = tuple[float, float]  # AUROC and average precision in percent
Results = dict[str, dict[str, list[Figures]]]  # figures of each seed, by detector and data set


def train_model(kind: str, rows: Scores, robust: bool = False, epochs: int | None = None) -> Pipeline:
    """Return the model that `elbo train` publishes for rows [N, D]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        np.save(path, rows.astype(np.float32))
        table = read_table(str(path))
    config = TrainConfig.model_validate({"model": kind, "name": kind, "robust": robust, "epochs": epochs})
    split = split_rows(len(rows), config.seed, rows.shape[1])
    return fit_pipeline(config, prepare_data(table, split, robust), SilentReporter())


def elbo_detector(kind: str, robust: bool = False, epochs: int | None = None) -> Callable[[LabelledSplit], Scores]:
    """Return a function that trains a model of `kind` on the training rows and scores the test rows."""

    def scores(split: LabelledSplit) -> Scores:
        pipeline = train_model(kind, split.train, robust, epochs)
        with torch.inference_mode():
            return pipeline.score(torch.from_numpy(split.test.astype(np.float32)))[0].double().numpy()

    return scores


def nearest_neighbours(split: LabelledSplit) -> Scores:
    """Return the distance of each test row to the fifth nearest training row, which is the score of PyOD's KNN."""
    distances = NearestNeighbors(n_neighbors=6).fit(split.train).kneighbors(split.test)[0]
    includes_itself = split.test is split.train
    return np.asarray(distances[:, 5 if includes_itself else 4])


def local_outlier_factor(split: LabelledSplit) -> Scores:
    """Return the scores of LOF with 20 neighbours."""
    return np.asarray(-LocalOutlierFactor(novelty=True).fit(split.train).score_samples(split.test))


def isolation_forest(split: LabelledSplit) -> Scores:
    """Return the scores of an isolation forest with 100 trees."""
    return np.asarray(-IsolationForest(random_state=0).fit(split.train).score_samples(split.test))


def measure(split: LabelledSplit, scores: Scores) -> Figures:
    """Return AUROC and average precision in percent. Both are NaN if a score is not finite."""
    if not np.isfinite(scores).all():
        return np.nan, np.nan
    return 100 * roc_auc_score(split.labels, scores), 100 * average_precision_score(split.labels, scores)


def _measure_split(task: tuple[LabelledSplit, Sequence[str], bool, int | None]) -> tuple[str, dict[str, Figures]]:
    """Measure all detectors except PyOD's on one split. Return the name of the data set and the figures."""
    torch.set_num_threads(1)
    split, kinds, robust, epochs = task
    detectors = {f"Elbo {kind}": elbo_detector(kind, robust, epochs) for kind in kinds}
    detectors |= {BASELINE: nearest_neighbours, "LOF": local_outlier_factor, "isolation forest": isolation_forest}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LOF warns about duplicate rows
        return split.name, {name: measure(split, detector(split)) for name, detector in detectors.items()}


class PyodProcess:
    """A process that scores the test rows of the given splits with PyOD's detectors.

    Args:
        splits: the splits.
        python: the interpreter that has PyOD.
    """

    def __init__(self, splits: list[LabelledSplit], python: str) -> None:
        self._splits = splits
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        for index, split in enumerate(splits):
            np.savez(folder / f"{index}.npz", train=split.train, test=split.test)
        self._log = folder / "log"
        command = [python, str(Path(__file__).with_name("pyod_detectors.py")), str(folder)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | ONE_CORE)

    def read_figures(self) -> Iterator[tuple[str, dict[str, Figures]]]:
        """Wait for the process to end. Then yield, per split, the name of the data set and the figures.

        Raises:
            RuntimeError: the process failed.
        """
        with self._folder as folder:
            if self._process.wait():
                raise RuntimeError(self._log.read_text().strip().splitlines()[-1])
            for index, split in enumerate(self._splits):
                with np.load(Path(folder) / "scores" / f"{index}.npz") as scores:
                    yield split.name, {name: measure(split, scores[name]) for name in scores}


def measure_all(
    splits: list[LabelledSplit],
    *,
    kinds: Sequence[str],
    robust: bool,
    epochs: int | None,
    jobs: int,
    pyod_python: str,
) -> tuple[Results, str]:
    """Measure all detectors on all splits.

    Returns:
        The results, and the reason why the results of PyOD are missing. The reason is empty if PyOD was measured.
    """
    results: Results = {}
    problem, pyod = "", None
    try:
        pyod = PyodProcess(splits, pyod_python)
    except FileNotFoundError:
        problem = f"PyOD is missing: {pyod_python} does not exist (run make bench-anomaly)."
    measured = []
    with get_context("spawn").Pool(jobs) as pool:
        for name, figures in pool.imap(_measure_split, [(split, kinds, robust, epochs) for split in splits]):
            cells = ", ".join(f"{detector} {auroc:.1f} / {ap:.1f}" for detector, (auroc, ap) in figures.items())
            print(f"{name}: {cells}", file=sys.stderr, flush=True)
            measured.append((name, figures))
    if pyod:
        try:
            measured += pyod.read_figures()
        except RuntimeError as error:
            problem = f"PyOD is missing: it failed with {error}."
    for name, figures in measured:
        for detector, figure in figures.items():
            results.setdefault(detector, {}).setdefault(name, []).append(figure)
    return results, problem


def _means(results: Results, detector: str) -> npt.NDArray[np.float64]:
    """Return the figures of `detector` as means over seeds, [data sets, 2]. They are NaN if a score was not finite."""
    return np.array([np.mean(figures, axis=0) for figures in results[detector].values()])


def print_means(results: Results) -> None:
    """Print the means of each detector over data sets, and the comparison with the baseline."""
    baseline = _means(results, BASELINE)
    print(
        f"| detector | AUROC | AP | data sets | AUROC: wins, ties, losses against {BASELINE} | p "
        f"| AP: wins, ties, losses against {BASELINE} | p |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for detector in results:
        means = _means(results, detector)
        finite = ~np.isnan(means[:, 0])
        auroc, ap = means[finite].mean(axis=0)
        comparison = "| | | | " if detector == BASELINE else _compare(means[finite] - baseline[finite])
        print(f"| {detector} | {auroc:.1f} | {ap:.1f} | {finite.sum()} {comparison}|")


def _compare(differences: npt.NDArray[np.float64]) -> str:
    """Return four table cells that compare a detector with the baseline, given their differences [data sets, 2].

    The first two cells are about AUROC: the numbers of wins, ties and losses, and the two-sided p-value of Wilcoxon's
    signed-rank test. The other two cells show the same for AP.
    """
    cells = ""
    for difference in differences.T:
        won, lost = int((difference > TIE).sum()), int((difference < -TIE).sum())
        p = wilcoxon(difference).pvalue if np.any(difference) and len(difference) > 1 else 1.0
        cells += f"| {won}, {len(difference) - won - lost}, {lost} | {p:.3f} "
    return cells


def print_data_sets(results: Results) -> None:
    """Print AUROC / AP per data set and detector, as means over seeds."""
    print(f"| data set | {' | '.join(results)} |")
    print(f"|---|{'---|' * len(results)}")
    means = {detector: _means(results, detector) for detector in results}
    for index, name in enumerate(results[BASELINE]):
        cells = ("{:.1f} / {:.1f}".format(*means[detector][index]) for detector in results)
        print(f"| {name} | {' | '.join(cells).replace('nan / nan', 'not finite')} |")


def main() -> None:
    """Measure all detectors and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small data sets, few epochs")
    parser.add_argument("--robust", action="store_true", help="train on all rows, including anomalies")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of Elbo's models (default all)")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes (default 1)")
    parser.add_argument(
        "--peers",
        default=str(ROOT / ".venv-peers" / "bin" / "python"),
        metavar="PYTHON",
        help="interpreter with PyOD (default that of make bench-anomaly)",
    )
    options = parser.parse_args()
    seeds = range(1 if options.smoke else 3)
    splits = list(labelled_splits(seeds, bundled=options.smoke, contaminated=options.robust))
    results, problem = measure_all(
        splits,
        kinds=options.kinds,
        robust=options.robust,
        epochs=5 if options.smoke else None,
        jobs=options.jobs,
        pyod_python=options.peers,
    )
    print(describe_machine("torch", "scikit-learn"), end="\n\n")
    rows = "all rows, including anomalies; Elbo's models with --robust" if options.robust else "half of the normal rows"
    print(f"Trained on {rows}; {len(results[BASELINE])} data sets, {len(seeds)} seeds.")
    print(f"p is the p-value of Wilcoxon's signed-rank test over data sets, against {BASELINE}. {problem}\n")
    print_means(results)
    print()
    print_data_sets(results)


if __name__ == "__main__":
    os.environ.update(ONE_CORE)
    main()
