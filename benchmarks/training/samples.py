"""Compare samples of Elbo's models with those of pythae's VAE: do they resemble real images, and are they copies?

    python benchmarks/training/samples.py                  # `make bench-train` also installs pythae
    python benchmarks/training/samples.py --data mnist     # at most an hour of one core for each model
    python benchmarks/training/samples.py --only pca vae   # some of the models
    python benchmarks/training/samples.py --seed 1         # another split of the digits, other weights and samples
    python benchmarks/training/samples.py --keep FOLDER    # keep the models there, and reuse those that are there
    python benchmarks/training/samples.py --smoke          # two models of the digits, a few steps

The digits are those of scikit-learn: half of them train the models, and the other half are the held-out rows. MNIST has
60,000 training rows and 10,000 held-out rows. There are as many samples as held-out rows. Elbo's samples are those that
/sample serves by default. pythae trains the same networks on more of the training rows (90 %, Elbo 70 %) and for at
least as many steps, and its samplers are fitted to the latents of its VAE. pythae runs in a separate Python environment
(`pythae_samples.py`).

The model map is a VAE with two latents, and conditional is a VAE that knows the class. The columns:

- confident: the share of the samples of which a classifier is sure (probability above 0.9). The classifier is a
  convolutional network that was trained on the labels of the training rows
- density and coverage: Naeem et al. 2020, k = 5, against the held-out rows, by distances between images in pixel space
- asked for: the share of the samples that the classifier assigns to the class that was asked for (conditional models)
- nearer than rows: p-value of the hypothesis that samples are no nearer to training rows than the reconstructions of
  held-out rows are; small if the model copies rows (Meehan, Chaudhuri & Dasgupta 2020). For pythae, the samples are
  compared with the held-out rows themselves.

The benchmark prints a Markdown table.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.data import ROOT, describe_machine, load_labelled_images
from benchmarks.training.training_speed import ONE_CORE
from models import artifact
from models.manifest import FILE_NAME
from training.config import TrainConfig
from training.data.conditions import draw_conditions
from training.data.table import read_table
from training.evaluation.samples import (
    CONFIDENT,
    copy_p_value,
    draw_rows,
    expected_coverage,
    likeness,
    nearest_distances,
)
from training.progress import PlainReporter, SilentReporter
from training.random_streams import SAMPLES, random_stream
from training.train import train

SEED = 0  # of the classifier, and of the rows that are drawn for comparison
NEAREST_AMONG = 20_000  # the nearest training row is sought among at most this many
PEER = "pythae"  # its name among the models of --only
SAMPLER_LINES = "samplers.jsonl"  # the file in which --keep describes pythae's samples
CLASSIFIER_STEPS = 4_000  # optimiser steps of the classifier
Images = npt.NDArray[np.float32]

CONV = {"network": "conv", "hidden": (32, 64), "dense": (256,), "likelihood": "bernoulli", "learning_rate": 3e-3}
MLP = {"network": "mlp", "hidden": (512, 256), "dense": (), "likelihood": "bernoulli", "learning_rate": 2e-3}
DIGITS: dict[str, dict[str, Any]] = {
    "pca": {"model": "pca"},
    "ae": {"model": "ae"},
    "vae": {"model": "vae"},
    "map": {"model": "vae", "latents": 2},
    "conditional": {"model": "vae", "condition": ("label",)},
}
MNIST: dict[str, dict[str, Any]] = {
    "pca": {"model": "pca", "latents": 64},
    "ae": {"model": "ae", "latents": 16, "epochs": 40, "learning_rate": 3e-3}
    | {key: CONV[key] for key in ("network", "hidden", "dense")},
    "vae": {"model": "vae", "latents": 16, "epochs": 40} | CONV,
    "conditional": {"model": "vae", "latents": 16, "epochs": 40, "condition": ("label",)} | CONV,
}


class LabelledImages(NamedTuple):
    """Images [N, H, W] with values from 0 to 255, and their labels [N]."""

    x: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    @property
    def rows(self) -> Images:
        """The images as rows [N, D], with values from 0 to 255."""
        return self.x.reshape(len(self.x), -1).astype(np.float32)


@dataclass(frozen=True)
class Drawn:
    """Samples of a model, and the reconstructions with which they are compared.

    Args:
        rows: samples [M, D], with values from 0 to 255.
        minutes: CPU minutes of training; None without training.
        asked: the class that each sample was drawn for, [M]; None for a model without conditions.
        reconstructions: reconstructions of the held-out rows, [N, D]; None to compare with the held-out rows
            themselves.
    """

    rows: Images
    minutes: float | None = None
    asked: npt.NDArray[np.int64] | None = None
    reconstructions: Images | None = field(default=None, repr=False)


class Classifier(nn.Module):
    """A convolutional network that classifies images [H, W] of the ten digits.

    Args:
        shape: H and W.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        height, width = (-(-side // 4) for side in shape)
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
            *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * height * width, 128), nn.ReLU()),
            *(nn.Dropout(0.5), nn.Linear(128, 10)),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Return the logits [N, 10] of rows [N, D] with values from 0 to 255."""
        logits: Tensor = self.layers(rows.reshape(-1, 1, *self.shape) / 255.0)
        return logits


def train_classifier(images: LabelledImages, steps: int, keep: Path | None = None) -> Classifier:
    """Return a classifier that is trained on the labels of the images, for `steps` optimiser steps.

    With `keep`, its weights are kept in this folder, and read from there if they are there already.
    """
    torch.manual_seed(SEED)
    height, width = images.x.shape[1:]
    classifier = Classifier((height, width))
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # a third faster
    weights = None if keep is None else keep / "classifier.pt"
    if weights is not None and weights.exists():
        classifier.load_state_dict(torch.load(weights, weights_only=True))
        return classifier.eval()
    optimiser = torch.optim.Adam(classifier.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    x, labels = torch.from_numpy(images.rows), torch.from_numpy(images.labels)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,))
        loss = functional.cross_entropy(classifier(x[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    if weights is not None:
        torch.save(classifier.state_dict(), weights)
    return classifier.eval()


@torch.inference_mode()
def classify(classifier: Classifier, rows: Images) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the most probable classes [N] of rows [N, D], and their probabilities [N]."""
    found = [functional.softmax(classifier(part), dim=1).max(dim=1) for part in torch.from_numpy(rows).split(1_000)]
    return torch.cat([part.indices for part in found]).numpy(), torch.cat([part.values for part in found]).numpy()


def draw_with_elbo(
    options: dict[str, Any],
    images: LabelledImages,
    held_out: LabelledImages,
    *,
    quiet: bool,
    keep: Path | None = None,
    seed: int = SEED,
) -> Drawn:
    """Train a model with `options` of `elbo train` on `images`, and return its samples as /sample serves them.

    With `keep`, the artifact is kept in this folder. A model that is there already is not trained again.
    """
    with tempfile.TemporaryDirectory() if keep is None else nullcontext(str(keep)) as folder:
        path, minutes = Path(folder, "samples", "1", FILE_NAME), None
        if not path.exists():
            np.savez(source := Path(folder, "images.npz"), x=images.x, y=images.labels)
            config = TrainConfig.model_validate({"name": "samples", "seed": seed} | options)
            table, started = read_table(str(source), condition=config.condition), process_time()
            path = train(config, table, Path(folder), SilentReporter() if quiet else PlainReporter())
            minutes = (process_time() - started) / 60.0
        model = artifact.load(path)
    conditions = model.manifest.conditions
    condition, asked, inputs = None, None, held_out.rows
    if conditions is not None:
        condition = draw_conditions(conditions, len(held_out.x), random_stream(SEED, SAMPLES))
        levels = np.array([int(level) for level in conditions.columns[0].levels])
        asked = levels[condition.argmax(dim=1).numpy()]
        one_hot = (held_out.labels[:, None] == levels).astype(np.float32)
        inputs = np.concatenate((inputs, one_hot), axis=1)
    size = model.manifest.latents, model.manifest.width
    rows = draw_rows(model.module, len(held_out.x), size, condition, with_noise=False)
    with torch.inference_mode():
        reconstructions = torch.cat([model.module(part) for part in torch.from_numpy(inputs).split(1_000)]).numpy()
    return Drawn(rows, minutes, asked, reconstructions)


def draw_with_pythae(
    options: dict[str, Any],
    images: LabelledImages,
    held_out: LabelledImages,
    python: str,
    *,
    quick: bool,
    samplers: Sequence[str] = (),
    keep: Path | None = None,
) -> Iterator[tuple[str, Drawn]]:
    """Train pythae's VAE with the networks of `options`, and yield the samples of each of its samplers.

    Args:
        options: the options of Elbo's VAE, as for `elbo train`.
        images: the training rows.
        held_out: the held-out rows. Only their number matters.
        python: the interpreter of the environment with pythae.
        quick: train only for two epochs, and use only two samplers.
        samplers: the samplers to use, of SAMPLERS in `pythae_samples.py`; by default all.
        keep: folder in which the samples are kept. If they are there already, the model is not trained again.

    Raises:
        RuntimeError: pythae is missing or fails. The message gives the reason.
    """
    script, count = str(Path(__file__).with_name("pythae_samples.py")), len(held_out.x)
    if keep is not None and (keep / SAMPLER_LINES).exists():
        for line in (keep / SAMPLER_LINES).read_text().splitlines():
            found = json.loads(line)
            yield found["sampler"], Drawn(np.load(keep / found["path"]).reshape(count, -1), found["minutes"])
        return
    with tempfile.TemporaryDirectory() if keep is None else nullcontext(str(keep)) as folder:
        np.savez(source := Path(folder, "images.npz"), x=images.x)
        command, lines = [python, script, str(source), folder, str(count), json.dumps(options)], []
        if not Path(python).exists():
            raise RuntimeError(f"{python} does not exist: run make bench-train, or give --peers")
        with (
            Path(folder, "errors.txt").open("w+") as errors,
            subprocess.Popen(
                command + ["--quick"] * quick + list(samplers),
                env={**os.environ, **ONE_CORE, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                found["path"] = Path(found["path"]).name
                lines.append(json.dumps(found))
                yield found["sampler"], Drawn(np.load(Path(folder, found["path"])).reshape(count, -1), found["minutes"])
            if process.wait():
                errors.seek(0)
                raise RuntimeError(errors.read().strip().splitlines()[-1])
        Path(folder, SAMPLER_LINES).write_text("\n".join(lines))


class Judge:
    """Prints the lines of the table.

    Args:
        images: the training rows.
        held_out: the rows with which samples are compared.
        steps: optimiser steps of the classifier.
        keep: folder in which the classifier is kept; see `train_classifier`.
    """

    def __init__(self, images: LabelledImages, held_out: LabelledImages, steps: int, keep: Path | None = None) -> None:
        self._held_out = held_out
        self._classifier = train_classifier(images, steps, keep)
        self._training = np.random.RandomState(SEED).permutation(images.rows)[:NEAREST_AMONG].astype(np.float64)
        classes, sure = classify(self._classifier, held_out.rows)
        print(f"The classifier is right for {(classes == held_out.labels).mean():.2%} of the held-out rows.\n")
        print("| model | confident | density | coverage | asked for | nearer than rows | CPU minutes |")
        print("|---|---|---|---|---|---|---|")
        coverage = expected_coverage(len(held_out.x), len(held_out.x))
        print(f"| held-out rows, or as expected of them | {(sure > CONFIDENT).mean():.3f} | 1 | {coverage:.3f} | | | |")

        middles = 0.5 * (held_out.rows + np.random.RandomState(SEED).permutation(held_out.rows))
        self.print_line("the mean of two held-out rows", Drawn(middles))

    def print_line(self, title: str, drawn: Drawn) -> None:
        """Measure samples, and print a line of the table."""
        rows = np.clip(drawn.rows, 0.0, 255.0)
        classes, sure = classify(self._classifier, rows)
        found = likeness(self._held_out.rows.astype(np.float64), rows.astype(np.float64))
        asked = "" if drawn.asked is None else f"{(classes == drawn.asked).mean():.1%}"
        real = self._held_out.rows if drawn.reconstructions is None else drawn.reconstructions
        nearer = copy_p_value(*(nearest_distances(each.astype(np.float64), self._training) for each in (rows, real)))
        confident = f"{(sure > CONFIDENT).mean():.3f}"
        print(
            f"| {title} | {confident} | {found.density:.2f} | {found.coverage:.3f} | {asked} | {nearer:.3f} "
            f"| {'' if drawn.minutes is None else f'{drawn.minutes:.1f}'} |",
            flush=True,
        )


def load(name: str, seed: int = SEED) -> tuple[LabelledImages, LabelledImages]:
    """Return the training rows and the held-out rows of "digits" or "mnist". `seed` splits the digits."""
    if name == "mnist":
        train_images, test_images = (LabelledImages(*load_labelled_images(part)[1:]) for part in ("train", "test"))
        return train_images, test_images
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.RandomState(seed).permutation(len(digits.target))
    x, labels = np.rint(digits.images * 255.0 / 16.0).astype(np.uint8)[order], digits.target[order].astype(np.int64)
    half = len(x) // 2
    return LabelledImages(x[-half:], labels[-half:]), LabelledImages(x[:-half], labels[:-half])


def main() -> None:
    """Train the models and print the table."""
    options = read_options()
    torch.set_num_threads(1)
    images, held_out = load(options.data, options.seed)
    models = choose_models(options)
    print(describe_machine("torch"), end="\n\n", flush=True)
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    judge = Judge(images, held_out, options.classifier_steps, options.keep)
    for title, model in models.items():
        if title in options.only:
            if keep := options.keep and options.keep / title:
                keep.mkdir(exist_ok=True)
            drawn = draw_with_elbo(model, images, held_out, quiet=options.smoke, keep=keep, seed=options.seed)
            judge.print_line(f"Elbo, {title}", drawn)
    if PEER not in options.only:
        return
    if keep := options.keep and options.keep / PEER:
        keep.mkdir(exist_ok=True)
    pythae = draw_with_pythae(
        models["vae"], images, held_out, options.peers, quick=options.smoke, samplers=options.samplers, keep=keep
    )
    try:
        for sampler, drawn in pythae:
            judge.print_line(f"pythae, vae, {sampler}", drawn)
    except RuntimeError as error:
        print(f"| pythae | missing: {error} | | | | | |")


def choose_models(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the options of `elbo train` for each model that the command line chose."""
    models = {title: dict(model) for title, model in (MNIST if options.data == "mnist" else DIGITS).items()}
    for model in models.values():
        if options.epochs and model["model"] != "pca":
            model["epochs"] = options.epochs
        if options.mlp and model.get("network") == "conv":
            model.update({key: MLP[key] for key in model.keys() & MLP.keys()})
    return models


def read_options() -> argparse.Namespace:
    """Return the options of the command line. `only` has the models to train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits", help="the images (default: digits)")
    parser.add_argument("--only", nargs="+", choices=[*DIGITS, PEER], help="some of the models (default: all)")
    parser.add_argument("--epochs", type=int, help="train the networks for so many epochs")
    parser.add_argument("--mlp", action="store_true", help="MNIST: perceptrons, which train seven times as fast")
    parser.add_argument("--classifier-steps", type=int, default=CLASSIFIER_STEPS, metavar="STEPS")
    parser.add_argument("--samplers", nargs="+", default=[], metavar="NAME", help="some of pythae's samplers")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the models, and reuse those that are there")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of Elbo's models and of the split (default 0)")
    parser.add_argument("--smoke", action="store_true", help="two models of the digits, a few steps")
    parser.add_argument(
        "--peers",
        default=str(ROOT / ".venv-peers" / "bin" / "python"),
        metavar="PYTHON",
        help="interpreter with pythae (default that of make bench-train)",
    )
    options = parser.parse_args()
    known = [*(MNIST if options.data == "mnist" else DIGITS), PEER]
    if options.smoke:
        options.epochs, options.classifier_steps = 2, 50
    options.only = options.only or (["pca", "conditional", PEER] if options.smoke else known)
    if unknown := set(options.only) - set(known):
        parser.error(f"--data {options.data} has no model {', '.join(unknown)}: expected some of {', '.join(known)}")
    return options


if __name__ == "__main__":
    main()
