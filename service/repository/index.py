"""The index of a repository: which versions it has, with the size and the SHA-256 of each file.

`elbo-index.json` is at the root of the repository. `elbo push` writes it after the files that it names, so a reader
sees a version only when the version is complete. With an index, a server finds new versions with one small request.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import first_fault, printable
from models.manifest import FILE_NAME, NAME, VERSION
from models.signatures import MAX_SIGNATURE_BYTES, SIGNATURE_NAME
from service.repository.location import RepositoryInvalid

INDEX_NAME = "elbo-index.json"
INDEX_FORMAT = 1
MAX_INDEX_BYTES = 16 * 2**20  # about 70,000 versions
MAX_FILE_BYTES = 4 * 2**30 - 1  # as `models.archive_check`: no artifact is larger


class FileEntry(BaseModel):
    """One file of a version.

    Args:
        bytes: its size.
        sha256: the SHA-256 of the file; None if the repository has no index.
        tag: a text that changes whenever the content changes, such as an ETag; None if the entry is from an index.
    """

    model_config = ConfigDict(frozen=True)

    bytes: int = Field(ge=1, le=MAX_FILE_BYTES)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    tag: str | None = None


class VersionEntry(BaseModel):
    """One version of a model: the artifact, and its signature if it has one."""

    model_config = ConfigDict(frozen=True)

    model: FileEntry
    signature: FileEntry | None = None


Entries = dict[str, dict[int, VersionEntry]]


@dataclass(frozen=True)
class VersionName:
    """A name and a version of a model. Both are valid as names of folders."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def files(self) -> tuple[str, str]:
        """The paths of the artifact and of its signature in the repository."""
        return f"{self.name}/{self.version}/{FILE_NAME}", f"{self.name}/{self.version}/{SIGNATURE_NAME}"


def parse_index(content: bytes, source: str) -> Entries:
    """Return the versions by name and number that the index `content` lists, with the numbers ascending.

    Args:
        content: the bytes of the index.
        source: the name of the repository, for messages.

    Raises:
        RepositoryInvalid: the index is damaged, of a later release, or has a name or a version that no model can have.
    """
    place = f"{source}/{INDEX_NAME}"
    try:
        document = json.loads(content)
        models = document["models"]
        if document["format"] != INDEX_FORMAT:
            raise RepositoryInvalid(
                f"{place} has format {printable(str(document['format']))[:20]}, this release reads {INDEX_FORMAT}: "
                "install a later release of Elbo"
            )
        return {name: dict(sorted(_versions(name, versions, place))) for name, versions in sorted(models.items())}
    except ValidationError as error:
        fault = first_fault(error)
        raise RepositoryInvalid(
            f"{place} is damaged ({'.'.join(fault.path)}: {fault.message}): write it again with elbo index"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RepositoryInvalid(f"{place} is damaged: write it again with elbo index") from error


def _versions(name: str, versions: Mapping[str, Any], place: str) -> Iterator[tuple[int, VersionEntry]]:
    for version, fields in versions.items():
        if not NAME.fullmatch(name) or not VERSION.fullmatch(version):
            raise RepositoryInvalid(
                f"{place} names {printable(f'{name}/{version}')[:100]!r}, which is no name and version of a model: the "
                "index was not written by elbo push; write it again with elbo index"
            )
        entry = VersionEntry.model_validate(fields)
        if entry.signature and entry.signature.bytes > MAX_SIGNATURE_BYTES:
            raise RepositoryInvalid(
                f"{place}: the signature of {name}@{version} has {entry.signature.bytes:,} bytes, expected at most "
                f"{MAX_SIGNATURE_BYTES:,}: sign the version again"
            )
        yield int(version), entry


def render_index(entries: Entries) -> bytes:
    """Return the bytes of the index of `entries`.

    Raises:
        RepositoryInvalid: the index would be larger than readers accept.
    """
    models = {
        name: {str(version): entry.model_dump(exclude_none=True) for version, entry in sorted(versions.items())}
        for name, versions in sorted(entries.items())
        if versions
    }
    content = (json.dumps({"format": INDEX_FORMAT, "models": models}, indent=1) + "\n").encode()
    if len(content) > MAX_INDEX_BYTES:
        raise RepositoryInvalid(
            f"the index of {sum(map(len, models.values())):,} versions would have {len(content):,} bytes, and readers "
            f"accept {MAX_INDEX_BYTES:,}: remove old versions from the repository, then run elbo index on it"
        )
    return content


def entries_of(files: Mapping[str, FileEntry]) -> Entries:
    """Return the versions among `files`, the files of a repository by their paths from its root. Ignore other files."""
    found: Entries = {}
    for path, entry in sorted(files.items()):
        name, _, rest = path.partition("/")
        version, _, file = rest.partition("/")
        if file == FILE_NAME and NAME.fullmatch(name) and VERSION.fullmatch(version):
            signature = files.get(VersionName(name, int(version)).files[1])
            found.setdefault(name, {})[int(version)] = VersionEntry(model=entry, signature=signature)
    return {name: dict(sorted(versions.items())) for name, versions in found.items()}
