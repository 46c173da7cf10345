"""What surrounds a fitted core: its scaling, the statistics of its score, the prior, the calibration."""

from typing import Literal

import torch
from torch import Tensor

from models.autoencoder import Autoencoder, Whitening
from models.calibration import Calibration
from models.core import Core
from models.ensemble import Ensemble, Neighbours
from models.explanation import Expectations, Explanation
from models.pca import PCA
from models.prior import Prior, gaussian_prior
from models.scaling import ImputingScaling, Scaling
from training.config import TrainConfig
from training.data.moments import Moments
from training.errors import FitError

MAX_WHITENING_WIDTH = 2048  # V up to which the covariance is full; above, its matrix would outweigh the networks
PSEUDO_ROWS = 3.0  # that every whitened coordinate counts as if it had seen
CODE_NOISE = 1.0  # variance in units of a code's own: it keeps something of any row, so where it lies says less
ORDINARY_PERCENT = 90  # per cent of the rows, by whose residuals those of the others are measured
OUTLIER_FACTOR = 100.0  # times the largest of those squared residuals: there a network was not wrong, it was elsewhere
NEIGHBOUR_RANK = 5  # whose distance is the scale of a row
NEIGHBOUR_NOISE = 0.1  # variance in units of a feature's own: neighbours need not agree on what is smaller
MAX_NEIGHBOURS = 2_048  # rows that an ensemble keeps: more find little more, and each request measures all distances
NEIGHBOUR_VALUES = 2 << 20  # of float32, in all of them
KEPT_PERCENT = 75  # per cent of the rows that robust statistics keep
CONCENTRATIONS = 5  # steps, after which few of the kept rows change
SHRINKAGE_ROWS = 5_000
SMALLEST_VARIANCE = 1e-12  # of a coordinate that varies, in model units
ROUNDING = 1e-5  # of a squared distance in float32, a feature
SMALLEST_MEAN = 1e-6  # of a score over normal rows
MIXTURE_COMPONENTS = 10  # of an autoencoder's prior, when there are rows enough
ROWS_A_COMPONENT = 50
MIXTURE_ROWS = 10_000  # codes that it is fitted on
AT_REST = 1e-3  # of a table's column that never changes: the share of its value that counts as a standard deviation
NEGLIGIBLE = 1e-7  # of a column's largest value: a deviation below is float32's rounding of a constant
MAX_EXPLAINED_FEATURES = 512  # features up to which each is explained by the others: their weights are a square
EXPLANATION_NOISE = 1.0  # variance, in units of a feature's own: as much noise as signal
BATCH = 4096  # rows at a time: bounds memory


def scaling_method(config: TrainConfig, pictures: bool) -> Literal["standardise", "range", "none"]:
    """The preprocessing that `config.scale` asks for, auto resolved."""
    if config.scale != "auto":
        return config.scale
    bernoulli = config.model == "vae" and config.likelihood == "bernoulli"
    return "range" if pictures or bernoulli else "standardise"


def fit_scaling(
    moments: Moments, config: TrainConfig, pixel_range: tuple[float, float] | None, fill: Tensor | None = None
) -> Scaling:
    """The preprocessing that `config.scale` asks for, for rows of these moments. Raises FitError where it cannot be.

    Args:
        fill: [D], raw units: what stands in for a missing value; None where none is missing.
    """
    how = scaling_method(config, pixel_range is not None)
    if config.model == "vae" and config.likelihood == "bernoulli" and how != "range":
        raise FitError(f"the bernoulli likelihood needs values in [0, 1], --scale {how} does not give them: use range")
    if config.output == "sigmoid" and how != "range":
        raise FitError(f"--output sigmoid needs values in [0, 1], --scale {how} does not give them: use range")
    shift, scale = torch.zeros_like(moments.mean), torch.ones_like(moments.mean)  # [D], [D]
    if how == "standardise":
        shift, scale = moments.mean, (moments.variance * (moments.rows - 1) / moments.rows).sqrt()
        largest = torch.maximum(moments.low.abs(), moments.high.abs())
        still = torch.ones_like(scale) if pixel_range else AT_REST * torch.where(largest > 0.0, largest, 1.0)
        scale = torch.where(scale <= NEGLIGIBLE * largest, still, scale)
    elif how == "range":
        ends = pixel_range or (moments.low, moments.high)
        low, high = (torch.as_tensor(end, dtype=torch.float64).expand_as(shift) for end in ends)
        shift, scale = low, torch.where(high > low, high - low, 1.0)
    scaling = Scaling(shift.float(), scale.float())
    return scaling if fill is None else ImputingScaling(scaling, fill)


def fit_score_statistics(core: Core, u: Tensor, fitted: Tensor, robust: bool = False) -> None:
    """Give `core` the statistics that its score needs and that its training did not.

    Args:
        u: rows [N, D] in model units which the networks did not see.
        fitted: rows [S, D] that they did.
        robust: whether some of u may be anomalies.
    """
    if isinstance(core, PCA):
        core.shrinkage = fit_shrinkage(fitted, core.mean)
    elif isinstance(core, Autoencoder):
        _judge_autoencoder(core, _without_wild(core, u), _usual_variance(fitted), robust)
    elif isinstance(core, Ensemble):
        _judge_ensemble(core, _without_wild(core.network, u), _usual_variance(fitted), robust)


def fit_shrinkage(x: Tensor, mean: Tensor) -> Tensor:
    """How far to shrink the covariance of rows x [N, D] about `mean` to a multiple of the identity: a scalar in [0, 1].

    Ledoit & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004, lemma 3.3. It falls
    as 1 / N, so that of many rows some tell it.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    some = (x[:SHRINKAGE_ROWS] - mean.to(x)).double().cpu().numpy()
    return torch.tensor(float(ledoit_wolf_shrinkage(some, assume_centered=True)) * len(some) / len(x)).to(mean)


def fit_whitening(vectors: Tensor, usual: Tensor, robust: bool = False, noise: Tensor | float = 0.0) -> Whitening:
    """Whitening of vectors [N, V], such as the residuals of rows that the networks did not see.

    Each coordinate counts as if PSEUDO_ROWS more had been seen, a standard deviation of `usual` off: one that did not
    move in N rows may move in the next. The correlations are shrunk as Ledoit & Wolf 2004 do: with few rows the plain
    matrix is singular.

    Args:
        usual: the variance to expect of a coordinate about which nothing is known, a scalar or [V].
        robust: fit it to the rows nearest to it alone.
        noise: variance that is added to each coordinate, in units of its own, a scalar or [V].
    """
    vectors, usual = vectors.double(), usual.double()
    kept = vectors[most_concentrated_rows(vectors, usual)] if robust else vectors
    return _whitening(kept, usual, noise).float()


def most_concentrated_rows(vectors: Tensor, usual: Tensor) -> Tensor:
    """The places of the KEPT per cent of vectors [N, V] that are most alike, ascending.

    Concentration steps, each of which keeps what lies nearest by the statistics of what the last kept: Rousseeuw & Van
    Driessen, "A fast algorithm for the minimum covariance determinant estimator", 1999, theorem 1. They start from
    medians, column by column, which even half of the rows cannot move far.
    """
    vectors, usual = vectors.double(), usual.double()
    count = -(-len(vectors) * KEPT_PERCENT // 100)
    centre = vectors.median(dim=0).values  # [V]
    spread = 1.4826 * (vectors - centre).abs().median(dim=0).values  # [V], the deviation of a normal column
    distance = Whitening(centre, _counting_more(spread.square(), len(vectors), usual).rsqrt()).distance(vectors)
    kept = distance.argsort()[:count]
    for _ in range(CONCENTRATIONS):
        kept = _whitening(vectors[kept], usual).distance(vectors).argsort()[:count]
    return kept.sort().values


def _counting_more(variance: Tensor, rows: int, usual: Tensor) -> Tensor:
    """The variance [V] of `rows` rows, had PSEUDO_ROWS more been seen a deviation of `usual` off."""
    return (rows * variance + PSEUDO_ROWS * usual) / (rows + PSEUDO_ROWS)


def _whitening(vectors: Tensor, usual: Tensor, noise: Tensor | float = 0.0) -> Whitening:
    from sklearn.covariance import ledoit_wolf

    rows, width = vectors.shape
    mean = vectors.mean(dim=0)  # [V]
    deviation = _counting_more(vectors.var(dim=0, correction=0), rows, usual).sqrt()  # [V]
    if width > MAX_WHITENING_WIDTH or rows == 1:
        return Whitening(mean, 1.0 / (deviation * torch.as_tensor(1.0 + noise).sqrt()))
    correlation = torch.from_numpy(ledoit_wolf(((vectors - mean) / deviation).numpy(), assume_centered=True)[0])
    correlation.diagonal().clamp_(min=1.0).add_(noise)  # at least 1: the rows that were not seen
    inverse = torch.linalg.solve_triangular(
        torch.linalg.cholesky(correlation), torch.diag(1.0 / deviation), upper=False
    )
    return Whitening(mean, inverse)


def _judge_autoencoder(core: Autoencoder, u: Tensor, usual: Tensor, robust: bool) -> None:
    codes, residuals = _answers(core, u)
    of_code = codes.var(dim=0, correction=0).mean().clamp(min=SMALLEST_VARIANCE)
    expected = torch.cat((of_code.expand(codes.shape[1]), usual.expand(u.shape[1])))  # [K + D]
    noise = torch.zeros_like(expected)
    noise[: codes.shape[1]] = CODE_NOISE
    core.whitening = fit_whitening(torch.cat((codes, residuals), dim=1), expected, robust, noise)


def _answers(core: Autoencoder, u: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and residuals [N, D] of rows u [N, D]."""
    with torch.no_grad():
        codes = torch.cat([core.encode(rows)[0] for rows in u.split(BATCH)])
        return codes, u - torch.cat([core.decode(some) for some in codes.split(BATCH)])


def _without_wild(core: Autoencoder, u: Tensor) -> Tensor:
    """Those rows of u [N, D] near which the networks know something: at least ORDINARY per cent, mostly all.

    Where a row moves a column that was at rest, a network says anything at all. One such residual, squared, would
    outweigh all others in the variances by which every row is judged.
    """
    squared = _answers(core, u)[1].double().square().sum(dim=1)  # [N]
    return u[squared <= OUTLIER_FACTOR * squared.kthvalue(-(-len(u) * ORDINARY_PERCENT // 100)).values]


def fit_neighbours(x: Tensor) -> Neighbours:
    """Some of the rows x [N, D] in model units, and as the scale of each its squared distance to its fifth neighbour.

    To that the mean of all is added: rows that lie on one another make no distance infinite.
    """
    whitening = fit_whitening(x[:SHRINKAGE_ROWS], _usual_variance(x), noise=NEIGHBOUR_NOISE)
    rows = whitening(x[: max(1, min(MAX_NEIGHBOURS, NEIGHBOUR_VALUES // x.shape[1]))])
    rank = min(NEIGHBOUR_RANK, len(rows) - 1) + 1  # the first is the row itself
    own = torch.cat([torch.cdist(part, rows).kthvalue(rank).values for part in rows.split(BATCH)]).square()  # [R]
    return Neighbours(whitening, rows, (own + own.mean()).clamp(min=ROUNDING * x.shape[1]))


def _judge_ensemble(core: Ensemble, u: Tensor, usual: Tensor, robust: bool) -> None:
    _judge_autoencoder(core.network, u, usual, robust)
    with torch.no_grad():
        unusual = torch.cat([core.network.score(rows)[0] for rows in u.split(BATCH)])  # [N]
        near = torch.cat([core.neighbours(rows) for rows in u.split(BATCH)])  # [N]
        core.weights = 1.0 / torch.stack([_mean(d, robust).clamp(min=SMALLEST_MEAN) for d in (unusual, near)])


def _usual_variance(fitted: Tensor) -> Tensor:
    """The mean variance of those columns of `fitted` [S, D] that vary, a scalar."""
    variance = fitted.double().var(dim=0, correction=0)
    return variance[variance > SMALLEST_VARIANCE].mean().nan_to_num(1.0)


def _mean(distances: Tensor, robust: bool) -> Tensor:
    """The mean of distances [N], a scalar; robust, of the smaller ones."""
    kept = -(-len(distances) * KEPT_PERCENT // 100) if robust else len(distances)
    return distances.sort().values[:kept].mean()


def fit_prior(core: Core, u: Tensor, latents: int, seed: int) -> Prior:
    """The prior whose draws decode to rows like the fitted u [N, D]: pPCA's, N(0, I), or a mixture on an AE's codes."""
    if isinstance(core, PCA):
        return gaussian_prior((core.eigenvalues - core.noise_variance).clamp(min=0.0).sqrt())
    if not isinstance(core, Autoencoder | Ensemble):
        return gaussian_prior(torch.ones(latents))
    from sklearn.mixture import GaussianMixture

    with torch.no_grad():
        codes = torch.cat([core.encode(rows)[0] for rows in u[:MIXTURE_ROWS].split(BATCH)]).double().numpy()
    components = min(MIXTURE_COMPONENTS, max(1, len(codes) // ROWS_A_COMPONENT))
    spread = float(codes.var(axis=0).mean())
    mixture = GaussianMixture(components, random_state=seed, reg_covar=1e-4 * spread + 1e-12, max_iter=300)
    mixture.fit(codes)
    parameters = mixture.weights_, mixture.means_, mixture.covariances_
    weights, means, covariances = (torch.from_numpy(value).float() for value in parameters)
    return Prior(weights, means, torch.linalg.cholesky(covariances))


def fit_explanation(moments: Moments, scaling: Scaling, pictures: bool) -> Explanation:
    """What is expected of each feature, from the moments of the fitted rows in raw units."""
    if pictures or moments.covariance is None or len(moments.mean) > MAX_EXPLAINED_FEATURES:
        return Explanation()
    moments = moments.scaled(scaling.shift, scaling.scale)
    assert moments.covariance is not None
    deviation = moments.variance.sqrt()  # [D]
    still = deviation <= NEGLIGIBLE * torch.maximum(moments.low.abs(), moments.high.abs())
    deviation = torch.where(still, 1.0, deviation)
    correlation = moments.covariance / torch.outer(deviation, deviation)  # [D, D]
    correlation[still, :] = correlation[:, still] = 0.0
    precision = torch.linalg.inv(correlation + EXPLANATION_NOISE * torch.eye(len(deviation)).double())
    own = precision / precision.diagonal().unsqueeze(1)  # [D, D]: (x - mean) to what the others leave of each
    residual = torch.where(still, 1.0, torch.einsum("ij,jk,ik->i", own, correlation, own).sqrt())  # [D]
    weights = -own * torch.outer(deviation, 1.0 / deviation)
    weights.fill_diagonal_(0.0)
    values = (moments.mean, deviation, weights, residual * deviation)
    return Expectations(*(value.float() for value in values))


def fit_calibration(core: Core, u: Tensor) -> Calibration:
    """Calibration by the scores of rows u [N, D] in model units which trained nothing."""
    with torch.no_grad():
        return Calibration(torch.cat([core.score(rows)[0] for rows in u.split(BATCH)]))
