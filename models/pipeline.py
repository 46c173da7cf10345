"""The complete model, which takes and returns raw units: scaling, core, prior, calibration and explanation."""

import torch
from torch import Tensor, nn

from models.calibration import Calibration
from models.core import Core
from models.explanation import Explanation
from models.observation import Observation, no_observation_noise
from models.policy import PolicyModule
from models.prior import Prior
from models.scaling import Scaling


class Pipeline(nn.Module):
    """The module that an artifact contains; its methods are the methods of the artifact.

    In shapes: B rows, D features, K latents, P parts of the score. All tensors are float32. If the scaling imputes
    missing values, rows may contain NaN. A missing value is scored as the value that replaces it.

    Args:
        scaling: converts raw units to model units.
        core: PCA, Autoencoder, Ensemble or VAE, in model units.
        prior: generative prior over the latents.
        calibration: calibration of the score.
        explanation: contributions of the features to the score; by default, the reconstruction residuals.
        observation: the noise of a row around the decoder's output; by default, there is no noise.
        policy: the deviations that do not matter, which are taken out of rows before they are scored; by default, every
            deviation matters.

    The pipeline of a model that was trained with times also has the module `baseline`, a
    `models.baseline.BaselineBuffers`. No method uses it.
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
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.core: Core = core
        self.prior = prior
        self.calibration = calibration
        self.explanation: Explanation = explanation or Explanation()
        self.observation: Observation = observation or no_observation_noise(len(scaling.shift))
        self.policy: PolicyModule | None = policy  # a class annotation would not compile

    def core_inputs(self, x: Tensor) -> Tensor:
        """Return the inputs of the core for x [B, D]: the rows in model units."""
        u: Tensor = self.scaling(x)  # [B, D]
        return u

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction [B, D] of x [B, D], decoded from the posterior mean."""
        return self.decode(self.encode(x)[0])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior mean [B, K] and standard deviation [B, K] of x [B, D]."""
        return self.core.encode(self.scaling(x))

    def decode(self, z: Tensor) -> Tensor:
        """Return E[x | z] [B, D] for z [B, K]."""
        return self.scaling.inverse(self.core.decode(z))

    def draw(self, noise: Tensor, choice: Tensor) -> Tensor:
        """Draw latents [B, K] from the prior. See `Prior.forward` for `noise` [B, K] and `choice` [B]."""
        latents: Tensor = self.prior(noise, choice)  # [B, K]
        return latents

    def observe(self, x_hat: Tensor, noise: Tensor) -> Tensor:
        """Draw rows [B, D] given decoded rows x_hat [B, D], with standard normal noise [B, D]."""
        rows: Tensor = self.observation(x_hat, noise)  # [B, D]
        return rows

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score rows x [B, D]: a higher score is more anomalous.

        Returns:
            score: [B].
            parts: the parts of the score, [B, P]. Their sum is the score. With valid ranges, the last part is what a
                value outside of its range adds.
            contribution: squared distance of each feature from its expected value, [B, D]; a missing value counts as
                the value that replaces it. See `models.explanation`.
            expected: expected value of each feature in raw units, [B, D].
        """
        u = self.scaling(x)  # [B, D]
        if self.policy is not None:
            return self._score_under_policy(x, u)
        score, parts, u_hat = self.core.score(u)
        contribution, expected = self.explanation(u, u_hat)  # [B, D], [B, D]
        return score, parts, contribution, self.scaling.inverse(expected)

    def _score_under_policy(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `score` returns for rows x [B, D] in raw units, which are u [B, D] in model units.

        A neutral feature has the contribution 0, and its prediction by the other features is its expected value.
        """
        assert self.policy is not None
        outside = self.policy.outside(x)  # [B, D]
        judged, neutral = self.policy(u, outside)  # [B, D], [B, D]
        score, parts, u_hat = self.core.score(judged)
        if self.policy.has_companions:
            # A row that is usual without the companions gets its score without them.
            fewer, more_neutral = self.policy(u, self.policy.companions(outside))
            other_score, other_parts, other_u_hat = self.core.score(fewer)
            is_unusual = other_score > self.policy.usual  # [B]
            score = torch.where(is_unusual, score, other_score)
            is_unusual = is_unusual.unsqueeze(1)  # [B, 1]
            parts, u_hat = torch.where(is_unusual, parts, other_parts), torch.where(is_unusual, u_hat, other_u_hat)
            judged, neutral = torch.where(is_unusual, judged, fewer), torch.where(is_unusual, neutral, more_neutral)
        contribution, expected = self.explanation(judged, u_hat)  # [B, D], [B, D]
        contribution = torch.where(neutral > 0.0, 0.0, contribution)
        expected = torch.where(neutral > 0.0, judged, expected)
        if self.policy.has_ranges:
            # A value outside of its range contributes more than every value inside of its range.
            largest = contribution.amax(dim=1, keepdim=True)  # [B, 1]
            squares = self.policy.squares(u, judged)  # [B, D]
            contribution = torch.where(outside > 0.0, largest + squares, contribution)
            excess = (self.policy.ceiling - score).clamp(min=0.0)  # [B]
            excess = torch.where(outside.amax(dim=1) > 0.0, excess, 0.0)
            score, parts = score + excess, torch.cat((parts, excess.unsqueeze(1)), dim=1)
        return score, parts, contribution, self.scaling.inverse(expected)

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return log p(x, z) - log q(z|x) in nats, [B], for x [B, D] and noise [B, K]; densities are in model units.

        The mean over standard normal noise is the ELBO. The result is NaN for models without a density.
        """
        return self.core.log_weight(self.scaling(x), noise)

    def p_value(self, score: Tensor) -> Tensor:
        """Return the conformal p-values [B] of scores [B]."""
        return self.calibration.p_value(score)

    def severity(self, score: Tensor, alpha: float) -> Tensor:
        """Return the severity [B] of scores [B], which is above 1 if and only if the row is anomalous at alpha."""
        return self.calibration.severity(score, alpha)

    def threshold(self, alpha: float) -> Tensor:
        """Return the score above which a row is anomalous at alpha, a scalar."""
        return self.calibration.threshold(alpha)
