"""`elbo.load` and `elbo.Model`: use a model in this process. It gives the numbers that the server gives over HTTP."""

import html
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from elbo.errors import NotSupportedError, OptionError
from elbo.sources import Data, Labels, as_source
from elbo.verdicts import Contribution, Verdict, Verdicts
from models import artifact
from models.errors import ArtifactMissing, join_names
from models.keys import PrivateKey, read_private_key
from models.manifest import FILE_NAME, Manifest, read_sealed, resolve, versions
from models.signatures import TrustedKeys, identify, trusted_keys
from service.codec.conditions import ConditionSchema
from service.inference import operations
from service.inference.backends import TorchScriptBackend
from service.inference.calibration import load_calibration
from service.inference.operations import Operation, in_order
from service.inference.sampling import NoiseSource, fresh_seed, interpolate
from training.data.readers import InMemory
from training.data.row_stream import BATCH_ROWS, stream_for_model
from training.data.windowed_stream import judged_batches
from training.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from elbo.card import Card
    from training.evaluation.evaluate import Evaluation
    from training.reports.plots import PlottedModel

Array = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Condition = Mapping[str, Any] | Sequence[Mapping[str, Any]]
DEFAULT_ALPHA = 0.05
MAX_FLOAT32 = np.finfo(np.float32).max
UNSAVED = Path("unsaved") / FILE_NAME  # path that messages give to a model without a file


@dataclass(frozen=True)
class _Rows:
    """A batch of rows, and the inputs of the model for them."""

    first: int  # number of the first row
    x: Array  # [B, D], raw units, with NaN for missing values
    inputs: Array  # [B, D], [B, N, D], or with conditions [B, D + C]
    is_short: Bools | None = None  # [B], whether a window has too few rows to judge its newest row
    silenced: Bools | None = None  # [B], whether a silence of the policy holds for the row


def load(
    reference: "str | os.PathLike[str]",
    *,
    artifacts: "str | os.PathLike[str] | None" = None,
    keys: "str | os.PathLike[str] | TrustedKeys | None" = None,
    device: Literal["cpu", "cuda", "auto"] = "cpu",
) -> "Model":
    """Load a model, and verify its seal, its weights and its golden answers.

    An artifact is a program. Elbo inspects it before it runs it, but without the trial in a child process that `elbo
    serve` makes: load only files that you trust, or set `keys`.

    Args:
        reference: "web" (the newest version), "web@2", the folder "artifacts/web" or "artifacts/web/2", or the path of
            a model.pt.
        artifacts: the artifact folder, for names; default: ELBO_ARTIFACTS, or "artifacts".
        keys: trusted public keys, as text or as the path of a file: one of them must have signed the model. Default:
            ELBO_TRUSTED_KEYS, or no signature is needed.
        device: where the model runs; auto: on a GPU if there is one.

    Raises:
        ArtifactError: there is no such model, or it fails a verification. `models.errors` lists the reasons.
        DeviceMissing: cuda was asked for, and this machine has none.
    """
    path = _artifact_path(reference, artifact_folder(artifacts))
    setting = os.environ.get("ELBO_TRUSTED_KEYS") if keys is None else keys
    trusted = setting if isinstance(setting, TrustedKeys) else trusted_keys(os.fspath(setting) if setting else None)
    content = read_sealed(path)
    if trusted is not None:
        trusted.verify(content, path, *identify(path))
    return Model.from_bytes(content, path=path, device=artifact.choose_device(device))


def artifact_folder(given: "str | os.PathLike[str] | None") -> Path:
    """Return the artifact folder: `given`, or ELBO_ARTIFACTS, or "artifacts", as on the command line."""
    return Path(given or os.environ.get("ELBO_ARTIFACTS") or "artifacts")


def _artifact_path(reference: "str | os.PathLike[str]", artifacts: Path) -> Path:
    """Return the path of the model.pt that `reference` names."""
    path = Path(reference)
    if path.is_dir() and (path / FILE_NAME).is_file():
        return path / FILE_NAME
    if path.is_dir() and versions(path.parent, path.name):
        return resolve(path.parent, path.name)
    if path.is_file() or len(path.parts) > 1 or path.name == FILE_NAME:
        if not path.is_file():
            raise ArtifactMissing(
                f"there is no model at {path}: expected the folder of a model or of a version, or a {FILE_NAME}"
            )
        return path
    return resolve(artifacts, os.fspath(reference))


class Model:
    """A model in this process. `elbo.fit`, `elbo.load` and `elbo.adopt` return a `Model`.

    All methods that take rows take the types that `elbo.fit` takes, in raw units: arrays, tensors, frames, lists and
    paths. They return NumPy arrays of float32. In shapes, B is the number of rows, D of features and K of latents, and
    `*shape` is the shape of one row: `[D]` for tables, `[H, W]` or `[H, W, C]` for images. Rows of images may be flat,
    [B, D], or images. Columns of frames are found by name, in any order; other columns are ignored.

    - Missing values (NaN or None) are allowed in features that had missing values in training. In frames, methods
      that score also allow them in the other features: up to half of these values of a row. The score is the expected
      score of the complete row. Models with a window or conditions, adopted models and artifacts of earlier releases
      replace a missing value by its training median.
    - If the model knows conditions, they come from the columns of a frame, or from the argument `condition`: a mapping
      such as `{"label": "7"}`, or one for each row. Without it, the model takes the condition as unknown.
    - If the model judges windows, frames need the column of times, and of groups, as in training; each row is judged
      with the rows before it. An array has windows, [B, N, D], oldest row first, with NaN for rows that are not there.
    - Scores are those of `elbo score`: they do not depend on the group and the time of a row, and there is no online
      calibration. The server adjusts the scores of models with times by group and season.

    Rows are processed in batches of 1,024, so that large files need little memory. A model never changes: several
    threads may use it at once, `copy` and `deepcopy` return the model itself, and pickle saves the bytes of its
    artifact. A pickle is a program, as every artifact is: unpickle only data that you trust.
    """

    def __init__(self, content: bytes, loaded: artifact.Artifact, path: Path | None, notes: Sequence[str] = ()) -> None:
        self._content = content
        self._artifact = loaded
        self._path = path
        self._noise = NoiseSource()
        self.notes = tuple(notes)
        """Messages about the data and the training; empty for a model that was loaded."""

    @classmethod
    def from_bytes(
        cls, content: bytes, *, path: Path | None = None, device: str = "cpu", notes: Sequence[str] = ()
    ) -> "Model":
        """Return the model in `content`, the bytes of an artifact.

        Args:
            content: the bytes, whose seal is not verified again: see `models.manifest.read_sealed`.
            path: the file that has these bytes; None if there is none.
            device: "cpu" or "cuda".
            notes: messages about the data and the training.

        Raises:
            ArtifactError: the bytes are no artifact, or fail a verification.
        """
        return cls(content, artifact.load_content(content, path or UNSAVED, device), path, notes)

    # What the model is

    @property
    def artifact(self) -> artifact.Artifact:
        """The loaded artifact: its module, manifest and exhibits."""
        return self._artifact

    @property
    def manifest(self) -> Manifest:
        """The description of the model: its features, options, data, metrics and calibration."""
        return self._artifact.manifest

    @property
    def name(self) -> str:
        """The name of the model: that of its folder in the artifact folder, otherwise that in its manifest."""
        if self._path is None or self.version is None:
            return self.manifest.name
        return self._path.absolute().parents[1].name

    @property
    def version(self) -> int | None:
        """The version of the model; None if the model is not saved, or its file is not in an artifact folder."""
        number = "" if self._path is None else self._path.absolute().parent.name
        return int(number) if number.isdecimal() else None

    @property
    def path(self) -> Path | None:
        """The file from which the model was loaded; None for other models, even after `save`."""
        return self._path

    @property
    def kind(self) -> str:
        """The kind of the model, such as pca or vae."""
        return self.manifest.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return tuple(self.manifest.shape)

    @property
    def latents(self) -> int:
        """K, the number of latents."""
        return self.manifest.latents

    @property
    def feature_names(self) -> list[str]:
        """The names of the D features."""
        return [feature.name for feature in self.manifest.features]

    @cached_property
    def card(self) -> "Card":
        """The model card, which a notebook renders. `str(card)` is its Markdown."""
        from elbo.card import Card

        return Card.of(self.manifest, self.version, self._artifact.exhibits, self.notes)

    # Latents and rows

    def encode(
        self, data: Data, *, sample: bool = False, seed: int | None = None, condition: Condition | None = None
    ) -> Array:
        """Return the latents [B, K] of rows: the posterior means, or with `sample` a draw from each posterior.

        Args:
            data: rows; see the class.
            sample: draw from the posterior of each row.
            seed: seed of the draw, which gives the same numbers as in `POST /encode`; by default, a random seed.
            condition: the condition of the rows, if the model knows conditions.
        """
        mean, std = self.posterior(data, condition=condition)
        if not sample:
            return mean
        noise, _ = self._noise.draw(fresh_seed() if seed is None else seed, *mean.shape)
        return np.asarray(mean + std * noise)

    def posterior(self, data: Data, *, condition: Condition | None = None) -> tuple[Array, Array]:
        """Return the mean [B, K] and the standard deviation [B, K] of the latents of rows.

        The standard deviation is 0 for models without a posterior, such as autoencoders.
        """
        self._require_latents("encode rows")
        mean, std = self._run(operations.ENCODE, data, condition)
        return mean[:, : self.latents], std[:, : self.latents]

    def decode(self, latents: npt.ArrayLike, *, condition: Condition | None = None) -> Array:
        """Return the rows [B, *shape] in raw units that `latents` [B, K] decode to.

        Raises:
            DataError: the latents do not have the shape [B, K], or are not finite.
        """
        self._require_latents("decode latents")
        z = self._with_condition(self._latents(latents), condition)
        parts = [self._backend.run(operations.DECODE, (part,))[0] for part in _parts(z)]
        return self._as_rows(np.concatenate(parts))

    def reconstruct(self, data: Data, *, condition: Condition | None = None) -> Array:
        """Return the reconstructions [B, *shape] of rows, in raw units, decoded from the posterior means.

        For windows, they are those of the newest rows.
        """
        return self._as_rows(self._run(self._reconstruct, data, condition)[0])

    def reconstruction_error(self, data: Data, *, condition: Condition | None = None) -> Array:
        """Return the mean squared error of the reconstruction of each row, [B], over the values that are present.

        The unit is the square of the raw unit.
        """
        return self._run(self._reconstruct, data, condition)[1]

    def sample(
        self,
        n: int = 1,
        *,
        seed: int | None = None,
        temperature: float = 1.0,
        noise: bool | None = None,
        prior: Literal["fitted", "standard"] = "fitted",
        condition: Condition | None = None,
    ) -> Array:
        """Return `n` new rows [n, *shape] in raw units, drawn from the prior. `POST /sample` gives the same numbers.

        Args:
            n: number of rows.
            seed: the same seed gives the same rows; by default, a random seed.
            temperature: factor of the noise: below 1, rows are more typical.
            noise: add observation noise, as real rows have; default: for tables, but not for images.
            prior: fitted (to the latents of the training rows), or standard (N(0, I), for a VAE only).
            condition: the condition of the rows; levels that are not given are drawn as often as in training.

        Raises:
            OptionError: n is below 1, or the model has no such prior.
        """
        if n < 1:
            raise OptionError(f"n: expected at least 1, got {n}")
        if prior == "standard" and self.kind != "vae":
            raise OptionError(
                f"prior: expected 'fitted', because only a VAE has the prior N(0, I), and this is a {self.kind}"
            )
        self._require_latents("draw samples")
        seed = fresh_seed() if seed is None else seed
        with_noise = not self.manifest.is_image if noise is None else noise
        normal, choice = self._noise.draw(seed, n, self.latents)
        normal *= np.float32(temperature)
        if self._conditions is not None:
            codes = self._conditions.read_all(_plain(condition), n)
            codes = self._conditions.draw_missing(codes, self._noise.draw_levels(seed, n))
            normal = self._conditions.join(normal, codes)
        elif condition is not None:
            self._refuse_condition()
        inputs: list[Array] = [normal, choice]
        if with_noise:
            inputs.append(self._noise.draw_rows(seed, n, self.manifest.width) * np.float32(temperature))
        operation = SAMPLING[prior, with_noise]
        parts = [self._backend.run(operation, part)[1] for part in zip(*map(_parts, inputs), strict=True)]
        return self._as_rows(np.concatenate(parts))

    def interpolate(
        self,
        start: Data,
        end: Data,
        steps: int = 8,
        *,
        method: Literal["linear", "slerp"] = "linear",
        condition: Mapping[str, Any] | None = None,
    ) -> Array:
        """Return rows [steps, *shape] in raw units: the points, decoded, of the path between the latents of two rows.

        Args:
            start: one row, [1, D] or [1, *shape], in any of the types of the class.
            end: one row.
            steps: number of points with both ends, at least 2.
            method: linear (a straight line) or slerp (spherical linear interpolation).
            condition: the condition of all points.

        Raises:
            DataError: `start` or `end` is not one row.
            OptionError: steps is below 2.
        """
        if steps < 2:
            raise OptionError(f"steps: expected at least 2, got {steps}")
        ends = []
        for name, data in (("start", start), ("end", end)):
            latents = self.encode(data, condition=condition)
            if len(latents) != 1:
                raise DataError(f"{name} has {len(latents)} rows: expected one")
            ends.append(latents[0])
        return self.decode(interpolate(ends[0], ends[1], steps, method), condition=condition)

    # Scores

    def score(self, data: Data, *, condition: Condition | None = None) -> Array:
        """Return the anomaly scores [B] of rows: the higher, the more anomalous. They have no unit.

        The score of a row for which the model overflows is NaN.
        """
        return self._judge(data, DEFAULT_ALPHA, condition, lambda outputs: outputs[0])

    def p_value(self, data: Data, *, condition: Condition | None = None) -> Array:
        """Return the p-values [B] of rows, from the number of calibration rows that are at least as anomalous.

        A normal row has a p-value of at most alpha with a probability of at most alpha, for every alpha.
        """
        return self._judge(data, DEFAULT_ALPHA, condition, lambda outputs: outputs[1])

    def severity(
        self, data: Data, *, alpha: float | None = None, extrapolated: bool = False, condition: Condition | None = None
    ) -> Array:
        """Return the severities [B] of rows: a row is anomalous at `alpha` if and only if its severity is above 1.

        Args:
            data: rows; see the class.
            alpha: the share of normal rows that may be anomalous; default: 0.05, or the alpha of the policy.
            extrapolated: allow anomalies at an alpha below the smallest p-value. A tail that is fitted to the
                calibration scores then gives the threshold, and the false-alarm rate is not guaranteed.
            condition: the condition of the rows, if the model knows conditions.

        Raises:
            OptionError: alpha is not between 0 and 1.
        """
        return self._judge(data, self._alpha(alpha), condition, lambda outputs: outputs[2], extrapolated)

    def is_anomaly(
        self, data: Data, *, alpha: float | None = None, extrapolated: bool = False, condition: Condition | None = None
    ) -> Bools:
        """Return whether each row is anomalous, [B]: see `severity`. No row is, during a silence of the policy."""
        return self.judge(data, alpha=alpha, extrapolated=extrapolated, condition=condition).is_anomaly

    def judge(
        self, data: Data, *, alpha: float | None = None, extrapolated: bool = False, condition: Condition | None = None
    ) -> Verdicts:
        """Return scores, p-values, severities and verdicts of rows; the model runs once. See `severity`."""
        operation = operations.anomaly(self._alpha(alpha), extrapolated)
        found = [
            (score, p_value, severity, (severity > 1) if rows.silenced is None else (severity > 1) & ~rows.silenced)
            for rows, (score, p_value, severity, *_) in self._judged(operation, data, condition)
        ]
        return Verdicts(*map(np.concatenate, zip(*found, strict=True)))

    def explain(
        self,
        data: Data,
        features: int = 3,
        *,
        alpha: float | None = None,
        extrapolated: bool = False,
        condition: Condition | None = None,
    ) -> list[Verdict]:
        """Return the verdict on each row, with the `features` features that contribute most to its score.

        See `severity` for the other arguments.
        """
        operation = operations.anomaly(self._alpha(alpha), extrapolated)
        verdicts: list[Verdict] = []
        for rows, outputs in self._judged(operation, data, condition):
            verdicts += self._verdicts(rows, outputs, features)
        return verdicts

    def _verdicts(self, rows: _Rows, outputs: tuple[Array, ...], features: int) -> Iterator[Verdict]:
        score, p_value, severity, parts, contribution, expected = outputs
        table, part_names = self.manifest.category_columns, self.manifest.parts
        names = self.feature_names if table is None else table.names
        numbers = len(names) if table is None else len(table.numbers)
        contribution = contribution if table is None else table.contributions(contribution)
        largest = np.argsort(-contribution, axis=1, kind="stable")[:, :features]  # [B, features]
        for i, columns in enumerate(largest.tolist()):
            is_silenced = rows.silenced is not None and bool(rows.silenced[i])
            yield Verdict(
                row=rows.first + i,
                score=float(score[i]),
                p_value=float(p_value[i]),
                severity=float(severity[i]),
                is_anomaly=bool(severity[i] > 1) and not is_silenced,
                parts=dict(zip(part_names, parts[i].tolist(), strict=True)),
                features=[
                    Contribution(names[j], float(rows.x[i, j]), float(expected[i, j]), float(contribution[i, j]))
                    if j < numbers or table is None
                    else Contribution(
                        names[j],
                        table.level_of(j - numbers, rows.x[i]),
                        table.level_of(j - numbers, expected[i]),
                        float(contribution[i, j]),
                    )
                    for j in columns
                ],
            )

    def threshold(self, alpha: float | None = None) -> float | None:
        """Return the score above which a row is anomalous at `alpha`; None if there are too few calibration rows."""
        alpha = self._alpha(alpha)
        return float(self._backend.calibration.threshold(alpha)) if self.manifest.calibration.reaches(alpha) else None

    def evaluate(
        self, data: Data, *, labels: Labels | None = None, normal: Sequence[str] = (), draws: int = 100
    ) -> "Evaluation":
        """Evaluate the model on rows, as `elbo evaluate` does.

        Args:
            data: rows; see the class.
            labels: a label of each row, [N]; the column of labels of a frame is found by its name.
            normal: the labels that mean normal; by default, labels such as good, ok, normal, 0 and false.
            draws: importance samples per row for the log-likelihood of a VAE.

        Raises:
            DataError: the model cannot take the rows.
        """
        from training.data.table import read_for_model
        from training.evaluation.evaluate import evaluate

        table = read_for_model(as_source(data, labels), self.manifest, normal=list(normal))
        return evaluate(self._artifact, table, draws)

    def calibrate(
        self,
        data: Data,
        *,
        labels: Labels | None = None,
        normal: Sequence[str] = (),
        alpha: float = 0.05,
        force: bool = False,
    ) -> "Model":
        """Return the same model, calibrated on the normal rows of `data`, as `elbo calibrate` does.

        Args:
            data: rows that the model has not seen; see the class.
            labels: a label of each row, [N]; rows with a label that does not mean normal are left out.
            normal: the labels that mean normal; by default, as in `evaluate`.
            alpha: the smallest alpha that you will use: at least 1/alpha - 1 rows are needed.
            force: calibrate even if the model flags all of these rows.

        Raises:
            DataError: the model was trained on some of these rows or flags all of them, or too few rows are normal.
        """
        from elbo.recalibration import recalibrated

        content, notes = recalibrated(self._content, self.name, as_source(data, labels), normal, alpha, force=force)
        return Model.from_bytes(content, notes=notes)

    # Save

    def save(
        self,
        artifacts: "str | os.PathLike[str] | None" = None,
        name: str | None = None,
        *,
        key: "PrivateKey | str | os.PathLike[str] | None" = None,
        replace_features: bool = False,
    ) -> Path:
        """Publish the model as the next version of its name, as `elbo train` does. Return the path of the artifact.

        A server whose artifact folder is `artifacts` serves the new version within seconds.

        Args:
            artifacts: the artifact folder; default: ELBO_ARTIFACTS, or "artifacts".
            name: the name to publish under; default: the name of the model.
            key: signs the version: a private key, or the path of one (`elbo keygen`).
            replace_features: publish even if the newest version of this name has other features.

        Raises:
            ArtifactUnwritable: the disk is full, or this user may not write to the folder.
            ArtifactNameInvalid: the name is not valid.
            DataError: the newest version of this name has other features, and `replace_features` is false.
        """
        from elbo.saving import save

        private = read_private_key(Path(key)) if isinstance(key, str | os.PathLike) else key
        return save(
            self._content,
            self._artifact,
            artifact_folder(artifacts),
            name or self.name,
            private,
            replace_features=replace_features,
        )

    def inputs(self, data: Data, most: int | None = None) -> Array:
        """Return the inputs of the artifact's module: rows [B, D], windows [B, N, D], or with conditions [B, D + C].

        Args:
            data: rows; see the class.
            most: maximum number of rows; by default, all.
        """
        found: list[Array] = []
        for rows in self._rows(data, None, may_fill=True):
            found.append(rows.inputs)
            if most is not None and sum(map(len, found)) >= most:
                break
        return np.concatenate(found)[:most]

    def to_bytes(self) -> bytes:
        """Return the bytes of the artifact: the file that `save` writes, if it gets no other name."""
        return self._content

    # Plots

    def plot_samples(self, rows: Data | None = None, *, seed: int = 0) -> "Figure":
        """Return a figure with samples from the prior, beside `rows` or the held-out rows of the artifact."""
        from elbo import figures

        self._require_latents("draw samples")
        return figures.samples(self._plotted(rows, None), seed)

    def plot_reconstructions(self, rows: Data | None = None) -> "Figure":
        """Return a figure with rows and their reconstructions; by default, held-out rows of the artifact."""
        from elbo import figures

        return figures.reconstructions(self._plotted(rows, None))

    def plot_latents(self, rows: Data | None = None, labels: Labels | None = None) -> "Figure":
        """Return a map of the latents of rows, coloured by label, or by score without labels.

        By default, the rows are held-out rows of the artifact, with their labels.
        """
        from elbo import figures

        self._require_latents("encode rows")
        return figures.latents(self._plotted(rows, labels))

    def plot_scores(self, rows: Data, *, alpha: float | None = None) -> "Figure":
        """Return a figure with the scores of rows in their order, beside those of the calibration set."""
        from elbo import figures

        return figures.scores(self._artifact, self.score(rows), self.threshold(alpha), self._alpha(alpha))

    def plot_explanation(self, row: Data, features: int = 12) -> "Figure":
        """Return a figure that explains the score of one row: the features that contribute most, or images.

        Raises:
            DataError: `row` is not one row, [1, D].
        """
        from elbo import figures

        verdicts = self.explain(row, self.manifest.width if self.manifest.is_image else features)
        if len(verdicts) != 1:
            raise DataError(f"row has {len(verdicts)} rows: expected one")
        return figures.explanation(self.manifest, verdicts[0])

    def plot_history(self) -> "Figure":
        """Return a figure with the terms of the loss by epoch.

        Raises:
            NotSupportedError: the model has no epochs, such as PCA and adopted models.
        """
        from elbo import figures

        return figures.history(self.manifest)

    def _plotted(self, rows: Data | None, labels: Labels | None) -> "PlottedModel":
        """Return the rows of a figure, by default the held-out rows of the artifact, with their labels."""
        from elbo import figures

        if rows is None:
            held_out = figures.read_held_out(self._artifact)
            inputs = self.inputs(held_out.rows, figures.MAX_ROWS)
            return figures.plotted_model(self._artifact, inputs, held_out.labels, held_out.label_names, "held-out rows")
        inputs = self.inputs(rows, figures.MAX_ROWS)
        codes, names = figures.codes_of(labels, len(inputs))
        return figures.plotted_model(self._artifact, inputs, codes, names, "rows")

    # How it is shown, copied and pickled

    def __repr__(self) -> str:
        version = "not saved" if self.version is None else f"version {self.version}"
        return f"<elbo.Model {self.name!r}, {version}: {self.kind}, {self._size()}, {self.latents} latents>"

    def _repr_html_(self) -> str:
        manifest = self.manifest
        rows = {
            "name": self.name + ("" if self.version is None else f"@{self.version}"),
            "kind": self.kind,
            "rows": self._size(),
            "features": join_names(self.feature_names),
            "latents": str(self.latents),
            "trained on": f"{manifest.data.rows:,} rows of {manifest.data.source}",
            "calibrated on": f"{manifest.calibration.rows:,} rows: the smallest p-value is "
            f"{manifest.calibration.floor:.3g}",
            **{f"held out: {name}": f"{value:.4g}" for name, value in manifest.metrics.items()},
            **({"warnings": " ".join(manifest.warnings)} if manifest.warnings else {}),
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(title)}</th><td style='text-align:left'>{html.escape(text)}"
            "</td></tr>"
            for title, text in rows.items()
        )
        return f"<table>{cells}</table>"

    def _size(self) -> str:
        width = self.manifest.width
        return f"{width:,} features" if len(self.shape) == 1 else f"rows of {' x '.join(map(str, self.shape))}"

    def __copy__(self) -> "Model":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Model":
        return self

    def __reduce__(self) -> tuple[Callable[..., "Model"], tuple[Any, ...]]:
        return _unpickle, (self._content, self._path, self.notes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and self._artifact.sha256 == other._artifact.sha256

    def __hash__(self) -> int:
        return hash(self._artifact.sha256)

    # How it computes

    @cached_property
    def _backend(self) -> TorchScriptBackend:
        return TorchScriptBackend(self._artifact.module, self._artifact.device, load_calibration(self._artifact))

    @cached_property
    def _scores_gaps(self) -> bool:
        return hasattr(self._artifact.module, "score_gaps")

    @cached_property
    def _conditions(self) -> ConditionSchema | None:
        known = self.manifest.conditions
        if known is None:
            return None
        return ConditionSchema({each.name: each.levels for each in known.columns}, known.combinations, known.shares)

    @property
    def _reconstruct(self) -> Operation:
        return operations.reconstruct(any(feature.missing > 0 for feature in self.manifest.features))

    def _alpha(self, alpha: float | None) -> float:
        if alpha is None:
            policy = self.manifest.policy
            return (policy and policy.alpha) or DEFAULT_ALPHA
        if not 0 < alpha < 1:
            raise OptionError(f"alpha: expected a number above 0 and below 1, got {alpha}")
        return alpha

    def _refuse_condition(self) -> None:
        raise NotSupportedError(
            f"{self.name} knows no condition of a row: leave condition out, or fit a model with the option condition"
        )

    def _require_latents(self, what: str) -> None:
        if self.latents == 0:
            raise NotSupportedError(
                f"{self.name} cannot {what}: it was adopted from a module without encoder and decoder, and only "
                "reconstructs and scores rows; adopt a module that has both"
            )

    def _with_condition(self, rows: Array, condition: Condition | None) -> Array:
        """Return rows or latents [B, D] followed by their conditions."""
        if self._conditions is not None:
            return self._conditions.join(rows, self._conditions.read_all(_plain(condition), len(rows)))
        if condition is not None:
            self._refuse_condition()
        return rows

    def _latents(self, latents: npt.ArrayLike) -> Array:
        source = as_source(latents)  # type: ignore[arg-type]  # an array-like is a sequence or an array
        z = source.rows if isinstance(source, InMemory) else None
        if not isinstance(z, np.ndarray) or z.ndim != 2 or z.shape[1] != self.latents or not len(z):
            got = "a table" if not isinstance(z, np.ndarray) else f"the shape {list(z.shape)}"
            raise DataError(f"latents: expected an array [B, {self.latents}], got {got}")
        array = z.astype(np.float32)
        if not np.isfinite(array).all():
            raise DataError("latents: expected finite numbers")
        return array

    def _as_rows(self, rows: Array) -> Array:
        return np.ascontiguousarray(rows).reshape(len(rows), *self.shape)

    def _run(self, operation: Operation, data: Data, condition: Condition | None) -> tuple[Array, ...]:
        """Return the outputs of an operation for all rows. Values may be missing only in features that allow it."""
        parts = [self._backend.run(operation, (rows.inputs,)) for rows in self._rows(data, condition, may_fill=False)]
        return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))

    def _judge(
        self,
        data: Data,
        alpha: float,
        condition: Condition | None,
        choose: Callable[[tuple[Array, ...]], Array],
        extrapolated: bool = False,
    ) -> Array:
        """Return one of the outputs of `operations.anomaly`, [B], for all rows."""
        operation = operations.anomaly(alpha, extrapolated)
        return np.concatenate([choose(outputs) for _, outputs in self._judged(operation, data, condition)])

    def _judged(
        self, operation: Operation, data: Data, condition: Condition | None
    ) -> Iterator[tuple[_Rows, tuple[Array, ...]]]:
        """Yield batches of rows with score, p-value, severity, parts, contribution and expected values.

        As in responses of /anomaly, infinite numbers are given as the largest float32. A row has NaN as its score, its
        p-value and its severity if one of its numbers is NaN, or an expected value is not finite.
        """
        for rows in self._rows(data, condition, may_fill=True):
            runs = operations.split_by_gaps(operation, rows.inputs) if self._scores_gaps else None
            if runs is None:
                outputs = self._backend.run(operation, (rows.inputs,))
            else:
                outputs = in_order(runs, [self._backend.run(each, (rows.inputs[places],)) for each, places in runs])
            score, p_value, severity, parts, contribution, expected = outputs
            if rows.is_short is not None:
                severity = np.where(rows.is_short, np.minimum(severity, np.float32(1)), severity)
            numbers = np.column_stack((score, severity, parts, contribution))
            unusable = np.isnan(numbers).any(axis=1) | ~np.isfinite(expected).all(axis=1)
            if not np.isfinite(numbers).all():
                score, severity, parts, contribution = (
                    np.clip(values, -MAX_FLOAT32, MAX_FLOAT32) for values in (score, severity, parts, contribution)
                )
            if unusable.any():
                score, p_value, severity = (
                    np.where(unusable, np.float32(np.nan), values) for values in (score, p_value, severity)
                )
            yield rows, (score, p_value, severity, parts, contribution, expected)

    def _rows(self, data: Data, condition: Condition | None, *, may_fill: bool) -> Iterator[_Rows]:
        """Yield the rows of `data` in batches.

        Args:
            may_fill: whether values may be missing in features that had none missing in training. If the model cannot
                score rows with missing values, training medians replace these values.

        Raises:
            DataError: the model cannot take the rows.
        """
        source = as_source(data)
        if self.manifest.window is not None and isinstance(source, InMemory) and not source.has_columns:
            yield from self._windows(source.rows)
            return
        stream = stream_for_model(source, self.manifest, keeps_gaps=may_fill and self._scores_gaps)
        given = None if condition is None or self._conditions is None else _plain(condition)
        if condition is not None and self._conditions is None:
            self._refuse_condition()
        for batch in judged_batches(stream, self.manifest):
            rows = batch.rows
            if rows.faults:
                position = min(rows.faults)
                raise DataError(f"{stream.source}: row {rows.first + position}: {rows.faults[position]}")
            if not may_fill:
                self._refuse_filled(stream.source, rows.first, rows.missing & ~stream.may_be_missing)
            inputs = batch.inputs
            if given is not None:
                of_batch = given[rows.first : rows.first + len(rows.x)] if isinstance(given, list) else given
                inputs = self._with_condition(rows.x, of_batch)
            is_short = None
            if batch.counts is not None and self.manifest.window is not None:
                is_short = batch.counts < self.manifest.window.least_rows
            yield _Rows(
                first=rows.first,
                x=np.where(rows.missing, np.float32(np.nan), rows.x),
                inputs=inputs,
                is_short=is_short,
                silenced=self._silenced(rows.time, rows.group, len(rows.x)),
            )

    def _refuse_filled(self, source: str, first: int, filled: Bools) -> None:
        if filled.any():
            row, column = np.argwhere(filled)[0].tolist()
            raise DataError(
                f"{source}: row {first + row} has no value for {self.feature_names[column]!r}: the model was trained "
                "without missing values in this column; fill in the value, or leave the row out"
            )

    def _silenced(
        self, times: Sequence[float | str | None] | None, groups: Sequence[str | None] | None, count: int
    ) -> Bools | None:
        policy = self.manifest.policy
        if policy is None or not policy.rules.silences:
            return None
        from training.evaluation.score import silenced_rows

        return silenced_rows(self.manifest, times, groups, count)

    def _windows(self, windows: Any) -> Iterator[_Rows]:
        """Yield windows [B, N, D] in batches."""
        window, width = self.manifest.window, self.manifest.width
        assert window is not None
        if windows.ndim != 3 or windows.shape[1:] != (window.rows, width) or not len(windows):
            raise DataError(
                f"data has the shape {list(windows.shape)}: {self.name} judges windows, so expected [B, {window.rows}, "
                f"{width}], or a frame with the column of times"
            )
        for start in range(0, len(windows), BATCH_ROWS):
            x = windows[start : start + BATCH_ROWS].astype(np.float32)
            present = ~np.isnan(x).all(axis=2)  # [B, N]
            if np.isinf(x).any() or not present[:, -1].all() or (np.diff(present.astype(np.int8), axis=1) < 0).any():
                raise DataError(
                    "data has a window with infinite values, or without its newest row, or with a gap: expected finite "
                    "numbers, and NaN only in rows before the first one"
                )
            optional = np.array([feature.missing > 0 for feature in self.manifest.features])
            self._refuse_filled("data", start, (np.isnan(x) & present[:, :, None] & ~optional).any(axis=1))
            yield _Rows(start, x[:, -1], x, is_short=present.sum(axis=1) < window.least_rows)


SAMPLING = {
    ("fitted", False): operations.SAMPLE,
    ("fitted", True): operations.SAMPLE_ROWS,
    ("standard", False): operations.SAMPLE_STANDARD,
    ("standard", True): operations.SAMPLE_STANDARD_ROWS,
}


def _unpickle(content: bytes, path: Path | None, notes: Sequence[str]) -> Model:
    """Return the model that was pickled, on the CPU."""
    return Model.from_bytes(content, path=path, notes=notes)


def _plain(condition: Condition | None) -> Any:
    """Return a condition as JSON has it: an object, or a list of objects."""
    if condition is None:
        return None
    return dict(condition) if isinstance(condition, Mapping) else [dict(each) for each in condition]


def _parts(rows: Array) -> Iterator[Array]:
    """Yield rows [B, ...] in batches."""
    for start in range(0, len(rows), BATCH_ROWS):
        yield rows[start : start + BATCH_ROWS]
