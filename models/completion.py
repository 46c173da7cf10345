"""Models that complete rows: they estimate or draw the missing values of a row, given its known values."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.calibration import Calibration
from models.core import Core
from models.explanation import Explanation
from models.gap_scores import GapScores, no_gap_scores
from models.observation import Observation
from models.pca import PCA
from models.pipeline import Pipeline
from models.policy import PolicyModule
from models.prior import Prior
from models.scaling import Scaling

CHAINS = 16
FIRST_STEPS = 4  # steps of each chain whose states are discarded
# Later steps of each chain, whose states are used. More of them lower the error by less than 2 %. If you change the
# number, change `CompletingNetwork._run_chains` too, which writes the steps out.
KEPT_STEPS = 4
SCORED_STEPS = 2  # steps of each chain before its state is scored; more of them change the AUROC by less than 0.003
CANDIDATES = 256  # draws from the prior, among which the first states of the chains are chosen
MAX_EXACT_FEATURES = 256  # limits the matrices [B, D, D] that the exact scores of PCA need for B rows of D features


class CompletingPipeline(Pipeline):
    """A pipeline that can complete rows, and score rows with missing values. See `Pipeline`.

    Args:
        gap_scores: maps the scores of rows with missing values to the scale of complete rows; by default, the identity.
    """

    def __init__(
        self,
        scaling: Scaling,
        core: Core,
        prior: Prior,
        calibration: Calibration,
        explanation: Explanation | None = None,
        observation: Observation | None = None,
        policy: PolicyModule | None = None,
        *,
        gap_scores: GapScores | None = None,
    ) -> None:
        super().__init__(scaling, core, prior, calibration, explanation, observation, policy)
        self.gap_scores = gap_scores or no_gap_scores()

    def impute(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Estimate the missing values of rows x [B, D], which are NaN.

        Returns:
            mean: the rows with expected values in place of missing values, [B, D]. They are within the bounds of the
                features, and are rounded if the feature has only whole numbers.
            deviation: the standard deviation of each missing value given the known values; 0 for a known value, [B, D].
            low: lower end of the interval that contains a missing value with probability 0.9; for a known value, the
                value itself, [B, D].
            high: upper end of this interval, [B, D].
        """
        raise NotImplementedError

    def constrain(self, x: Tensor, mean: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the estimates `mean` of the missing values of rows x within their bounds, and their intervals.

        An interval that does not contain its estimate any more is extended. All arrays are [B, D].
        """
        constrained = torch.where(x.isnan(), self.observation.constrain(mean), x)
        return (
            constrained,
            torch.where(low > constrained, constrained, low),
            torch.where(high < constrained, constrained, high),
        )

    def score_gaps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score rows x [B, D] whose missing values are NaN. Return what `Pipeline.score` returns for complete rows.

        The score is the expected score of the complete row given the known values, mapped by `gap_scores`. A missing
        value has the contribution 0, and its expected value is its mean given the known values.
        """
        score, parts, contribution, expected = self.expected_score(x)
        share = x.isnan().to(x.dtype).mean(dim=1)  # [B]
        scaled: Tensor = self.gap_scores(score, share)  # [B]
        # Each part gets an equal share of the difference, so that their sum is still the score.
        shift = (scaled - score) / parts.shape[1]  # [B]
        return scaled, parts + shift.unsqueeze(1), contribution, expected

    def expected_score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `score_gaps` returns for x [B, D], but with scores that `gap_scores` has not mapped."""
        raise NotImplementedError

    def complete(self, x: Tensor, noise: Tensor, choice: Tensor, row_noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw B rows that have the known values of one row.

        Args:
            x: the row, [1, D]; missing values are NaN.
            noise: standard normal noise of the latents, [B, K].
            choice: uniform numbers in [0, 1), [B].
            row_noise: standard normal noise of the rows, [B, 2 D].

        Returns:
            z: the latents, [B, K].
            x_hat: the rows with the values that z decodes to, [B, D].
            rows: the rows with observation noise, [B, D]. Drawn values are within the range of the training rows, and
                are rounded if the feature has only whole numbers. Known values are unchanged.
        """
        raise NotImplementedError


class CompletingPCA(CompletingPipeline):
    """A pipeline of PCA that completes rows by the exact conditional distribution of probabilistic PCA.

    In model units, x = mean + W' t + noise. t ~ N(0, I) are the standardised latents, W = (L - s2)^(1/2) V [K, D] are
    the loadings, and the noise is N(0, s2 I) (Tipping & Bishop 1999, eq. 7). Let x_o be the known values of a row, and
    W_o their loadings. Then t given x_o is N(M^-1 W_o (x_o - mean_o), s2 M^-1), with M = s2 I + W_o W_o' (eq. 6). So
    the missing values are Gaussian too. All of this is computed in float64, because s2 can be very small.

    The means and the deviations are those of this Gaussian. They take the fitted parameters for the true ones. The
    intervals of `impute` do not: see `_margin`.

    See `CompletingPipeline` for the other arguments. `core` is a PCA. The latents have this Gaussian prior, not the
    mixture of `prior`, so that the missing values given the known ones are Gaussian.

    Args:
        score_form: what `_score_form` returns for `core`; None to compute it.
        fit_rows: the number of rows to which `core` was fitted; None if it is unknown. The intervals are then those of
            the Gaussian, as with infinitely many rows.
    """

    if TYPE_CHECKING:
        core: PCA  # TorchScript cannot compile this annotation
    centre: Tensor
    precision: Tensor
    uncertainty: Tensor

    def __init__(
        self,
        scaling: Scaling,
        core: Core,
        prior: Prior,
        calibration: Calibration,
        explanation: Explanation | None = None,
        observation: Observation | None = None,
        policy: PolicyModule | None = None,
        *,
        gap_scores: GapScores | None = None,
        score_form: tuple[Tensor, Tensor] | None = None,
        fit_rows: int | None = None,
    ) -> None:
        super().__init__(scaling, core, prior, calibration, explanation, observation, policy, gap_scores=gap_scores)
        centre, precision = score_form or _score_form(core)
        self.register_buffer("centre", centre)
        self.register_buffer("precision", precision)
        # 1 / (N - 1) of N fit rows, float64: unlike N, it is finite for infinitely many rows.
        self.register_buffer("uncertainty", torch.tensor(1.0 / (fit_rows - 1) if fit_rows else 0.0).double())

    def expected_score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the expected scores of rows x [B, D]. See `CompletingPipeline.expected_score`.

        The score is a squared Mahalanobis distance d with the precision P, the inverse of the covariance. Under this
        Gaussian, the expected d of the complete row is the distance of the known values alone plus the number m of
        missing values, because given the known values, the missing ones add a chi-squared variable with m degrees of
        freedom. The distance of the known values is the smallest d that a completed row can have. The completion that
        has it is the conditional mean x_m = mean_m - P_mm^-1 P_mo (x_o - mean_o).

        With more than MAX_EXACT_FEATURES features, P would be too large. The rows are then completed by the conditional
        mean of probabilistic PCA, as in `impute`.
        """
        missing = x.isnan()  # [B, D]
        gaps = missing.double()  # [B, D]
        if self.precision.shape[0] == x.shape[1]:
            u = self.scaling(torch.where(missing, torch.zeros_like(x), x)).double() - self.centre  # [B, D]
            u = torch.where(missing, torch.zeros_like(u), u)
            # P_mm for the missing values, and the identity for the known ones, [B, D, D].
            matrix = gaps.unsqueeze(2) * self.precision * gaps.unsqueeze(1) + torch.diag_embed(1.0 - gaps)
            factor = torch.linalg.cholesky_ex(matrix)[0]  # [B, D, D]
            right = ((u @ self.precision) * gaps).unsqueeze(2)  # [B, D, 1]
            half = torch.linalg.solve_triangular(factor, right, upper=False)
            solved = torch.linalg.solve_triangular(factor.permute(0, 2, 1), half, upper=True).squeeze(2)  # [B, D]
            completed = self.scaling.inverse(u - solved * gaps + self.centre).float()  # [B, D]
        else:
            latents, _ = self._condition(x, self._loadings())  # [B, K]
            completed = self.scaling.inverse(latents @ self._loadings() + self.core.mean).float()
        completed = torch.where(missing, completed, x)
        score, parts, contribution, expected = self.score(completed)
        count = gaps.sum(dim=1).to(x.dtype)  # [B]
        parts = parts + (count / parts.shape[1]).unsqueeze(1)
        contribution = torch.where(missing, torch.zeros_like(contribution), contribution)
        return score + count, parts, contribution, torch.where(missing, completed, expected)

    def impute(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Estimate the missing values of rows x [B, D]. See `CompletingPipeline.impute`."""
        missing = x.isnan()  # [B, D]
        loadings = self._loadings()  # [K, D]
        latents, factor = self._condition(x, loadings)  # [B, K], [B, K, K]
        mean = latents @ loadings + self.core.mean  # [B, D]
        # With M = F F', the variance of W' t is s2 W' M^-1 W = s2 (F^-1 W)' (F^-1 W).
        spread = torch.linalg.solve_triangular(factor, loadings.unsqueeze(0), upper=False)  # [B, K, D]
        variance = self.core.noise_variance.double() * (1.0 + spread.square().sum(dim=1))  # [B, D]
        filled = torch.where(missing, self.scaling.inverse(mean), x.double())  # [B, D]
        deviation = torch.where(missing, variance.sqrt() * self.scaling.scale, torch.zeros_like(filled))  # [B, D]
        margin = self._margin(latents, factor).unsqueeze(1) * deviation  # [B, D]
        constrained, low, high = self.constrain(x, filled.float(), (filled - margin).float(), (filled + margin).float())
        return constrained, deviation.float(), low, high

    def complete(
        self,
        x: Tensor,
        noise: Tensor,
        choice: Tensor,  # noqa: ARG002 - there is no mixture to choose from
        row_noise: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw B rows that have the known values of one row. See `CompletingPipeline.complete`."""
        missing = x.isnan()  # [1, D]
        loadings = self._loadings()  # [K, D]
        mean, factor = self._condition(x, loadings)  # [1, K], [1, K, K]
        # M^-1 = F'^-1 F^-1, so F'^-1 times standard normal noise has the covariance M^-1.
        spread = torch.linalg.solve_triangular(factor[0].T, noise.double().T, upper=True).T  # [B, K]
        deviation = self.core.noise_variance.double().sqrt()
        latents = mean + deviation * spread  # [B, K]
        decoded = latents @ loadings + self.core.mean  # [B, D]
        noisy = decoded + deviation * row_noise[:, : x.shape[1]]  # [B, D]
        x_hat = torch.where(missing, self.scaling.inverse(decoded), x.double()).float()  # [B, D]
        rows = self.scaling.inverse(noisy).float()  # [B, D]
        # These rows have noise already: `observation` only clamps and rounds them.
        rows = torch.where(missing, self.observation(rows, torch.zeros_like(rows)), x)
        return (latents * self._deviations()).float(), x_hat, rows

    def _margin(self, latents: Tensor, factor: Tensor) -> Tensor:
        """Return the distance of the ends of the intervals from the mean, in standard deviations, [B].

        The intervals are those of a Student t distribution, as for the predictions of a regression (Draper & Smith
        1998, "Applied regression analysis", section 3.1). Each missing value is regressed on the q latents that the
        known values determine. With N fit rows, the residual variance has N - 1 - q degrees of freedom, and a
        prediction has that variance times 1 + 1 / N + h, with the leverage h = t' R^-1 t / (N - 1). Here, t are the
        expected latents, and their covariance over rows is R = I - s2 M^-1. Latents that the known values determine
        only in part count in part: q is the trace of R. If N is infinite, the distribution is normal.
        `benchmarks/training/imputation.py` measures what the intervals contain.

        Args:
            latents: the expected latents t given the known values, [B, K].
            factor: F, where M = F F', [B, K, K].
        """
        identity = torch.diag_embed(torch.zeros_like(latents) + 1.0)  # [B, K, K]
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)  # [B, K, K]
        noise = self.core.noise_variance.double()
        # s2 M^-1, the covariance of the latents given the known values
        unexplained = noise * (inverse.permute(0, 2, 1) @ inverse)  # [B, K, K]
        # If fewer values are known than there are latents, R is singular, and rounding may make it indefinite. Adding
        # 1e-5 keeps it positive definite. This hardly changes the leverage, because t is 0 where R is 0.
        root = torch.linalg.cholesky_ex((1.0 + 1e-5) * identity - unexplained)[0]  # [B, K, K]
        leverage = torch.linalg.solve_triangular(root, latents.unsqueeze(2), upper=False).square().sum(dim=(1, 2))
        determined = latents.shape[1] - noise * inverse.square().sum(dim=(1, 2))  # q, [B]
        share = torch.maximum(1.0 - determined * self.uncertainty, self.uncertainty)  # (N - 1 - q) / (N - 1), [B]
        widening = (1.0 + self.uncertainty / (1.0 + self.uncertainty) + leverage * self.uncertainty) / share
        margin: Tensor = t_quantile(self.uncertainty / share) * widening.sqrt()
        return margin

    def _deviations(self) -> Tensor:
        """Return the prior standard deviation of each principal score, [K], float64."""
        return (self.core.eigenvalues.double() - self.core.noise_variance.double()).clamp(min=0.0).sqrt()

    def _loadings(self) -> Tensor:
        """Return W [K, D], float64."""
        return self._deviations().unsqueeze(1) * self.core.components.double()

    def _condition(self, x: Tensor, loadings: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean [B, K] of t given the known values of x [B, D], and F [B, K, K], where M = F F'."""
        known = 1.0 - x.isnan().double()  # [B, D]
        # The number in place of a missing value has no effect, because `known` is 0 there.
        filled = torch.where(x.isnan(), torch.zeros_like(x), x).double()
        centred = known * (self.scaling(filled) - self.core.mean)  # [B, D]
        weighted = loadings * known.unsqueeze(1)  # [B, K, D]
        noise = torch.diag_embed(torch.zeros_like(self.core.eigenvalues).double() + self.core.noise_variance)  # [K, K]
        m = weighted @ loadings.T + noise  # [B, K, K]
        factor = torch.linalg.cholesky_ex(m)[0]  # [B, K, K]
        right = (centred @ loadings.T).unsqueeze(2)  # [B, K, 1]
        half = torch.linalg.solve_triangular(factor, right, upper=False)
        mean = torch.linalg.solve_triangular(factor.permute(0, 2, 1), half, upper=True)  # [B, K, 1]
        return mean.squeeze(2), factor


class Chains(nn.Module):
    """The tensors that the chains of `CompletingNetwork` need: C chains, M candidates, D features, K latents.

    Args:
        deviation: standard deviation of each feature around the decoder's output, in model units, positive, [D].
        candidate_noise: standard normal noise, with which candidates are drawn from the prior, [M, K].
        candidate_choice: uniform numbers in [0, 1), which choose the Gaussian of each candidate, [M].
        noise: standard normal noise of the latents, [C, K].
        row_noise: standard normal noise of the rows, [C, D].
        spread: factor by which the standard deviation of the chains is multiplied, so that it matches the errors on
            calibration rows, [D].
        low: lower end of the interval of a missing value, measured from the mean of the chains in their standard
            deviations, [D]. The interval contains 90 % of the values that were taken out of calibration rows.
        high: upper end of this interval, in the same unit, [D].
    """

    deviation: Tensor
    candidate_noise: Tensor
    candidate_choice: Tensor
    noise: Tensor
    row_noise: Tensor
    spread: Tensor
    low: Tensor
    high: Tensor
    shares: Tensor
    width: Tensor
    slopes: Tensor
    chain_places: Tensor
    state_places: Tensor

    def __init__(
        self,
        deviation: Tensor,
        candidate_noise: Tensor,
        candidate_choice: Tensor,
        noise: Tensor,
        row_noise: Tensor,
        spread: Tensor,
        low: Tensor,
        high: Tensor,
    ) -> None:
        super().__init__()
        self.set_widths(torch.tensor([0.0, 1.0]), torch.ones(2))
        self.register_buffer("deviation", deviation)
        self.register_buffer("candidate_noise", candidate_noise)
        self.register_buffer("candidate_choice", candidate_choice)
        self.register_buffer("noise", noise)
        self.register_buffer("row_noise", row_noise)
        self.register_buffer("spread", spread)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        chains = len(noise)
        states = chains * KEPT_STEPS
        # `chain_places` are the middles of C equal parts of [0, 1]. `state_places` are the borders between equal parts
        # of [0, 1], one part for each state.
        self.register_buffer("chain_places", (torch.arange(chains) + 0.5) / chains)  # [C]
        self.register_buffer("state_places", torch.arange(1, states) / states)  # [C KEPT_STEPS - 1]

    @torch.jit.unused
    def set_widths(self, shares: Tensor, widths: Tensor) -> None:
        """Set the factors of `spread`, `low` and `high` of rows by their shares of missing values.

        Args:
            shares: shares of missing values of a row, ascending, [L].
            widths: the factor at each share, [L]. It is interpolated between the shares, and constant beyond.
        """
        self.register_buffer("shares", shares)
        self.register_buffer("width", widths[:1])
        self.register_buffer("slopes", widths.diff() / shares.diff())  # [L - 1]

    def width_of(self, missing: Tensor) -> Tensor:
        """Return the factor of the intervals of each row, [B, 1], given which values are missing, [B, D]."""
        share = missing.to(self.width.dtype).mean(dim=1, keepdim=True)  # [B, 1]
        within = (share.clamp(max=self.shares[-1]) - self.shares[:-1]).clamp(min=0.0)  # [B, L - 1]
        within = torch.minimum(within, self.shares[1:] - self.shares[:-1])
        return self.width + (within * self.slopes).sum(dim=1, keepdim=True)


class ChainsFromRows(Chains):
    """The tensors that the chains of `CompletingReconstruction` need.

    Args:
        chains: the tensors that all chains need.
        candidates: reconstructions of normal rows in model units, with which chains may begin, [M, D].
    """

    candidates: Tensor

    def __init__(self, chains: Chains, candidates: Tensor) -> None:
        super().__init__(
            chains.deviation,
            chains.candidate_noise,
            chains.candidate_choice,
            chains.noise,
            chains.row_noise,
            chains.spread,
            chains.low,
            chains.high,
        )
        self.register_buffer("candidates", candidates)


class CompletingNetwork(CompletingPipeline):
    """A pipeline of a VAE, an autoencoder or an ensemble that completes rows by Markov chains.

    Each chain alternates between two draws: latents given the whole row, and missing values given the latents. For a
    VAE, see Rezende, Mohamed & Wierstra 2014, "Stochastic backpropagation", appendix F. For an autoencoder, see the
    walkback of Bengio et al. 2013, "Generalized denoising auto-encoders as generative models". The chains begin with
    candidates from the prior, chosen with probabilities in proportion to the density of the known values
    (sampling-importance resampling). A chain that begins with medians needs many more steps if most values are missing.

    The encoder only approximates the posterior, so the distribution of the chains is not exact. The deviations and the
    intervals of `impute` are therefore calibrated: on rows that did not train the networks, 90 % of the values that
    were taken out are within their intervals. The chains overestimate the deviation of rows with few missing values, so
    the intervals are calibrated for several shares of missing values.

    The noise of `impute` and `score_gaps` is a part of the artifact, so equal rows get equal results.

    See `CompletingPipeline` for the other arguments. `chains` is a `Chains`.
    """

    def __init__(
        self,
        scaling: Scaling,
        core: Core,
        prior: Prior,
        calibration: Calibration,
        explanation: Explanation | None = None,
        observation: Observation | None = None,
        policy: PolicyModule | None = None,
        *,
        chains: Chains,
        gap_scores: GapScores | None = None,
    ) -> None:
        super().__init__(scaling, core, prior, calibration, explanation, observation, policy, gap_scores=gap_scores)
        self.chains = chains
        self.first_steps = FIRST_STEPS
        self.scored_steps = SCORED_STEPS

    def impute(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Estimate the missing values of rows x [B, D], which are NaN. See `CompletingPipeline.impute`."""
        missing = x.isnan()  # [B, D]
        mean, deviation = self.estimate(x)  # [B, D], [B, D]
        deviation = self.chains.width_of(missing) * deviation  # [B, D]
        filled = torch.where(missing, self.scaling.inverse(mean), x)  # [B, D]
        low = torch.where(missing, self.scaling.inverse(mean + self.chains.low * deviation), x)
        high = torch.where(missing, self.scaling.inverse(mean + self.chains.high * deviation), x)
        scaled = self.chains.spread * deviation * self.scaling.scale  # [B, D]
        constrained, low, high = self.constrain(x, filled, low, high)
        return constrained, torch.where(missing, scaled, torch.zeros_like(scaled)), low, high

    def expected_score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the expected scores of rows x [B, D]: the means over the states of the chains.

        See `CompletingPipeline.expected_score`.
        """
        missing = x.isnan()  # [B, D]
        decoded = self._first_states(x)  # [B, C, D]
        values = self._known(x).unsqueeze(1)  # [B, 1, D]
        for step in range(self.scored_steps):
            decoded = self._step(decoded, missing.unsqueeze(1), values, step)
        drawn = self.scaling.inverse(decoded + self.chains.deviation * self.chains.row_noise)  # [B, C, D]
        completed = torch.where(missing.unsqueeze(1), drawn, x.unsqueeze(1))  # [B, C, D]
        score, parts, contribution, expected = self.score(completed.flatten(0, 1))  # each [B C, ...]
        chains = decoded.shape[1]
        mean_contribution = contribution.reshape(x.shape[0], chains, -1).mean(dim=1)  # [B, D]
        mean_expected = expected.reshape(x.shape[0], chains, -1).mean(dim=1)  # [B, D]
        return (
            score.reshape(x.shape[0], chains).mean(dim=1),
            parts.reshape(x.shape[0], chains, -1).mean(dim=1),
            torch.where(missing, torch.zeros_like(mean_contribution), mean_contribution),
            torch.where(missing, completed.mean(dim=1), mean_expected),
        )

    def estimate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of the chains for rows x [B, D], in model units, each [B, D].

        Both are computed for all values, including the known ones.
        """
        decoded = self._run_chains(x)  # [B, S, D]
        mean = decoded.mean(dim=1)  # [B, D]
        variance = (decoded - mean.unsqueeze(1)).square().mean(dim=1) + self.chains.deviation.square()
        return mean, variance.sqrt()

    def complete(self, x: Tensor, noise: Tensor, choice: Tensor, row_noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw B rows that have the known values of one row. `choice` chooses a state of the chains for each of them.

        See `CompletingPipeline.complete`.
        """
        missing = x.isnan()  # [1, D]
        decoded = self._run_chains(x)  # [1, S, D]
        state = torch.searchsorted(self.chains.state_places, choice, right=True)  # [B]
        width = x.shape[1]
        u = decoded[0][state] + self.chains.deviation * row_noise[:, :width]  # [B, D]
        u = torch.where(missing, u, self._known(x))
        mean, std = self.core.encode(u)  # [B, K], [B, K]
        latents = mean + std * noise  # [B, K]
        x_hat = self.scaling.inverse(self.core.decode(latents))  # [B, D]
        rows = self.observation(x_hat, row_noise[:, width:])  # [B, D]
        return latents, torch.where(missing, x_hat, x), torch.where(missing, rows, x)

    def candidates(self) -> Tensor:
        """Return the decoded states with which chains may begin, in model units, [M, D]."""
        return self.core.decode(self.prior(self.chains.candidate_noise, self.chains.candidate_choice))

    def _known(self, x: Tensor) -> Tensor:
        """Return x [B, D] in model units, with arbitrary numbers in place of missing values."""
        u: Tensor = self.scaling(torch.where(x.isnan(), torch.zeros_like(x), x))  # [B, D]
        return u

    def _run_chains(self, x: Tensor) -> Tensor:
        """Return the decoded states of the chains in model units, [B, S, D]: S = KEPT_STEPS C.

        Args:
            x: rows [B, D], whose missing values are NaN.
        """
        missing, values = x.isnan().unsqueeze(1), self._known(x).unsqueeze(1)  # [B, 1, D], [B, 1, D]
        decoded = self._first_states(x)  # [B, C, D]
        for step in range(self.first_steps):
            decoded = self._step(decoded, missing, values, step)
        # KEPT_STEPS steps, written out: TorchScript and ONNX would need a list that grows in a loop.
        first = self._step(decoded, missing, values, self.first_steps)
        second = self._step(first, missing, values, self.first_steps + 1)
        third = self._step(second, missing, values, self.first_steps + 2)
        fourth = self._step(third, missing, values, self.first_steps + 3)
        return torch.cat((first, second, third, fourth), dim=1)

    def _first_states(self, x: Tensor) -> Tensor:
        """Return the decoded first states of the chains in model units, [B, C, D].

        Args:
            x: rows [B, D], whose missing values are NaN.
        """
        known, u = 1.0 - x.isnan().to(x.dtype), self._known(x)  # [B, D], [B, D]
        candidates = self.candidates()  # [M, D]
        weight = known / self.chains.deviation.square()  # [B, D]
        # The log-density of the known values given each candidate, without terms that are equal for all candidates of a
        # row, [B, M].
        log_density = (weight * u) @ candidates.T - 0.5 * weight @ candidates.square().T
        cumulative = torch.softmax(log_density, dim=1).cumsum(dim=1)[:, :-1].contiguous()  # [B, M - 1]
        places = self.chains.chain_places.unsqueeze(0) + torch.zeros_like(u[:, :1])  # [B, C]
        chosen = torch.searchsorted(cumulative, places, right=True)  # [B, C]
        return candidates[chosen]  # [B, C, D]

    def _step(self, decoded: Tensor, missing: Tensor, values: Tensor, step: int) -> Tensor:
        """Return the decoded next states of the chains in model units, [B, C, D].

        Args:
            decoded: the decoded present states in model units, [B, C, D].
            missing: whether a value is missing, [B, 1, D].
            values: the known values in model units, [B, 1, D].
            step: the number of the step, below C. Each chain uses the noise of the chain `step` places further on, so
                each step of a chain has other noise.
        """
        noise = torch.cat((self.chains.noise[step:], self.chains.noise[:step]))  # [C, K]
        row_noise = torch.cat((self.chains.row_noise[step:], self.chains.row_noise[:step]))  # [C, D]
        rows = torch.where(missing, decoded + self.chains.deviation * row_noise, values)  # [B, C, D]
        mean, std = self.core.encode(rows.flatten(0, 1))  # [B C, K], [B C, K]
        z = mean.reshape(rows.shape[0], rows.shape[1], -1) + std.reshape(rows.shape[0], rows.shape[1], -1) * noise
        return self.core.decode(z.flatten(0, 1)).reshape(rows.shape)


class CompletingAdopted(CompletingNetwork):
    """A pipeline of an adopted network that encodes and decodes, which completes rows like `CompletingNetwork`.

    Its scaling need not be an affine map.
    """

    def impute(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Estimate the missing values of rows x [B, D], which are NaN. See `CompletingPipeline.impute`.

        The standard deviation is half of the distance between one standard deviation above and below in model units.
        """
        missing = x.isnan()  # [B, D]
        mean, deviation = self.estimate(x)  # [B, D], [B, D]
        deviation = self.chains.width_of(missing) * deviation  # [B, D]
        spread = self.chains.spread * deviation  # [B, D]
        scaled = (self.scaling.inverse(mean + spread) - self.scaling.inverse(mean - spread)).abs() / 2.0  # [B, D]
        first = self.scaling.inverse(mean + self.chains.low * deviation)  # [B, D]
        last = self.scaling.inverse(mean + self.chains.high * deviation)  # [B, D]
        constrained, low, high = self.constrain(
            x,
            torch.where(missing, self.scaling.inverse(mean), x),
            torch.where(missing, torch.minimum(first, last), x),  # a scaling may reverse the order
            torch.where(missing, torch.maximum(first, last), x),
        )
        return constrained, torch.where(missing, scaled, torch.zeros_like(scaled)), low, high


class CompletingReconstruction(CompletingAdopted):
    """A pipeline of an adopted network that only reconstructs rows. Its chains begin with reconstructions of rows.

    `chains` is a `ChainsFromRows`.
    """

    if TYPE_CHECKING:
        chains: ChainsFromRows  # TorchScript cannot compile this annotation

    def candidates(self) -> Tensor:
        """Return the decoded states with which chains may begin, in model units, [M, D]."""
        found: Tensor = self.chains.candidates
        return found


def t_quantile(inverse_freedom: Tensor) -> Tensor:
    """Return the number that a Student t variable exceeds with a probability of 0.05, [B].

    The series of Abramowitz & Stegun 1964, eq. 26.7.5. It is exact for the normal distribution, and the error is below
    0.001 from 6 degrees of freedom on.

    Args:
        inverse_freedom: 1 / (degrees of freedom), [B]; 0 for the normal distribution.
    """
    z = 1.6448536269514722  # a normal variable exceeds it with probability 0.05
    first = (z**3 + z) / 4.0
    second = (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / 96.0
    third = (3.0 * z**7 + 19.0 * z**5 + 17.0 * z**3 - 15.0 * z) / 384.0
    return z + inverse_freedom * (first + inverse_freedom * (second + inverse_freedom * third))


def _score_form(core: Core) -> tuple[Tensor, Tensor]:
    """Return `PCA.score_form` of `core`; placeholders [1] and [1, 1] if the matrix would be too large."""
    assert isinstance(core, PCA)
    if len(core.mean) > MAX_EXACT_FEATURES:
        return torch.zeros(1).double(), torch.zeros(1, 1).double()  # an artifact has no empty weights
    return core.score_form()


# The classes of pipelines that complete rows, by their names.
COMPLETING: dict[str, type[Pipeline]] = {
    kind.__name__: kind for kind in (CompletingPCA, CompletingNetwork, CompletingAdopted, CompletingReconstruction)
}
