"""Publish a model that is in memory as the next version of its name."""

import re
from pathlib import Path

from models import artifact
from models.artifact import Artifact
from models.keys import PrivateKey
from models.manifest import Manifest
from training.publishing.compatibility import refuse_other_manifest


def save(
    content: bytes,
    loaded: Artifact,
    artifacts: Path,
    name: str,
    key: PrivateKey | None,
    *,
    replace_features: bool = False,
) -> Path:
    """Write the artifact as the next version of `name` under `artifacts`. Return its path.

    Args:
        content: the bytes of the artifact.
        loaded: the artifact.
        artifacts: the artifact folder.
        name: the name, which may differ from that in the manifest.
        key: signs the version.
        replace_features: publish even if the newest version of this name has other features.

    Raises:
        ArtifactUnwritable: the disk is full, or this user may not write to the folder.
        ArtifactNameInvalid: the name is not valid.
        DataError: the newest version of this name has other features, and `replace_features` is false.
    """
    if not replace_features:
        refuse_other_manifest(loaded.manifest, artifacts, name)
    if name != loaded.manifest.name:
        manifest = Manifest.model_validate(loaded.manifest.model_dump() | {"name": name})
        exhibits = artifact.read_exhibits(content, loaded.path)
        if artifact.CARD in exhibits:
            exhibits[artifact.CARD] = _renamed(exhibits[artifact.CARD], loaded.manifest.name, name)
        twin = None if loaded.twin is None else loaded.twin.graphs
        content = artifact.archive(artifact.thaw_content(content), manifest, twin, exhibits)
    return artifact.publish_content(content, name, artifacts, key)


def _renamed(card: bytes, old: str, new: str) -> bytes:
    """Return a model card with another name of the model in its title and in its commands."""
    text = re.sub(rf"\A# {re.escape(old)}(?![\w.-])", lambda _: f"# {new}", card.decode())
    return re.sub(rf"--name {re.escape(old)}(?![\w.-])", lambda _: f"--name {new}", text).encode()
