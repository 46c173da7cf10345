"""How well anomaly scores rank: Elbo's kinds as `elbo train` makes them by default, against PyOD and scikit-learn.

Sets and splits are those of `anomaly_sets.py`. Elbo deals the training half out again: 70 % of it fit, 10 % are held
out, 20 % calibrate; the others learn from all of it. PyOD lives in an environment that `make bench-anomaly`
makes; where it is missing the tables say so. Prints Markdown tables. `--smoke` takes small sets and a few steps,
`--robust` shows what happens when the anomalies are among the rows that are learnt from.
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

from benchmarks.anomaly.datasets import Contest, contests
from benchmarks.data import ROOT, describe_machine
from models.pipeline import Pipeline
from training.config import TrainConfig
from training.data.table import read_table, split_rows
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import prepare_data
from training.progress import SilentReporter

KINDS = ("pca", "vae", "ae", "ensemble")
RIVAL = "kNN"  # the one to beat
EVEN = 0.05  # of 100: a smaller difference between two sets' figures is a tie
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Scores = npt.NDArray[np.float64]
Results = dict[str, dict[str, list[tuple[float, float]]]]  # by detector, by set: AUROC and AP of each seed, of 100


def trained(kind: str, rows: Scores, robust: bool = False, epochs: int | None = None) -> Pipeline:
    """The model that `elbo train` publishes for `rows` [N, D]."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        np.save(path, rows.astype(np.float32))
        table = read_table(str(path))
    config = TrainConfig.model_validate({"model": kind, "name": kind, "robust": robust, "epochs": epochs})
    return fit_pipeline(
        config, prepare_data(table, split_rows(len(rows), config.seed, rows.shape[1]), robust), SilentReporter()
    )


def elbo(kind: str, robust: bool = False, epochs: int | None = None) -> Callable[[Contest], Scores]:
    """The scores of the test rows by a model of `kind`."""

    def scores(contest: Contest) -> Scores:
        pipeline = trained(kind, contest.train, robust, epochs)
        with torch.inference_mode():
            return pipeline.score(torch.from_numpy(contest.test.astype(np.float32)))[0].double().numpy()

    return scores


def neighbours(contest: Contest) -> Scores:
    """The distance to the fifth neighbour, as PyOD's KNN has it; a row is no neighbour of itself."""
    found = NearestNeighbors(n_neighbors=6).fit(contest.train).kneighbors(contest.test)[0]
    known = contest.test is contest.train
    return np.asarray(found[:, 5 if known else 4])


def outlier_factor(contest: Contest) -> Scores:
    """LOF with 20 neighbours."""
    return np.asarray(-LocalOutlierFactor(novelty=True).fit(contest.train).score_samples(contest.test))


def forest(contest: Contest) -> Scores:
    """An isolation forest of 100 trees."""
    return np.asarray(-IsolationForest(random_state=0).fit(contest.train).score_samples(contest.test))


def measure(contest: Contest, scores: Scores) -> tuple[float, float]:
    """AUROC and average precision, of 100; (NaN, NaN) for scores that are not finite."""
    if not np.isfinite(scores).all():
        return np.nan, np.nan
    return 100 * roc_auc_score(contest.labels, scores), 100 * average_precision_score(contest.labels, scores)


def _judged(task: tuple[Contest, Sequence[str], bool, int | None]) -> tuple[str, dict[str, tuple[float, float]]]:
    """What every detector reaches on one contest, but for PyOD's."""
    torch.set_num_threads(1)
    contest, kinds, contaminated, epochs = task
    detectors = {f"Elbo {kind}": elbo(kind, contaminated, epochs) for kind in kinds}
    detectors |= {RIVAL: neighbours, "LOF": outlier_factor, "isolation forest": forest}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LOF warns of duplicates
        return contest.name, {name: measure(contest, detect(contest)) for name, detect in detectors.items()}


class Pyod:
    """PyOD's detectors at work on some contests, in a process of their own."""

    def __init__(self, given: list[Contest], python: str) -> None:
        self._given, self._folder = given, tempfile.TemporaryDirectory()
        for index, contest in enumerate(given):
            np.savez(Path(self._folder.name) / f"{index}.npz", train=contest.train, test=contest.test)
        command = [python, str(ROOT / "benchmarks" / "anomaly_pyod.py"), self._folder.name]
        with (Path(self._folder.name) / "said").open("w") as said:
            self._process = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | ONE_CORE)

    def judged(self) -> Iterator[tuple[str, dict[str, tuple[float, float]]]]:
        """What each reaches on each contest. Raises RuntimeError if it did not work."""
        with self._folder as folder:
            if self._process.wait():
                raise RuntimeError((Path(folder) / "said").read_text().strip().splitlines()[-1])
            for index, contest in enumerate(self._given):
                with np.load(Path(folder) / "scores" / f"{index}.npz") as scores:
                    yield contest.name, {name: measure(contest, scores[name]) for name in scores}


def compete(
    given: list[Contest], kinds: Sequence[str], contaminated: bool, epochs: int | None, jobs: int, python: str
) -> tuple[Results, str]:
    """What all reach, and what to say of who could not take part."""
    results: Results = {}
    absent, peers = "", None
    try:
        peers = Pyod(given, python)
    except FileNotFoundError:
        absent = f"PyOD did not take part: no {python}: run make bench-anomaly."
    with get_context("spawn").Pool(jobs) as pool:
        judged = []
        for name, figures in pool.imap(_judged, [(contest, kinds, contaminated, epochs) for contest in given]):
            told = ", ".join(f"{detector} {auroc:.1f} / {ap:.1f}" for detector, (auroc, ap) in figures.items())
            print(f"{name}: {told}", file=sys.stderr, flush=True)
            judged.append((name, figures))
    try:
        judged += peers.judged() if peers else []
    except RuntimeError as error:
        absent = f"PyOD did not take part: {error}."
    for name, figures in judged:
        for detector, figure in figures.items():
            results.setdefault(detector, {}).setdefault(name, []).append(figure)
    return results, absent


def _means(results: Results, detector: str) -> npt.NDArray[np.float64]:
    """[sets, 2]: means over the seeds, NaN where a score was not finite."""
    return np.array([np.mean(figures, axis=0) for figures in results[detector].values()])


def print_means(results: Results) -> None:
    """The table of means over sets, each compared with the rival set by set."""
    rival = _means(results, RIVAL)
    print(f"| detector | AUROC | AP | sets | AUROC: wins, ties, losses against {RIVAL} | p | AP: the same | p |")
    print("|---|---|---|---|---|---|---|---|")
    for detector in results:
        means = _means(results, detector)
        there = ~np.isnan(means[:, 0])
        figures = means[there].mean(axis=0)
        compared = "| | | | " if detector == RIVAL else _compared(means[there] - rival[there])
        print(f"| {detector} | {figures[0]:.1f} | {figures[1]:.1f} | {there.sum()} {compared}|")


def _compared(differences: npt.NDArray[np.float64]) -> str:
    """Wins, ties and losses by AUROC and by AP, and the two-sided p of Wilcoxon's signed ranks over sets."""
    cells = ""
    for difference in differences.T:
        won, lost = int((difference > EVEN).sum()), int((difference < -EVEN).sum())
        p = wilcoxon(difference).pvalue if np.any(difference) and len(difference) > 1 else 1.0
        cells += f"| {won}, {len(difference) - won - lost}, {lost} | {p:.3f} "
    return cells


def print_sets(results: Results) -> None:
    """The table of AUROC / AP by set, means over seeds."""
    print(f"| set | {' | '.join(results)} |")
    print(f"|---|{'---|' * len(results)}")
    means = {detector: _means(results, detector) for detector in results}
    for index, name in enumerate(results[RIVAL]):
        cells = ("{:.1f} / {:.1f}".format(*means[detector][index]) for detector in results)
        print(f"| {name} | {' | '.join(cells).replace('nan / nan', 'not finite')} |")


def main() -> None:
    """Let them compete and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small sets and few steps, to see that it works")
    parser.add_argument("--robust", action="store_true", help="anomalies among the rows that are learnt from")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of Elbo's models, all by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--peers", default=str(ROOT / ".venv-peers" / "bin" / "python"), metavar="PYTHON")
    options = parser.parse_args()
    given = list(contests(range(1 if options.smoke else 3), options.smoke, options.robust))
    epochs = 5 if options.smoke else None
    results, absent = compete(given, options.kinds, options.robust, epochs, options.jobs, options.peers)
    print(describe_machine("torch", "scikit-learn"), end="\n\n")
    learnt = (
        "all rows, anomalies among them; Elbo's kinds with --robust" if options.robust else "half of the normal rows"
    )
    print(f"Learnt from {learnt}; {len(results[RIVAL])} sets, {len(given) // len(results[RIVAL])} seeds.")
    print(f"p is of Wilcoxon's signed ranks over sets, against {RIVAL}. {absent}\n")
    print_means(results)
    print()
    print_sets(results)


if __name__ == "__main__":
    os.environ.update(ONE_CORE)
    main()
