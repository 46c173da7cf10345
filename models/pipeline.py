"""The whole way of a row, raw units in and raw units out: scaling, core model, prior, calibration."""

from torch import Tensor, nn

from models.calibration import Calibration
from models.core import Core
from models.explanation import Explanation
from models.prior import Prior
from models.scaling import Scaling


class Pipeline(nn.Module):
    """What an artifact holds; its methods are the artifact's methods. B rows, D features, K latents, float32.

    Where the scaling imputes, rows may hold NaN: a missing value is judged as the value in its place is.

    Args:
        scaling: raw units to model units.
        core: PCA, Autoencoder or VAE, in model units.
        prior: over the core's latents.
        calibration: of the core's score.
        explanation: which features made the score; without one the reconstruction's residuals do.
    """

    def __init__(
        self,
        scaling: Scaling,
        core: Core,
        prior: Prior,
        calibration: Calibration,
        explanation: Explanation | None = None,
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.core: Core = core
        self.prior = prior
        self.calibration = calibration
        self.explanation: Explanation = explanation or Explanation()

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x [B, D] through the posterior mean, [B, D]."""
        return self.decode(self.encode(x)[0])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of x [B, D]: two of [B, K]."""
        return self.core.encode(self.scaling(x))

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z], [B, K] to [B, D]."""
        return self.scaling.inverse(self.core.decode(z))

    def draw(self, noise: Tensor, choice: Tensor) -> Tensor:
        """Latents [B, K] from the prior, out of standard normal noise [B, K] and uniform choice [B] in [0, 1)."""
        latents: Tensor = self.prior(noise, choice)  # [B, K]
        return latents

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """How strange x [B, D] is.

        Returns:
            score [B], higher is stranger; its parts [B, P], which sum to it; contribution [B, D], the squared distance
            of each feature from what was expected of it (of a missing value, that of the one in its place, which the
            score counts); expected [B, D], raw units. See `models.explanation`.
        """
        u = self.scaling(x)  # [B, D]
        score, parts, u_hat = self.core.score(u)
        contribution, expected = self.explanation(u, u_hat)  # [B, D], [B, D]
        return score, parts, contribution, self.scaling.inverse(expected)

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:
        """log p(x, z) - log q(z|x) in nats, of the density in model units: x [B, D] and noise [B, K] to [B].

        The mean over standard normal noise is the ELBO. NaN for an autoencoder, which has no density.
        """
        return self.core.log_weight(self.scaling(x), noise)

    def p_value(self, score: Tensor) -> Tensor:
        """Conformal p-values of scores, [B] to [B]."""
        return self.calibration.p_value(score)

    def severity(self, score: Tensor, alpha: float) -> Tensor:
        """Scores [B] to severity [B]: > 1 exactly where the row is anomalous at alpha."""
        return self.calibration.severity(score, alpha)

    def threshold(self, alpha: float) -> Tensor:
        """The score above which a row is anomalous at alpha, a scalar."""
        return self.calibration.threshold(alpha)
