"""CSV files: quotation marks inside cells, blank lines, line ends, missing headers, and the line numbers in errors."""

from pathlib import Path
from typing import Any

import pytest

from tests.commands import in_process
from tests.data import values
from training.data.table import DataError, read_table

TWO_MARKS = "write a quotation mark inside a quoted cell twice"
BACKSLASH = ', or add --escape backslash, which reads \\" as a quotation mark'


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def with_disks(*disks: str) -> str:
    """Return 400 records of a load and the name of a disk. The lines 62, 302, ... have the names `disks`, unchanged."""
    lines = [f"{i * 7 % 11}.5,sda" for i in range(400)]
    for position, disk in enumerate(disks):
        lines[60 + 240 * position] = f"3,{disk}"
    return "load,disk\n" + "\n".join(lines) + "\n"


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_table(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(source, "FILE")


@pytest.mark.parametrize(
    ("disks", "message"),
    [
        (
            ['"disk 5\\" x"'] * 2,
            f"FILE: line 62 opens a quotation that does not end where a cell ends: {TWO_MARKS}{BACKSLASH}",
        ),
        (
            ['"disk 5\\""'] * 2,
            f"FILE: line 62 opens a quotation that does not end where a cell ends: {TWO_MARKS}{BACKSLASH}",
        ),
        (
            ['"disk 5" x"'] * 2,
            f"FILE: line 62 opens a quotation that does not end where a cell ends: {TWO_MARKS}",
        ),
        (['"disk 5', "sda"], f"FILE: line 62 opens a quotation that does not end: {TWO_MARKS}"),
        (
            ['"disk 5', '5 disk"'],
            "FILE: the quotation that opens in line 62 ends in line 302, but these lines look like rows of 2",
        ),
    ],
    ids=["backslash", "backslash at the end", "not doubled", "never closed", "closed by another cell"],
)
def test_csv_raises_and_names_the_line_if_a_quotation_would_swallow_lines(
    tmp_path: Path, disks: list[str], message: str
) -> None:
    assert refusal(write(tmp_path / "a.csv", with_disks(*disks)), drop=["disk"]).startswith(message)


@pytest.mark.parametrize(
    ("line", "text"),
    [(100, ",sda"), (100, "nan,sda"), (100, "1.5,sda,7"), (100, "1.5"), (100, "inf,sda"), (60, ',"disk 5'), (61, "")],
    ids=[
        "empty cell",
        "nan",
        "too many values",
        "too few values",
        "infinity",
        "no number where it opens",
        "blank line",
    ],
)
def test_csv_raises_for_a_quotation_that_swallows_lines_even_if_one_of_them_is_unlike_the_others(
    tmp_path: Path, line: int, text: str
) -> None:
    lines = with_disks('"disk 5', '5 disk"').splitlines()
    lines[line + 1] = text
    message = refusal(write(tmp_path / "a.csv", "\n".join(lines)), drop=["disk"])
    assert message.startswith("FILE: the quotation that opens in line 62 ends in line 302, but these lines look like")


@pytest.mark.parametrize(
    "disk",
    [
        '"disk 5"" x"',
        'disk 5" x',
        '"C:\\"',
        '"sda, sdb"',
        '"two\nlines"',
        '"Dear all,\n\nthe disks, 3, 5\nfail\n"',
        "'sda'",
        '""',
        '"""5"""',
    ],
)
def test_csv_keeps_every_row_for_valid_quotation_marks(tmp_path: Path, disk: str) -> None:
    table = read_table(write(tmp_path / "a.csv", with_disks(disk, disk)), drop=["disk"])
    assert len(table.x) == 400
    assert values(table)[[59, 60, 300, 399], 0].tolist() == [6.5, 3, 3, 10.5]


@pytest.mark.parametrize("disk", ['"disk 5\\" x"', '"disk 5\\""', '"a\\\\"', "disk\\, other", '"disk 5"" x"'])
def test_option_escape_backslash_reads_cells_with_backslashes(tmp_path: Path, disk: str) -> None:
    table = read_table(write(tmp_path / "a.csv", with_disks(disk, disk)), drop=["disk"], escape="backslash")
    assert len(table.x) == 400
    assert values(table)[[59, 60, 300, 399], 0].tolist() == [6.5, 3, 3, 10.5]


def test_option_escape_double_accepts_a_cell_whose_lines_look_like_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", with_disks('"disk 5', '5 disk"'))
    assert len(read_table(path, drop=["disk"], escape="double").x) == 160


@pytest.mark.slow
def test_train_and_score_read_backslashes_as_the_option_escape_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, *lines = with_disks('"disk 5\\" x"', '"disk 6\\" x"').splitlines()
    lines = ["other,load,disk", *(f"{i * 5 % 13},{line}" for i, line in enumerate(lines))]
    path = write(tmp_path / "a.csv", "\n".join(lines))
    artifacts, runs = str(tmp_path / "artifacts"), str(tmp_path / "runs")
    train = ["train", path, "--model", "pca", "--name", "disks", "--drop", "disk", "--artifacts", artifacts]
    code, _, err = in_process(capsys, *train, "--runs", runs)
    assert code == 2
    assert "line 62 opens a quotation" in err
    code, _, err = in_process(capsys, *train, "--runs", runs, "--escape", "backslash")
    assert code == 0, err
    code, out, err = in_process(capsys, "score", "disks", path, "--artifacts", artifacts)
    assert (code, out.count("\n")) == (0, 400)
    code, _, err = in_process(capsys, "score", "disks", path, "--artifacts", artifacts, "--escape", "double")
    assert (code, "line 62 opens a quotation" in err) == (2, True)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("blank", ["", "  ", "\t"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_blank_lines_are_skipped_with_a_note_for_every_kind_of_line_end(
    tmp_path: Path, end: str, blank: str, quote: str
) -> None:
    lines = ["a,b", f"{quote}1{quote},2", blank, "3,4", blank, blank, "5,6", blank, ""]
    table = read_table(write(tmp_path / "a.csv", end.join(lines)))
    assert values(table).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert table.missing.tolist() == [0, 0]
    assert table.notes == ["blank lines are skipped: 3"]


@pytest.mark.parametrize("text", ["x\ny\nz", "x\r\ny\r\nz"])
@pytest.mark.parametrize("quoted", [True, False])
def test_error_names_the_line_of_the_file_after_cells_with_line_ends_and_blank_lines(
    tmp_path: Path, text: str, quoted: bool
) -> None:
    cell = f'"{text}"' if quoted else "xyz"
    lines = ["a,t,b", f"1,{cell},2", "3,w,4", "", "3,w,5", "5,w,q", *["1,1,1"] * 5]
    message = refusal(write(tmp_path / "a.csv", "\n".join(lines) + "\n"), drop=["t"])
    assert f"got 'q' in row 3 (line {8 if quoted else 6}): correct the cell" in message


@pytest.mark.parametrize("first", ["1.5,x,2", "web-1,0.5,3", "x,-1,0.5", "1e3,x,y", "1.5,2,", '"7","a","9"'])
def test_csv_without_header_raises_although_its_first_line_contains_text(tmp_path: Path, first: str) -> None:
    message = refusal(write(tmp_path / "a.csv", f"{first}\n2,y,3\n3,z,5\n"))
    assert "in its first line: expected a header; put column names above the rows" in message


def test_csv_header_may_contain_years(tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "a.csv", "load,2019,2020\n1,2,3\n4,5,7\n")).names == ["load", "2019", "2020"]


LINES = ["a,b", "1,2", "3,4", "5,7"]


@pytest.mark.parametrize(
    "lines",
    [
        [f"{line}," for line in LINES],
        ["a,b", *(f"{line}," for line in LINES[1:])],
        ["a,b,", *LINES[1:]],
        ["a,b", "1,2", "3,4,", "5,7, "],
        ['"a","b",', '"1",2,', "3,4,", "5,7,"],
        ["sep=,", *LINES],
        ["\ufeff\ufeffa,b", *LINES[1:]],
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_at_line_ends_and_marks_at_the_start_of_a_csv_file_are_ignored(
    tmp_path: Path, lines: list[str], end: str
) -> None:
    table = read_table(write(tmp_path / "a.csv", end.join(lines) + end))
    assert table.names == ["a", "b"]
    assert values(table).tolist() == [[1, 2], [3, 4], [5, 7]]


def test_csv_raises_for_a_line_with_too_many_values_even_if_other_lines_end_with_a_separator(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "a,b,\n1,2,\n3,4,9\n5,7,\n")
    assert refusal(source) == "FILE: line 3 has 3 values, but the header has 2: correct the line"


@pytest.mark.parametrize("empty", [",", " , ", '"",', "NaN,null"])
def test_rows_without_any_value_are_left_out_with_a_note(tmp_path: Path, empty: str) -> None:
    table = read_table(write(tmp_path / "a.csv", f"a,b\n1,2\n{empty}\n3,4\n{empty}\n5,6\n7,\n"))
    assert values(table)[:3].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert table.missing.tolist() == [0, 1]
    assert table.notes[0] == "rows without any value are left out: 2"


def test_error_names_the_line_after_rows_without_any_value(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "a,b\n1,2\n,\n3,4\n5,inf\n")
    assert "the value inf in row 3 (line 5)" in refusal(source)


def test_labels_stay_with_their_rows_if_rows_without_any_value_are_left_out(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", "a,b,label\n1,2,good\n,,bad\n3,4,bad\n5,7,good\n"))
    assert table.normal is not None
    assert table.normal.tolist() == [True, False, True]
