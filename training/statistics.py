"""What surrounds a fitted core: its scaling, the whitening of an autoencoder's score, the prior, the calibration."""

from typing import Literal

import torch
from torch import Tensor

from models.autoencoder import Autoencoder, Whitening
from models.calibration import Calibration
from models.core import Core
from models.explanation import Expectations, Explanation
from models.pca import PCA
from models.prior import Prior, gaussian_prior
from models.scaling import ImputingScaling, Scaling
from training.config import TrainConfig
from training.errors import FitError
from training.moments import Moments

WIDEST_WHITENING = 2048  # K + D up to which the joint covariance is full; above, its matrix would outweigh the networks
MIXTURE_COMPONENTS = 10  # of an autoencoder's prior, when there are rows enough
ROWS_A_COMPONENT = 50
NEGLIGIBLE = 1e-7  # of a column's largest value: a deviation below is float32's rounding of a constant
SMALLEST_DEVIATION = 1e-6  # of a whitened coordinate, in model units
WIDEST_EXPLANATION = 512  # features up to which each is explained by the others: their weights are a square
EXPLAINING_NOISE = 1.0  # variance, in units of a feature's own: as much noise as signal
BATCH = 4096  # rows at a time: bounds memory


def how_scaled(config: TrainConfig, pictures: bool) -> Literal["standardise", "range", "none"]:
    """The preprocessing that `config.scale` asks for, auto resolved."""
    if config.scale != "auto":
        return config.scale
    bernoulli = config.model == "vae" and config.likelihood == "bernoulli"
    return "range" if pictures or bernoulli else "standardise"


def scaling_of(
    moments: Moments, config: TrainConfig, pixel_range: tuple[float, float] | None, fill: Tensor | None = None
) -> Scaling:
    """The preprocessing that `config.scale` asks for, for rows of these moments. Raises FitError where it cannot be.

    Args:
        fill: [D], raw units: what stands in for a missing value; None where none is missing.
    """
    how = how_scaled(config, pixel_range is not None)
    if config.model == "vae" and config.likelihood == "bernoulli" and how != "range":
        raise FitError(f"the bernoulli likelihood needs values in [0, 1], --scale {how} does not give them: use range")
    if config.output == "sigmoid" and how != "range":
        raise FitError(f"--output sigmoid needs values in [0, 1], --scale {how} does not give them: use range")
    shift, scale = torch.zeros_like(moments.mean), torch.ones_like(moments.mean)  # [D], [D]
    if how == "standardise":
        shift, scale = moments.mean, (moments.variance * (moments.rows - 1) / moments.rows).sqrt()
        largest = torch.maximum(moments.low.abs(), moments.high.abs())
        scale = torch.where(scale <= NEGLIGIBLE * largest, 1.0, scale)
    elif how == "range":
        ends = pixel_range or (moments.low, moments.high)
        low, high = (torch.as_tensor(end, dtype=torch.float64).expand_as(shift) for end in ends)
        shift, scale = low, torch.where(high > low, high - low, 1.0)
    scaling = Scaling(shift.float(), scale.float())
    return scaling if fill is None else ImputingScaling(scaling, fill)


def whitening_of(core: Autoencoder, u: Tensor) -> Whitening:
    """Whitening of (code, residual) on rows u [N, D] in model units which the networks did not see.

    The covariance is shrunk as Ledoit & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
    2004: with few rows the plain one is singular.
    """
    from sklearn.covariance import ledoit_wolf

    with torch.no_grad():
        code = core.encode(u)[0]  # [N, K]
        joint = torch.cat((code, u - core.decode(code)), dim=1).double()  # [N, K + D]
    mean, deviation = joint.mean(dim=0), joint.std(dim=0, correction=0).clamp(min=SMALLEST_DEVIATION)  # [K + D] each
    if joint.shape[1] > WIDEST_WHITENING:
        return Whitening(mean.float(), (1.0 / deviation).float())
    correlation = torch.from_numpy(ledoit_wolf(((joint - mean) / deviation).numpy(), assume_centered=True)[0])
    factor = torch.linalg.cholesky(correlation)
    inverse = torch.linalg.solve_triangular(factor, torch.diag(1.0 / deviation), upper=False)
    return Whitening(mean.float(), inverse.float())


def prior_of(core: Core, u: Tensor, latents: int, seed: int) -> Prior:
    """The prior whose draws decode to rows like the fitted u [N, D]: pPCA's, N(0, I), or a mixture on an AE's codes."""
    if isinstance(core, PCA):
        return gaussian_prior((core.eigenvalues - core.noise_variance).clamp(min=0.0).sqrt())
    if not isinstance(core, Autoencoder):
        return gaussian_prior(torch.ones(latents))
    from sklearn.mixture import GaussianMixture

    with torch.no_grad():
        codes = torch.cat([core.encode(rows)[0] for rows in u.split(BATCH)]).double().numpy()
    components = min(MIXTURE_COMPONENTS, max(1, len(codes) // ROWS_A_COMPONENT))
    spread = float(codes.var(axis=0).mean())
    mixture = GaussianMixture(components, random_state=seed, reg_covar=1e-4 * spread + 1e-12, max_iter=300)
    mixture.fit(codes)
    parameters = mixture.weights_, mixture.means_, mixture.covariances_
    weights, means, covariances = (torch.from_numpy(value).float() for value in parameters)
    return Prior(weights, means, torch.linalg.cholesky(covariances))


def explanation_of(moments: Moments, scaling: Scaling, pictures: bool) -> Explanation:
    """What is expected of each feature, from the moments of the fitted rows in raw units."""
    if pictures or moments.covariance is None or len(moments.mean) > WIDEST_EXPLANATION:
        return Explanation()
    moments = moments.scaled(scaling.shift, scaling.scale)
    assert moments.covariance is not None
    deviation = moments.variance.sqrt()  # [D]
    still = deviation <= NEGLIGIBLE * torch.maximum(moments.low.abs(), moments.high.abs())
    deviation = torch.where(still, 1.0, deviation)
    correlation = moments.covariance / torch.outer(deviation, deviation)  # [D, D]
    correlation[still, :] = correlation[:, still] = 0.0
    precision = torch.linalg.inv(correlation + EXPLAINING_NOISE * torch.eye(len(deviation)).double())
    own = precision / precision.diagonal().unsqueeze(1)  # [D, D]: (x - mean) to what the others leave of each
    residual = torch.where(still, 1.0, torch.einsum("ij,jk,ik->i", own, correlation, own).sqrt())  # [D]
    weights = -own * torch.outer(deviation, 1.0 / deviation)
    weights.fill_diagonal_(0.0)
    values = (moments.mean, deviation, weights, residual * deviation)
    return Expectations(*(value.float() for value in values))


def calibration_of(core: Core, u: Tensor) -> Calibration:
    """Calibration by the scores of rows u [N, D] in model units which trained nothing."""
    with torch.no_grad():
        return Calibration(torch.cat([core.score(rows)[0] for rows in u.split(BATCH)]))
