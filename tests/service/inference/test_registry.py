"""The registry on real folders: what is published appears, what is bad does no harm, what is removed goes."""

import shutil
from pathlib import Path

import pytest

from service.errors import ModelNotFound, NotReady
from service.inference.registry import ModelRegistry


def publish(artifacts: Path, root: Path, name: str = "vae", version: int = 1) -> Path:
    """A copy of the session's model as `name`@`version` under `root`, as a person would make it."""
    path = root / name / str(version) / "model.pt"
    path.parent.mkdir(parents=True)
    shutil.copy(artifacts / "vae" / "1" / "model.pt", path)
    return path


def registry(root: Path, keep: int = 2) -> ModelRegistry:
    return ModelRegistry(root, "cpu", "vae", keep)


def served(repo: ModelRegistry) -> list[str]:
    return [f"{name}@{version}" for name, numbers in repo.catalogue.models.items() for version in numbers]


def test_an_empty_or_absent_folder_is_not_ready_and_says_what_to_do(tmp_path: Path) -> None:
    repo = registry(tmp_path / "absent")
    repo.refresh()
    with pytest.raises(NotReady) as caught:
        repo.catalogue.find(None)
    assert "elbo demo" in str(caught.value.hint)


def test_the_newest_version_answers_and_older_ones_by_number(artifacts: Path, tmp_path: Path) -> None:
    for version in (1, 2, 10):
        publish(artifacts, tmp_path, version=version)
    repo = registry(tmp_path)
    repo.refresh()
    assert served(repo) == ["vae@2", "vae@10"]
    assert repo.catalogue.find("vae").version == 10
    assert repo.catalogue.find("vae@2").version == 2
    assert repo.catalogue.find(None).version == 10


@pytest.mark.parametrize("reference", ["vae@1", "vae@3", "vae@02", "vae@", "nobody", "", "@2", "vae@2@2", "../vae"])
def test_what_is_not_served_is_not_found_and_the_answer_lists_what_is(
    artifacts: Path, tmp_path: Path, reference: str
) -> None:
    publish(artifacts, tmp_path, version=2)
    repo = registry(tmp_path)
    repo.refresh()
    if reference == "vae@":
        assert repo.catalogue.find(reference).version == 2
        return
    with pytest.raises(ModelNotFound) as caught:
        repo.catalogue.find(reference)
    assert caught.value.expected == "one of vae@2"


def test_without_the_default_the_first_by_name_answers(artifacts: Path, tmp_path: Path) -> None:
    publish(artifacts, tmp_path, name="zebra")
    publish(artifacts, tmp_path, name="apple")
    repo = registry(tmp_path)
    repo.refresh()
    assert repo.catalogue.find(None).name == "apple"


def test_a_folder_may_rename_a_model(artifacts: Path, tmp_path: Path) -> None:
    publish(artifacts, tmp_path, name="other")
    repo = registry(tmp_path)
    repo.refresh()
    assert repo.catalogue.find("other").name == "other"


def test_a_bad_version_leaves_the_old_one_serving_and_is_told_once(
    artifacts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(artifacts, tmp_path)
    repo = registry(tmp_path)
    repo.refresh()
    first = repo.catalogue.find("vae")
    bad = publish(artifacts, tmp_path, version=2)
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    for _ in range(3):
        repo.refresh()
    assert repo.catalogue.find("vae") is first
    (failure,) = repo.catalogue.failures
    assert (failure.name, failure.version, failure.code) == ("vae", 2, "artifact_corrupt")
    assert sum("vae@2 cannot be served" in record.message for record in caplog.records) == 1


def test_a_half_copied_file_is_served_when_the_rest_has_come(artifacts: Path, tmp_path: Path) -> None:
    path = publish(artifacts, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    repo = registry(tmp_path)
    repo.refresh()
    assert served(repo) == []
    assert len(repo.catalogue.failures) == 1
    path.write_bytes(whole)
    repo.refresh()
    assert served(repo) == ["vae@1"]
    assert not repo.catalogue.failures


def test_what_does_not_change_is_not_loaded_again(artifacts: Path, tmp_path: Path) -> None:
    publish(artifacts, tmp_path)
    repo = registry(tmp_path)
    repo.refresh()
    first = repo.catalogue.find("vae")
    repo.refresh()
    assert repo.catalogue.find("vae") is first


def test_a_file_that_is_replaced_is_loaded_again(artifacts: Path, tmp_path: Path) -> None:
    path = publish(artifacts, tmp_path)
    repo = registry(tmp_path)
    repo.refresh()
    first = repo.catalogue.find("vae")
    spare = tmp_path / "spare"
    shutil.copy(path, spare)
    spare.replace(path)
    repo.refresh()
    assert repo.catalogue.find("vae") is not first


def test_a_file_that_is_spoilt_leaves_its_loaded_self_serving(artifacts: Path, tmp_path: Path) -> None:
    path = publish(artifacts, tmp_path)
    repo = registry(tmp_path)
    repo.refresh()
    first = repo.catalogue.find("vae")
    path.write_bytes(b"nonsense")
    repo.refresh()
    assert repo.catalogue.find("vae") is first
    assert len(repo.catalogue.failures) == 1


def test_a_removed_version_goes_and_a_removed_model_too(artifacts: Path, tmp_path: Path) -> None:
    publish(artifacts, tmp_path)
    publish(artifacts, tmp_path, version=2)
    publish(artifacts, tmp_path, name="other")
    repo = registry(tmp_path)
    repo.refresh()
    assert served(repo) == ["other@1", "vae@1", "vae@2"]
    shutil.rmtree(tmp_path / "vae" / "2")
    shutil.rmtree(tmp_path / "other")
    repo.refresh()
    assert served(repo) == ["vae@1"]
    assert repo.catalogue.find(None).version == 1


def test_only_the_newest_versions_stay_loaded_bad_ones_not_counted(artifacts: Path, tmp_path: Path) -> None:
    for version in (1, 2, 3, 4):
        path = publish(artifacts, tmp_path, version=version)
    path.write_bytes(b"PK")
    repo = registry(tmp_path, keep=2)
    repo.refresh()
    assert served(repo) == ["vae@2", "vae@3"]


def test_strangers_in_the_folder_are_passed_over(artifacts: Path, tmp_path: Path) -> None:
    publish(artifacts, tmp_path)
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "vae" / ".staging-x").mkdir()
    (tmp_path / "vae" / "latest").mkdir()
    (tmp_path / "vae" / "7").mkdir()
    (tmp_path / "vae" / "8").symlink_to("nowhere")
    repo = registry(tmp_path)
    repo.refresh()
    assert served(repo) == ["vae@1"]
    assert not repo.catalogue.failures
