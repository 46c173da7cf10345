"""Gradient descent: the algorithm of the seed text, with what it takes to trust a long run to it.

Shuffle, minibatch, step, epoch after epoch. The best model on held-out rows is the one that is kept; a run that goes
wrong stops and keeps it; a run that is killed continues from its checkpoint to the same weights, to the bit; processes
that share the batches compute what one would.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.data.batches import Batches
from training.errors import FitError
from training.fitting import checkpoint
from training.fitting.distributed import ProcessGroup
from training.fitting.objectives import LossTerms
from training.progress import Reporter
from training.random_streams import NOISE, VALIDATION, random_stream

STEPS = 3_000  # that the default number of epochs aims at: the demonstration models stop improving there
FEWEST_EPOCHS, MOST_EPOCHS = 10, 400
RATE = 1e-3  # where none is set
LARGEST_GRADIENT = 1000.0  # norm; far above a healthy step's, so only an exploding one is cut
VALIDATION_ROWS = 256  # at a time: what is computed of them stays in the processor's cache


class Objective(Protocol):
    """What is minimised, its randomness apart, so that processes can share what one drew."""

    def draw(self, rows: Tensor, random: torch.Generator, warmth: float) -> tuple[Tensor, ...]:
        """All that the loss of rows [B, D] needs, each with B as its first dimension: the rows, the noise.

        Args:
            warmth: how much of the warm-up is behind, from 0 to 1.
        """

    def terms(self, drawn: tuple[Tensor, ...], warmth: float) -> LossTerms:
        """The loss of what `draw` gave, or of some of its rows."""


@dataclass(frozen=True)
class Run:
    """Where a run keeps its state, and whether it continues one.

    Args:
        folder: of the checkpoint.
        identity: of data and options; another's checkpoint is refused.
        resume: continue from the checkpoint.
        seconds: between checkpoints.
    """

    folder: Path
    identity: str
    resume: bool = False
    seconds: float = 30.0


class Trainer:
    """One run of Adam (Kingma & Ba 2015) on a one-cycle schedule (Smith & Topin 2018).

    Args:
        model: what is trained, on the device of the batches.
        batches: the rows to fit.
        held_out: rows [M, D], in model units, by which the best epoch is chosen.
        processes: those that share every batch; each calls this with the same arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batches: Batches,
        held_out: Tensor,
        config: TrainConfig,
        processes: ProcessGroup = ProcessGroup(),  # noqa: B008  # frozen
    ) -> None:
        self._model = model.to(held_out.device)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._objective, self._batches, self._held_out = objective, batches, held_out
        self._config, self._processes = config, processes
        self._batch = min(config.batch_size, len(batches))
        if self._batch < processes.count:
            raise FitError(f"{processes.count} processes cannot share a batch of {self._batch} rows: start fewer")
        self._steps_an_epoch = -(-len(batches) // self._batch)
        default = min(max(-(-STEPS // self._steps_an_epoch), FEWEST_EPOCHS), MOST_EPOCHS)
        self._steps = (config.epochs or default) * self._steps_an_epoch
        self._warm_up = min(config.warm_up, self._steps)
        self._optimiser = torch.optim.Adam(model.parameters(), fused=True)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, config.learning_rate or RATE, total_steps=self._steps
        )
        self._step = 0
        self._names: list[str] = []  # of the loss and its terms
        self._sums: list[float] = []  # of those, over the rows of the epoch so far
        self._best: dict[str, Any] | None = None
        self._best_loss = math.inf
        self._epochs_without_gain = 0

    def run(self, report: Reporter, run: Run | None) -> None:
        """Train to the end and leave the best model in place. Raises FitError when there is none."""
        if run and run.resume:
            self._restore(checkpoint.load(run.folder, run.identity))
            report.note(f"resumed at step {self._step} of {self._steps}")
        report.start(f"{self._config.name} ({self._config.model})", self._steps)
        saved = monotonic()
        while self._step < self._steps and not self._stale():
            if not self._one_step():
                self._lost(report)
                break
            if self._step % self._steps_an_epoch == 0:
                self._end_epoch(report)
            if run and monotonic() - saved >= run.seconds:
                self._save(run, report)
                saved = monotonic()
        if run:  # what follows may take long too
            self._save(run, report)
        if self._best is not None:
            self._model.load_state_dict(self._best)
        self._model.eval()

    def _one_step(self) -> bool:
        """One update; False if the loss or its gradient is not finite, in which case nothing is changed."""
        epoch, position = divmod(self._step, self._steps_an_epoch)
        if position == 0:
            self._sums = []
        if not self._model.training:  # validation ends an epoch
            self._model.train()
        start = position * self._batch
        rows = self._batches.take(epoch, start, min(start + self._batch, len(self._batches)))
        self._optimiser.zero_grad(set_to_none=True)
        values = self._loss(rows, random_stream(self._config.seed, NOISE, self._step), self._warmth())
        norm = self._gradient_norm()
        if not (math.isfinite(values[0]) and math.isfinite(norm)):
            return False
        if norm > LARGEST_GRADIENT:
            nn.utils.clip_grads_with_norm_(self._parameters, LARGEST_GRADIENT, torch.tensor(norm))
        self._optimiser.step()
        self._schedule.step()
        self._step += 1
        sums = self._sums or [0.0] * len(values)
        self._sums = [total + value * len(rows) for total, value in zip(sums, values, strict=True)]  # one may be short
        return True

    def _gradient_norm(self) -> float:
        """The Euclidean norm of all gradients together."""
        gradients = [p.grad.reshape(-1) for p in self._parameters if p.grad is not None]
        return math.sqrt(torch.stack([each.dot(each) for each in gradients]).sum().item())

    def _loss(self, rows: Tensor, random: torch.Generator, warmth: float, backward: bool = True) -> list[float]:
        """The loss of rows [B, D] and its terms, of which each process computes its share; gradients likewise."""
        drawn = self._objective.draw(rows, random, warmth)
        share = self._processes.slice_of(len(rows))
        weight = (share.stop - share.start) / len(rows)
        if self._processes.count > 1:
            drawn = tuple(part[share] for part in drawn)
        if weight > 0:
            terms = self._objective.terms(drawn, warmth)
            self._names = list(terms)
            if backward:
                (terms["loss"] if weight == 1.0 else weight * terms["loss"]).backward()
            values = torch.stack([term.detach() for term in terms.values()])  # loss first
        else:
            values = torch.zeros(len(self._names), device=rows.device)
        if self._processes.count > 1:
            values = values.double() * weight
            self._processes.all_reduce(values)
            if backward:
                self._add_up_gradients()
        return cast(list[float], values.tolist())

    def _add_up_gradients(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = nn.utils.parameters_to_vector(parameter.grad for parameter in self._parameters)  # type: ignore[misc] # a generator will do
        self._processes.all_reduce(flat)
        start = 0
        for parameter in self._parameters:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def _warmth(self) -> float:
        """How much of the warm-up is behind, from 0 to 1."""
        return 1.0 if not self._warm_up else min(1.0, self._step / self._warm_up)

    def _end_epoch(self, report: Reporter) -> None:
        means = {name: total / len(self._batches) for name, total in zip(self._names, self._sums, strict=True)}
        means["held_out_loss"] = loss = self._validate()
        del means["loss"]
        report.epoch(self._step // self._steps_an_epoch, self._step, means)
        if self._step < self._warm_up:
            return  # the loss still changes its meaning
        better = loss < self._best_loss
        if better or (self._config.kept == "last" and math.isfinite(loss)):
            self._best = copy.deepcopy(self._model.state_dict())
        self._best_loss = loss if better else self._best_loss
        self._epochs_without_gain = 0 if better else self._epochs_without_gain + 1

    def _validate(self) -> float:
        """The loss of the held-out rows, with the same noise after every epoch."""
        self._model.eval()
        random, total = random_stream(self._config.seed, VALIDATION), 0.0
        with torch.no_grad():
            for rows in self._held_out.split(VALIDATION_ROWS):
                total += self._loss(rows, random, 1.0, backward=False)[0] * len(rows)
        return total / len(self._held_out)

    def _stale(self) -> bool:
        return self._config.patience is not None and self._epochs_without_gain > self._config.patience

    def _lost(self, report: Reporter) -> None:
        epoch = self._step // self._steps_an_epoch + 1
        message = f"the loss stopped being finite at step {self._step + 1}, in epoch {epoch}"
        if self._best is None:
            raise FitError(f"{message}: lower --learning-rate")
        report.note(f"warning: {message}; the best model until then is kept. Lower --learning-rate")

    def _save(self, run: Run, report: Reporter) -> None:
        """A checkpoint; a full disk costs the checkpoint, not the run."""
        try:
            checkpoint.save(run.folder, self._state(run.identity))
        except OSError as error:
            report.note(f"warning: no checkpoint in {run.folder} ({error.strerror}): make room there, or set --runs")

    def _state(self, identity: str) -> dict[str, Any]:
        return {
            "identity": identity,
            "step": self._step,
            "model": self._model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "names": self._names,
            "sums": self._sums,
            "best": self._best,
            "best_loss": self._best_loss,
            "epochs_without_gain": self._epochs_without_gain,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._names = state["names"]
        self._sums = state["sums"]
        self._best, self._best_loss = state["best"], state["best_loss"]
        self._epochs_without_gain = state["epochs_without_gain"]
