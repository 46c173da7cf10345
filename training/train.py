"""One training run, from a table to a published artifact."""

import hashlib
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models import artifact
from models.autoencoder import Autoencoder
from models.core import Core
from models.manifest import FORMAT_VERSION, CalibrationSize, Data, Feature, Golden, Manifest
from models.pipeline import Pipeline
from training import checkpoint
from training.config import TrainConfig
from training.data import Split, Table, split
from training.descent import Run
from training.errors import FitError
from training.evaluate import held_out_metrics
from training.networks import fit_autoencoder, fit_vae
from training.pca import fit_pca
from training.progress import Reporter
from training.statistics import calibration_of, prior_of, scaling_of, whitening_of

DEFAULT_LATENTS = 16
GOLDEN_ROWS = 3


def train(
    config: TrainConfig,
    table: Table,
    artifacts: Path,
    report: Reporter,
    runs: Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
) -> Path:
    """Fit, judge, calibrate and publish; gives the path of the new artifact.

    Deterministic: the same table, configuration and versions give the same weights, however often the run was killed
    and resumed on the way. Raises DataError and FitError.

    Args:
        runs: where the run keeps its state while it trains, in a folder of its name; without it, it keeps none.
        resume: continue from that state.
        checkpoint_seconds: between two savings of it.
    """
    for note in table.notes:
        report.note(note)
    rows = split(len(table.x), config.seed)
    run = Run(runs / config.name, _identity(config, table), resume, checkpoint_seconds) if runs else None
    with _one_thread():
        pipeline = fit(config, table, rows, report, run)
        metrics = held_out_metrics(pipeline, torch.from_numpy(table.x), rows, config.seed)
        module = artifact.script(pipeline)
        golden = _golden(module, table.x[rows.held_out], config.seed)
    path = artifact.publish(module, _manifest(config, table, rows, pipeline, metrics, golden), artifacts)
    if run:
        checkpoint.remove(run.folder)
    report.done(metrics)
    return path


def _identity(config: TrainConfig, table: Table) -> str:
    """What must be the same for a run to be continued."""
    return hashlib.sha256(f"{config.model_dump_json()} {table.fingerprint} {torch.__version__}".encode()).hexdigest()


def fit(config: TrainConfig, table: Table, rows: Split, report: Reporter, run: Run | None = None) -> Pipeline:
    """The whole pipeline, on the CPU: networks from the fit rows, score from the held-out, p-values from the others."""
    x = torch.from_numpy(table.x)
    scaling = scaling_of(x[rows.fit], config, table.pixel_range)
    latents = config.latents or min(DEFAULT_LATENTS, -(-table.x.shape[1] // 2))
    if len(rows.fit) <= latents:
        raise FitError(f"{latents} latents need more rows to fit than {len(rows.fit)}: add rows, or lower --latents")
    core = _core(config, scaling(x[rows.fit].double()), scaling(x[rows.held_out]), latents, report, run)
    if isinstance(core, Autoencoder):
        core.whitening = whitening_of(core, scaling(x[rows.held_out]))
    prior = prior_of(core, scaling(x[rows.fit]), latents, config.seed)
    calibration = calibration_of(core, scaling(x[rows.calibration]))
    return Pipeline(scaling, core, prior, calibration).eval()


def _core(config: TrainConfig, u: Tensor, held_out: Tensor, latents: int, report: Reporter, run: Run | None) -> Core:
    """The model that `config` asks for, fitted on rows u [N, D], float64, in model units; float32 on the CPU."""
    device = artifact.choose_device(config.device)
    core: Core
    if config.model == "pca":
        report.start(f"{config.name} (pca)", 1)
        core = fit_pca(u.to(device), latents)
    elif config.model == "ae":
        core = fit_autoencoder(u.float().to(device), held_out.to(device), latents, config, report, run)
    else:
        core = fit_vae(u.float().to(device), held_out.to(device), latents, config, report, run)
    return core.cpu().float().eval()


def _golden(module: torch.jit.ScriptModule, x: npt.NDArray[np.float32], seed: int) -> Golden:
    rows = torch.from_numpy(x[:GOLDEN_ROWS])
    random = np.random.RandomState(seed)
    latents = module.encode(rows)[0].shape[1]
    noise = torch.from_numpy(random.standard_normal((len(rows), latents)).astype(np.float32))
    choice = torch.from_numpy(random.uniform(size=len(rows)).astype(np.float32))
    return artifact.golden(module, rows, noise, choice)


def _manifest(
    config: TrainConfig, table: Table, rows: Split, pipeline: Pipeline, metrics: dict[str, float], golden: Golden
) -> Manifest:
    fitted = table.x[rows.fit]
    medians, lows, highs = np.median(fitted, axis=0), fitted.min(axis=0), fitted.max(axis=0)
    return Manifest(
        format_version=FORMAT_VERSION,
        name=config.name,
        kind=config.model,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        shape=list(table.shape),
        features=[
            Feature(name=name, unit=unit, median=float(median), minimum=float(low), maximum=float(high))
            for name, unit, median, low, high in zip(table.names, table.units, medians, lows, highs, strict=True)
        ],
        latents=len(golden.outputs["draw"][0]),
        parts=list(pipeline.core.parts),
        pixel_range=table.pixel_range,
        training=config.model_dump(),
        data=Data(
            source=table.source,
            rows=len(table.x),
            fingerprint=table.fingerprint,
            fit=len(rows.fit),
            held_out=len(rows.held_out),
            calibration=len(rows.calibration),
        ),
        metrics=metrics,
        calibration=CalibrationSize(rows=len(rows.calibration), floor=1.0 / (len(rows.calibration) + 1)),
        golden=golden,
        versions={
            "elbo": version("elbo"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        weights_sha256=artifact.weights_sha256(pipeline),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: as fast for networks of this size, and the sums do not depend on how many cores a machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
