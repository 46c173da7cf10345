"""Categories: columns of text, whose levels are features that are 1 or 0. They are the last features of a row.

In shapes: B rows, D features. J categories have L_1, ..., L_J levels, which are the last L = L_1 + ... + L_J features.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.likelihood import LOG_VARIANCE_RANGE, GaussianLikelihood
from models.observation import Observation
from models.policy import STEPS, PolicyModule

MIN_PROBABILITY = 1e-6  # of a level that the decoder gives; the surprisal of a level is at most 14 nats
MAX_DEVIATION = 0.5  # if the features of a category have a sum further from 1 than this, the row has none of its levels


def columns_of_features(width: int, sizes: Sequence[int]) -> Tensor:
    """Return the index of the column of each feature, [D]: the features of the levels of a category share theirs."""
    numbers = width - sum(sizes)
    copies = torch.tensor([1] * numbers + list(sizes))  # [D - L + J]
    return torch.arange(len(copies)).repeat_interleave(copies)


def sizes_of(pipeline: nn.Module) -> list[int]:
    """Return the number of levels of each category of a pipeline, or of the module of an artifact."""
    members = getattr(getattr(pipeline, "policy", None), "members", None)
    return [] if members is None else [int(size) for size in members.sum(dim=1).tolist()]


def members_of(sizes: Sequence[int]) -> Tensor:
    """Return the matrix [J, L] that is 1 where a category has a level."""
    return torch.repeat_interleave(torch.eye(len(sizes)), torch.tensor(list(sizes)), dim=1)


class Categories(nn.Module):
    """Computes over the levels of each category. There are no loops: an artifact may not nest them.

    Args:
        sizes: the number of levels of each category.
    """

    members: Tensor
    places: Tensor

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.count, self.widest = len(sizes), max(sizes)
        self.register_buffer("members", members_of(sizes))
        # For each category as many levels as the widest one has, of which the last is repeated, [J max(L_j)].
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        places = [
            [min(end - size + place, end - 1) for place in range(self.widest)]
            for size, end in zip(sizes, ends, strict=True)
        ]
        self.register_buffer("places", torch.tensor(places).flatten())

    def largest(self, values: Tensor) -> Tensor:
        """Return, for each level in values [B, L], the largest value among the levels of its category, [B, L]."""
        of_categories = values.T[self.places].reshape(self.count, self.widest, -1).amax(dim=1)  # [J, B]
        return of_categories.T @ self.members

    def forward(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities [B, L] of the levels, given their logits [B, L]."""
        centred = logits - self.largest(logits)  # [B, L]
        return centred - (centred.exp() @ self.members.T @ self.members).log()


class LevelSoftmax(nn.Module):
    """The end of a decoder: turns its outputs for the levels of each category into probabilities, in model units.

    Args:
        sizes: the number of levels of each category.
        shift: what the scaling subtracts from each feature, [D].
        scale: what the scaling divides each feature by, [D].
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, sizes: Sequence[int], shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.numbers = len(shift) - sum(sizes)
        self.categories = Categories(sizes)
        self.register_buffer("shift", shift[self.numbers :].clone())
        self.register_buffer("scale", scale[self.numbers :].clone())

    def forward(self, output: Tensor) -> Tensor:
        """Return rows [B, D] in model units for outputs [B, D]: numbers stay as they are."""
        probabilities = self.categories(output[:, self.numbers :]).exp()  # [B, L]
        return torch.cat((output[:, : self.numbers], (probabilities - self.shift) / self.scale), dim=1)

    @torch.jit.unused
    def loss(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Return the loss [B] of rows x [B, D] and their reconstructions x_hat [B, D], in model units.

        It is -2 log p, up to a constant, for independent numbers with variance 1 and for categories with the
        probabilities in `x_hat`: the squared error of the numbers, plus twice the cross-entropy of the levels.
        """
        squares = (x[:, : self.numbers] - x_hat[:, : self.numbers]).square().sum(dim=1)  # [B]
        level = x[:, self.numbers :] * self.scale + self.shift  # [B, L]
        probability = x_hat[:, self.numbers :] * self.scale + self.shift  # [B, L]
        return squares - 2.0 * (level * probability.clamp(min=MIN_PROBABILITY).log()).sum(dim=1)


class MixedLikelihood(GaussianLikelihood):
    """Numbers are Gaussian, and each category has a categorical distribution, whose logits the decoder gives.

    p(x | z) = N(numbers; output, variance) * product over the categories of softmax(output)[level]. Nazabal et al.
    2020, "Handling incomplete heterogeneous data using VAEs", eq. 4 and 9. Features of levels are in raw units.

    Args:
        sizes: the number of levels of each category.
        variance: initial or fixed variance of the numbers, [1] (shared) or [D - L] (per feature).
        learn: whether the variance is learned.
        lowest: lower bound of the log-variance.
    """

    def __init__(
        self, sizes: Sequence[int], variance: Tensor, learn: bool = True, lowest: float = LOG_VARIANCE_RANGE[0]
    ) -> None:
        super().__init__(variance, learn, lowest)
        self.levels, self.categories = sum(sizes), Categories(sizes)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Return log p(x | z) [B] for x and output [B, D]."""
        numbers = x.shape[1] - self.levels
        log_variance = self.log_variance.clamp(self.low, self.high)  # [1] or [D - L]
        squared = (x[:, :numbers] - output[:, :numbers]).square() * torch.exp(-log_variance)  # [B, D - L]
        density = -0.5 * (squared + log_variance + math.log(2.0 * math.pi)).sum(dim=1)  # [B]
        log_probability: Tensor = self.categories(output[:, numbers:])  # [B, L]
        return density + (x[:, numbers:] * log_probability).sum(dim=1)

    def mean(self, output: Tensor) -> Tensor:
        """Return E[x | z] [B, D]: the numbers, and the probabilities of the levels."""
        numbers = output.shape[1] - self.levels
        return torch.cat((output[:, :numbers], self.categories(output[:, numbers:]).exp()), dim=1)


class MixedObservation(Observation):
    """Noise of rows with categories: numbers have the noise of `Observation`, and each category has one drawn level.

    See `Observation` for the other arguments. `sizes` are the numbers of levels of the categories.
    """

    order: Tensor

    def __init__(self, sizes: Sequence[int], factor: Tensor, low: Tensor, high: Tensor, whole: Tensor) -> None:
        super().__init__(factor, low, high, whole)
        self.numbers, self.least, self.categories = len(low) - sum(sizes), MIN_PROBABILITY, Categories(sizes)
        self.register_buffer("order", MIN_PROBABILITY * torch.arange(sum(sizes)))  # of equal levels, the first is taken

    def constrain(self, x: Tensor) -> Tensor:
        """Return rows x [B, D] whose numbers are within their bounds; features of levels stay as they are."""
        within = x.clamp(self.low, self.high)
        constrained = torch.where(self.whole, within.round(), within)  # TorchScript has no `super`
        return torch.cat((constrained[:, : self.numbers], x[:, self.numbers :]), dim=1)

    def forward(self, x_hat: Tensor, noise: Tensor) -> Tensor:
        """Return rows [B, D] for decoded rows x_hat [B, D] and standard normal noise [B, D].

        A level is drawn with its decoded probability: by the Gumbel-max trick, of which the noise gives the uniform
        numbers. If all noise is 0, the most probable level is taken.
        """
        numbers = self.add_noise(x_hat, noise)[:, : self.numbers]
        uniform = torch.special.ndtr(noise[:, self.numbers :]).clamp(self.least, 1.0 - self.least)  # [B, L]
        gumbel = -(-uniform.log()).log() - self.order  # [B, L]
        score = x_hat[:, self.numbers :].clamp(min=self.least).log() + gumbel  # [B, L]
        levels = torch.where(score >= self.categories.largest(score), 1.0, torch.zeros_like(score))
        return torch.cat((numbers, levels), dim=1)


class LevelPolicy(PolicyModule):
    """A policy of a model with categories: a level that the model does not know is outside of its valid range.

    The features of such a level are all 0. See `PolicyModule`; `sizes` are the numbers of levels of the categories.
    """

    members: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        mean: Tensor,
        residual: Tensor,
        precision: Tensor,
        below: Tensor,
        above: Tensor,
        low: Tensor,
        high: Tensor,
        companion: Tensor,
    ) -> None:
        super().__init__(mean, residual, precision, below, above, low, high, companion)
        self.numbers, self.most = len(low) - sum(sizes), MAX_DEVIATION
        self.has_ranges, self.steps = True, min(len(low), STEPS)
        self.register_buffer("members", members_of(sizes))

    def outside(self, x: Tensor) -> Tensor:
        """Return 1 for values of x [B, D] outside of their valid ranges, and for categories without a known level."""
        beyond = torch.where(torch.maximum(x - self.high, self.low - x) > 0.0, 1.0, torch.zeros_like(x))  # [B, D]
        levels = x[:, self.numbers :]  # [B, L]
        is_missing = torch.where(levels.isnan(), 1.0, torch.zeros_like(levels))
        excess = torch.where(levels.isnan(), torch.zeros_like(levels), levels) @ self.members.T - 1.0  # [B, J]
        is_unknown = torch.where(torch.maximum(excess, -excess) > self.most, 1.0, torch.zeros_like(excess))
        is_unknown = torch.where(is_missing @ self.members.T > 0.0, 0.0, is_unknown)  # [B, J]
        return torch.cat((beyond[:, : self.numbers], is_unknown @ self.members), dim=1)
