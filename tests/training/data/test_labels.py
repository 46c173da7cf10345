"""Labels in tables, arrays and folders: which columns hold them, and which labels mean normal."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from tests.commands import in_process
from tests.data import values
from tests.training.manifests import manifest_of
from training.data.table import DataError, Table, read_for_model, read_table

RANDOM = np.random.RandomState(0)


def labelled(path: Path, column: str, labels: list[Any], normal: tuple[str, ...] = ()) -> Table:
    """Write a table with the features a and b and a column of labels, and read it for a model trained on a and b."""
    trained = path.parent / "trained.csv"
    trained.write_text("a,b\n1,2\n3,4\n")
    frame = pl.DataFrame({"a": range(len(labels)), column: labels, "b": [i * i for i in range(len(labels))]})
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path)
    return read_for_model(str(path), manifest_of(read_table(str(trained))), normal=normal)


def flags(table: Table) -> list[int | None]:
    """Return 0 for each normal row, 1 for each anomalous row, None for each row without a label."""
    assert table.normal is not None
    assert table.anomalous is not None
    assert not (table.normal & table.anomalous).any()
    return [0 if n else 1 if a else None for n, a in zip(table.normal, table.anomalous, strict=True)]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    "column", ["label", "Label", "LABELS", "y", "Class", "target", "anomaly", "is_anomaly", "isOutlier", "ground-truth"]
)
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 0], [0, 1, 0]),
        ([1.0, 0.0, 0.0], [1, 0, 0]),
        (["good", "bad", "good"], [0, 1, 0]),
        (["GOOD", "Scratch", "Dent"], [0, 1, 1]),
        (["normal.", "smurf.", "normal."], [0, 1, 0]),
        (["OK", "NOK", "OK"], [0, 1, 0]),
        (["part", "defective", "part"], [0, 1, 0]),
        ([True, False, False], [1, 0, 0]),
        (["yes", "no", "No"], [1, 0, 0]),
        (["none", "scratch", "none"], [0, 1, 0]),
        ([1, -1, 1], [0, 1, 0]),
        ([1, 2, 1], [0, 1, 0]),
        ([0, 7, 0], [0, 1, 0]),
        ([0, 1, None], [0, 1, None]),
        (["bad", "good", None], [1, 0, None]),
    ],
)
def test_labels_that_mean_normal_are_recognised_in_a_table(
    tmp_path: Path, suffix: str, column: str, labels: list[Any], expected: list[int | None]
) -> None:
    table = labelled(tmp_path / f"a{suffix}", column, labels)
    assert flags(table) == expected
    assert values(table).tolist() == [[0, 0], [1, 1], [2, 4]]
    assert " normal (" in table.notes[-1]


@pytest.mark.parametrize(
    "column", ["Machine failure", "Normal/Attack", "Outlier_label", "class label", "gt", "y_true", "defects", "failure"]
)
@pytest.mark.parametrize("labels", [[0, 1, 0], ["b'normal.'", "b'smurf.'", "b'normal.'"], ["OK", "other", "OK"]])
def test_label_column_with_a_less_common_name_is_recognised_and_is_no_feature(
    tmp_path: Path, column: str, labels: list[Any]
) -> None:
    assert flags(labelled(tmp_path / "a.csv", column, labels)) == [0, 1, 0]
    table = read_table(str(tmp_path / "a.csv"))
    assert table.names == ["a", "b"]
    assert any(note.startswith(f"column {column!r} holds labels, so it is not a feature") for note in table.notes)


def test_note_names_a_second_column_of_labels(tmp_path: Path) -> None:
    bits = [0, 1] * 20
    pl.DataFrame({"a": range(1, 41), "label": bits, "attack_label": bits}).write_csv(tmp_path / "a.csv")
    note = "column 'attack_label' is a feature: if it holds labels, add --drop attack_label"
    assert note in read_table(str(tmp_path / "a.csv"), keep=["a"]).notes
    assert note not in read_table(str(tmp_path / "a.csv"), keep=["a", "attack_label"]).notes


@pytest.mark.parametrize("column", ["machine_status", "Status", "condition"])
def test_status_column_holds_labels_only_if_a_text_means_normal(tmp_path: Path, column: str) -> None:
    texts = ["NORMAL", "BROKEN", "NORMAL", "RECOVERING"]
    assert flags(labelled(tmp_path / "a.csv", column, texts)) == [0, 1, 0, 1]
    assert read_table(str(tmp_path / "a.csv")).names == ["a", "b"]
    assert labelled(tmp_path / "b.csv", column, ["up", "down", "up"]).normal is None
    with pytest.raises(DataError, match=f"column '{column}' .text, 'up' in row 0"):
        read_table(str(tmp_path / "b.csv"))
    assert labelled(tmp_path / "c.csv", column, [0, 1, 0]).normal is None
    assert read_table(str(tmp_path / "c.csv")).names == ["a", column, "b"]


@pytest.mark.parametrize("column", ["time_since_failure", "attack", "defects"])
def test_column_of_measurements_stays_a_feature_even_if_it_is_named_like_labels(tmp_path: Path, column: str) -> None:
    frame = pl.DataFrame({"a": RANDOM.uniform(size=40), column: RANDOM.randint(0, 30, 40)})
    frame.write_csv(tmp_path / "a.csv")
    assert read_table(str(tmp_path / "a.csv")).names == ["a", column]


def test_column_of_lists_is_not_read_as_labels_even_if_it_is_called_label(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"a": [1.0, 2.0], "label": [[1], [2]], "b": [3.0, 5.0]}).write_parquet(path)
    with pytest.raises(
        DataError, match=r"column 'label' \(List\(Int64\), \[1\] in row 0\) is not a measurement: add --drop"
    ):
        read_table(str(path))
    kept = read_table(str(path), drop=["label"])
    table = read_for_model(str(path), manifest_of(kept))
    assert (table.labels, table.normal, len(table.x)) == (None, None, 2)


@pytest.mark.parametrize("column", ["normal", "is_normal", "Is OK", "is_good"])
@pytest.mark.parametrize("labels", [[1, 0, 1], [True, False, True], ["yes", "no", "yes"]])
def test_true_means_normal_in_a_column_that_is_called_normal(tmp_path: Path, column: str, labels: list[Any]) -> None:
    assert flags(labelled(tmp_path / "a.csv", column, labels)) == [0, 1, 0]


@pytest.mark.parametrize("labels", [["cat", "dog", "cat"], [3, 4, 5], [-1, -1, 1], [2, 2, 1]])
def test_unknown_labels_count_as_neither_normal_nor_anomalous_and_a_note_asks(
    tmp_path: Path, labels: list[Any]
) -> None:
    table = labelled(tmp_path / "a.csv", "label", labels)
    assert (table.normal, table.anomalous) == (None, None)
    assert table.notes[-1].startswith("labels: which of ")
    assert table.notes[-1].endswith(" mean normal is unknown: name them with --normal")


@pytest.mark.parametrize(
    ("labels", "normal", "expected"),
    [
        (["cat", "dog", "cat"], ["dog"], [1, 0, 1]),
        (["good", "bad", "good"], ["bad"], [1, 0, 1]),
        ([1, -1, 1], ["-1"], [1, 0, 1]),
        ([1.0, 2.0, 3.0], ["1", "3"], [0, 1, 0]),
        (["Cat", "dog", "eel"], ["cat", "EEL"], [0, 1, 0]),
    ],
)
def test_option_normal_names_the_labels_that_mean_normal(
    tmp_path: Path, labels: list[Any], normal: list[str], expected: list[int]
) -> None:
    assert flags(labelled(tmp_path / "a.csv", "Class", labels, tuple(normal))) == expected


def test_option_normal_raises_for_a_label_that_does_not_occur(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--normal fine: no row has this label: the labels are bad, good"):
        labelled(tmp_path / "a.csv", "label", ["good", "bad"], ("fine",))
    with pytest.raises(DataError, match=r"--normal good: the data have no labels"):
        labelled(tmp_path / "a.csv", "host", ["good", "bad"], ("good",))


@pytest.mark.parametrize("key", ["y", "Y", "label", "labels", "is_anomaly"])
@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 1, 0]),
        np.array([[0], [1], [0]]),
        np.array(["good", "bad", "good"]),
        np.array([b"ok", b"nok", b"ok"]),
    ],
    ids=["integers", "column", "text", "bytes"],
)
def test_labels_that_mean_normal_are_recognised_in_an_archive(tmp_path: Path, key: str, labels: np.ndarray) -> None:
    arrays: dict[str, Any] = {"X": RANDOM.standard_normal((3, 2)), key: labels}
    np.savez(tmp_path / "a.npz", **arrays)
    assert flags(read_table(str(tmp_path / "a.npz"))) == [0, 1, 0]


def picture_folders(root: Path, names: list[str]) -> str:
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(2):
            Image.fromarray(RANDOM.randint(0, 256, (6, 4)).astype(np.uint8)).save(root / name / f"{index}.png")
    return str(root)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["bad", "good"], [1, 1, 0, 0]),
        (["Defect", "OK"], [1, 1, 0, 0]),
        (["broken_large", "contamination", "good"], [1, 1, 1, 1, 0, 0]),
        (["0", "1"], [0, 0, 1, 1]),
    ],
)
def test_labels_that_mean_normal_are_recognised_in_the_names_of_folders(
    tmp_path: Path, folders: list[str], expected: list[int]
) -> None:
    assert flags(read_table(picture_folders(tmp_path / "pictures", folders))) == expected


# Training data


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("column", "labels"),
    [
        ("label", [0, 1, 0, 0]),
        ("Label", ["good", "bad", "good", "good"]),
        ("Class", [3, 1, 2, 5]),
        ("y", [1, -1, 1, 1]),
        ("target", [1, 2, 1, 1]),
        ("is_anomaly", [True, False, False, False]),
        ("anomaly", [0, 1, None, 0]),
    ],
)
def test_label_column_in_training_data_is_not_a_feature_and_a_note_says_so(
    tmp_path: Path, suffix: str, column: str, labels: list[Any]
) -> None:
    path = tmp_path / f"a{suffix}"
    frame = pl.DataFrame({"a": [1, 5, 2, 9], column: labels, "b": [3, 1, 4, 1]})
    frame.write_csv(path) if suffix == ".csv" else frame.write_parquet(path)
    table = read_table(str(path))
    assert table.names == ["a", "b"]
    assert values(table).tolist() == [[1, 3], [5, 1], [2, 4], [9, 1]]
    assert (
        f"column {column!r} holds labels, so it is not a feature: add --keep {column} to learn from it" in table.notes
    )
    if isinstance(labels[0], str):
        return
    assert read_table(str(path), keep=[column]).names == ["a", column, "b"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_label_option_makes_columns_labels_whatever_their_names_are(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    frame = pl.DataFrame(
        {"a": [1, 5, 2, 9], "event": ["ok", "ok", "broken", "ok"], "shift": [1, 2, 3, 4], "b": [3, 1, 4, 1]}
    )
    frame.write_csv(path) if suffix == ".csv" else frame.write_parquet(path)
    with pytest.raises(DataError, match=r"'event' .text, 'ok' in row 0.* is not a measurement"):
        read_table(str(path))
    table = read_table(str(path), label=["event", "shift"])
    assert table.names == ["a", "b"]
    assert flags(table) == [0, 0, 1, 0]
    assert "the model also learns from the 1 anomalous rows: remove them, or add --robust" in table.notes
    assert not [note for note in table.notes if "--keep" in note]


def test_label_option_takes_precedence_over_the_names_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,label,score,b\n1,3.5,1,2\n5,2.5,0,1\n3,1.5,0,7\n")
    table = read_table(str(path), label=["score"])
    assert table.names == ["a", "label", "b"]
    assert flags(table) == [1, 0, 0]


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        (["c"], {}, "a.csv has no column 'c' to read as labels: it has a, b"),
        (["a", "b"], {}, "a.csv has no column except labels: expected measurements to learn from"),
        (["a"], {"keep": ["a"]}, "--label and --keep both name 'a'"),
        (["a"], {"drop": ["a"]}, "--label and --drop both name 'a'"),
    ],
)
def test_label_option_that_contradicts_the_file_or_another_option_is_refused(
    tmp_path: Path, label: list[str], options: dict[str, Any], message: str
) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(DataError, match=message):
        read_table(str(tmp_path / "a.csv"), label=label, **options)


def test_label_option_is_refused_for_a_column_of_lists_and_for_a_source_without_names(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1, 2], "b": [[1], [2]]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'b' holds lists: expected one label in each row"):
        read_table(str(tmp_path / "a.parquet"), label=["b"])
    np.save(tmp_path / "a.npy", RANDOM.standard_normal((20, 2)))
    for source in (str(tmp_path / "a.npy"), "digits", picture_folders(tmp_path / "pictures", ["bad", "good"])):
        with pytest.raises(DataError, match=r"--label names a column or an array of a file \(.csv, .parquet, .npz\)"):
            read_table(source, label=["y"])


def test_label_option_can_select_an_array_of_an_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=RANDOM.standard_normal((3, 2)), kind=np.array(["ok", "bad", "ok"]))
    assert read_table(str(tmp_path / "a.npz")).normal is None
    assert flags(read_table(str(tmp_path / "a.npz"), label=["kind"])) == [0, 1, 0]
    with pytest.raises(DataError, match="has no array 'sort' to read as labels: it has x, kind"):
        read_table(str(tmp_path / "a.npz"), label=["sort"])


def test_column_named_like_labels_but_with_other_values_is_a_feature_and_a_note_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y,z\n1,2.5,3\n5,1.5,6\n2,0.5,7\n")
    table = read_table(str(tmp_path / "a.csv"))
    assert table.names == ["x", "y", "z"]
    assert "column 'y' is a feature: if it holds labels, add --drop y" in table.notes


def test_anomalous_rows_in_training_data_are_pointed_out(tmp_path: Path) -> None:
    notes = read_table(picture_folders(tmp_path / "pictures", ["bad", "good"])).notes
    assert notes[:2] == [
        "labels: good means normal (2 rows), bad means anomalous (2 rows)",
        "the model also learns from the 2 anomalous rows: remove them, or add --robust",
    ]


# Commands


@pytest.mark.slow
def test_evaluate_and_calibrate_use_good_as_normal_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The good pictures are dark and noisy, and the bad ones have a bright stripe. A PCA tells them apart."""
    options = ("--artifacts", str(tmp_path / "artifacts"))
    write_pictures(tmp_path / "train", {"": 200})
    train = ("train", str(tmp_path / "train"), "--model", "pca", "--name", "parts", "--latents", "2")
    code, _, err = in_process(capsys, *train, *options, "--runs", str(tmp_path / "runs"))
    assert code == 0, err
    write_pictures(tmp_path / "test", {"bad": 30, "good": 60})

    code, out, err = in_process(capsys, "evaluate", "parts", str(tmp_path / "test"), *options)
    assert code == 0, err
    assert "labels: good means normal (60 rows), bad means anomalous (30 rows); --normal LABEL changes this" in err
    assert "AUROC                  1.0000" in out

    swapped = ("evaluate", "parts", str(tmp_path / "test"), "--normal", "bad", *options)
    code, out, _ = in_process(capsys, *swapped)
    assert code == 0
    assert "AUROC                  0.0000" in out
    assert "the labels are swapped: if 'good' means normal, add --normal good" in out

    code, out, err = in_process(capsys, "calibrate", "parts", str(tmp_path / "test"), *options)
    assert code == 0, err
    assert "left out 30 rows labelled bad" in err
    assert "calibrated on 60 rows" in out


@pytest.mark.slow
def test_evaluate_reads_the_labels_from_the_column_that_was_chosen_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = RANDOM.standard_normal((300, 3))
    lines = [f"{a},{b},{c},{'fine' if i % 3 else 'bad'}" for i, (a, b, c) in enumerate(rows)]
    (tmp_path / "a.csv").write_text("a,b,c,verdict\n" + "\n".join(lines) + "\n")
    options = ("--artifacts", str(tmp_path / "artifacts"))
    train = ("train", str(tmp_path / "a.csv"), "--model", "pca", "--name", "m", "--runs", str(tmp_path / "runs"))
    code, _, err = in_process(capsys, *train, "--label", "verdict", *options)
    assert code == 0, err
    code, _, err = in_process(capsys, "evaluate", "m", str(tmp_path / "a.csv"), *options)
    assert "bad means anomalous (100 rows)" in err
    (tmp_path / "b.csv").write_text("a,b,c\n1,2,3\n")
    code, _, err = in_process(capsys, "evaluate", "m", str(tmp_path / "b.csv"), *options)
    assert code == 0, err


@pytest.mark.slow
def test_calibrate_refuses_two_unknown_labels_and_score_ignores_a_text_column_called_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = RANDOM.standard_normal((300, 3))
    np.savetxt(tmp_path / "train.csv", rows, delimiter=",", header="a,b,c", comments="")
    options = ("--artifacts", str(tmp_path / "artifacts"))
    train = ("train", str(tmp_path / "train.csv"), "--model", "pca", "--name", "m", "--runs", str(tmp_path / "runs"))
    assert in_process(capsys, *train, *options)[0] == 0
    lines = [f"{a},{b},{c},{'left' if a > 0 else 'right'}" for a, b, c in RANDOM.standard_normal((100, 3))]
    (tmp_path / "new.csv").write_text("a,b,c,label\n" + "\n".join(lines) + "\n")

    code, out, err = in_process(capsys, "score", "m", str(tmp_path / "new.csv"), *options)
    assert (code, out.count("\n")) == (0, 100), err
    code, _, err = in_process(capsys, "calibrate", "m", str(tmp_path / "new.csv"), *options)
    assert code == 2
    assert "has the labels left and right, and it is unknown which of them means normal: name it with --normal" in err
    code, out, err = in_process(capsys, "calibrate", "m", str(tmp_path / "new.csv"), "--normal", "left,right", *options)
    assert code == 0, err
    assert "calibrated on 100 rows" in out


def write_pictures(root: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = RANDOM.randint(0, 40, (6, 6)).astype(np.uint8)
            if name == "bad":
                pixels[2] = 250
            Image.fromarray(pixels).save(root / name / f"{index:03}.png")


def test_label_column_without_any_label_counts_as_no_labels(tmp_path: Path) -> None:
    table = labelled(tmp_path / "a.csv", "label", [None] * 5)
    assert (table.normal, table.labels, table.present_labels) == (None, None, [])
    assert table.notes == ["labels are ignored: no row has one"]
