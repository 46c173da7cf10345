"""The versions of a model in the artifact folder: take the next number, and roll back. This module imports no torch.

A version number is used once, even if its version is removed, because clients and logs refer to `name@version`. The
folder `.versions` therefore has an empty file `<name>@<version>` for the highest number that each model has had. If the
artifact folder is not writable, this file is in the folder `.versions` of the model's folder.

A roll-back moves the newer versions into the folder `.withdrawn` of the model's folder. They can be restored.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from models.errors import ArtifactMissing, ArtifactUnwritable
from models.manifest import FILE_NAME, VERSION, model_folder, read_manifest, resolve, version_folder, versions

USED = ".versions"
WITHDRAWN = ".withdrawn"


@dataclass(frozen=True)
class RollBack:
    """What `roll_back` did.

    Args:
        version: the version that is now the newest.
        withdrawn: the versions that were withdrawn, ascending.
    """

    version: int
    withdrawn: list[int]


def next_version(root: Path, name: str) -> int:
    """Return the number of the next version of model `name`. No version of the model has had this number."""
    used = (path.name.rpartition("@")[2] for place in _records(root, name) for path in place.glob(f"{name}@*"))
    numbers = [int(number) for number in used if VERSION.fullmatch(number)]
    return max([0, *versions(root, name), *withdrawn_versions(root, name), *numbers]) + 1


def claim_version(
    staging: Path, root: Path, name: str, prepare: Callable[[Path, int], None] = lambda _staging, _version: None
) -> int:
    """Rename the folder `staging` to the next version of model `name`, and return its number.

    Concurrent callers get different numbers.

    Args:
        staging: a folder with the files of the version.
        root: the artifact folder.
        name: name of the model.
        prepare: called with `staging` and a number just before the folder may become the version with this number.

    Raises:
        OSError: the artifact folder is not writable.
    """
    version = next_version(root, name)
    while True:
        _record(root, name, version)  # first, so that a crash wastes a number but never frees one
        prepare(staging, version)
        try:
            staging.rename(version_folder(root, name, version))
        except OSError:
            if not (version_folder(root, name, version)).exists():
                raise
            version += 1  # another publisher has taken this version
        else:
            return version


def withdrawn_versions(root: Path, name: str) -> list[int]:
    """Return the withdrawn versions of model `name`, ascending."""
    found = (path.parent.name for path in (model_folder(root, name) / WITHDRAWN).glob(f"*/{FILE_NAME}"))
    return sorted(int(version) for version in found if VERSION.fullmatch(version))


def roll_back(root: Path, name: str, version: int | None = None) -> RollBack:
    """Make `version` of model `name` the newest one by withdrawing later versions. A withdrawn version is restored.

    Args:
        root: the artifact folder.
        name: name of the model.
        version: by default, the version before the newest one.

    Raises:
        ArtifactMissing: there is no such model or version.
        ArtifactError: the version is damaged, so nothing was changed.
        ArtifactUnwritable: this user may not change the folder.
    """
    present, withdrawn = versions(root, name), withdrawn_versions(root, name)
    if not present and not withdrawn:
        resolve(root, name)  # raises ArtifactMissing
    if version is None:
        if len(present) < 2:
            others = f"; withdrawn: {_listed(withdrawn)}" if withdrawn else ""
            raise ArtifactMissing(
                f"model {name!r} has no earlier version to roll back to (available: {_listed(present)}{others})"
            )
        version = present[-2]
    folder = model_folder(root, name)
    hidden = folder / WITHDRAWN
    restored = version not in present
    if restored and version not in withdrawn:
        available = _listed(sorted({*present, *withdrawn}))
        raise ArtifactMissing(f"model {name!r} has no version {version} (available: {available})")
    read_manifest((hidden if restored else folder) / str(version) / FILE_NAME)
    later = [number for number in present if number > version]
    with unwritable_as_artifact_error(folder):
        _record(root, name, next_version(root, name) - 1)
        if restored:
            (hidden / str(version)).rename(folder / str(version))
        for number in reversed(later):
            hidden.mkdir(exist_ok=True)
            (folder / str(number)).rename(hidden / str(number))
    return RollBack(version, later)


@contextmanager
def unwritable_as_artifact_error(folder: Path) -> Iterator[None]:
    """Turn an OSError into an ArtifactUnwritable that names `folder`."""
    try:
        yield
    except OSError as error:
        place = error.filename or folder  # a parent of `folder` may be at fault
        raise ArtifactUnwritable(
            f"cannot write to the artifact folder {folder} ({error.strerror}: {place}): free some space or change its "
            "permissions, or choose another artifact folder with --artifacts"
        ) from error


def _records(root: Path, name: str) -> tuple[Path, Path]:
    """Return the folders that may have the record of the highest number. The first one that is writable has it."""
    return root / USED, model_folder(root, name) / USED


def _record(root: Path, name: str, version: int) -> None:
    """Record that `version` is used. Creating a file is atomic, so concurrent callers cannot lower the number."""
    for place in _records(root, name):
        try:
            place.mkdir(exist_ok=True)
            (place / f"{name}@{version}").touch()
        except OSError as error:
            failure = error
            continue
        for path in place.glob(f"{name}@*"):
            number = path.name.rpartition("@")[2]
            if VERSION.fullmatch(number) and int(number) < version:
                with suppress(OSError):
                    path.unlink()
        return
    raise failure


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
