"""Compare the features of training data with those of the version that is served under the same name."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from models.errors import ArtifactError, join_names
from models.manifest import FILE_NAME, Manifest, read_manifest, version_folder, versions
from training.data.layout import PIXEL_RANGES
from training.data.table import Table
from training.errors import DataError

ON_COMMAND_LINE = "choose another --name, or add --replace-features"
IN_PYTHON = "choose another name, or set replace_features"


def refuse_other_features(table: Table, root: Path, name: str, advice: str = ON_COMMAND_LINE) -> None:
    """Check that a model trained on `table` takes the same rows as the newest readable version of model `name`.

    Args:
        table: training data.
        root: artifact folder.
        name: name of the model.
        advice: what to do if the features differ.

    Raises:
        DataError: clients that send rows to `name` would get errors or wrong responses.
    """
    _refuse(Rows(table.source, list(table.shape), table.names, table.units, table.pixel_range), root, name, advice)


def refuse_other_manifest(manifest: Manifest, root: Path, name: str) -> None:
    """Check that the model of `manifest` takes the same rows as the newest readable version of model `name`.

    Raises:
        DataError: clients that send rows to `name` would get errors or wrong responses.
    """
    names, units = [each.name for each in manifest.features], [each.unit for each in manifest.features]
    rows = Rows("the model", manifest.shape, names, units, manifest.pixel_range)
    _refuse(rows, root, name, IN_PYTHON)


class Rows(NamedTuple):
    """The rows that a model takes."""

    source: str
    shape: Sequence[int]
    names: Sequence[str]
    units: Sequence[str | None]
    pixel_range: tuple[float, float] | None


def _refuse(table: Rows, root: Path, name: str, advice: str) -> None:
    for version in reversed(versions(root, name)):
        try:
            manifest = read_manifest(version_folder(root, name, version) / FILE_NAME)
        except ArtifactError:
            continue
        if differences := "; ".join(_differences(manifest, table)):
            raise DataError(
                f"{table.source} has other features than {name}@{version} ({differences}), so requests to {name!r} "
                f"would fail or get wrong responses: {advice}"
            )
        return


def _differences(manifest: Manifest, table: Rows) -> Iterator[str]:
    old, new = [feature.name for feature in manifest.features], list(table.names)
    if list(table.shape) != manifest.shape and (len(table.shape) > 1 or len(manifest.shape) > 1):
        yield f"rows have the shape {list(table.shape)} instead of {manifest.shape}"
        return
    if absent := [name for name in old if name not in set(new)]:
        yield f"it lacks {join_names(absent)}"
    if added := [name for name in new if name not in set(old)]:
        yield f"it adds {join_names(added)}"
    if not absent and not added and old != new:
        yield f"they are in another order: {join_names(new)} instead of {join_names(old)}"
    old_units = {feature.name: feature.unit for feature in manifest.features}
    for name, unit in zip(new, table.units, strict=True):
        if (old_unit := old_units.get(name)) and unit and old_unit != unit:
            yield f"{name} is in {unit} instead of {old_unit}"
    # Other ranges are guesses from the values, which differ from one file to the next.
    if manifest.pixel_range != table.pixel_range and {manifest.pixel_range, table.pixel_range} <= {*PIXEL_RANGES, None}:
        yield f"pixels have the range {table.pixel_range} instead of {manifest.pixel_range}"
