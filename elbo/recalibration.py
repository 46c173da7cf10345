"""Recalibrate a model that is in memory."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from models import artifact
from models.manifest import read_sealed
from training.data.readers import InMemory
from training.data.table import read_for_model
from training.publishing.recalibrate import recalibrate


def recalibrated(
    content: bytes, name: str, source: str | InMemory, normal: Sequence[str], alpha: float, *, force: bool
) -> tuple[bytes, list[str]]:
    """Return the artifact in `content`, calibrated on the normal rows of `source`, and notes. See `Model.calibrate`.

    `recalibrate` reads and writes an artifact folder. A temporary one is used, and the result is loaded from it.
    """
    with tempfile.TemporaryDirectory(prefix="elbo-") as folder:
        root = Path(folder)
        parent = artifact.load(artifact.publish_content(content, name, root))
        table = read_for_model(source, parent.manifest, normal=list(normal))
        done = recalibrate(parent, table, root, alpha, force=force)
        return read_sealed(done.path), list(dict.fromkeys([*table.notes, *done.notes]))
