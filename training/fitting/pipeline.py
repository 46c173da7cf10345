"""Fit a whole pipeline: scaling, networks, score statistics, prior, calibration and explanation."""

from collections.abc import Callable

import torch
from torch import Tensor

from models import artifact
from models.autoencoder import Autoencoder
from models.conditional import ConditionalPipeline, ConditionalPrior
from models.core import Core
from models.ensemble import Ensemble
from models.heavy_tailed import HeavyTailedAutoencoder
from models.pca import PCA
from models.pipeline import Pipeline
from models.policy_rules import Policy
from models.prior import gaussian_prior
from models.scaling import Scaling
from models.vae import VAE
from training.config import TrainConfig
from training.data.batches import Batches
from training.errors import FitError
from training.fitting.autoencoders import FitTask, fit_autoencoder, fit_vae
from training.fitting.checkpoint import CheckpointStore
from training.fitting.completion import with_completion_of_rows
from training.fitting.defaults import default_image_latents, default_table_latents, with_defaults
from training.fitting.distributed import ProcessGroup
from training.fitting.explanation import fit_explanation
from training.fitting.heavy_tailed import count_axes, fit_heavy_tailed_ensemble, fit_heavy_tailed_pca, with_heavy_tails
from training.fitting.level_correction import fit_level_correction
from training.fitting.observation import check_bounds, fit_observation, set_bounds
from training.fitting.pca import fit_pca, pca_from_moments, spectrum_from_moments
from training.fitting.policy import fit_policy, fit_usual_score, score_rows, set_calibration
from training.fitting.prepared_data import MAX_COVARIANCE_FEATURES, PreparedData
from training.fitting.prior import fit_conditional_prior, fit_prior
from training.fitting.scaling import fit_scaling, scaling_method
from training.fitting.score_statistics import fit_calibration, fit_neighbours, fit_score_statistics
from training.progress import Reporter


def fit_pipeline(
    config: TrainConfig,
    data: PreparedData,
    reporter: Reporter,
    *,
    checkpoints: CheckpointStore | None = None,
    processes: ProcessGroup = ProcessGroup(),  # noqa: B008  # frozen
    for_scores: bool = False,
) -> Pipeline:
    """Return the fitted pipeline, on the CPU. If `data` has windows, it is the model of their summaries.

    Networks and PCA are fitted to the fit rows. Score statistics of networks are fitted to the held-out rows, and those
    of PCA to the fit rows; with `config.calibration` cross, to both. The calibration is fitted to the calibration rows.

    Args:
        config: the options. `config.model` must be one kind, not auto.
        for_scores: leave out what scores do not need: the prior is N(0, I), and there is no observation noise.

    Raises:
        FitError: the data or the options do not allow a fit, or the fit failed.
    """
    config = with_defaults(config, data.images, len(data.split.fit))
    sizes = data.category_sizes
    scaling = fit_scaling(data.moments, config, data.table.pixel_range, data.fill, sum(sizes))
    latents = config.latents or _default_latents(config.model, data, scaling)
    if len(data.split.fit) <= latents:
        raise FitError(
            f"{latents} latents need at least {latents + 1} rows to fit, got {len(data.split.fit)}: "
            "add rows, or lower --latents"
        )
    check_bounds(config.bounds, data)
    held_out, sample = scaling(data.held_out), scaling(data.sample)
    to_core = core_inputs(scaling)
    held_out_inputs, sample_inputs = to_core(data.held_out_inputs), to_core(data.sample_inputs)

    known = None if data.conditions is None else data.conditions.known
    levels = () if known is None else tuple(len(column.levels) for column in known.columns)
    core: Core
    if config.model == "pca":
        reporter.start(f"{config.name} (pca)", 1)
        core = _fit_pca(data, scaling, latents)
    else:
        device = artifact.choose_device(config.device)
        task = FitTask(
            config=config,
            shape=tuple(data.table.shape),
            unit_range=data.images and scaling_method(config, data.images) == "range",
            latents=latents,
            batches=Batches(data.store, data.split.fit, to_core, config.seed, device),
            sample=sample_inputs,
            held_out=held_out_inputs.to(device),
            reporter=reporter,
            checkpoints=checkpoints,
            processes=processes,
            levels=levels,
            category_sizes=sizes,
            scaling=scaling,
        )
        match config.model:
            case "vae":
                core = fit_vae(task)
            case "ae" | "ensemble":
                core = fit_autoencoder(task)
            case kind:
                raise NotImplementedError(f"no fit is defined for the kind {kind!r}")
    reporter.stage("computing the score statistics")
    if data.windows is None:
        core = _with_score(core.cpu().float().eval(), config, held_out_inputs, sample, data.images)
    else:
        core = _with_window_score(core.cpu().eval(), config, data, scaling)

    prior = gaussian_prior(torch.ones(latents))
    observation = None
    if not for_scores:
        with_spread = isinstance(core, VAE) and not data.images  # only a VAE of tables: see `fit_prior`
        prior = (
            fit_prior(core, sample, held_out, config.seed, with_spread=with_spread)
            if known is None
            else fit_conditional_prior(
                core, sample_inputs, held_out_inputs, config.seed, known, with_spread=with_spread
            )
        )
        # Samples of a model with a window are rows, not summaries: see `fit_windowed`.
        if data.windows is None:
            observation = fit_observation(core, prior, scaling, data)
            set_bounds(observation, config.bounds, data.table.names)
    reporter.stage("calibrating")
    calibration_inputs = to_core(data.calibration_inputs)
    correction = None if known is None else fit_level_correction(core, calibration_inputs, levels)
    calibration = fit_calibration(core, calibration_inputs, correction)
    explanation = fit_explanation(data.moments, scaling, data.images)
    if isinstance(prior, ConditionalPrior) and correction is not None:
        return ConditionalPipeline(scaling, core, prior, calibration, correction, explanation, observation).eval()
    policy = None
    if data.policy is not None or sizes:
        rules = Policy() if data.policy is None else data.policy.rules
        row_scaling = None if data.windows is None else data.windows.scaling
        policy = fit_policy(rules, data.rows.table.names, scaling, explanation, row_scaling, sizes)
    pipeline = Pipeline(scaling, core, prior, calibration, explanation, observation, policy).eval()
    return _with_completion(pipeline, config, data, reporter, for_scores)


def _with_completion(
    pipeline: Pipeline, config: TrainConfig, data: PreparedData, reporter: Reporter, for_scores: bool
) -> Pipeline:
    """Return `pipeline`, so that it can complete rows and score rows with missing values, with its final calibration.

    With `for_scores`, a pipeline that scores complete rows only is not changed.
    """
    if pipeline.policy is not None:
        fit_usual_score(pipeline, data.held_out)
    has_gaps = data.fill is not None and data.windows is None
    if has_gaps or not for_scores:
        reporter.stage("calibrating the estimates of missing values")
        pipeline = with_completion_of_rows(pipeline, data, config.seed)
    if pipeline.policy is not None or has_gaps:
        set_calibration(pipeline, score_rows(pipeline, data.calibration))
    return pipeline


def core_inputs(scaling: Scaling) -> Callable[[Tensor], Tensor]:
    """Return the function that converts inputs of the model, [B, D] or [B, D + C], to the inputs of its core.

    The features are converted to model units, and a condition stays as it is.
    """
    width = len(scaling.shift)

    def convert(x: Tensor) -> Tensor:
        if x.shape[1] == width:
            u: Tensor = scaling(x)
            return u
        return torch.cat((scaling(x[:, :width]), x[:, width:]), dim=1)

    return convert


def _default_latents(kind: str, data: PreparedData, scaling: Scaling) -> int:
    width = data.table.x.width
    if data.images or data.moments.covariance is None:
        return default_image_latents(width)
    if data.windows is not None and kind == "pca":
        return count_axes(spectrum_from_moments(data.scaled_moments(scaling)), len(data.split.fit))
    total = data.scaled_moments(scaling).variance.sum()
    variance_shares = (data.spectrum(scaling) / total).tolist()
    return default_table_latents(kind, variance_shares, len(data.split.fit), width)


def _with_score(core: Core, config: TrainConfig, held_out: Tensor, sample: Tensor, images: bool) -> Core:
    """Return the model that has the networks of `core` and its score statistics.

    With cross-conformal calibration, the statistics come from the fit rows and the held-out rows together, because a
    tenth of a small table gives a poor covariance. The model of each fold has such statistics, too. The scores that it
    gives to the rows of its fold are therefore comparable with the scores of new rows.
    """
    if config.calibration == "cross":
        held_out = sample = torch.cat((sample, held_out))
    if config.model == "ensemble":
        assert isinstance(core, Autoencoder)
        core = Ensemble(core, fit_neighbours(sample), torch.ones(len(Ensemble.parts)))
    fit_score_statistics(core, held_out, sample, config.robust, images)
    return core


def _with_window_score(core: Core, config: TrainConfig, data: PreparedData, scaling: Scaling) -> Core:
    """Return the model of summaries that has the networks of `core`, with its score statistics."""
    moments, held_out = data.scaled_moments(scaling), scaling(data.held_out)
    if isinstance(core, PCA):
        return fit_heavy_tailed_pca(moments, len(core.eigenvalues)).eval()
    core = with_heavy_tails(core.float(), held_out, scaling(data.sample), config.robust)
    if config.model == "ensemble":
        assert isinstance(core, HeavyTailedAutoencoder)
        core = fit_heavy_tailed_ensemble(core, moments, held_out, config.robust)
    return core.eval()


def _fit_pca(data: PreparedData, scaling: Scaling, latents: int) -> PCA:
    """Return the PCA, computed from the covariance, or from the rows if there are too many features for that."""
    if data.moments.covariance is not None:
        return pca_from_moments(data.scaled_moments(scaling), latents)
    width, rows = data.table.x.width, len(data.split.fit)
    if rows > MAX_COVARIANCE_FEATURES or rows > len(data.sample):
        raise FitError(
            f"PCA of {rows:,} rows of {width:,} features would take hours: expected at most {MAX_COVARIANCE_FEATURES} "
            "features or rows; make images smaller with --size, or train an autoencoder"
        )
    return fit_pca(scaling(data.sample).double(), latents)
