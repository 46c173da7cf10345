"""The training loop: minibatch gradient descent with validation, early stopping, checkpoints and several processes.

- After every epoch, the model is validated on the held-out rows. Either the best or the last weights are kept.
- If the loss becomes NaN or infinite, training stops and keeps the weights of the best or the last epoch before.
- A killed run can resume from its checkpoint, and then ends with exactly the weights of an uninterrupted run.
- Several processes that share the batches compute the same weights as a single process, up to rounding.
"""

import copy
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, current_thread, main_thread
from time import monotonic
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.data.batches import Batches
from training.errors import FitError
from training.fitting.checkpoint import CheckpointStore
from training.fitting.distributed import ProcessGroup
from training.fitting.objectives import Objective
from training.progress import Reporter
from training.random_streams import NOISE, VALIDATION, random_stream

DEFAULT_STEPS = 3_000  # optimiser steps; more steps do not improve the demonstration models
MIN_EPOCHS, MAX_EPOCHS = 10, 400  # limits of the default number of epochs
DEFAULT_LEARNING_RATE = 1e-3
MAX_GRADIENT_NORM = 1000.0  # far above the norm in a healthy step, so only exploding gradients are clipped
VALIDATION_BATCH = 256  # rows per validation batch; activations of so few rows stay in the processor's cache


@contextmanager
def _delay_interrupt() -> Iterator[Event]:
    """Let the first Ctrl-C set the event instead of stopping Python in the middle of a step.

    A second Ctrl-C raises KeyboardInterrupt at once. Nothing changes if another handler is set, or in a thread that
    cannot set one.
    """
    interrupted = Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            signal.default_int_handler(number, frame)
        interrupted.set()

    if current_thread() is not main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupted
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Trainer:
    """Trains one model with Adam (Kingma & Ba 2015) on a one-cycle learning rate schedule (Smith & Topin 2018).

    Args:
        model: the model to train. It is moved to the device of the held-out rows.
        objective: the loss to minimise.
        batches: the fit rows, on the device of the held-out rows.
        held_out: rows [M, D] for validation, in model units.
        config: the options of the run.
        reporter: receives the progress.
        checkpoints: the store for the state of the run; None to save no checkpoints.
        processes: the processes that share every batch. Each process creates a trainer with the same arguments.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: Objective,
        batches: Batches,
        held_out: Tensor,
        config: TrainConfig,
        reporter: Reporter,
        checkpoints: CheckpointStore | None = None,
        processes: ProcessGroup = ProcessGroup(),  # noqa: B008  # frozen
    ) -> None:
        self._model = model.to(held_out.device)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._objective, self._batches, self._held_out = objective, batches, held_out
        self._config, self._reporter = config, reporter
        self._checkpoints, self._processes = checkpoints, processes

        self._batch_size = min(config.batch_size, len(batches))
        if self._batch_size < processes.count:
            raise FitError(
                f"{processes.count} processes cannot share a batch of {self._batch_size} rows: "
                "start fewer processes, or raise --batch-size"
            )
        self._steps_per_epoch = -(-len(batches) // self._batch_size)
        default_epochs = min(max(-(-DEFAULT_STEPS // self._steps_per_epoch), MIN_EPOCHS), MAX_EPOCHS)
        self._steps = (config.epochs or default_epochs) * self._steps_per_epoch
        self._warm_up_steps = min(config.warm_up, self._steps)
        self._optimiser = torch.optim.Adam(model.parameters(), fused=True)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, config.learning_rate or DEFAULT_LEARNING_RATE, total_steps=self._steps
        )

        self._step = 0  # optimiser steps so far
        self._term_names: list[str] = []  # "loss" first
        self._term_sums: list[float] = []  # sum of each term over the rows of the epoch so far
        self._best: dict[str, Any] | None = None  # weights to publish if no later epoch replaces them
        self._best_loss = math.inf
        self._epochs_without_gain = 0

    def train(self) -> None:
        """Train to the end. Leave the model in evaluation mode, with the weights to publish.

        Raises:
            FitError: the loss became NaN or infinite before the first epoch ended (with a warm-up: the first epoch that
                ends after it), or the checkpoint is unusable.
        """
        if self._checkpoints and self._checkpoints.resume:
            self._restore(self._checkpoints.load())
            self._reporter.note(f"resumed at step {self._step} of {self._steps}")
        with _delay_interrupt() as interrupted:
            self._reporter.start(f"{self._config.name} ({self._config.model})", self._steps)
            self._train_steps(interrupted)
        if self._checkpoints:  # the run may be killed while the statistics that follow are computed
            self._save_checkpoint(self._checkpoints, finished=True)
        if self._best is not None:
            self._model.load_state_dict(self._best)
        self._model.eval()

    def _train_steps(self, interrupted: Event) -> None:
        """Train until all steps are done, the patience is exhausted, or the loss is not finite.

        Raises:
            KeyboardInterrupt: `interrupted` was set. The state of the run is saved.
        """
        saved_at = monotonic()
        while self._step < self._steps and not self._out_of_patience():
            if not self._train_step():
                self._report_bad_loss()
                break
            if self._step % self._steps_per_epoch == 0:
                self._end_epoch()
            due = self._checkpoints and monotonic() - saved_at >= self._checkpoints.interval_seconds
            if self._checkpoints and (due or interrupted.is_set()):
                self._save_checkpoint(self._checkpoints)
                saved_at = monotonic()
            if interrupted.is_set():
                raise KeyboardInterrupt

    def _train_step(self) -> bool:
        """Make one optimiser step. Return False, and leave the weights, if the loss or its gradient is not finite."""
        epoch, step_in_epoch = divmod(self._step, self._steps_per_epoch)
        if step_in_epoch == 0:
            self._term_sums = []
        if not self._model.training:  # validation leaves the model in evaluation mode
            self._model.train()
        start = step_in_epoch * self._batch_size
        rows = self._batches.take(epoch, start, min(start + self._batch_size, len(self._batches)))
        self._optimiser.zero_grad(set_to_none=True)
        random = random_stream(self._config.seed, NOISE, self._step)
        values = self._loss_terms(rows, random, self._warm_up_progress(), backward=True)
        norm = self._gradient_norm()
        if not (math.isfinite(values[0]) and math.isfinite(norm)):
            return False
        if norm > MAX_GRADIENT_NORM:
            nn.utils.clip_grads_with_norm_(self._parameters, MAX_GRADIENT_NORM, torch.tensor(norm))
        self._optimiser.step()
        self._schedule.step()
        self._step += 1
        sums = self._term_sums or [0.0] * len(values)
        # Batches are weighted by their number of rows: the last batch of an epoch may be smaller than the others.
        self._term_sums = [total + value * len(rows) for total, value in zip(sums, values, strict=True)]
        return True

    def _loss_terms(self, rows: Tensor, random: torch.Generator, warm_up: float, *, backward: bool) -> list[float]:
        """Return the loss terms of rows [B, D], the loss first.

        Each process computes the terms of its share of the rows. The processes then average the terms over all rows.

        Args:
            backward: whether to also compute the gradients.
        """
        drawn = self._objective.draw(rows, random, warm_up)
        share = self._processes.slice_of(len(rows))
        weight = (share.stop - share.start) / len(rows)
        if self._processes.count > 1:
            drawn = tuple(part[share] for part in drawn)
        if weight > 0:
            terms = self._objective.terms(drawn, warm_up)
            self._term_names = list(terms)
            if backward:
                (terms["loss"] if weight == 1.0 else weight * terms["loss"]).backward()
            values = torch.stack([term.detach() for term in terms.values()])
        else:
            values = torch.zeros(len(self._term_names), device=rows.device)
        if self._processes.count > 1:
            values = values.double() * weight
            self._processes.all_reduce(values)
            if backward:
                self._all_reduce_gradients()
        return cast(list[float], values.tolist())

    def _all_reduce_gradients(self) -> None:
        """Replace the gradients of this process by their sums over all processes."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = nn.utils.parameters_to_vector(parameter.grad for parameter in self._parameters)  # type: ignore[misc] # a generator works as well
        self._processes.all_reduce(flat)
        start = 0
        for parameter in self._parameters:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def _gradient_norm(self) -> float:
        """Return the Euclidean norm of all gradients, taken together."""
        gradients = [p.grad.reshape(-1) for p in self._parameters if p.grad is not None]
        return math.sqrt(torch.stack([each.dot(each) for each in gradients]).sum().item())

    def _warm_up_progress(self) -> float:
        """Return the share of the warm-up that is over, from 0 to 1."""
        return 1.0 if not self._warm_up_steps else min(1.0, self._step / self._warm_up_steps)

    def _end_epoch(self) -> None:
        """Validate the model and report the epoch. Keep the weights if this epoch is now the one to publish."""
        pairs = zip(self._term_names, self._term_sums, strict=True)
        means = {name: total / len(self._batches) for name, total in pairs}
        means["held_out_loss"] = loss = self._validate()
        del means["loss"]
        self._reporter.epoch(self._step // self._steps_per_epoch, self._step, means)
        if self._step < self._warm_up_steps:
            return  # losses before the end of the warm-up cannot be compared with later ones
        better = loss < self._best_loss
        if better or (self._config.kept == "last" and math.isfinite(loss)):
            self._keep_weights()
        self._best_loss = loss if better else self._best_loss
        self._epochs_without_gain = 0 if better else self._epochs_without_gain + 1

    def _keep_weights(self) -> None:
        """Copy the weights to `_best`. Reuse its tensors: new ones would take as long as an epoch of a small table."""
        weights = self._model.state_dict()
        if self._best is None:
            self._best = copy.deepcopy(weights)
            return
        for kept, weight in zip(self._best.values(), weights.values(), strict=True):
            kept.copy_(weight)

    def _validate(self) -> float:
        """Return the loss of the held-out rows. The noise is the same after every epoch."""
        self._model.eval()
        random, total = random_stream(self._config.seed, VALIDATION), 0.0
        with torch.no_grad():
            for rows in self._held_out.split(VALIDATION_BATCH):
                total += self._loss_terms(rows, random, warm_up=1.0, backward=False)[0] * len(rows)
        return total / len(self._held_out)

    def _out_of_patience(self) -> bool:
        return self._config.patience is not None and self._epochs_without_gain > self._config.patience

    def _report_bad_loss(self) -> None:
        """Report that the loss is not finite. Raise FitError if there are no weights to publish."""
        epoch = self._step // self._steps_per_epoch + 1
        message = f"the loss became NaN or infinite at step {self._step + 1}, in epoch {epoch}"
        if self._best is None:
            raise FitError(f"{message}: lower --learning-rate")
        self._reporter.note(
            f"warning: {message}: training stopped, and the weights of the {self._config.kept or 'best'} epoch before "
            "it are kept; lower --learning-rate"
        )

    def _save_checkpoint(self, checkpoints: CheckpointStore, *, finished: bool = False) -> None:
        """Save the state of the run. A failure, such as a full disk, is reported and does not stop the training.

        Args:
            finished: whether the training is over.
        """
        try:
            checkpoints.save(self._state() | {"finished": finished})
        except OSError as error:
            self._reporter.note(
                f"warning: no checkpoint was written to {checkpoints.folder} ({error.strerror}): "
                "free some space or change its permissions, or choose another folder with --runs"
            )

    def _state(self) -> dict[str, Any]:
        """Return the state of the run, which `_restore` takes."""
        return {
            "step": self._step,
            "model": self._model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "names": self._term_names,
            "sums": self._term_sums,
            "best": self._best,
            "best_loss": self._best_loss,
            "epochs_without_gain": self._epochs_without_gain,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._term_names = state["names"]
        self._term_sums = state["sums"]
        self._best, self._best_loss = state["best"], state["best_loss"]
        self._epochs_without_gain = state["epochs_without_gain"]
