"""Titles and cells: requests and training files are read by the same rules."""

import numpy as np
import polars as pl
import pytest

from models.columns import parse_cell, parse_title
from training.data.readers.columns import Column

CELLS = [
    "5", "+5", "-5", "5.", ".5", "1e5", "1E+5", "00012", "1e-400", " 7 ", "\t7\u00a0", "inf", "-Infinity", "1e400",
    "nan", "NaN", "-nan", "", " ", "NA", "n/a", "null", "None", "?", "-", "true", "TRUE", "Yes", "false", "No", " no ",
    "1_0", "１", "٣", "0x10", "1d5", "5f", "--5", "1e", ".", "5 5", "high", "oui", "\ufeff5",
]  # fmt: skip


@pytest.mark.parametrize("cell", CELLS)
def test_cell_of_a_request_has_the_same_value_as_the_cell_of_a_training_file(cell: str) -> None:
    column = Column("x", None, 0)
    (expected,) = column.read(pl.Series([cell]), 0)
    value = parse_cell(cell)
    if column.non_numbers:
        assert value == cell
    else:
        np.testing.assert_equal(value, expected)


@pytest.mark.parametrize(
    ("title", "name", "unit"),
    [
        ("temp", "temp", None),
        ("temp [°C]", "temp", "°C"),
        ("  disk   used\t[ % of all ] ", "disk used", "% of all"),
        ("pixel[0,1]", "pixel[0,1]", None),
        ("a [b] [c]", "a [b]", "c"),
        ("[s]", "[s]", None),
        ("", "", None),
    ],
)
def test_title_is_a_name_and_an_optional_unit_in_brackets(title: str, name: str, unit: str | None) -> None:
    assert parse_title(title) == (name, unit)
