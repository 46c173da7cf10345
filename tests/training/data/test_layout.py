"""The layout of arrays with three or more dimensions: images, or measurements with ranges of their own."""

from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tests.commands import in_process
from tests.data import mnist, values
from tests.training.manifests import manifest_of
from training.config import TrainConfig
from training.data.layout import LAYOUTS
from training.data.table import DataError, Table, read_for_model, read_table

RANDOM = np.random.RandomState(0)
Array = npt.NDArray[np.floating]


def series(rows: int, scales: list[float], offsets: list[float], steps: int = 20, seed: int = 0) -> Array:
    """Return smooth random series [rows, steps, C] whose channels have the given scales and offsets."""
    random = np.random.RandomState(seed)
    phases = random.uniform(0, 6.28, (rows, 1, len(scales)))
    waves = np.sin(np.linspace(0, 6.28, steps)[:, None] + phases)
    return np.asarray(offsets + scales * (waves + 0.05 * random.standard_normal(waves.shape)))


def save(path: Path, x: np.ndarray) -> str:
    np.savez(path, x=x) if path.suffix == ".npz" else np.save(path, x)
    return str(path)


def digits() -> Array:
    x: Array = values(read_table("digits")).reshape(-1, 8, 8)
    return x


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    "x",
    [
        series(60, [1, 100, 10_000], [0, 0, 0]),
        series(60, [1, 1, 1], [20, 1000, 0]),
        series(60, [0.3, 0.003], [0.5, 0.01]),
        series(60, [1000, 1, 1, 1, 1, 1, 1, 1], [0] * 8, steps=8),
        series(60, [1, 1, 1], [0, 0, 0]),
        series(60, [1, 500, 1, 20], [50, 900, 3, 400]).transpose(0, 2, 1),
        np.moveaxis(series(60, [1, 100, 10_000], [0, 0, 0], steps=36).reshape(60, 6, 6, 3), 3, 1),
        series(60, [1, 100], [0, 0], steps=36).reshape(60, 6, 6, 2),
        series(60, [1, 3, 5], [2, 6, 10]),
        (100 + series(60, [50, 50], [0, 0])).astype(np.uint8),
        np.cumsum(series(60, [1], [2]), 1),
    ],
    ids=["scales", "offsets", "0 to 1", "square", "negative", "NCT", "NCHW", "NHWC", "positive", "bytes", "NT1"],
)
def test_channels_with_ranges_of_their_own_are_measurements_and_not_images(
    tmp_path: Path, suffix: str, x: Array
) -> None:
    table = read_table(save(tmp_path / f"a{suffix}", x))
    assert (table.shape, table.pixel_range) == (x.shape[1:], None)
    assert table.names[-1] == f"x[{','.join(str(size - 1) for size in x.shape[1:])}]"
    text = " x ".join(map(str, x.shape[1:]))
    assert table.notes[0].startswith(f"each row is read as {text} measurements, each with a range of its own; if ")


@pytest.mark.parametrize("scale", [1, 16, 255, 60_000])
def test_images_of_any_range_of_values_stay_images(tmp_path: Path, scale: float) -> None:
    table = read_table(save(tmp_path / "a.npy", digits()[:500] * scale))
    assert (table.shape, table.pixel_range) == ((8, 8), (0, scale))
    assert table.notes[0] == (
        f"each row is read as an image of 8 x 8 pixels from 0 to {scale:g}; if the rows are series or other "
        "measurements, add --layout ntc or --layout flat"
    )


@pytest.mark.slow
@pytest.mark.parametrize("black", [0.0, -1.0])
def test_mnist_as_floats_is_read_as_images(tmp_path: Path, black: float) -> None:
    x = black + (1 - black) * mnist("test")[:300].reshape(-1, 28, 28)
    assert read_table(save(tmp_path / "a.npy", x)).pixel_range == (black, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("layout", [None, "nchw"])
def test_images_with_channels_first_become_images_with_channels_last(
    tmp_path: Path, channels: int, dtype: type, layout: str | None
) -> None:
    x: np.ndarray = RANDOM.randint(0, 256, (30, channels, 9, 7)).astype(dtype)
    table = read_table(save(tmp_path / "a.npy", x), layout=layout)  # type: ignore[arg-type]
    assert (table.shape, table.pixel_range) == ((9, 7, channels), (0, 255))
    assert np.array_equal(values(table).reshape(30, 9, 7, channels), x.transpose(0, 2, 3, 1))
    assert f"9 x 7 x {channels} pixels from 0 to 255, whose channels come first in the file" in table.notes[0]
    again = read_for_model(str(tmp_path / "a.npy"), manifest_of(table))
    assert again.fingerprint == table.fingerprint


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_that_have_channels_first_and_dark_borders_are_recognised(
    tmp_path: Path, channels: int, dtype: type
) -> None:
    x: Array = np.zeros((30, channels, 16, 16), dtype)
    x[:, :, 1:-1, 1:-1] = RANDOM.randint(0, 4, (30, channels, 14, 14))
    x[:, :, 4:-4, 4:-4] = RANDOM.randint(0, 256, (30, channels, 8, 8))
    table = read_table(save(tmp_path / "a.npy", x))
    assert (table.shape, table.pixel_range) == ((16, 16, channels), (0, 255))
    assert np.array_equal(values(table).reshape(30, 16, 16, channels), x.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("largest", [1, 15])
def test_images_of_bytes_with_few_grey_levels_get_a_range_from_0_to_the_largest_value(
    tmp_path: Path, largest: int
) -> None:
    x = RANDOM.randint(0, largest + 1, (30, 8, 8)).astype(np.uint8)
    assert read_table(save(tmp_path / "a.npy", x)).pixel_range == (0, largest)


@pytest.mark.parametrize(
    ("layout", "shape", "is_image"), [("nhwc", (20, 3), True), ("ntc", (20, 3), False), ("flat", (60,), False)]
)
def test_option_layout_decides(tmp_path: Path, layout: str, shape: tuple[int, ...], is_image: bool) -> None:
    for name, scales in (("a.npy", [1.0, 1.0, 1.0]), ("b.npy", [1.0, 100.0, 10_000.0])):
        x = series(40, scales, [5, 5, 5])
        table: Table = read_table(save(tmp_path / name, x), layout=layout)  # type: ignore[arg-type]
        assert (table.shape, table.pixel_range is not None) == (shape, is_image)
        assert np.array_equal(values(table), x.reshape(40, -1).astype(np.float32))


@pytest.mark.parametrize(
    ("source", "layout", "message"),
    [
        ("a.npy", "nchw", r"a.npy: --layout nchw needs \[N, C, H, W\], got \['N', 4\]"),
        ("a.npy", "ntc", r"a.npy: --layout ntc needs an array of three or more dimensions, got \['N', 4\]"),
        ("a.csv", "ntc", r"--layout is for arrays \(.npy, .npz\), and .*a.csv is none: leave --layout out"),
        ("digits", "flat", r"--layout is for arrays \(.npy, .npz\), and digits is none"),
        ("images", "nchw", r"--layout is for arrays"),
    ],
)
def test_option_layout_raises_for_other_data(tmp_path: Path, source: str, layout: str, message: str) -> None:
    save(tmp_path / "a.npy", RANDOM.standard_normal((30, 4)))
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,5\n")
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "images" / "a.png")
    with pytest.raises(DataError, match=message):
        read_table(source if source == "digits" else str(tmp_path / source), layout=layout)  # type: ignore[arg-type]


def test_layouts_of_the_option_are_those_of_the_reader() -> None:
    field = TrainConfig.model_fields["layout"].annotation
    assert get_args(get_args(field)[0]) == LAYOUTS


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [0, 1, 2])
def test_fault_in_a_channel_of_small_values_is_found(
    tmp_path: Path, faulty: int, capsys: pytest.CaptureFixture[str]
) -> None:
    scales = [1.0, 100.0, 10_000.0]
    data = save(tmp_path / "train.npy", series(600, scales, [0, 0, 0]))
    test = series(40, scales, [0, 0, 0], seed=1)
    test[:20, 7, faulty] += 25 * scales[faulty]  # 500 times the noise
    options = ("--artifacts", str(tmp_path / "artifacts"))
    train = ("train", data, "--model", "pca", "--name", "plant", "--runs", str(tmp_path / "runs"))
    code, _, err = in_process(capsys, *train, *options)
    assert code == 0, err
    assert "each row is read as 20 x 3 measurements" in err
    score = ("score", "plant", save(tmp_path / "test.npy", test), "--format", "csv", "--alpha", "0.05")
    code, out, err = in_process(capsys, *score, *options)
    assert code == 0, err
    flagged = [line.split(",")[4] for line in out.splitlines()[1:]]
    assert flagged[:20] == ["1"] * 20
    assert flagged[20:].count("1") <= 6
