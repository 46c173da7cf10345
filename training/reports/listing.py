"""`elbo list`: the versions in the artifact folder, as a table or as JSON. Needs no torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from models.errors import ArtifactUnreadable, ArtifactUntrusted, ElboError
from models.manifest import FILE_NAME, folders, model_folder, parse, read_sealed, version_folder, versions
from models.signatures import TrustedKeys
from models.versions import WITHDRAWN, withdrawn_versions


@dataclass(frozen=True)
class ListedVersion:
    """One version of a model. The fields from `kind` on are None if the artifact cannot be read."""

    name: str
    version: int | None  # None if the folder of the model cannot be read
    status: str  # newest (requests for the name get this version), older, withdrawn, damaged, or untrusted
    path: str
    kind: str | None = None
    created: str | None = None
    features: int | None = None
    rows: int | None = None  # rows of the training data
    error: str | None = None  # why the artifact cannot be read or is not trusted
    signed_by: str | None = None  # the trusted key that has signed the artifact; None if no keys were given


def list_versions(root: Path, keys: TrustedKeys | None = None) -> list[ListedVersion]:
    """Return all versions under `root`, sorted by name, newest version first. Withdrawn versions are included.

    With `keys`, a version that none of these keys has signed is untrusted.
    """
    found = []
    for name in folders(root) if root.exists() else []:
        try:
            present = [(version, version_folder(root, name, version)) for version in versions(root, name)]
        except ArtifactUnreadable as error:
            found.append(ListedVersion(name, None, "damaged", str(model_folder(root, name)), error=str(error)))
            continue
        withdrawn = [
            (version, model_folder(root, name) / WITHDRAWN / str(version)) for version in withdrawn_versions(root, name)
        ]
        newest = max(present, default=(0, root))[0]
        for version, folder in sorted(present + withdrawn, reverse=True):
            status = "newest" if version == newest else "older"
            if (version, folder) in withdrawn:
                status = "withdrawn"
            found.append(_read(name, version, status, folder / FILE_NAME, keys))
    return found


def _read(name: str, version: int, status: str, path: Path, keys: TrustedKeys | None) -> ListedVersion:
    try:
        content = read_sealed(path)
        signed_by = None if keys is None else str(keys.verify(content, path, name, version))
        manifest = parse(content, path)
    except ArtifactUntrusted as error:
        return ListedVersion(name, version, "untrusted", str(path), error=" ".join(str(error).split()))
    except (ElboError, OSError) as error:
        return ListedVersion(name, version, "damaged", str(path), error=" ".join(str(error).split()))
    return ListedVersion(
        name=name,
        version=version,
        status=status,
        path=str(path),
        kind=manifest.kind,
        created=manifest.created,
        features=manifest.width,
        rows=manifest.data.rows,
        signed_by=signed_by,
    )


def listing_json(found: list[ListedVersion]) -> str:
    """Return the versions as a JSON list."""
    return json.dumps([asdict(version) for version in found], indent=2)


def _reference(each: ListedVersion) -> str:
    return each.name if each.version is None else f"{each.name}@{each.version}"


def listing_text(found: list[ListedVersion]) -> str:
    """Return the versions as a table, followed by the reasons why artifacts are damaged or untrusted."""
    table = [("model", "kind", "status", "written", "features", "rows")]
    for each in found:
        features, rows = (f"{number:,}" if number is not None else "-" for number in (each.features, each.rows))
        table.append((_reference(each), each.kind or "-", each.status, each.created or "-", features, rows))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for *words, features, rows in table:
        padded = [word.ljust(width) for word, width in zip(words, widths, strict=False)]
        lines.append("  ".join([*padded, features.rjust(widths[-2]), rows.rjust(widths[-1])]))
    return "\n".join(lines + [f"{_reference(each)}: {each.error}" for each in found if each.error])
