"""The registry with trusted keys: it serves what they have signed, and follows changes of keys and signatures."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from models.artifact import load_after_trial
from models.errors import ArtifactCorrupt, ArtifactUntrusted
from models.keys import PrivateKey, PublicKey
from models.manifest import FILE_NAME
from models.signatures import TrustedKeys, TrustedKeySource, sign
from models.trial import Verdict
from service.inference.model_loader import ModelLoader
from service.inference.registry import Failure, ModelRegistry
from service.inference.trial import TrialClient
from tests.models.publishing import publish
from tests.models.signing import CHANGES, new_key

pytestmark = pytest.mark.slow


class Site:
    """An artifact folder with model@1, two keys, a file of trusted keys (first the key `first`), and a registry."""

    def __init__(self, folder: Path, published: Path) -> None:
        self.root, self.file = folder / "artifacts", folder / "trusted"
        self.path = self.root / "model" / "1" / "model.pt"
        shutil.copytree(published.parent, self.path.parent)
        self.first, self.second = new_key(folder, "first"), new_key(folder, "second")
        self.trust(self.first)

    def trust(self, *keys: PrivateKey) -> None:
        self.file.write_text("".join(f"{key.public.line}\n" for key in keys))

    def start(self) -> None:
        self.registry = ModelRegistry(
            self.root, ModelLoader(), default_model="model", keep_versions=2, keys=TrustedKeySource(str(self.file))
        )
        self.registry.refresh()

    def new_version(self, version: int) -> Path:
        folder = self.root / "model" / str(version)
        shutil.copytree(self.path.parent, folder)
        return folder / "model.pt"

    @property
    def served(self) -> list[int]:
        return list(self.registry.catalogue.models.get("model", {}))

    @property
    def failures(self) -> Sequence[Failure]:
        return self.registry.catalogue.failures


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture
def site(tmp_path: Path, published: Path) -> Site:
    return Site(tmp_path, published)


def test_unsigned_version_is_served_as_soon_as_it_is_signed(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.start()
    for _ in range(3):
        site.registry.refresh()
    assert site.served == []
    (failure,) = site.failures
    assert (failure.name, failure.version, failure.code) == ("model", 1, "artifact_untrusted")
    assert "is not signed" in failure.detail
    assert sum("failed to load model@1" in record.message for record in caplog.records) == 1
    sign(site.path, site.second)
    site.registry.refresh()
    assert site.served == []
    assert "is signed by SHA256:" in site.failures[0].detail
    sign(site.path, site.first)
    site.registry.refresh()
    assert site.served == [1]
    assert site.failures == ()
    assert site.registry.catalogue.find(None).signed_by == site.first.public


@pytest.mark.parametrize("change", CHANGES)
def test_old_version_stays_served_if_the_signature_of_the_new_one_is_missing_or_wrong(site: Site, change: str) -> None:
    sign(site.path, site.first)
    site.start()
    new = site.new_version(2)
    sign(new, site.first)
    make, reason = CHANGES[change]
    make(new)
    site.registry.refresh()
    assert site.served == [1]
    assert [failure.version for failure in site.failures] == [2]
    assert reason in site.failures[0].detail


def test_copy_of_a_signed_version_under_the_next_number_is_not_served(site: Site) -> None:
    sign(site.path, site.first)
    site.start()
    site.new_version(2)
    site.registry.refresh()
    assert site.served == [1]
    assert "the signature is for model@1, not for model@2" in site.failures[0].detail


@pytest.mark.parametrize("content", ["unsigned", "of an unknown key"])
def test_loaded_model_stays_served_if_its_file_is_replaced_by_an_untrusted_one(
    site: Site, tmp_path: Path, content: str
) -> None:
    sign(site.path, site.first)
    site.start()
    first = site.registry.catalogue.find(None)
    other = publish(tmp_path / "more", kind="ae")
    shutil.copy(other, site.path)
    if content == "of an unknown key":
        sign(site.path, new_key(tmp_path, "stranger"))
    site.registry.refresh()
    assert site.registry.catalogue.find(None) is first
    assert [failure.code for failure in site.failures] == ["artifact_untrusted"]


def test_model_is_no_longer_served_when_its_key_is_removed_and_returns_with_the_key(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sign(site.path, site.first)
    site.start()
    site.trust(site.second)
    for _ in range(3):
        site.registry.refresh()
    assert site.served == []
    assert [failure.code for failure in site.failures] == ["artifact_untrusted"]
    assert sum("failed to load model@1" in record.message for record in caplog.records) == 1
    assert sum("no longer serving model@1" in record.message for record in caplog.records) == 1
    site.trust(site.second, site.first)
    site.registry.refresh()
    assert site.served == [1]


@pytest.mark.parametrize("unreadable", ["model folder", "artifact folder"])
def test_model_is_no_longer_served_when_its_key_is_removed_while_its_folder_is_unreadable(
    site: Site, unreadable: str
) -> None:
    sign(site.path, site.first)
    site.start()
    folder = site.root if unreadable == "artifact folder" else site.path.parents[1]
    folder.rename(folder.with_name(".away"))
    folder.symlink_to(folder)
    site.registry.refresh()
    assert site.served == [1]
    site.trust(site.second)
    site.registry.refresh()
    assert site.served == []


def test_model_with_two_signatures_stays_served_when_one_key_is_removed(site: Site) -> None:
    sign(site.path, site.first)
    sign(site.path, site.second)
    site.trust(site.first, site.second)
    site.start()
    assert site.registry.catalogue.find(None).signed_by == site.first.public
    site.trust(site.second)
    site.registry.refresh()
    assert site.registry.catalogue.find(None).signed_by == site.second.public
    assert site.failures == ()


def test_loaded_model_is_not_loaded_again_when_a_key_is_added(site: Site) -> None:
    sign(site.path, site.first)
    site.start()
    first = site.registry.catalogue.find(None)
    site.trust(site.second, site.first)
    site.registry.refresh()
    assert site.registry.catalogue.find(None) is first


@pytest.mark.parametrize("content", ["", "nonsense", None])
def test_models_stay_served_while_the_file_of_keys_is_invalid(
    site: Site, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    caplog.set_level(logging.INFO)
    sign(site.path, site.first)
    site.start()
    first = site.registry.catalogue.find(None)
    if content is None:
        site.file.unlink()
    else:
        site.file.write_text(content)
    unsigned = publish(site.root)
    for _ in range(3):
        site.registry.refresh()
    assert site.registry.catalogue.find(None) is first
    assert [failure.code for failure in site.failures] == ["key_invalid", "artifact_untrusted"]
    assert str(site.file) in site.failures[0].detail
    assert sum("the keys that were read before stay trusted" in record.message for record in caplog.records) == 1
    sign(unsigned, site.first)
    site.trust(site.first)
    site.registry.refresh()
    assert site.served == [1, 2]
    assert site.failures == ()
    assert "resolved: " in caplog.text


class RecordingTrials(TrialClient):
    """Records the paths and digests that a loader asks for, and tries nothing out."""

    def __init__(self) -> None:
        self.asked: list[tuple[Path, str | None]] = []
        self.begun: list[tuple[Path, str | None]] = []

    def begin(self, path: Path, digest: str | None = None) -> None:
        self.begun.append((path, digest))

    def try_out(self, path: Path, digest: str | None = None) -> Verdict:
        self.asked.append((path, digest))
        return {"digest": digest}


def test_trial_before_a_load_is_for_the_content_whose_signature_was_verified(site: Site) -> None:
    """Without the digest, a file that replaces the artifact after the verification would run in the trial."""
    trials = RecordingTrials()
    keys = TrustedKeySource(str(site.file)).keys
    with pytest.raises(ArtifactUntrusted):
        ModelLoader(trials=trials).load(site.path, "model", 1, keys)
    assert trials.asked == []
    sign(site.path, site.first)
    served = ModelLoader(trials=trials).load(site.path, "model", 1, keys)
    assert served.signed_by == site.first.public
    assert trials.asked == [(site.path, site.path.read_bytes()[-64:].decode())]


def test_trial_of_an_artifact_begins_while_another_model_loads_but_only_if_the_artifact_is_signed(site: Site) -> None:
    trials = RecordingTrials()
    keys = TrustedKeySource(str(site.file))
    sign(site.path, site.first)
    # The signature of a copy is not valid, because it contains the name of the original.
    for name in ("model-2", "model-3"):
        shutil.copytree(site.root / "model", site.root / name)
    sign(site.root / "model-2" / "1" / FILE_NAME, site.first)
    loader = ModelLoader(trials=trials)
    registry = ModelRegistry(site.root, loader, default_model="model", keep_versions=2, keys=keys)
    registry.refresh()
    digest = site.path.read_bytes()[-64:].decode()
    assert trials.begun == [(site.root / "model-2" / "1" / FILE_NAME, digest)]
    assert sorted(registry.catalogue.models) == ["model", "model-2"]
    registry.refresh()
    assert len(trials.begun) == 1


class SwappingKeys(TrustedKeys):
    """Trusted keys that copy `path`.other over the artifact at `path` as soon as its signature is verified."""

    def verify(self, content: bytes, path: Path, name: str, version: int) -> PublicKey:
        key = super().verify(content, path, name, version)
        shutil.copy(f"{path}.other", path)
        return key


def test_artifact_that_is_swapped_after_its_signature_was_verified_is_refused(site: Site, tmp_path: Path) -> None:
    sign(site.path, site.first)
    shutil.copy(publish(tmp_path / "more", kind="ae"), f"{site.path}.other")
    with pytest.raises(ArtifactCorrupt, match="was changed while it was loaded"):
        load_after_trial(site.path, SwappingKeys((site.first.public,)))
