from pathlib import Path

import numpy as np
import polars as pl
import pytest

from models.manifest import OTHER_LEVEL
from tests.mixed_tables import mixed_frame
from training.data.readers import InMemory
from training.data.table import read_table
from training.errors import DataError


@pytest.fixture
def frame() -> pl.DataFrame:
    return mixed_frame(660)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "frame"])
def test_columns_of_text_become_a_feature_per_level_for_each_kind_of_source(
    suffix: str, frame: pl.DataFrame, tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{suffix}"
    source: str | InMemory = InMemory(frame) if suffix == "frame" else str(path)
    if suffix == "csv":
        frame.write_csv(path)
    elif suffix == "parquet":
        frame.write_parquet(path)

    table = read_table(source)

    zones = ["zone=Zürich=a", "zone=b c", "zone=日本"]
    levels = ["protocol=icmp", "protocol=tcp", "protocol=udp", *zones]
    assert table.names == ["cpu", "mem", "secure", "count", *levels]
    x = table.x.read_range(0, 660)
    np.testing.assert_allclose(x[:, :4], frame.select("cpu", "mem", "secure", "count").to_numpy(), rtol=1e-6)
    for index, level in enumerate(["icmp", "tcp", "udp"]):
        assert x[:, 4 + index].tolist() == (frame["protocol"] == level).cast(float).to_list()
    assert np.array_equal(table.x.take(np.array([7, 3])), x[[7, 3]])


def test_levels_of_few_rows_are_grouped_and_the_share_of_new_levels_is_estimated(frame: pl.DataFrame) -> None:
    protocol = frame["protocol"].to_list()
    protocol[:6] = ["sctp", "sctp", "gre", "esp", None, None]

    table = read_table(InMemory(frame.with_columns(protocol=pl.Series(protocol))))

    category = table.categories[0]
    assert category.levels == ["icmp", "tcp", "udp", OTHER_LEVEL]
    assert category.rare == ["esp", "gre", "sctp"]
    assert category.new_share == pytest.approx(2 / 658)  # Good-Turing: two of the levels were seen once
    features = table.x.read_range(0, 6)[:, list(category.features)]
    assert features[:4].tolist() == [[0, 0, 0, 1]] * 4
    assert np.isnan(features[4:]).all()
    assert table.missing[list(category.features)].tolist() == [2] * 4


def test_column_of_numbers_is_a_category_if_the_option_names_it(frame: pl.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    ports = ["80", "443", "ssh"] * 220
    frame.with_columns(port=pl.Series(ports)).write_csv(path)

    with pytest.raises(DataError, match=r"expected numbers, got 'ssh' .* add --category port"):
        read_table(str(path))
    assert read_table(str(path), category=["port"]).names[-3:] == ["port=443", "port=80", "port=ssh"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([f"user {index}" for index in range(660)], "text of 660 different values, of which 660 occur"),
        ([f"u{index % 60}" for index in range(660)], "text of 60 levels, and a model takes at most 50"),
        (["a\nb", "c"] * 330, r"cannot name a level, 'a\\nb'"),
        ([OTHER_LEVEL, "c"] * 330, "cannot name a level"),
        (["2024-01-01", "2024-01-02"] * 330, "dates"),
        (["5 %", "6 %"] * 330, "write the number alone"),
    ],
)
def test_column_of_text_that_is_no_category_is_refused_with_the_reason(
    cells: list[str], message: str, frame: pl.DataFrame
) -> None:
    with pytest.raises(DataError, match=message):
        read_table(InMemory(frame.with_columns(other=pl.Series(cells))))


def test_table_with_only_columns_of_text_is_read(frame: pl.DataFrame) -> None:
    assert read_table(InMemory(frame.select("protocol", "zone"))).x.width == 6


def test_column_with_the_name_of_a_level_is_refused(frame: pl.DataFrame) -> None:
    with pytest.raises(DataError, match="both named 'protocol=tcp': rename one"):
        read_table(InMemory(frame.with_columns(pl.Series("protocol=tcp", np.random.randn(660)))))


def test_note_suggests_a_column_of_text_as_the_group_if_there_are_times_without_groups(frame: pl.DataFrame) -> None:
    times = frame.with_columns(time=1_700_000_000 + 60 * pl.int_range(660))

    notes = read_table(InMemory(times), time="time").notes

    assert any("if 'protocol' names the host of a row, use it with --group protocol" in note for note in notes)
