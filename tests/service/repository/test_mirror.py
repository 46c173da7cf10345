"""The mirror of a remote repository: what it copies, what it refuses, and what it keeps."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.repository import mirror as mirror_module
from service.repository.index import INDEX_NAME
from service.repository.location import parse_location
from service.repository.mirror import Mirror, read_failures
from tests.conftest import require
from tests.data import ROOT
from tests.service.repository.folders import add_version, files_in, sealed, write_index


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """Return a repository with hosts@1 and hosts@2, and their index."""
    root = tmp_path / "remote"
    for version in (1, 2):
        add_version(root, "hosts", version)
    write_index(root)
    return root


def mirror_of(remote: Path, cache: Path, keep_versions: int = 2, clock: Clock | None = None) -> Mirror:
    return Mirror(parse_location(f"file://{remote}"), cache, keep_versions, clock=clock or Clock())


def test_poll_copies_the_newest_versions_and_the_next_poll_copies_a_new_one(remote: Path, tmp_path: Path) -> None:
    mirror = mirror_of(remote, tmp_path / "cache", keep_versions=1)
    assert (mirror.poll().outcome, mirror.poll().changed) == ("ok", False)
    assert files_in(tmp_path / "cache") == ["hosts/1/model.pt", "hosts/2/model.pt"]
    added = add_version(remote, "hosts", 3)
    assert not mirror.poll().changed  # the index does not name it yet
    write_index(remote)
    assert mirror.poll().changed
    assert files_in(tmp_path / "cache") == ["hosts/2/model.pt", "hosts/3/model.pt"]  # one more than is served
    assert (tmp_path / "cache/hosts/3/model.pt").read_bytes() == added.read_bytes()


def test_version_and_model_that_the_index_no_longer_names_are_removed(remote: Path, tmp_path: Path) -> None:
    add_version(remote, "other", 1)
    write_index(remote)
    mirror = mirror_of(remote, tmp_path / "cache")
    mirror.poll()
    shutil.rmtree(remote / "hosts" / "2")
    shutil.rmtree(remote / "other")
    write_index(remote)
    assert mirror.poll().changed
    assert files_in(tmp_path / "cache") == ["hosts/1/model.pt"]


def test_altered_artifact_is_refused_with_its_hashes_and_downloaded_again_after_a_pause(
    remote: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, cache = Clock(), tmp_path / "cache"
    mirror = mirror_of(remote, cache, clock=clock)
    mirror.poll()
    path = add_version(remote, "hosts", 3)
    write_index(remote)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    assert [mirror.poll().outcome for _ in range(3)] == ["incomplete"] * 3
    (failure,) = read_failures(cache)
    assert (failure.name, failure.version, failure.code) == ("hosts", 3, "repository_corrupt")
    assert "has the SHA-256" in failure.detail
    assert "push the version again" in failure.detail
    assert sum("failed to mirror hosts@3" in record.message for record in caplog.records) == 1
    assert files_in(cache) == ["hosts/1/model.pt", "hosts/2/model.pt"]
    path.write_bytes(whole)
    assert mirror.poll().outcome == "incomplete"
    clock.now += 5.0
    assert mirror.poll().outcome == "ok"
    assert read_failures(cache) == ()
    assert (cache / "hosts/3/model.pt").read_bytes() == whole


def test_faulty_replacement_of_a_version_leaves_the_version_in_the_cache(remote: Path, tmp_path: Path) -> None:
    mirror = mirror_of(remote, tmp_path / "cache", keep_versions=1)
    mirror.poll()
    before = (tmp_path / "cache/hosts/2/model.pt").read_bytes()
    path = add_version(remote, "hosts", 2, "another content")
    write_index(remote)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert mirror.poll().outcome == "incomplete"
    assert (tmp_path / "cache/hosts/2/model.pt").read_bytes() == before
    path.write_bytes(sealed("a third content"))
    (remote / INDEX_NAME).unlink()
    write_index(remote)
    assert mirror.poll().outcome == "ok"
    assert (tmp_path / "cache/hosts/2/model.pt").read_bytes() == sealed("a third content")


def test_file_with_another_size_than_the_index_names_is_refused(remote: Path, tmp_path: Path) -> None:
    path = remote / "hosts" / "2" / "model.pt"
    path.write_bytes(path.read_bytes()[:-10])
    mirror_of(remote, tmp_path / "cache").poll()
    assert "bytes, expected" in read_failures(tmp_path / "cache")[0].detail
    assert files_in(tmp_path / "cache") == ["hosts/1/model.pt"]


def test_cache_stays_if_the_repository_is_gone_also_after_a_restart(remote: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    mirror = mirror_of(remote, cache)
    mirror.poll()
    remote.rename(tmp_path / "away")
    for gone in (mirror, mirror_of(remote, cache)):
        assert gone.poll().outcome == "failed"
        assert gone.has_versions()
        (failure,) = read_failures(cache)
        assert failure.code == "repository_unavailable"
        assert failure.detail.endswith("the models in the cache stay served")
    assert files_in(cache) == ["hosts/1/model.pt", "hosts/2/model.pt"]
    (tmp_path / "away").rename(remote)
    add_version(remote, "hosts", 3)
    write_index(remote)
    poll = mirror.poll()
    assert (poll.outcome, poll.changed, read_failures(cache)) == ("ok", True, ())
    assert (cache / "hosts/3/model.pt").exists()


def test_cache_stays_if_the_repository_is_suddenly_empty(remote: Path, tmp_path: Path) -> None:
    mirror = mirror_of(remote, tmp_path / "cache")
    mirror.poll()
    shutil.rmtree(remote)
    remote.mkdir()
    assert mirror.poll().outcome == "failed"
    assert "has no models any more" in read_failures(tmp_path / "cache")[0].detail
    assert files_in(tmp_path / "cache") == ["hosts/1/model.pt", "hosts/2/model.pt"]


def test_file_that_was_damaged_in_the_cache_is_downloaded_again_after_a_restart(remote: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    mirror_of(remote, cache).poll()
    path = cache / "hosts/2/model.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    assert mirror_of(remote, cache).poll().changed
    assert path.read_bytes() == whole


def test_signature_that_is_added_later_is_mirrored(remote: Path, tmp_path: Path) -> None:
    mirror = mirror_of(remote, tmp_path / "cache")
    mirror.poll()
    for text in ("signature", "another 9"):  # of the same size
        (remote / "hosts/2/model.pt.sig").write_text(text)
        write_index(remote)
        assert mirror.poll().changed
        assert (tmp_path / "cache/hosts/2/model.pt.sig").read_text() == text
    (remote / "hosts/2/model.pt.sig").unlink()
    write_index(remote)
    mirror.poll()
    assert files_in(tmp_path / "cache") == ["hosts/1/model.pt", "hosts/2/model.pt"]


def test_repository_without_an_index_is_listed_and_its_seals_are_verified(
    remote: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    (remote / INDEX_NAME).unlink()
    damaged = add_version(remote, "hosts", 3)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    mirror = mirror_of(remote, cache, keep_versions=1)
    assert [mirror.poll().outcome, mirror.poll().outcome] == ["incomplete", "incomplete"]
    assert files_in(cache) == ["hosts/1/model.pt", "hosts/2/model.pt"]
    assert [failure.code for failure in read_failures(cache)] == ["artifact_corrupt"]
    assert sum("elbo index" in record.message for record in caplog.records) == 1
    add_version(remote, "hosts", 3)
    add_version(remote, "hosts", 4)
    assert mirror.poll().outcome == "ok"
    assert files_in(cache) == ["hosts/3/model.pt", "hosts/4/model.pt"]


@pytest.mark.parametrize("names", [("../outside", "1"), ("hosts", "../1"), ("a/b", "1"), ("..", "1"), ("hosts", "0")])
def test_index_that_names_a_place_outside_of_the_repository_is_refused(
    remote: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    document = json.loads((remote / INDEX_NAME).read_bytes())
    document["models"][names[0]] = {names[1]: document["models"]["hosts"]["1"]}
    (remote / INDEX_NAME).write_text(json.dumps(document))
    assert mirror_of(remote, tmp_path / "cache").poll().outcome == "failed"
    (failure,) = read_failures(tmp_path / "cache")
    assert (failure.code, "is no name and version of a model" in failure.detail) == ("repository_invalid", True)
    assert files_in(tmp_path / "cache") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "remote"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 2, "models": {}}', b'{"format": 1, "models": {"a": {"1": 5}}}',
     b'{"format": 1, "models": {"a": {"1": {"model": {"bytes": -1}}}}}', b"[" * 10_000, b" " * (16 * 2**20 + 1)],
    ids=["empty", "half", "list", "no models", "later format", "number", "negative size", "deep", "too large"],
)  # fmt: skip
def test_damaged_index_is_refused_and_the_cache_stays(remote: Path, tmp_path: Path, content: bytes) -> None:
    mirror = mirror_of(remote, tmp_path / "cache")
    mirror.poll()
    (remote / INDEX_NAME).write_bytes(content)
    assert mirror.poll().outcome == "failed"
    assert read_failures(tmp_path / "cache")[0].code == "repository_invalid"
    assert files_in(tmp_path / "cache") == ["hosts/1/model.pt", "hosts/2/model.pt"]


def test_only_one_process_mirrors_into_a_cache(remote: Path, tmp_path: Path) -> None:
    first, second = mirror_of(remote, tmp_path / "cache"), mirror_of(remote, tmp_path / "cache")
    with first._locked() as is_locked:
        assert is_locked
        assert second.poll().outcome == "skipped"
    assert second.poll().outcome == "ok"


FILL_DISK = """
import sys
from pathlib import Path
from service.repository import mirror
from service.repository.location import parse_location
mirror.SPARE_BYTES = int(sys.argv[3])
cache = Path(sys.argv[2])
poll = mirror.Mirror(parse_location("file://" + sys.argv[1]), cache, 2).poll()
print(poll.outcome, [failure.code for failure in mirror.read_failures(cache)], sorted(
    str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() and not path.name.startswith(".mirror")
))
"""


@pytest.mark.parametrize(
    ("spare", "expected"),
    [
        (-(10**9), "incomplete ['cache_unwritable'] ['hosts/1/model.pt']"),
        (0, "incomplete ['cache_unwritable'] ['hosts/1/model.pt']"),
        (64 * 2**20, "incomplete ['cache_unwritable', 'cache_unwritable'] []"),
    ],
    ids=["full during the download", "too little space for one", "too little space for all"],
)
def test_version_for_which_the_disk_has_no_space_is_reported_and_the_others_are_mirrored(
    remote: Path, tmp_path: Path, spare: int, expected: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    large = remote / "hosts/2/model.pt"
    large.write_bytes(b"PK" + bytes(3_000_000))
    (remote / INDEX_NAME).unlink()
    write_index(remote)
    script = f'mount -t tmpfs -o size=1m tmpfs "{disk}" && exec "{sys.executable}" -c "$0" "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, FILL_DISK, str(remote), str(disk), str(spare)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    require("unshare" not in result.stderr and "mount:" not in result.stderr, "this user may not mount a disk")
    assert result.stdout.strip() == expected, result.stderr


def test_cache_that_is_a_file_is_logged_once(remote: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("")
    mirror = mirror_of(remote, tmp_path / "cache" / "folder")
    with caplog.at_level(logging.INFO):
        assert [mirror.poll().outcome, mirror.poll().outcome] == ["failed", "failed"]
    assert [record.message for record in caplog.records if "set ELBO_CACHE to another folder" in record.message] == [
        caplog.records[0].message
    ]


@pytest.mark.parametrize("has_exchange", [True, False], ids=["one step", "other file systems"])
def test_artifact_and_signature_of_a_replaced_version_change_together(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_exchange: bool
) -> None:
    cache = tmp_path / "cache"
    (remote / "hosts/2/model.pt.sig").write_text("first")
    write_index(remote)
    mirror = mirror_of(remote, cache)
    mirror.poll()
    add_version(remote, "hosts", 2, "another content")
    (remote / "hosts/2/model.pt.sig").write_text("second")
    write_index(remote)
    if not has_exchange:
        monkeypatch.setattr("service.repository.mirror.RENAME_EXCHANGE", 1 << 30)  # unknown to the kernel
    folder, pairs = cache / "hosts/2", set()

    def recorded(move: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
        def moved(path: Path, target: Path) -> object:
            found = move(path, target)
            if folder.exists():
                pairs.add(((folder / "model.pt").read_bytes(), (folder / "model.pt.sig").read_text()))
            return found

        return moved

    for owner, name in ((Path, "rename"), (Path, "replace"), (mirror_module, "_exchange")):
        monkeypatch.setattr(owner, name, recorded(getattr(owner, name)))
    assert mirror.poll().changed
    after = (sealed("another content"), "second")
    assert {after} <= pairs <= {(sealed("hosts 2"), "first"), after}
    assert (cache / "hosts/2/model.pt").read_bytes() == sealed("another content")
    assert (cache / "hosts/2/model.pt.sig").read_text() == "second"
    assert sorted(path.name for path in (cache / "hosts").iterdir()) == ["1", "2"]
