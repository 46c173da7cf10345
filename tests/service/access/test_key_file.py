"""The file of API keys, and the commands that change it."""

import hashlib
import json
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from elbo import cli
from service.access import key_file
from service.access.key_file import MAX_KEYS, ApiKey, KeyFileError
from service.access.scopes import Scope
from tests.data import ROOT

HASH = hashlib.sha256(b"elbo_x").hexdigest()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run `elbo key` with `arguments`. Return the exit code and the two outputs."""
    code = 0
    try:
        cli.main(["key", *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_added_key_is_printed_once_and_only_its_hash_is_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.toml"
    code, out, err = run(capsys, "add", "shop", "--scope", "infer", "--scope", "write", "--file", str(file))
    value = out.strip()
    assert code == 0
    assert re.fullmatch(r"elbo_[\w-]{43}", value)
    assert value not in err
    text = file.read_text()
    assert value not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]
    keys = key_file.read(file)
    assert keys["shop"].sha256 == hashlib.sha256(value.encode()).hexdigest()
    assert keys["shop"].scopes == {Scope.INFER, Scope.WRITE}
    assert len(text.splitlines()) == 1


def test_file_that_is_cut_off_anywhere_grants_no_key_more_than_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key_file.add(file, "first", ApiKey(sha256=HASH, scopes={Scope.INFER}, requests_per_second=25, burst=100))
    key_file.add(file, "second", ApiKey(sha256="0" * 64, scopes={Scope.ADMIN, Scope.METRICS}, concurrent_requests=12))
    text, whole = file.read_text(), key_file.read(file)
    found = set()
    for end in range(len(text)):
        try:
            keys = key_file.parse(text[:end], file)
        except KeyFileError:
            continue
        assert keys.items() <= whole.items()
        found.add(len(keys))
    assert found == {0, 1, 2}


def test_limits_of_an_added_key_are_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.toml"
    limits = ["--requests-per-second", "2.5", "--burst", "7", "--rows-per-second", "90", "--concurrent-requests", "3"]
    run(capsys, "add", "shop", "--scope", "infer", *limits, "--file", str(file))
    expected = {"requests_per_second": 2.5, "burst": 7, "rows_per_second": 90, "concurrent_requests": 3}
    assert key_file.read(file)["shop"].limits == expected
    code, out, _ = run(capsys, "list", "--json", "--file", str(file))
    assert code == 0
    assert json.loads(out) == {"shop": {"scopes": ["infer"], **expected}}
    _, out, _ = run(capsys, "list", "--file", str(file))
    shown = "shop  infer  requests_per_second 2.5  burst 7  rows_per_second 90  concurrent_requests 3"
    assert out.strip() == shown


def test_removal_deletes_one_line_and_keeps_comments_and_the_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.toml"
    for name in ("one", "on", "e"):
        run(capsys, "add", name, "--scope", "infer", "--file", str(file))
    file.write_text("# ours\n" + file.read_text())
    file.chmod(0o640)
    before = file.read_text().splitlines()
    code, out, _ = run(capsys, "remove", "on", "--file", str(file))
    assert (code, out.strip()) == (0, f"removed on from {file}")
    assert file.read_text().splitlines() == [line for line in before if not line.startswith("on ")]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "shop", "--scope", "infer"], "already has a key shop"),
        (["add", "a b", "--scope", "infer"], "expected a name"),
        (["add", "elbo_abc", "--scope", "infer"], "does not begin with elbo_"),
        (["add", "x", "--scope", "infer", "--burst", "3"], "burst: expected requests_per_second beside it"),
        (["add", "x", "--scope", "infer", "--burst", "0"], "--burst: input should be greater"),
        (["add", "x", "--scope", "infer", "--requests-per-second", "nan"], "--requests-per-second"),
        (["add", "x", "--scope", "root"], "is not one of 'infer', 'write', 'metrics', 'admin'"),
        (["add", "x"], "Missing option '--scope'"),
        (["remove", "nobody"], "has no key nobody: expected one of shop"),
    ],
)
def test_command_that_cannot_be_carried_out_says_why_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    file = tmp_path / "keys.toml"
    run(capsys, "add", "shop", "--scope", "infer", "--file", str(file))
    before = file.read_bytes()
    code, out, err = run(capsys, *arguments, "--file", str(file))
    assert code == 2
    assert message in " ".join(err.split())
    assert out == ""
    assert file.read_bytes() == before


def test_removal_of_a_key_is_refused_if_its_table_has_several_lines(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[shop]\nsha256 = "{HASH}"\nscopes = ["infer"]\n')
    assert key_file.read(file)["shop"].scopes == {Scope.INFER}
    with pytest.raises(KeyFileError, match="remove it with an editor"):
        key_file.remove(file, "shop")
    assert "shop" in key_file.read(file)


def test_keys_that_are_added_at_the_same_time_are_all_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"

    def add(number: int) -> None:
        key = ApiKey(sha256=key_file.hash_of(str(number)), scopes=frozenset({Scope.INFER}))
        key_file.add(file, f"key{number}", key)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(key_file.read(file)) == 20


def test_file_behind_a_symbolic_link_is_changed_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "keys.toml", tmp_path / "keys.toml"
    link.symlink_to(real)
    key_file.add(link, "shop", ApiKey(sha256=HASH, scopes=frozenset({Scope.INFER})))
    assert link.is_symlink()
    assert list(key_file.read(real)) == ["shop"]


def entry(**fields: object) -> str:
    values = {"sha256": HASH, "scopes": ["infer"], **fields}
    return "{" + ", ".join(f"{name} = {json.dumps(value)}" for name, value in values.items()) + "}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shop = {sha256", "expected a TOML file"),
        ("shop = 3", "shop: "),
        (f"shop = {entry(sha256='abc')}", "shop.sha256: string should match pattern"),
        (f"shop = {entry(sha256=HASH.upper())}", "shop.sha256"),
        (f"shop = {entry(scopes=[])}", "shop.scopes"),
        (f"shop = {entry(scopes=['everything'])}", "shop.scopes"),
        (f"shop = {entry(scope=['infer'])}", "shop.scope: extra inputs are not permitted"),
        (f"shop = {entry(burst=3)}", "burst: expected requests_per_second beside it"),
        (f"shop = {entry(concurrent_requests=0)}", "shop.concurrent_requests"),
        (f"shop = {entry()}\nshop = {entry()}", "expected a TOML file"),
        (f"one = {entry()}\nother = {entry()}", "one and other have the same sha256"),
        (f'"a\\nb" = {entry()}', "string should match pattern"),
        (
            "\n".join(f"k{i} = {entry(sha256=f'{i:064x}')}" for i in range(MAX_KEYS + 1)),
            "at most 100 API keys, got 101",
        ),
    ],
)
def test_invalid_file_is_refused_with_the_place_of_the_fault(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(KeyFileError) as caught:
        key_file.read(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text", ["elbo_s3cr3t = 1", "shop = {sha256 = 'elbo_s3cr3t', scopes = ['infer']}", "elbo_s3cr3t"]
)
def test_value_of_a_key_that_was_written_into_the_file_is_not_in_the_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(KeyFileError) as caught:
        key_file.read(file)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys.toml"
    if content:
        file.write_bytes(content)
    with pytest.raises(KeyFileError, match=r"cannot read the API keys|UTF-8"):
        key_file.read(file)


def test_scopes_of_the_command_are_those_of_the_server() -> None:
    assert [scope.value for scope in cli.KeyScope] == [scope.value for scope in Scope]


def test_key_is_made_without_importing_torch(tmp_path: Path) -> None:
    code = "import sys; from elbo import cli; cli.main(['key', 'add', 'a', '--scope', 'infer', '--file', sys.argv[1]])"
    script = f"try:\n    {code}\nfinally:\n    print('torch' in sys.modules)"
    file = tmp_path / "keys.toml"
    result = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "False"
