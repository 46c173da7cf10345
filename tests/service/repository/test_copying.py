"""Copies of versions between repositories: elbo push, elbo pull and elbo index."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from models.errors import ArtifactMissing, ElboError
from models.keys import create_key, read_private_key
from models.manifest import FILE_NAME
from models.signatures import sign, trusted_keys
from service.repository.copying import (
    FolderRepository,
    RemoteRepository,
    copy_versions,
    open_repository,
    write_index_of,
)
from service.repository.index import (
    INDEX_NAME,
    FileEntry,
    VersionEntry,
    VersionName,
    entries_of,
    parse_index,
    render_index,
)
from service.repository.location import RepositoryInvalid, parse_location
from service.repository.mirror import Mirror
from service.repository.storage import CopyConflict, FsspecStorage, RepositoryUnavailable, failures_of, sha256_of
from tests.models.publishing import publish
from tests.service.repository.folders import files_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with web@1, web@2 and hosts@1."""
    root = tmp_path_factory.mktemp("repository") / "artifacts"
    for name in ("web", "web", "hosts"):
        publish(root, name=name)
    return root


def copied(source: Path | str, destination: Path | str, *names: str, keys: str | None = None) -> list[str]:
    read, written = open_repository(str(source)), open_repository(str(destination))
    return [f"{each.action} {each.name}" for each in copy_versions(read, written, names, trusted_keys(keys))]


def test_push_copies_what_is_missing_and_writes_the_index(folder: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    assert copied(folder, url, "web@1") == ["copied web@1"]
    assert copied(folder, url) == ["copied hosts@1", "copied web@2"]
    assert copied(folder, url, "web@1", "web") == ["present web@1", "present web@2"]
    index = parse_index((tmp_path / "remote" / INDEX_NAME).read_bytes(), "")
    assert {name: list(found) for name, found in index.items()} == {"hosts": [1], "web": [1, 2]}
    for name, found in index.items():
        for version, entry in found.items():
            path = folder / name / str(version) / FILE_NAME
            assert (entry.model.sha256, entry.model.bytes) == (sha256_of(path), path.stat().st_size)


def test_pull_copies_the_named_version_into_a_folder_without_an_index(folder: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    copied(folder, url, "web@1", "web@2")
    assert copied(url, tmp_path / "own", "web@1") == ["copied web@1"]
    assert files_in(tmp_path / "own") == ["web/1/model.pt"]
    assert (tmp_path / "own/web/1/model.pt").read_bytes() == (folder / "web/1/model.pt").read_bytes()


def test_version_that_differs_at_the_destination_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    publish(tmp_path / "other", kind="ae", name="web")
    url = f"file://{tmp_path}/remote"
    copied(tmp_path / "other", url)
    with pytest.raises(CopyConflict, match="the destination has another web@1"):
        copied(folder, url, "hosts", "web@1")
    assert files_in(tmp_path / "remote") == [INDEX_NAME, "hosts/1/model.pt", "web/1/model.pt"]
    assert (tmp_path / "remote/web/1/model.pt").read_bytes() == (tmp_path / "other/web/1/model.pt").read_bytes()


def test_signature_that_is_added_later_is_pushed_and_verified_by_pull(tmp_path: Path) -> None:
    own, url = tmp_path / "own", f"file://{tmp_path}/remote"
    publish(own, name="web")
    copied(own, url)
    public = create_key(tmp_path / "release.key", "release")
    with pytest.raises(Exception, match="is not signed"):
        copied(url, tmp_path / "pulled", keys=public.line)
    assert not (tmp_path / "pulled" / "web").exists()
    sign(own / "web/1/model.pt", read_private_key(tmp_path / "release.key"))
    assert copied(own, url) == ["signature web@1"]
    assert copied(own, url) == ["present web@1"]
    assert copied(url, tmp_path / "pulled", keys=public.line) == ["copied web@1"]
    assert files_in(tmp_path / "pulled") == ["web/1/model.pt", "web/1/model.pt.sig"]
    assert copied(url, tmp_path / "pulled", keys=public.line) == ["present web@1"]


def test_version_that_is_present_is_verified_with_the_trusted_keys(folder: Path, tmp_path: Path) -> None:
    assert copied(folder, tmp_path / "own", "web@1") == ["copied web@1"]
    public = create_key(tmp_path / "release.key", "release")
    with pytest.raises(Exception, match="is not signed"):
        copied(folder, tmp_path / "own", "web@1", keys=public.line)


def test_damaged_artifact_is_not_pushed(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "own/web/1/model.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes((folder / "web/1/model.pt").read_bytes()[:-1] + b"x")
    with pytest.raises(Exception, match="truncated or was altered"):
        copied(tmp_path / "own", f"file://{tmp_path}/remote")
    assert not (tmp_path / "remote").exists()


def test_push_that_ends_before_the_index_shows_readers_the_repository_as_before(folder: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    copied(folder, url, "web@1")
    before = (tmp_path / "remote" / INDEX_NAME).read_bytes()
    copied(folder, url, "web@2")
    (tmp_path / "remote" / INDEX_NAME).write_bytes(before)  # as if the process had been killed before the index
    mirror = Mirror(parse_location(url), tmp_path / "cache", 2)
    assert mirror.poll().outcome == "ok"
    assert files_in(tmp_path / "cache") == ["web/1/model.pt"]
    assert copied(folder, url, "web@2") == ["present web@2"]
    assert mirror.poll().changed
    assert files_in(tmp_path / "cache") == ["web/1/model.pt", "web/2/model.pt"]


def test_unknown_model_or_version_names_those_that_exist(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing, match=r"no model 'wbe' \(available: hosts, web\)"):
        copied(folder, tmp_path / "own", "wbe")
    with pytest.raises(ArtifactMissing, match=r"'web' has no version '7' in the source \(has: 1, 2\)"):
        copied(folder, tmp_path / "own", "web@7")


def test_index_of_a_folder_lists_what_other_programs_have_copied_there(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path / "own", "web@1")
    assert write_index_of(str(tmp_path / "own")) == 1
    copied(folder, tmp_path / "own", "web@2")  # the folder has an index now, so it is kept up to date
    assert list(parse_index((tmp_path / "own" / INDEX_NAME).read_bytes(), "")["web"]) == [1, 2]


@pytest.mark.parametrize(
    ("file", "size", "message"),
    [("model.pt", 2**32, "at most 4,294,967,295"), ("model.pt.sig", 0, "expected 1 to 65,536: sign the version again")],
)
def test_file_whose_size_is_not_valid_is_named(
    folder: Path, tmp_path: Path, file: str, size: int, message: str
) -> None:
    copied(folder, tmp_path / "own", "web@1")
    with (tmp_path / "own/web/1" / file).open("wb") as made:
        made.truncate(size)  # a sparse file
    with pytest.raises(ElboError, match=message):
        copied(tmp_path / "own", f"file://{tmp_path}/remote")
    if size == 0:  # the hash of 4 GiB takes 3 s
        with pytest.raises(ElboError, match=message):
            write_index_of(str(tmp_path / "own"))


def test_index_that_readers_would_refuse_is_not_written() -> None:
    entry = VersionEntry(model=FileEntry(bytes=1, sha256="0" * 64))
    with pytest.raises(RepositoryInvalid, match="run elbo index"):
        render_index({"web": dict.fromkeys(range(1, 120_000), entry)})


def test_version_that_another_push_wrote_meanwhile_is_a_conflict(folder: Path, tmp_path: Path) -> None:
    publish(tmp_path / "other", kind="ae", name="web")
    destination = FolderRepository(tmp_path / "own")
    for source in (tmp_path / "other", folder):
        staging = tmp_path / f"staging-{source.name}"
        shutil.copytree(source / "web/1", staging)
        if source == folder:
            with pytest.raises(CopyConflict, match="the destination has another web@1"):
                destination.store(VersionName("web", 1), staging, only_signature=False)
        else:
            destination.store(VersionName("web", 1), staging, only_signature=False)
    assert (tmp_path / "own/web/1/model.pt").read_bytes() == (tmp_path / "other/web/1/model.pt").read_bytes()


def test_repository_on_a_drive_that_this_user_may_not_read_names_the_permissions(folder: Path, tmp_path: Path) -> None:
    location = parse_location(f"file://{tmp_path}/remote")
    copied(folder, location.url)
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "remote" / INDEX_NAME))
    with pytest.raises(RepositoryUnavailable, match="change the permissions"), failures_of(location, INDEX_NAME):
        raise denied
    target = tmp_path / "cache" / "model.pt"
    denied = PermissionError(errno.EACCES, "Permission denied", str(target))
    with pytest.raises(PermissionError), failures_of(location, "web/1/model.pt", target):
        raise denied


class WatchedStorage(FsspecStorage):
    """A folder as remote storage, which calls `after` with the path of each file that was uploaded."""

    def __init__(self, folder: Path, after: Callable[[str], None]) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__(parse_location(f"file://{folder}"))
        self._folder, self._after = folder, after

    def upload(self, source: Path, path: str, is_new: bool) -> None:
        (self._folder / path).parent.mkdir(parents=True, exist_ok=True)
        super().upload(source, path, is_new)
        self._after(path)


def remote(folder: Path, after: Callable[[str], None] = lambda path: None) -> RemoteRepository:  # noqa: ARG005
    """Return the remote repository in `folder`."""
    return RemoteRepository(parse_location(f"file://{folder}"), WatchedStorage(folder, after))


def signed_copy(folder: Path, target: Path, key: str) -> Path:
    """Copy web@1 of `folder` to the artifact folder `target`, and sign it with a new key."""
    shutil.copytree(folder / "web/1", target / "web/1")
    create_key(target / key, key)
    sign(target / "web/1/model.pt", read_private_key(target / key))
    return target


def test_no_reader_finds_a_signed_version_without_its_signature(folder: Path, tmp_path: Path) -> None:
    own = signed_copy(folder, tmp_path / "own", "release")
    seen = []

    def look(path: str) -> None:
        listed = entries_of(FsspecStorage(parse_location(f"file://{tmp_path}/remote")).list_files())
        seen.append((path, {name: found[1].signature is not None for name, found in listed.items()}))

    copy_versions(FolderRepository(own), remote(tmp_path / "remote", look), ["web@1"])
    assert seen == [("web/1/model.pt.sig", {}), ("web/1/model.pt", {"web": True})]


def test_unsigned_version_is_not_pushed_beside_the_signature_of_an_unfinished_push(
    folder: Path, tmp_path: Path
) -> None:
    own = signed_copy(folder, tmp_path / "own", "release")
    left = tmp_path / "remote/web/1/model.pt.sig"
    left.parent.mkdir(parents=True)
    shutil.copy(own / "web/1/model.pt.sig", left)
    with pytest.raises(CopyConflict, match="sign it with elbo sign web, and push it again"):
        copy_versions(FolderRepository(folder), remote(tmp_path / "remote"), ["web@1"])
    assert [path.name for path in left.parent.iterdir()] == ["model.pt.sig"]
    copy_versions(FolderRepository(own), remote(tmp_path / "remote"), ["web@1"])
    assert copied(f"file://{tmp_path}/remote", tmp_path / "pulled") == ["copied web@1"]


def test_index_has_the_hash_of_the_signature_that_another_push_wrote_meanwhile(folder: Path, tmp_path: Path) -> None:
    own = signed_copy(folder, tmp_path / "own", "release")
    rival = signed_copy(folder, tmp_path / "rival", "rival")

    def push_rival(path: str) -> None:
        if path == "web/1/model.pt":
            copy_versions(FolderRepository(rival), remote(tmp_path / "remote"), ["web@1"])

    copy_versions(FolderRepository(own), remote(tmp_path / "remote", push_rival), ["web@1"])
    assert copied(f"file://{tmp_path}/remote", tmp_path / "pulled") == ["copied web@1"]
    index = parse_index((tmp_path / "remote" / INDEX_NAME).read_bytes(), "")
    signature = index["web"][1].signature
    assert signature is not None
    assert signature.sha256 == sha256_of(rival / "web/1/model.pt.sig") != sha256_of(own / "web/1/model.pt.sig")
    assert (tmp_path / "pulled/web/1/model.pt.sig").read_bytes() == (rival / "web/1/model.pt.sig").read_bytes()
