"""Artifact folders with small sealed files, for tests of repositories that load no model."""

from pathlib import Path

from models.manifest import FILE_NAME, SEAL, seal
from service.repository.copying import FolderRepository


def sealed(text: str) -> bytes:
    """Return bytes with a valid seal. They are no artifact, but nothing in a repository loads them."""
    return seal(b"PK" + text.encode() * 50 + SEAL + b"0" * 64)


def add_version(root: Path, name: str, version: int, text: str | None = None) -> Path:
    """Write `name`@`version` into the artifact folder `root`. Return its path."""
    path = root / name / str(version) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sealed(text or f"{name} {version}"))
    return path


def write_index(root: Path) -> None:
    """Write the index of the artifact folder `root`."""
    FolderRepository(root, has_index=True).write_index({})


def files_in(folder: Path) -> list[str]:
    """Return the paths of the files in `folder` from there, without the lock and the failures of a mirror."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not path.startswith(".mirror"))
