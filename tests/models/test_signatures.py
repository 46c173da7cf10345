"""Signatures: an artifact loads only under the name and version for which a trusted key has signed it."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from models import artifact
from models.errors import ArtifactCorrupt, ArtifactUntrusted, KeyInvalid
from models.keys import PrivateKey, PublicKey, create_key, parse_public_keys, read_private_key
from models.signatures import TrustedKeys, TrustedKeySource, identify, sign, trusted_keys, write_signature
from tests.conftest import require
from tests.models.publishing import publish
from tests.models.signing import CHANGES, alter, copy_version, edit_envelope, new_key, signature_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of an unsigned artifact, model@1."""
    return publish(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture
def key(tmp_path: Path) -> PrivateKey:
    return new_key(tmp_path / "keys")


@pytest.fixture
def path(published: Path, tmp_path: Path, key: PrivateKey) -> Path:
    """Return the path of model@1, signed by `key`."""
    copy = tmp_path / "artifacts" / "model" / "1" / published.name
    shutil.copytree(published.parent, copy.parent)
    sign(copy, key)
    return copy


def trust(*keys: PrivateKey) -> TrustedKeys:
    return TrustedKeys(tuple(key.public for key in keys))


def test_signed_artifact_loads_and_names_the_key(path: Path, key: PrivateKey) -> None:
    assert artifact.load(path, keys=trust(key)).signed_by == key.public


@pytest.mark.parametrize("change", CHANGES)
def test_artifact_does_not_load_if_its_signature_is_missing_or_wrong(path: Path, key: PrivateKey, change: str) -> None:
    make, reason = CHANGES[change]
    make(path)
    with pytest.raises(ArtifactUntrusted, match=reason):
        artifact.load(path, keys=trust(key))
    artifact.load(path)  # without trusted keys, signatures are not read


@pytest.mark.parametrize("member", ["manifest.json", "data.pkl", "data/0", ".py", "version"])
def test_artifact_with_a_changed_member_does_not_load_even_if_the_file_was_sealed_again(
    path: Path, key: PrivateKey, member: str
) -> None:
    alter(path, member)
    with pytest.raises(ArtifactUntrusted, match="altered after it was signed"):
        artifact.load(path, keys=trust(key))


def test_artifact_does_not_load_if_any_one_of_its_bytes_was_changed(path: Path, key: PrivateKey) -> None:
    content, keys = path.read_bytes(), trust(key)
    for place in range(0, len(content), len(content) // 50):
        changed = bytearray(content)
        changed[place] ^= 0x10
        with pytest.raises(ArtifactUntrusted):
            keys.verify(bytes(changed), path, "model", 1)
    for other in (b"", content[:-1], content + b"\0"):
        with pytest.raises(ArtifactUntrusted):
            keys.verify(other, path, "model", 1)


@pytest.mark.parametrize(("name", "version"), [("model", 2), ("other", 1), ("model", 11)])
def test_signature_is_not_valid_for_another_name_or_version(
    path: Path, key: PrivateKey, name: str, version: int
) -> None:
    copy = copy_version(path, name, version)
    with pytest.raises(ArtifactUntrusted, match=f"is for model@1, not for {name}@{version}"):
        artifact.load(copy, keys=trust(key))


def test_older_version_cannot_be_passed_off_as_the_newest_one_by_a_symbolic_link(path: Path, key: PrivateKey) -> None:
    (path.parents[1] / "2").symlink_to("1")
    with pytest.raises(ArtifactUntrusted, match="is for model@1, not for model@2"):
        artifact.load(path.parents[1] / "2" / path.name, keys=trust(key))


def test_path_with_the_link_latest_loads_the_signed_version_behind_the_link(path: Path, key: PrivateKey) -> None:
    (path.parents[1] / "latest").symlink_to("1")
    assert artifact.load(path.parents[1] / "latest" / path.name, keys=trust(key)).signed_by == key.public


def test_signature_of_another_version_is_not_valid_even_if_the_content_is_the_same(path: Path, key: PrivateKey) -> None:
    copy = copy_version(path, "model", 2)
    sign(copy, key)
    shutil.copy(signature_of(copy), signature_of(path))
    with pytest.raises(ArtifactUntrusted, match="is for model@2, not for model@1"):
        artifact.load(path, keys=trust(key))


def test_signature_of_an_earlier_content_of_the_same_version_is_not_valid(path: Path, key: PrivateKey) -> None:
    alter(path, "data/0")
    sign(path, key)
    shutil.copy(publish(path.parents[2], kind="ae"), path)
    with pytest.raises(ArtifactUntrusted, match="altered after it was signed"):
        artifact.load(path, keys=trust(key))


def test_artifact_in_a_folder_without_name_and_version_does_not_load(path: Path, key: PrivateKey) -> None:
    folder = path.parents[2] / "elsewhere"
    shutil.copytree(path.parent, folder)
    with pytest.raises(ArtifactUntrusted, match="no name and version"):
        artifact.load(folder / path.name, keys=trust(key))
    with pytest.raises(ArtifactUntrusted, match="no name and version"):
        identify(Path("/model.pt"))


def test_signatures_of_several_keys_are_kept_and_one_trusted_key_is_enough(
    path: Path, key: PrivateKey, tmp_path: Path
) -> None:
    second, third = new_key(tmp_path / "keys", "second"), new_key(tmp_path / "keys", "third")
    sign(path, second)
    sign(path, second)
    assert artifact.load(path, keys=trust(key)).signed_by == key.public
    assert artifact.load(path, keys=trust(third, second)).signed_by == second.public
    with pytest.raises(ArtifactUntrusted, match=r"is signed by SHA256:\S+, SHA256:\S+, and ELBO_TRUSTED_KEYS trusts"):
        artifact.load(path, keys=trust(third))


def test_signed_text_that_is_not_json_is_refused_as_a_signature_of_another_release(path: Path, key: PrivateKey) -> None:
    write_signature(signature_of(path), b"no JSON", key)
    with pytest.raises(ArtifactUntrusted, match="the signature is of another release of Elbo"):
        artifact.load(path, keys=trust(key))


def test_signing_a_changed_file_drops_the_signatures_of_the_old_content(
    path: Path, key: PrivateKey, tmp_path: Path
) -> None:
    second = new_key(tmp_path / "keys", "second")
    shutil.copy(publish(tmp_path / "more", kind="ae"), path)
    sign(path, second)
    with pytest.raises(ArtifactUntrusted, match="is signed by SHA256"):
        artifact.load(path, keys=trust(key))


def test_invalid_signature_of_a_trusted_key_does_not_hide_a_valid_one(
    path: Path, key: PrivateKey, tmp_path: Path
) -> None:
    second = new_key(tmp_path / "keys", "second")
    sign(path, second)
    edit_envelope(path, lambda envelope: envelope["signatures"][0].update(sig="AAAA"))
    assert artifact.load(path, keys=trust(key, second)).signed_by == second.public


def test_file_that_is_swapped_after_it_was_verified_is_not_used(path: Path, key: PrivateKey, tmp_path: Path) -> None:
    loaded = artifact.load(path, keys=trust(key))
    other = publish(tmp_path / "more")
    content = bytearray(other.read_bytes())
    path.write_bytes(content)
    with pytest.raises(ArtifactCorrupt, match="has changed since it was loaded"):
        artifact.thaw(loaded)
    with pytest.raises(ArtifactCorrupt, match="has changed since it was loaded"):
        artifact.read_trained_rows(loaded)


def test_published_artifact_is_signed_from_the_moment_at_which_its_version_appears(
    tmp_path: Path, key: PrivateKey, published: Path
) -> None:
    root = tmp_path / "artifacts"
    shutil.copytree(published.parent, root / "model" / "1")
    loaded = artifact.load(root / "model" / "1" / "model.pt")
    (root / "model" / "2").mkdir()  # a folder without an artifact: the next number is taken
    (root / "model" / "2" / "file").touch()
    path = artifact.publish(artifact.thaw(loaded), loaded.manifest, root, key=key)
    assert path.parent.name == "3"
    assert artifact.load(path, keys=trust(key)).signed_by == key.public
    assert stat.S_IMODE(signature_of(path).stat().st_mode) & 0o444 == 0o444


def test_sign_refuses_a_damaged_artifact(path: Path, key: PrivateKey) -> None:
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactCorrupt):
        sign(path, key)


def test_create_key_writes_a_private_key_that_only_its_owner_can_read_and_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "key"
    old = os.umask(0)
    try:
        public = create_key(path, "ops team")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (tmp_path / "key.pub").read_text() == f"{public.line}\n"
    private = path.read_bytes()
    for existing in (path, tmp_path / "other.pub"):
        existing.touch()
        with pytest.raises(KeyInvalid, match="never overwritten"):
            create_key(existing.with_suffix(""), "")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(KeyInvalid, match="never overwritten"):
        create_key(tmp_path / "link", "")
    assert path.read_bytes() == private
    assert sorted(each.name for each in tmp_path.iterdir()) == ["key", "key.pub", "link", "other.pub"]


def test_text_of_a_private_key_shows_only_the_public_key(key: PrivateKey, tmp_path: Path) -> None:
    secret = (tmp_path / "keys" / "release").read_text().splitlines()[2]
    for text in (repr(key), str(key), f"{key}", repr([key])):
        assert key.public.fingerprint in text
        assert secret not in text
        assert "Ed25519PrivateKey" not in text


def test_fingerprint_and_public_key_are_those_of_ssh_keygen(tmp_path: Path) -> None:
    require(shutil.which("ssh-keygen"), "ssh-keygen is not installed")
    public = create_key(tmp_path / "key", "ops")
    listed = subprocess.run(["ssh-keygen", "-lf", tmp_path / "key.pub"], capture_output=True, text=True, check=True)
    assert listed.stdout.split()[:3] == ["256", public.fingerprint, "ops"]
    derived = subprocess.run(["ssh-keygen", "-y", "-f", tmp_path / "key"], capture_output=True, text=True, check=True)
    assert derived.stdout.split()[:2] == public.line.split()[:2]


@pytest.mark.parametrize("tool", ["ssh-keygen", "openssl"])
def test_keys_that_other_tools_create_can_sign(published: Path, tmp_path: Path, tool: str) -> None:
    require(shutil.which(tool), f"{tool} is not installed")
    path, file = tmp_path / "model" / "1" / published.name, tmp_path / "key"
    shutil.copytree(published.parent, path.parent)
    command = {
        "ssh-keygen": ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)],
        "openssl": ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(file)],
    }[tool]
    subprocess.run(command, check=True, capture_output=True)
    key = read_private_key(file)
    sign(path, key)
    keys = trusted_keys(str(tmp_path / "key.pub")) if tool == "ssh-keygen" else trust(key)
    assert artifact.load(path, keys=keys).signed_by == key.public


def test_signature_is_a_standard_envelope_that_other_programs_can_verify(path: Path, key: PrivateKey) -> None:
    """Verify with the formula of the DSSE standard, written out here, and with the bare ed25519 function."""
    import base64
    import hashlib
    import json

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    envelope = json.loads(signature_of(path).read_bytes())
    kind, text = envelope["payloadType"].encode(), base64.b64decode(envelope["payload"])
    encoded = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(text)).encode(), text])
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    Ed25519PublicKey.from_public_bytes(key.public.raw).verify(signature, encoded)
    content = path.read_bytes()
    files = {"model.pt": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    assert json.loads(text) == {"name": "model", "version": 1, "files": files}


def secret_line(tmp_path: Path) -> str:
    create_key(tmp_path / "pasted", "")
    return (tmp_path / "pasted").read_text()


PUBLIC = PublicKey(bytes(range(32)), "someone").line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no key"),
        ("# only a comment\n\n", "has no key"),
        ("nonsense", "line 1 is not an ed25519 public key"),
        (f"{PUBLIC}\nssh-rsa AAAAB3NzaC1yc2E= x", "line 2 is not an ed25519 public key"),
        (f"{PUBLIC}\n\nssh-ed25519", "line 3 is not an ed25519 public key"),
        ("ssh-ed25519 AAAA x", "the key in line 1 is damaged"),
        (PUBLIC.replace("AAAAC3", "AAAAC4"), "the key in line 1 is damaged"),
        (PUBLIC.replace("ssh-ed25519 ", "ssh-ed25519 é"), "the key in line 1 is damaged"),
        ("\0\1\2\n", "line 1 is not an ed25519 public key"),
    ],
)
def test_file_of_trusted_keys_that_is_not_valid_is_refused_with_its_line(
    tmp_path: Path, text: str, reason: str
) -> None:
    file = tmp_path / "trusted"
    file.write_text(text)
    with pytest.raises(KeyInvalid, match=reason):
        trusted_keys(str(file))


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "huge"])
def test_file_of_trusted_keys_that_cannot_be_read_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "trusted"
    match kind:
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "huge":
            file.write_text("#" * 2_000_000)
    with pytest.raises(KeyInvalid, match=str(file)):
        trusted_keys(str(file))


def test_message_about_a_file_of_keys_contains_no_part_of_a_private_key(tmp_path: Path) -> None:
    text = secret_line(tmp_path)
    file = tmp_path / "trusted"
    file.write_text(text)
    for setting in (str(file), "# x\n" + text):
        with pytest.raises(KeyInvalid) as caught:
            trusted_keys(setting)
        assert not any(line and line in str(caught.value) for line in text.splitlines())


def test_list_of_trusted_keys_may_have_comments_commas_and_line_breaks() -> None:
    first, second = PublicKey(b"a" * 32, "ops team, night"), PublicKey(b"b" * 32)
    lines = ["# release keys", "", f"  {first.line}  ", second.line, first.line]
    assert parse_public_keys(lines, "x") == (first, second)
    assert str(parse_public_keys(lines, "x")[0]).startswith("ops team, night (SHA256:")
    for separator in (",", "\n", " , "):
        inline = trusted_keys(separator.join([PublicKey(first.raw, "ops").line, second.line]))
        assert inline is not None
        assert inline.keys == (first, second)
    assert trusted_keys("") is trusted_keys(None) is None


def test_comment_of_a_key_cannot_control_the_terminal() -> None:
    (key,) = parse_public_keys([PublicKey(b"a" * 32).line + " \x1b[2Jx" + "y" * 500], "x")
    assert str(key).isprintable()
    assert len(key.comment) <= 100


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "got something else"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "got something else"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n", "got something else"),
        (PUBLIC.encode(), "got an ed25519 public key"),
    ],
)
def test_file_that_is_no_private_key_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(KeyInvalid, match=reason):
        read_private_key(file)


@pytest.mark.parametrize("options", [["-t", "ed25519", "-N", "secret"], ["-t", "rsa", "-N", ""]])
def test_private_key_with_a_passphrase_or_of_another_kind_is_refused(tmp_path: Path, options: list[str]) -> None:
    require(shutil.which("ssh-keygen"), "ssh-keygen is not installed")
    file = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", *options, "-f", str(file)], check=True, capture_output=True)
    with pytest.raises(KeyInvalid, match="passphrase" if "secret" in options else "got something else"):
        read_private_key(file)


def test_key_source_follows_its_file_and_keeps_the_keys_if_the_file_becomes_invalid(tmp_path: Path) -> None:
    first, second = PublicKey(b"a" * 32), PublicKey(b"b" * 32)
    file = tmp_path / "trusted"
    file.write_text(first.line)
    source = TrustedKeySource(str(file))
    source.refresh()
    assert source.keys.keys == (first,)
    for broken in ("", "nonsense", None):
        if broken is None:
            file.unlink()
        else:
            file.write_text(broken)
        for _ in range(2):
            with pytest.raises(KeyInvalid):
                source.refresh()
        assert source.keys.keys == (first,)
    file.write_text(second.line)
    source.refresh()
    assert source.keys.keys == (second,)


def test_reading_and_verifying_signatures_does_not_import_torch(path: Path, tmp_path: Path) -> None:
    import sys

    program = (
        "import sys; from pathlib import Path; from models.signatures import trusted_keys; "
        "path = Path(sys.argv[1]); trusted_keys(sys.argv[2]).verify(path.read_bytes(), path, 'model', 1); "
        "sys.exit('torch' in sys.modules)"
    )
    arguments = [sys.executable, "-c", program, str(path), str(tmp_path / "keys" / "release.pub")]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")


def test_signature_does_not_change_what_a_model_computes(path: Path, key: PrivateKey) -> None:
    x = torch.randn(3, 5)
    signed, plain = artifact.load(path, keys=trust(key)), artifact.load(path)
    assert torch.equal(signed.module.score(x)[0], plain.module.score(x)[0])
