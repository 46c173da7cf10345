"""Hostile artifacts are refused, each with its reason, before anything in them runs."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from models import artifact
from models.errors import ArtifactError
from models.pipeline import Pipeline
from tests.models import hostile
from tests.models.publishing import publish

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_was_written() -> object:
    """Check after each test that no artifact has written the file that some of them try to write."""
    assert not Path(hostile.TARGET).exists()
    yield
    assert not Path(hostile.TARGET).exists()


def reason_of_refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as refusal:
        artifact.load(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("model", hostile.CODE, ids=lambda model: model.__name__)
def test_refusal_of_hostile_code_names_the_code_and_its_file(model: type[Pipeline], tmp_path: Path) -> None:
    reason = reason_of_refusal(hostile.publish_code(tmp_path, model))
    assert hostile.CODE[model] in reason
    assert "the code in code/__torch__/" in reason


@pytest.mark.parametrize("edit", hostile.EDITS)
def test_load_of_an_artifact_with_hostile_members_is_refused_with_the_reason(edit: str, tmp_path: Path) -> None:
    assert hostile.EDITS[edit][1] in reason_of_refusal(hostile.publish_edited(tmp_path, edit))


@pytest.mark.parametrize("edit", hostile.BYTES)
def test_load_of_an_artifact_with_a_hostile_zip_file_is_refused_with_the_reason(edit: str, tmp_path: Path) -> None:
    assert re.search(hostile.BYTES[edit][1], reason_of_refusal(hostile.publish_bytes(tmp_path, edit)))


@pytest.mark.parametrize("edit", hostile.TWINS)
def test_load_of_an_artifact_with_a_hostile_copy_for_onnx_runtime_is_refused_with_the_reason(
    edit: str, tmp_path: Path
) -> None:
    assert re.search(hostile.TWINS[edit][1], reason_of_refusal(hostile.publish_hostile_twin(tmp_path, edit)))


def _make_fifo(path: Path) -> None:
    os.mkfifo(path)


def _link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(5 * 2**30)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_make_fifo, "is not a regular file"),
        (_link_to_device, "is not a regular file"),
        (Path.mkdir, "Is a directory"),
        (_make_sparse, "an artifact has at most"),
        (lambda path: path.symlink_to(path), "cannot read"),
        (lambda path: path.symlink_to("/etc/passwd"), "is not a zip file"),
    ],
    ids=["fifo", "link to a device", "folder", "file of 5 GiB", "link to itself", "link to another file"],
)
def test_load_of_a_path_that_is_no_artifact_file_is_refused_at_once(
    make: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    make(path)
    assert reason in reason_of_refusal(path)


def test_load_of_a_file_that_has_grown_is_refused(tmp_path: Path) -> None:
    path = publish(tmp_path)
    with path.open("ab") as file:
        file.write(bytes(1000))
    assert "was altered after it was written" in reason_of_refusal(path)
