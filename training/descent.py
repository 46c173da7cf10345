"""Gradient descent: the algorithm of the seed text, with what it takes to trust a long run to it.

Shuffle, minibatch, step, epoch after epoch. The best model on held-out rows is the one that is kept; a run that goes
wrong stops and keeps it; a run that is killed continues from its checkpoint to the same weights, to the bit.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from training import checkpoint
from training.config import TrainConfig
from training.errors import FitError
from training.objectives import Terms
from training.progress import Reporter
from training.streams import NOISE, VALIDATION, order, stream

STEPS = 3_000  # that the default number of epochs aims at: the demonstration models stop improving there
FEWEST_EPOCHS, MOST_EPOCHS = 10, 400
LARGEST_GRADIENT = 100.0  # norm; far above a healthy step's, so only an exploding one is cut
VALIDATION_ROWS = 2_048  # at a time

# Rows [B, D], a stream of noise, and the share of the KL warm-up that is behind, to the loss and its terms.
Objective = Callable[[Tensor, torch.Generator, float], Terms]


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


class Descent:
    """One run of Adam (Kingma & Ba 2015) on a one-cycle schedule (Smith & Topin 2018).

    Args:
        model: what is trained, on the device of the rows.
        objective: what is minimised.
        x: rows [N, D] to fit.
        held_out: rows [M, D] by which the best epoch is chosen.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, x: Tensor, held_out: Tensor, config: TrainConfig
    ) -> None:
        self._model = model.to(x.device)
        self._objective = objective
        self._x, self._held_out = x, held_out
        self._config = config
        self._batch = min(config.batch_size, len(x))
        self._steps_an_epoch = -(-len(x) // self._batch)
        default = min(max(-(-STEPS // self._steps_an_epoch), FEWEST_EPOCHS), MOST_EPOCHS)
        self._steps = (config.epochs or default) * self._steps_an_epoch
        self._warm_up = min(config.warm_up, self._steps)
        self._optimiser = torch.optim.Adam(model.parameters(), fused=True)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, config.learning_rate, total_steps=self._steps
        )
        self._step = 0
        self._sums: dict[str, float] = {}  # of the terms, over the rows of the epoch so far
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
        if self._best is not None:
            self._model.load_state_dict(self._best)
        self._model.eval()

    def _one_step(self) -> bool:
        """One update; False if the loss is not finite, in which case nothing is changed."""
        epoch, position = divmod(self._step, self._steps_an_epoch)
        if position == 0:
            self._order = order(self._config.seed, epoch, len(self._x))
            self._sums = {}
        chosen = self._order[position * self._batch : (position + 1) * self._batch]
        self._model.train()
        terms = self._objective(
            self._x[chosen.to(self._x.device)], stream(self._config.seed, NOISE, self._step), self._warmth()
        )
        if not math.isfinite(float(terms["loss"].detach())):
            return False
        self._optimiser.zero_grad(set_to_none=True)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), LARGEST_GRADIENT)
        self._optimiser.step()
        self._schedule.step()
        self._step += 1
        for name, value in terms.items():  # weighted by rows: the last batch may be short
            self._sums[name] = self._sums.get(name, 0.0) + float(value.detach()) * len(chosen)
        return True

    def _warmth(self) -> float:
        """How much of the warm-up is behind, from 0 to 1."""
        return 1.0 if not self._warm_up else min(1.0, self._step / self._warm_up)

    def _end_epoch(self, report: Reporter) -> None:
        means = {name: total / len(self._x) for name, total in self._sums.items() if name != "loss"}
        loss = self._validate()
        report.epoch(self._step // self._steps_an_epoch, self._step, means | {"held_out_loss": loss})
        if self._step < self._warm_up:
            return  # the loss still changes its meaning
        if loss < self._best_loss:
            self._best, self._best_loss = copy.deepcopy(self._model.state_dict()), loss
            self._epochs_without_gain = 0
        else:
            self._epochs_without_gain += 1

    def _validate(self) -> float:
        """The loss of the held-out rows, with the same noise after every epoch."""
        self._model.eval()
        random, total = stream(self._config.seed, VALIDATION), 0.0
        with torch.no_grad():
            for rows in self._held_out.split(VALIDATION_ROWS):
                total += float(self._objective(rows, random, 1.0)["loss"]) * len(rows)
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
        self._sums, self._best = state["sums"], state["best"]
        self._best_loss, self._epochs_without_gain = state["best_loss"], state["epochs_without_gain"]
        self._order = order(self._config.seed, self._step // self._steps_an_epoch, len(self._x))
