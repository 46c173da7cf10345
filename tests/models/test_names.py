"""Names and versions of models cannot lead out of the artifact folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from models import artifact
from models.errors import ArtifactError, ArtifactNameInvalid
from models.manifest import resolve, version_folder
from models.versions import WITHDRAWN, claim_version, next_version, roll_back, withdrawn_versions
from tests.models.builders import batch, manifest, pipeline
from tests.models.publishing import publish

NAMES = (
    "../escaped",
    "../../escaped",
    "/var/tmp/escaped",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    ".hidden",
    "a\n",
    "a" * 65,
    "ä",
)


def _publish(root: Path, name: str) -> object:
    model = pipeline("pca")
    module = artifact.script(model)
    description = manifest("model", artifact.weights_sha256(model), artifact.record_golden(module, *batch()))
    return artifact.publish(module, description.model_copy(update={"name": name}), root)


USES: dict[str, Callable[[Path, str], object]] = {
    "publish": _publish,
    "require_writable": artifact.require_writable,
    "next_version": next_version,
    "claim_version": lambda root, name: claim_version(root, root, name),
    "withdrawn_versions": withdrawn_versions,
    "roll_back": roll_back,
    "version_folder": lambda root, name: version_folder(root, name, 1),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use", USES)
def test_name_that_leads_out_of_the_artifact_folder_is_refused_and_nothing_is_written(
    use: str, name: str, tmp_path: Path
) -> None:
    root = tmp_path / "deep" / "artifacts"
    root.mkdir(parents=True)
    with pytest.raises(ArtifactNameInvalid, match="is no name of a model"):
        USES[use](root, name)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "deep", root]


@pytest.mark.parametrize("version", [0, -1, 10**9])
def test_version_below_1_or_above_999_999_999_is_refused(version: int, tmp_path: Path) -> None:
    with pytest.raises(ArtifactNameInvalid, match="is no version of a model"):
        version_folder(tmp_path, "model", version)


@pytest.mark.parametrize("name", NAMES)
def test_resolve_refuses_a_name_that_leads_out_of_the_artifact_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        resolve(tmp_path, name)


def test_roll_back_does_not_restore_a_version_outside_of_the_artifact_folder(tmp_path: Path) -> None:
    outside = publish(tmp_path, name="outside").parent
    withdrawn = tmp_path / "outside" / WITHDRAWN
    withdrawn.mkdir()
    outside.rename(withdrawn / "1")
    (tmp_path / "artifacts").mkdir()
    with pytest.raises(ArtifactNameInvalid):
        roll_back(tmp_path / "artifacts", "../outside", 1)
    assert (withdrawn / "1" / "model.pt").exists()
