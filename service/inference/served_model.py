"""One loaded model version, and its description for clients."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from zoneinfo import ZoneInfoNotFoundError

from models.artifact import DIRECTIONS
from models.baseline import Baseline
from models.categories import CategoryColumns
from models.errors import ArtifactMismatch
from models.keys import PublicKey
from models.manifest import Manifest
from models.onset import UsualCourse
from models.silences import Silences
from service.codec import png
from service.codec.conditions import ConditionSchema
from service.codec.feature_names import FeatureSelectors
from service.codec.pictures import PictureRow
from service.codec.row_schema import RowSchema
from service.codec.row_windows import WindowSchema
from service.inference.backend_selection import Selection
from service.inference.backends import Backend
from service.inference.latent_space import HeldOutRows, LabelMean, read_held_out, read_label_means


@dataclass(frozen=True, eq=False)
class ServedModel:
    """One version of a model, loaded and warmed up.

    Args:
        name: the name of the model's folder, which may differ from the name in the manifest.
        version: the version of the model.
        manifest: the manifest of the artifact.
        selection: the backend that runs the operations, and why it was selected.
        load_seconds: time to load and verify the artifact and to select the backend.
        warm_seconds: time of the warm-up.
        exhibits: documents for human readers, such as the model card, by file name.
        signed_by: the trusted key that has signed the artifact; None if the server needs no signatures.
        baseline: what score is usual for a group and a time; None if the model was trained without times.
        course: how features vary within a window; None if the model has no window, or if this is unknown.
    """

    name: str
    version: int
    manifest: Manifest
    selection: Selection
    load_seconds: float
    warm_seconds: float = 0.0
    exhibits: Mapping[str, bytes] = field(default_factory=dict)
    signed_by: PublicKey | None = None
    baseline: Baseline | None = None
    course: UsualCourse | None = None

    @cached_property
    def backend(self) -> Backend:
        """The backend that runs the operations."""
        return self.selection.backend

    @cached_property
    def metric_labels(self) -> tuple[str, str]:
        """The values of the metric labels `model` and `version`."""
        return self.name, str(self.version)

    @cached_property
    def has_past(self) -> bool:
        """Whether the past of a row's group can matter for its verdict: the model has times or a window."""
        return self.manifest.timeline is not None or self.manifest.window is not None

    @cached_property
    def default_alpha(self) -> float | None:
        """The alpha that keeps the budget of alarms of the policy; None if there is no budget."""
        policy = self.manifest.policy
        return None if policy is None else policy.alpha

    @cached_property
    def silences(self) -> Silences | None:
        """When no row is anomalous; None if the policy has no silences. Raises ArtifactMismatch."""
        policy = self.manifest.policy
        if policy is None or not policy.rules.silences:
            return None
        try:
            return Silences(policy.rules.silences)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ArtifactMismatch(
                f"this machine does not know a time zone of the policy of {self.name}@{self.version} ({error}): "
                "install the time zones, such as Debian's package tzdata"
            ) from error

    @cached_property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The headers that every response computed by this model has."""
        return ((b"elbo-model", f"{self.name}@{self.version}".encode()),)

    @cached_property
    def row_schema(self) -> RowSchema:
        """The schema of input rows."""
        features = self.manifest.features
        names = [feature.name for feature in features]
        optional = [feature.missing > 0 for feature in features]
        medians = [feature.median for feature in features]
        units = [feature.unit for feature in features]
        booleans = [feature.values == "boolean" for feature in features]
        return RowSchema(self.manifest.shape, names, optional, medians, units, self.conditions, self.columns, booleans)

    @cached_property
    def columns(self) -> CategoryColumns | None:
        """The columns of the table that the model was trained on, if some are categories; otherwise None."""
        return self.manifest.category_columns

    @cached_property
    def conditions(self) -> ConditionSchema | None:
        """The conditions that the model knows of a row; None if it knows none."""
        known = self.manifest.conditions
        if known is None:
            return None
        return ConditionSchema({each.name: each.levels for each in known.columns}, known.combinations, known.shares)

    @cached_property
    def window_schema(self) -> WindowSchema | None:
        """The schema of windows; None if the model judges each row alone."""
        window = self.manifest.window
        return None if window is None else WindowSchema(window.rows, self.row_schema)

    @cached_property
    def input_width(self) -> int:
        """The number of values of a row, or of a window if the model has one. Conditions are not counted."""
        return self.row_schema.width if self.window_schema is None else self.window_schema.width

    @cached_property
    def latent_schema(self) -> RowSchema:
        """The schema of a row of latents."""
        return RowSchema([self.manifest.latents])

    @cached_property
    def held_out(self) -> HeldOutRows | None:
        """The held-out rows in the artifact; None if it has none. The first call may take 60 ms.

        Raises:
            BadExhibitError: the exhibit is damaged.
        """
        return read_held_out(self.exhibits, self.manifest.latents)

    @cached_property
    def label_means(self) -> dict[str, LabelMean]:
        """The mean latents of labels, by name. The first call may take 60 ms. Raises BadExhibitError."""
        return read_label_means(self.exhibits, self.manifest.latents, self.held_out)

    @cached_property
    def row_bytes(self) -> int:
        """Size of one row, or of its window if the model has one, or of its latents, whichever is largest, in bytes."""
        window = self.manifest.window
        widest = max(self.manifest.width * (window.rows if window else 1), self.manifest.latents)
        return 4 * (widest + self.manifest.condition_width)

    @cached_property
    def selectors(self) -> FeatureSelectors:
        """The mapping from metric names and labels to features."""
        return FeatureSelectors({name: name for name in self.row_schema.names})

    @cached_property
    def picture_row(self) -> PictureRow | None:
        """The row that a PNG or JPEG body becomes; None if rows are not images."""
        if not self.has_png_output or self.manifest.pixel_range is None:
            return None
        return PictureRow(self.manifest.shape, self.manifest.pixel_range)

    @cached_property
    def has_observation_noise(self) -> bool:
        """Whether samples can include observation noise. Artifacts of earlier releases lack the method."""
        return hasattr(self.backend.module, "observe")

    @cached_property
    def scales_by_group(self) -> bool:
        """Whether the model sees rows in units of their group (`elbo train --scale-by-group`)."""
        return self.baseline is not None and self.baseline.features is not None

    @cached_property
    def completes_rows(self) -> bool:
        """Whether the model can estimate and draw the missing values of a row."""
        is_plain = self.conditions is None and not self.scales_by_group
        return is_plain and hasattr(self.backend.module, "impute")

    @cached_property
    def scores_gaps(self) -> bool:
        """Whether the model can score rows with missing values. For others, the scaling or medians replace them."""
        return hasattr(self.backend.module, "score_gaps")

    @cached_property
    def has_png_output(self) -> bool:
        """Whether outputs can be returned as image/png."""
        return png.is_image(self.manifest.shape, self.manifest.pixel_range)


def describe(served: ServedModel) -> dict[str, Any]:
    """Return the entry of `served` in GET /models: everything that a client must know before its first request."""
    manifest = served.manifest
    window = {} if manifest.window is None else {"window": manifest.window.model_dump()}
    return {
        "name": served.name,
        "version": served.version,
        "kind": manifest.kind,
        "created": manifest.created,
        "shape": manifest.shape,
        "width": manifest.width,
        "latents": manifest.latents,
        "parts": manifest.parts,
        "pixel_range": manifest.pixel_range,
        **window,
        "pictures": served.has_png_output,
        "completes_rows": served.completes_rows,
        "exhibits": [name.partition(".")[0] for name in served.exhibits if name != DIRECTIONS],
        "metrics": manifest.metrics,
        "warnings": manifest.warnings,
        "calibration": manifest.calibration.model_dump(),
        "device": str(served.backend.device),
        "backend": {
            "name": served.backend.name,
            "reason": served.selection.reason,
            "precision": served.backend.precision,
            "errors": dict(served.selection.errors),
        },
        "signed_by": None if served.signed_by is None else str(served.signed_by),
        "load_seconds": round(served.load_seconds, 3),
        "warm_seconds": round(served.warm_seconds, 3),
        **({"groups": len(manifest.groups)} if manifest.groups else {}),
        **({"season": manifest.season.model_dump()} if manifest.season else {}),
        **({"conditions": served.conditions.levels} if served.conditions else {}),
        **({"categories": served.columns.known} if served.columns else {}),
    }
