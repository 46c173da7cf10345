"""CSV over HTTP and in files: whatever `elbo score` reads, /anomaly reads in the same way, and no row vanishes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from service.anomaly.inputs import InputRows, parse_record_rows
from service.codec import csv_rows
from service.codec.row_errors import MalformedRow
from service.codec.row_schema import RowSchema
from service.errors import InvalidCsv, InvalidRows
from service.schemas import AnomalyBody
from tests.data import values
from tests.training.manifests import manifest_of
from training.data.table import DataError, read_for_model, read_table

HEADER = "a [s],b,note\n"
SCHEMA = RowSchema([2], ["a", "b"], [True, True], units=["s", None])


def read_as_service(text: str) -> InputRows:
    fields = csv_rows.read_fields(text.encode())
    body = AnomalyBody(records=[])
    return parse_record_rows(SCHEMA, body, fields.values.get("records", []), fields.may_contain_non_floats, minimum=0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("csv") / "train.csv"
    path.write_text("a [s],b\n1,2\n,3\n5,\n")
    return manifest_of(read_table(str(path)))


GOOD = [
    "1,2,x", "3,4,", "5,-,y", "NA,6,z", ",,", "", " ", "1e3,.5,x", " 1 , 2 ,x", '11,12,"x"', '13,14,"x, y"',
    '15,16,"x ""y"""', '"17","18","z"', '25,26,5" x', '37, "38", x', '35,36,"two\nlines"', '"39\n",40,x',
]  # fmt: skip
BAD = [
    "7,8", "9,10,x,y", "1,yes,x", '19,20,"open', 'close",21,22', '23,24,"disk 5\\" x"', '27,28,"a"b', '29,"30', '",x',
    'x",31,32', "high,33,x", "1_0,34,x", '35,36,"two', 'lines"',
]  # fmt: skip
# Most files have no bad line, because training refuses most files with one.
LINES = st.lists(st.sampled_from(GOOD), min_size=1, max_size=8) | st.lists(st.sampled_from(GOOD + BAD), max_size=8)


@pytest.mark.slow
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_text_that_training_reads_gives_the_same_rows_over_http(
    tmp_path: Path, manifest: Any, lines: list[str], end: str
) -> None:
    path = tmp_path / "rows.csv"
    text = HEADER.replace("\n", end) + end.join(lines) + end
    path.write_bytes(text.encode())
    try:
        expected = values(read_for_model(str(path), manifest))
    except DataError:
        event("training refuses the file")
        return
    event("training reads the file")
    rows = read_as_service(text)
    # Training leaves out the rows without any value; in a request, such a row is an error.
    assert rows.rows_received == len(expected) + len(rows.parsed.errors)
    assert all("missing" in error.error.detail for error in rows.parsed.errors)
    np.testing.assert_array_equal(rows.parsed.x, expected)


@pytest.mark.parametrize(
    "bad",
    [
        '50,60,"disk 5"" x',
        '50,60,"disk 5\\" x"',
        '50,60,"never closed',
        '50,60,"a"b',
        '"50,60,x',
        '50,60,""x"',
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_stray_quotation_mark_costs_only_its_own_row(bad: str, count: int) -> None:
    lines = [f"{index},{index + 1},x" for index in range(40)]
    for place in (3, 20, 33)[:count]:
        lines[place] = bad
    rows = read_as_service(HEADER + "\n".join(lines) + "\n")
    assert rows.rows_received == 40
    assert [error.row for error in rows.parsed.errors] == [3, 20, 33][:count]
    assert all("not valid CSV" in error.error.detail for error in rows.parsed.errors)


@pytest.mark.parametrize("line", [",11,x", "nan,11,x", ",,"])
def test_stray_quotation_mark_costs_only_its_own_row_if_another_row_lacks_values(line: str) -> None:
    lines = [f"{index},{index + 1},x" for index in range(40)]
    lines[3], lines[10], lines[20] = '50,60,"x', line, '50,60,x"'
    rows = read_as_service(HEADER + "\n".join(lines) + "\n")
    assert rows.rows_received == 40
    assert [error.row for error in rows.parsed.errors if "not valid CSV" in error.error.detail] == [3]


def test_value_that_contains_line_ends_is_one_value() -> None:
    rows = read_as_service(HEADER + '1,2,"two\nlines"\n3,4,"a ""quoted""\nword"\n5,6,x\n')
    assert (rows.rows_received, rows.parsed.errors) == (3, [])


def test_lines_of_commas_after_the_last_row_are_no_rows() -> None:
    assert read_as_service(HEADER + "1,2,x\n,,\n, ,\n").rows_received == 1
    with pytest.raises(InvalidRows, match="there are no records"):
        read_as_service(HEADER + ",,\n")


def test_line_that_closes_one_quotation_and_opens_another_costs_one_row() -> None:
    rows = read_as_service(HEADER + 'a",1,"x\n' * 200 + "1,2,x\n")
    assert (rows.rows_received, rows.parsed.rows) == (201, [200])


@pytest.mark.parametrize("last", ["", '"\n'])
def test_large_body_whose_lines_close_one_quotation_and_open_another_is_refused(last: str) -> None:
    """Without a limit, each of the 100,000 lines would be read to the end of the body, which takes many minutes."""
    body = HEADER + 'a",1,"x\n' * 100_000 + last
    with pytest.raises(InvalidCsv, match="too many quotations"):
        list(csv_rows.read_fields(body.encode()).values["records"])


def test_large_body_of_open_quotations_is_read_in_time() -> None:
    body = HEADER.encode() + b'1,2,"x\n' * 20_000 + b'""x\n' * 20_000
    records = list(csv_rows.read_fields(body).values["records"])
    assert len(records) <= 40_000
    assert any(isinstance(record, MalformedRow) for record in records)
