"""The collapse forecast: how many latents the data, beta and the likelihood's variance can keep alive."""

from torch import Tensor

from training.fitting.pca import spectrum


def predict_active_latents(x: Tensor, latents: int, beta: float, variance: float | None) -> int:
    """How many of `latents` a linear VAE keeps on rows x [N, D]: as many eigenvalues as exceed beta times the variance.

    With `variance` None it is learned: at the optimum D s2 = (the eigenvalues of dead latents) + (k live ones) beta s2;
    the most latents that agree with the s2 that they leave are the answer (Lucas et al. 2019, "Don't blame the ELBO!",
    section 4, with beta). A network that is not linear may do a little better; one that does much worse has collapsed.
    """
    features = x.shape[1]
    eigenvalues = spectrum(x)  # [R], descending
    if variance is not None:
        return int((eigenvalues[:latents] > beta * variance).sum())
    for kept in range(min(latents, len(eigenvalues)), 0, -1):
        free = features - kept * beta
        if free > 0 and float(eigenvalues[kept - 1]) > beta * float(eigenvalues[kept:].sum()) / free:
            return kept
    return 0


def forecast_message(kept: int, latents: int, beta: float) -> str:
    """What to expect, said before training."""
    text = f"forecast: the data's spectrum keeps about {kept} of {latents} latents alive"
    return text if kept == latents else f"{text} at beta {beta:g}; ask for fewer, or lower --beta"


def collapse_warning(active: int, kept: int, latents: int) -> str | None:
    """A warning that nobody can miss, if fewer than half of the latents are alive that could be."""
    if active == latents or 2 * active >= kept > 0:
        return None
    advice = "lower --beta or --variance, or add --warm-up steps"
    return f"WARNING: COLLAPSE. {active} of {latents} latents are active, the forecast was {kept}: {advice}"
