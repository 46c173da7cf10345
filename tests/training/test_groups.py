"""`elbo train --per-group`: a model for each host, as if it had been trained from the rows of this host alone."""

import re
from pathlib import Path

import pytest

from models.manifest import Manifest, read_manifest
from tests.commands import in_process
from tests.hosts_table import write_hosts
from training.errors import FitError
from training.groups import name_models

pytestmark = pytest.mark.slow

OPTIONS = ["--model", "pca", "--latents", "2", "--name", "hosts", "--time", "time", "--group", "host"]


def folders(path: Path) -> list[str]:
    """Return the options for the folders of a run below `path`."""
    return ["--artifacts", str(path / "artifacts"), "--runs", str(path / "runs")]


def manifest_of(path: Path, name: str, version: int = 1) -> Manifest:
    """Return the manifest of a version in the artifact folder below `path`."""
    return read_manifest(path / "artifacts" / name / str(version) / "model.pt")


def lines_of(out: str) -> dict[str, list[str]]:
    """Return the cells of the printed table by group."""
    lines = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    return {line[0]: line for line in lines if len(line) > 5}


def test_groups_train_as_if_alone_and_only_those_with_new_rows_train_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"a": 200, "b 1": 200, "short": 6}
    data = write_hosts(tmp_path / "all.csv", counts)
    command = ["train", data, *OPTIONS, *folders(tmp_path), "--per-group"]
    code, out, err = in_process(capsys, *command)
    assert code == 0, err
    assert "1/3 hosts-a: published as hosts-a@1" in err
    alone = tmp_path / "alone"
    only_b = write_hosts(tmp_path / "b.csv", {"b 1": 200}, {"b 1": 1})
    assert in_process(capsys, "train", only_b, *OPTIONS, *folders(alone), "--no-plots")[0] == 0
    expected, found = manifest_of(alone, "hosts"), manifest_of(tmp_path, "hosts-b-1")
    assert (found.weights_sha256, found.groups, found.data.fingerprint) == (
        expected.weights_sha256,
        ["b 1"],
        expected.data.fingerprint,
    )
    assert found.metrics == expected.metrics
    table = lines_of(out)
    assert [table[group][1] for group in counts] == ["200", "200", "6"]
    assert "published as hosts-b-1@1: there is no served version" in table["b 1"][-1]
    assert table["short"][-1].startswith("not trained: ")
    assert "got 6" in table["short"][-1]
    assert "3 groups: 2 published, 1 not trained" in out
    page = (tmp_path / "runs" / "hosts" / "groups.html").read_text()
    assert page.count("<tr") == 4
    assert "hosts-b-1@1" in page

    # Host a has other rows, of the same kind: its new model is no better, and b has the same rows as before.
    write_hosts(tmp_path / "all.csv", counts, {"a": 7, "b 1": 1, "short": 2})
    code, out, err = in_process(capsys, *command)
    assert code == 0, err
    table = lines_of(out)
    assert table["a"][-1] == (
        "not published: it is not significantly better than the served version on the held-out rows"
    )
    assert table["b 1"][-1] == "not published: hosts-b-1@1 was trained from the same rows with the same options"
    assert [path.name for path in (tmp_path / "artifacts" / "hosts-b-1").iterdir()] == ["1"]
    code, out, err = in_process(capsys, *command, "--force")
    assert "2 published" in out, err
    assert manifest_of(tmp_path, "hosts-a", 2).data.fingerprint != manifest_of(tmp_path, "hosts-a").data.fingerprint


def test_better_model_of_a_group_replaces_a_worse_one_and_windows_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_hosts(tmp_path / "all.csv", {"a": 600})
    command = ["train", data, *OPTIONS, *folders(tmp_path), "--per-group"]
    assert in_process(capsys, *command, "--latents", "1")[0] == 0
    code, out, err = in_process(capsys, *command)
    assert code == 0, err
    assert "published as hosts-a@2: it beats the served version" in out
    code, out, err = in_process(capsys, *command, "--window", "3", "--scale-by-group")
    assert code == 0, err
    assert "published as hosts-a@3: it was not compared with the served version" in out
    manifest = manifest_of(tmp_path, "hosts-a", 3)
    assert manifest.window is not None
    assert (manifest.window.rows, manifest.training["scale_by_group"]) == (3, True)
    assert "1 unchanged" in in_process(capsys, *command, "--window", "3", "--scale-by-group")[1]


def test_warning_about_the_model_of_a_group_is_in_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_hosts(tmp_path / "all.csv", {"a": 40})
    code, out, err = in_process(capsys, "train", data, *OPTIONS, *folders(tmp_path), "--per-group")
    assert code == 0, err
    assert "published as hosts-a@1" in out
    assert "WARNING: no row is called anomalous at alpha 0.05" in out


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["a b", "a-b"], "the groups 'a b' and 'a-b' both give the name 'hosts-a-b'"),
        (["a", "///"], "'///' gives the name 'hosts-'"),
        (["x" * 60], "which is no name of a model"),
    ],
)
def test_groups_without_a_name_of_their_own_are_refused(groups: list[str], message: str) -> None:
    with pytest.raises(FitError, match=re.escape(message)):
        name_models("hosts", groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time", "time", "--group", "host", "--per-group", "--resume"], "--resume is not for --per-group"),
        (
            ["--time", "time", "--group", "host", "--per-group", "--sweep", "latents=1"],
            "--per-group is not for --sweep",
        ),
        (["--per-group"], "--per-group trains a model for each value of the column --group: add --group and --time"),
        (["--time", "time", "--group", "host", "--per-group"], "no model of a group could be trained"),
        (["--time", "time", "--group", "host", "--per-group", "--name", "h" * 64], "choose a shorter --name"),
    ],
)
def test_options_that_are_not_for_groups_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_hosts(tmp_path / "all.csv", {"a": 6, "b": 6})
    command = ["train", data, "--model", "pca", "--name", "hosts", *folders(tmp_path), *options]
    code, _, err = in_process(capsys, *command)
    assert code != 0
    assert message in err
    assert list((tmp_path / "artifacts").glob("*/*")) == []


def test_served_version_of_a_group_that_cannot_be_loaded_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_hosts(tmp_path / "all.csv", {"a": 200, "b": 200})
    command = ["train", data, *OPTIONS, *folders(tmp_path), "--per-group"]
    assert in_process(capsys, *command)[0] == 0
    write_hosts(tmp_path / "all.csv", {"a": 200, "b": 200}, {"a": 7, "b": 8})
    (tmp_path / "artifacts" / "hosts-b" / "1" / "model.pt").write_bytes(b"half a file")
    code, out, err = in_process(capsys, *command)
    assert code == 0, err
    table = lines_of(out)
    assert table["b"][-1].startswith("published as hosts-b@2: it was not compared with the served version: that cannot")
    assert table["a"][-1].startswith("not published: it is not significantly better")
