"""Posterior collapse: predict how many latents of a VAE stay active, and warn if far fewer are active."""

from torch import Tensor

from training.fitting.pca import spectrum


def predict_active_latents(x: Tensor, latents: int, beta: float, variance: float | None) -> int:
    """Return how many of `latents` a linear VAE keeps active on rows x [N, D].

    Let s2 be the variance of the likelihood. There are two conditions:

    1. A latent is active if the eigenvalue of the covariance along its direction exceeds beta s2.
    2. At its optimum, a learned s2 satisfies D s2 = (sum of the eigenvalues of all inactive directions) + (number of
       active latents) beta s2.

    If s2 is fixed, count the latents that satisfy the first condition. If s2 is learned, return the largest number of
    active latents for which both conditions hold. The conditions are those of Lucas et al. 2019, "Don't blame the
    ELBO!", section 4, extended by beta.

    A nonlinear VAE may keep a few more latents active than a linear VAE. If it keeps far fewer, it has collapsed.

    Args:
        variance: the fixed variance of the likelihood; None if the variance is learned.
    """
    features = x.shape[1]
    eigenvalues = spectrum(x)  # [R], descending
    if variance is not None:
        return int((eigenvalues[:latents] > beta * variance).sum())
    for active in range(min(latents, len(eigenvalues)), 0, -1):
        free = features - active * beta
        if free > 0 and float(eigenvalues[active - 1]) > beta * float(eigenvalues[active:].sum()) / free:
            return active
    return 0


def forecast_message(predicted: int, latents: int, beta: float) -> str:
    """Return the note about the predicted number of active latents, which is shown before training."""
    text = f"forecast: about {predicted} of {latents} latents will stay active, given the spectrum of the data"
    return text if predicted == latents else f"{text} and beta {beta:g}; lower --latents or --beta"


def collapse_warning(active: int, predicted: int, latents: int) -> str | None:
    """Return a warning if no latent is active, or fewer than half of the predicted number are; else None."""
    if active > 0 and 2 * active >= predicted:
        return None
    return (
        f"WARNING: posterior collapse: {active} of {latents} latents are active, {predicted} were predicted: "
        "lower --beta or --variance, or add --warm-up steps"
    )
