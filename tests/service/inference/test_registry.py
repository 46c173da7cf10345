"""The registry on real folders: artifacts are added, replaced, damaged and removed."""

import logging
import os
import shutil
from pathlib import Path

import pytest

from models.signatures import TrustedKeys
from service.errors import ModelNotFound, NotReady
from service.inference.model_loader import ModelLoader
from service.inference.registry import ModelRegistry
from service.inference.served_model import ServedModel


def publish(artifacts: Path, root: Path, name: str = "vae", version: int = 1) -> Path:
    """Copy the artifact of the test session to `name`@`version` under `root`; return its path."""
    path = root / name / str(version) / "model.pt"
    path.parent.mkdir(parents=True)
    shutil.copy(artifacts / "vae" / "1" / "model.pt", path)
    return path


def create_registry(root: Path, keep_versions: int = 2) -> ModelRegistry:
    return ModelRegistry(root, ModelLoader(), default_model="vae", keep_versions=keep_versions)


class CountingLoader(ModelLoader):
    """A loader that counts its calls."""

    loads = 0

    def load(
        self, path: Path, name: str, version: int, keys: TrustedKeys | None = None, next_path: Path | None = None
    ) -> ServedModel:
        self.loads += 1
        return super().load(path, name, version, keys, next_path)


def served(registry: ModelRegistry) -> list[str]:
    return [f"{name}@{version}" for name, numbers in registry.catalogue.models.items() for version in numbers]


def test_find_raises_not_ready_with_advice_if_the_folder_is_absent(tmp_path: Path) -> None:
    registry = create_registry(tmp_path / "absent")
    registry.refresh()
    with pytest.raises(NotReady) as caught:
        registry.catalogue.find(None)
    assert "elbo demo" in str(caught.value.hint)


def test_find_returns_the_newest_version_or_the_requested_one(artifacts: Path, tmp_path: Path) -> None:
    for version in (1, 2, 10):
        publish(artifacts, tmp_path, version=version)
    registry = create_registry(tmp_path)
    registry.refresh()
    assert served(registry) == ["vae@2", "vae@10"]
    assert registry.catalogue.find("vae").version == 10
    assert registry.catalogue.find("vae@2").version == 2
    assert registry.catalogue.find(None).version == 10


@pytest.mark.parametrize("reference", ["vae@1", "vae@3", "vae@02", "vae@", "unknown", "", "@2", "vae@2@2", "../vae"])
def test_find_raises_an_error_that_lists_the_served_models_if_the_reference_is_unknown(
    artifacts: Path, tmp_path: Path, reference: str
) -> None:
    publish(artifacts, tmp_path, version=2)
    registry = create_registry(tmp_path)
    registry.refresh()
    if reference == "vae@":
        assert registry.catalogue.find(reference).version == 2
        return
    with pytest.raises(ModelNotFound) as caught:
        registry.catalogue.find(reference)
    assert caught.value.expected == "one of vae@2"


def test_find_returns_the_first_model_by_name_if_the_default_model_is_absent(artifacts: Path, tmp_path: Path) -> None:
    publish(artifacts, tmp_path, name="zebra")
    publish(artifacts, tmp_path, name="apple")
    registry = create_registry(tmp_path)
    registry.refresh()
    assert registry.catalogue.find(None).name == "apple"


def test_model_in_a_renamed_folder_is_served_under_the_name_of_the_folder(artifacts: Path, tmp_path: Path) -> None:
    publish(artifacts, tmp_path, name="other")
    registry = create_registry(tmp_path)
    registry.refresh()
    assert registry.catalogue.find("other").name == "other"


def test_bad_new_version_is_logged_once_and_the_old_version_stays_served(
    artifacts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(artifacts, tmp_path)
    registry = create_registry(tmp_path)
    registry.refresh()
    first = registry.catalogue.find("vae")
    bad = publish(artifacts, tmp_path, version=2)
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    for _ in range(3):
        registry.refresh()
    assert registry.catalogue.find("vae") is first
    (failure,) = registry.catalogue.failures
    assert (failure.name, failure.version, failure.code) == ("vae", 2, "artifact_corrupt")
    assert sum("failed to load vae@2" in record.message for record in caplog.records) == 1


def test_half_copied_file_is_served_as_soon_as_it_is_complete(artifacts: Path, tmp_path: Path) -> None:
    path = publish(artifacts, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    registry = create_registry(tmp_path)
    registry.refresh()
    assert served(registry) == []
    assert len(registry.catalogue.failures) == 1
    path.write_bytes(whole)
    registry.refresh()
    assert served(registry) == ["vae@1"]
    assert not registry.catalogue.failures


def with_flipped_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_failed_version_is_loaded_when_its_content_is_repaired_with_the_same_size_and_modification_time(
    artifacts: Path, tmp_path: Path
) -> None:
    path = publish(artifacts, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(with_flipped_bit(whole))
    os.utime(path, (1e9, 1e9))
    registry = create_registry(tmp_path)
    registry.refresh()
    assert served(registry) == []
    with path.open("r+b") as file:
        file.write(whole)
    os.utime(path, (1e9, 1e9))
    registry.refresh()
    assert served(registry) == ["vae@1"]


@pytest.mark.parametrize("change", ["nothing", "mode", "owner", "modification time", "folder", "model folder", "read"])
def test_failed_version_is_loaded_and_logged_again_only_after_its_file_or_its_permissions_change(
    artifacts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    path = publish(artifacts, tmp_path)
    path.write_bytes(with_flipped_bit(path.read_bytes()))
    loader = CountingLoader()
    registry = ModelRegistry(tmp_path, loader, default_model="vae", keep_versions=2)
    for _ in range(3):
        registry.refresh()
    assert loader.loads == 1
    match change:
        case "mode":
            path.chmod(0o600)
        case "owner":
            os.chown(path, os.getuid(), os.getgid())
        case "modification time":
            path.touch()
        case "folder":
            path.parent.chmod(0o700)
        case "model folder":
            path.parents[1].chmod(0o700)
        case "read":
            path.read_bytes()
    for _ in range(3):
        registry.refresh()
    expected = 1 if change in ("nothing", "read") else 2
    assert loader.loads == expected
    assert sum("failed to load vae@1" in record.message for record in caplog.records) == expected


@pytest.mark.parametrize("change", ["mode", "hard link", "folder"])
def test_loaded_version_is_not_loaded_again_when_only_its_permissions_change(
    artifacts: Path, tmp_path: Path, change: str
) -> None:
    path = publish(artifacts, tmp_path)
    loader = CountingLoader()
    registry = ModelRegistry(tmp_path, loader, default_model="vae", keep_versions=2)
    registry.refresh()
    match change:
        case "mode":
            path.chmod(0o600)
        case "hard link":
            (tmp_path / "copy").hardlink_to(path)
        case "folder":
            path.parent.chmod(0o700)
    registry.refresh()
    assert (loader.loads, served(registry)) == (1, ["vae@1"])


def test_unchanged_file_is_not_loaded_again(artifacts: Path, tmp_path: Path) -> None:
    publish(artifacts, tmp_path)
    registry = create_registry(tmp_path)
    registry.refresh()
    first = registry.catalogue.find("vae")
    registry.refresh()
    assert registry.catalogue.find("vae") is first


def test_replaced_file_is_loaded_again(artifacts: Path, tmp_path: Path) -> None:
    path = publish(artifacts, tmp_path)
    registry = create_registry(tmp_path)
    registry.refresh()
    first = registry.catalogue.find("vae")
    spare = tmp_path / "spare"
    shutil.copy(path, spare)
    spare.replace(path)
    registry.refresh()
    assert registry.catalogue.find("vae") is not first


def test_model_stays_served_when_its_file_is_overwritten_with_garbage(artifacts: Path, tmp_path: Path) -> None:
    path = publish(artifacts, tmp_path)
    registry = create_registry(tmp_path)
    registry.refresh()
    first = registry.catalogue.find("vae")
    path.write_bytes(b"nonsense")
    registry.refresh()
    assert registry.catalogue.find("vae") is first
    assert len(registry.catalogue.failures) == 1


def test_removed_versions_and_models_are_no_longer_served(artifacts: Path, tmp_path: Path) -> None:
    publish(artifacts, tmp_path)
    publish(artifacts, tmp_path, version=2)
    publish(artifacts, tmp_path, name="other")
    registry = create_registry(tmp_path)
    registry.refresh()
    assert served(registry) == ["other@1", "vae@1", "vae@2"]
    shutil.rmtree(tmp_path / "vae" / "2")
    shutil.rmtree(tmp_path / "other")
    registry.refresh()
    assert served(registry) == ["vae@1"]
    assert registry.catalogue.find(None).version == 1


class LateLoader(ModelLoader):
    """A loader that finds the first version replaced by the next one whenever it begins to load."""

    replacements = 3

    def load(
        self, path: Path, name: str, version: int, keys: TrustedKeys | None = None, next_path: Path | None = None
    ) -> ServedModel:
        if self.replacements:
            self.replacements -= 1
            path.parent.rename(path.parent.with_name(str(version + 1)))
        return super().load(path, name, version, keys, next_path)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_model_whose_versions_are_replaced_faster_than_they_load_stays_served(
    artifacts: Path, tmp_path: Path, is_loaded: bool
) -> None:
    path = publish(artifacts, tmp_path)
    registry = ModelRegistry(tmp_path, loader := LateLoader(), default_model="vae", keep_versions=2)
    if is_loaded:
        loader.replacements = 0
        registry.refresh()
        path.parent.rename(tmp_path / "vae" / "2")
        loader.replacements = 3
    registry.refresh()
    assert served(registry) == ["vae@5" if is_loaded else "vae@4"]
    assert registry.catalogue.failures == ()


def test_limit_on_kept_versions_counts_only_versions_that_load(artifacts: Path, tmp_path: Path) -> None:
    for version in (1, 2, 3, 4):
        path = publish(artifacts, tmp_path, version=version)
    path.write_bytes(b"PK")
    registry = create_registry(tmp_path, keep_versions=2)
    registry.refresh()
    assert served(registry) == ["vae@2", "vae@3"]


def test_other_files_in_the_artifact_folder_are_ignored(artifacts: Path, tmp_path: Path) -> None:
    publish(artifacts, tmp_path)
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "vae" / ".staging-x").mkdir()
    (tmp_path / "vae" / "latest").mkdir()
    (tmp_path / "vae" / "7").mkdir()
    (tmp_path / "vae" / "8").symlink_to("nowhere")
    registry = create_registry(tmp_path)
    registry.refresh()
    assert served(registry) == ["vae@1"]
    assert not registry.catalogue.failures


def unreadable_path(root: Path, kind: str) -> Path:
    """Return the path at which a symbolic link to itself makes one part of the model `bad` unreadable."""
    path = {"folder": root / "bad", "version": root / "bad" / "1", "file": root / "bad" / "1" / "model.pt"}[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize(("kind", "version"), [("folder", None), ("version", 1), ("file", 1)])
def test_model_that_cannot_be_read_is_a_failure_and_does_not_affect_other_models(
    artifacts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, version: int | None
) -> None:
    publish(artifacts, tmp_path)
    path = unreadable_path(tmp_path, kind)
    path.symlink_to(path)
    registry = create_registry(tmp_path)
    for _ in range(3):
        registry.refresh()
    assert served(registry) == ["vae@1"]
    (failure,) = registry.catalogue.failures
    assert (failure.name, failure.version, failure.code) == ("bad", version, "artifact_unreadable")
    assert "Too many levels of symbolic links" in failure.detail
    assert sum("failed to load bad" in record.message for record in caplog.records) == 1
    publish(artifacts, tmp_path, version=2)
    registry.refresh()
    assert served(registry) == ["vae@1", "vae@2"]
    path.unlink()
    registry.refresh()
    assert not registry.catalogue.failures


@pytest.mark.parametrize("kind", ["folder", "version", "file"])
def test_loaded_model_stays_served_while_it_cannot_be_read(artifacts: Path, tmp_path: Path, kind: str) -> None:
    publish(artifacts, tmp_path, name="bad")
    registry = create_registry(tmp_path)
    registry.refresh()
    first = registry.catalogue.find("bad")
    path = unreadable_path(tmp_path, kind)
    path.rename(tmp_path / ".away")
    path.symlink_to(path)
    registry.refresh()
    assert registry.catalogue.find("bad") is first
    assert [failure.name for failure in registry.catalogue.failures] == ["bad"]
    path.unlink()
    (tmp_path / ".away").rename(path)
    registry.refresh()
    assert registry.catalogue.find("bad").name == "bad"
    assert not registry.catalogue.failures


@pytest.mark.parametrize("replacement", ["nothing", "empty folder", "file", "symbolic link to itself"])
def test_loaded_models_stay_served_while_the_artifact_folder_is_missing(
    artifacts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, replacement: str
) -> None:
    caplog.set_level(logging.INFO)
    root = tmp_path / "artifacts"
    publish(artifacts, root)
    registry = create_registry(root)
    registry.refresh()
    first = registry.catalogue.find(None)
    root.rename(tmp_path / "away")
    if replacement == "empty folder":
        root.mkdir()
    elif replacement == "file":
        root.write_text("")
    elif replacement != "nothing":
        root.symlink_to(root)
    for _ in range(3):
        registry.refresh()
    assert registry.catalogue.find(None) is first
    (failure,) = registry.catalogue.failures
    assert (failure.name, failure.version, failure.code) == (None, None, "artifact_unreadable")
    assert str(root) in failure.detail
    assert "the loaded models stay served" in failure.detail
    assert sum("cannot read the artifact folder" in record.message for record in caplog.records) == 1
    if replacement == "empty folder":
        root.rmdir()
    elif replacement != "nothing":
        root.unlink()
    (tmp_path / "away").rename(root)
    registry.refresh()
    assert registry.catalogue.find(None) is first
    assert not registry.catalogue.failures


def test_models_stay_served_until_a_recreated_artifact_folder_has_a_model(artifacts: Path, tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    publish(artifacts, root)
    publish(artifacts, root, name="other")
    registry = create_registry(root)
    registry.refresh()
    shutil.rmtree(root)
    registry.refresh()
    root.mkdir()
    registry.refresh()
    assert served(registry) == ["other@1", "vae@1"]
    publish(artifacts, root, version=2)
    registry.refresh()
    assert served(registry) == ["vae@2"]
    assert not registry.catalogue.failures


def test_artifact_folder_that_cannot_be_read_at_start_is_a_failure(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    root.symlink_to(root)
    registry = create_registry(root)
    registry.refresh()
    assert [failure.name for failure in registry.catalogue.failures] == [None]
    with pytest.raises(NotReady) as caught:
        registry.catalogue.find(None)
    assert "failures" in str(caught.value.hint)
