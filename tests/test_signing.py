"""`elbo keygen`, `elbo sign` and `elbo verify`, and signatures in the other commands and in the server."""

import json
import shutil
import stat
from pathlib import Path

import pytest

from models.manifest import versions
from models.signatures import is_signed
from tests.commands import command, in_process, succeed, two_factor_rows, write
from tests.models.publishing import publish
from tests.models.signing import CHANGES, new_key, signature_of
from tests.service.process import ServerProcess

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a/hosts/1, which is signed by the key `release`, and the file train.csv."""
    folder = tmp_path_factory.mktemp("trained")
    new_key(folder)
    data = write(folder / "train.csv", two_factor_rows(600, seed=0))
    options = ["--model", "pca", "--name", "hosts", "--latents", "2", "--sign", str(folder / "release")]
    succeed("train", data, *options, "--artifacts", str(folder / "a"), "--runs", str(folder / "runs"))
    return folder


@pytest.fixture
def site(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of `trained` that the test may change."""
    shutil.copytree(trained, tmp_path / "site")
    return tmp_path / "site"


def run(
    capsys: pytest.CaptureFixture[str], site: Path, *arguments: str, keys: str | None = None
) -> tuple[int, str, str]:
    trusted = [] if keys is None else ["--trusted-keys", keys]
    return in_process(capsys, *arguments, "--artifacts", str(site / "a"), *trusted)


def test_train_signs_the_version_that_it_publishes(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, site, "verify", keys=str(site / "release.pub"))
    assert code == 0
    assert out.startswith("hosts@1: signed by release (SHA256:")


def test_train_with_a_missing_key_fails_before_it_reads_the_data(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, site, "train", "absent.csv", "--model", "pca", "--name", "x", "--sign", "absent.key")
    assert code == 2
    assert err == "elbo: error: cannot read absent.key: No such file or directory\n"


def test_keygen_prints_the_public_key_and_never_the_private_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = in_process(capsys, "keygen", str(tmp_path / "key"), "--comment", "ops\nteam")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == (tmp_path / "key.pub").read_text().strip()
    assert out.splitlines()[-1].endswith(" ops team")
    secret = (tmp_path / "key").read_text()
    assert not any(line in out for line in secret.splitlines())
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    code, out, err = in_process(capsys, "keygen", str(tmp_path / "key"))
    assert (code, out) == (2, "")
    assert "a key is never overwritten" in err
    assert (tmp_path / "key").read_text() == secret


def test_sign_warns_if_other_users_can_read_the_private_key(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "release").chmod(0o644)
    code, _, err = run(capsys, site, "sign", "hosts", "--key", str(site / "release"))
    assert code == 0
    assert "chmod 600" in err


def test_sign_prints_what_it_signed(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import hashlib

    path = publish(site / "a", name="other")
    code, out, err = run(capsys, site, "sign", "hosts@1", "other", "--key", str(site / "release"))
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [["signed", "hosts@1"], ["signed", "other@1"]]
    assert out.strip().endswith(hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("key", ["absent", "train.csv", "release.pub"])
def test_sign_with_a_file_that_is_no_private_key_fails_in_one_line(
    site: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    code, out, err = run(capsys, site, "sign", "hosts", "--key", str(site / key))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert str(site / key) in err


@pytest.mark.parametrize("change", CHANGES)
def test_verify_and_list_report_each_version_that_is_not_trusted(
    site: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    make, reason = CHANGES[change]
    make(site / "a" / "hosts" / "1" / "model.pt")
    keys = (site / "release.pub").read_text().strip()
    code, out, err = run(capsys, site, "verify", keys=keys)
    assert code == 1
    assert out.startswith("artifact_untrusted: ")
    assert reason in out
    assert err == "1 of 1 artifacts are not trusted\n"
    code, out, _ = run(capsys, site, "list", "--json", keys=keys)
    (listed,) = json.loads(out)
    assert (code, listed["status"], listed["signed_by"]) == (0, "untrusted", None)
    assert reason in listed["error"]
    code, out, _ = run(capsys, site, "list", keys=keys)
    assert reason in out.splitlines()[-1]
    assert "newest" in run(capsys, site, "list")[1]


@pytest.mark.parametrize("name", ["score", "evaluate", "calibrate"])
@pytest.mark.parametrize("state", ["signed", "unsigned", "copied to the next version"])
def test_command_that_runs_a_model_refuses_one_that_is_not_trusted(
    site: Path, capsys: pytest.CaptureFixture[str], name: str, state: str
) -> None:
    recent = write(site / "recent.csv", two_factor_rows(200, seed=3))
    path = site / "a" / "hosts" / "1" / "model.pt"
    if state == "unsigned":
        signature_of(path).unlink()
    elif state != "signed":
        shutil.copytree(path.parent, path.parents[1] / "2")
    options = ["--runs", str(site / "runs")] if name == "calibrate" else []
    code, out, err = run(capsys, site, name, "hosts", recent, *options, keys=str(site / "release.pub"))
    if state == "signed":
        assert code == 0, err
        return
    assert (code, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("elbo: error")]
    assert ("is not signed" if state == "unsigned" else "is for hosts@1, not for hosts@2") in line
    assert versions(site / "a", "hosts")[-1] == (1 if state == "unsigned" else 2)


def test_trusted_keys_come_from_the_environment_too(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    signature_of(site / "a" / "hosts" / "1" / "model.pt").unlink()
    monkeypatch.setenv("ELBO_TRUSTED_KEYS", str(site / "release.pub"))
    monkeypatch.setenv("ELBO_ARTIFACTS", str(site / "a"))
    code, out, err = in_process(capsys, "score", "hosts", str(site / "train.csv"))
    assert (code, out) == (1, "")
    assert "is not signed" in err


@pytest.mark.parametrize("is_signed_again", [False, True])
def test_recalibrated_version_needs_a_signature_of_its_own(
    site: Path, capsys: pytest.CaptureFixture[str], is_signed_again: bool
) -> None:
    recent = write(site / "recent.csv", two_factor_rows(200, seed=3))
    options = ["--sign", str(site / "release")] if is_signed_again else []
    keys = str(site / "release.pub")
    code, _, err = run(capsys, site, "calibrate", "hosts", recent, "--runs", str(site / "r"), *options, keys=keys)
    assert code == 0, err
    assert ("hosts@2 is not signed, but an older version is" in err) is not is_signed_again
    assert run(capsys, site, "verify", "hosts@2", keys=keys)[0] == (0 if is_signed_again else 1)
    if not is_signed_again:
        assert run(capsys, site, "sign", "hosts@2", "--key", str(site / "release"))[0] == 0
        assert run(capsys, site, "verify", keys=keys)[0] == 0


def test_version_keeps_its_signature_when_it_is_withdrawn_and_restored(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(site / "a", name="hosts")
    keys = str(site / "release.pub")
    assert run(capsys, site, "sign", "hosts", "--key", str(site / "release"))[0] == 0
    assert run(capsys, site, "rollback", "hosts")[0] == 0
    listed = json.loads(run(capsys, site, "list", "--json", keys=keys)[1])
    assert [(each["version"], each["status"]) for each in listed] == [(2, "withdrawn"), (1, "newest")]
    assert all(each["signed_by"].startswith("release (SHA256:") for each in listed)
    assert run(capsys, site, "rollback", "hosts", "2")[0] == 0
    assert run(capsys, site, "verify", keys=keys)[0] == 0


def test_verify_without_trusted_keys_says_what_is_missing(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, site, "verify")
    assert (code, out) == (2, "")
    assert "ELBO_TRUSTED_KEYS" in err


def test_training_prints_nothing_about_signatures_if_no_version_is_signed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "train.csv", two_factor_rows(300, seed=0))
    options = ["--model", "pca", "--name", "m", "--latents", "2", "--runs", str(tmp_path / "r")]
    code, _, err = in_process(capsys, "train", data, *options, "--artifacts", str(tmp_path / "a"))
    assert code == 0
    assert "signed" not in err
    assert not is_signed(tmp_path / "a" / "m" / "1" / "model.pt")


def test_server_loads_a_version_when_it_is_signed_and_drops_it_when_the_key_is_removed(site: Path) -> None:
    path = site / "a" / "hosts" / "1" / "model.pt"
    signature_of(path).rename(site / "signature")
    second = new_key(site, "second")
    trusted = site / "trusted"
    trusted.write_text(f"# keys of the release team\n{(site / 'release.pub').read_text()}")
    server = ServerProcess(site / "a", TRUSTED_KEYS=trusted)
    try:
        with server.client() as client:
            (failure,) = client.get("/models").json()["failures"]
            assert (failure["name"], failure["code"]) == ("hosts", "artifact_untrusted")
            assert "is not signed" in failure["detail"]
            assert client.get("/readyz").status_code == 503
            (site / "signature").rename(signature_of(path))
            server.wait_for_log("serving hosts@1")
            (model,) = client.get("/models").json()["models"]
            assert model["signed_by"].startswith("release (SHA256:")
            trusted.write_text(second.public.line)
            server.wait_for_log("no longer serving hosts@1")
            assert client.get("/readyz").status_code == 503
        assert server.stop() == 0
    finally:
        server.close()


@pytest.mark.parametrize("setting", ["absent", "train.csv", "release", "ssh-ed25519 AAAA"])
def test_server_does_not_start_if_the_trusted_keys_cannot_be_read(site: Path, setting: str) -> None:
    value = setting if setting.startswith("ssh") else str(site / setting)
    environment = {"ELBO_TRUSTED_KEYS": value, "ELBO_ARTIFACTS": str(site / "a"), "ELBO_PORT": "0"}
    result = command("serve", environment=environment)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("elbo: error")]
    assert "PRIVATE" not in result.stderr + result.stdout
    assert (value if setting != "ssh-ed25519 AAAA" else "ELBO_TRUSTED_KEYS") in line
