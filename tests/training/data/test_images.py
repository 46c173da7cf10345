"""Folders of pictures: the values that are learnt from, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data import values
from tests.training.manifests import manifest_of
from training.data.table import DataError, Table, read_for_model, read_table

RANDOM = np.random.RandomState(0)
GREY = RANDOM.randint(0, 256, (12, 6, 4)).astype(np.uint8)
COLOUR = RANDOM.randint(0, 256, (12, 6, 4, 3)).astype(np.uint8)


def saved(folder: Path, pixels: np.ndarray, suffix: str = ".png") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{index:03}{suffix}")
    return str(folder)


def pictures(table: Table) -> np.ndarray:
    return values(table).reshape(-1, *table.shape)


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_table(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(source, "FOLDER")


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".tiff", ".gif"])
def test_grey_pictures_are_rows_of_height_by_width_from_0_to_255(tmp_path: Path, suffix: str) -> None:
    table = read_table(saved(tmp_path / "photos", GREY, suffix))
    assert (table.shape, table.pixel_range, table.labels, table.notes) == ((6, 4), (0, 255), None, [])
    assert np.array_equal(pictures(table), GREY)
    assert (table.names[-1], table.missing.tolist()) == ("pixel[5,3]", [0] * 24)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp"])
def test_colour_pictures_have_three_channels_at_the_end(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, picture in enumerate(COLOUR):
        Image.fromarray(picture).save(folder / f"{index:03}{suffix}", lossless=True)  # else WebP loses something
    table = read_table(str(folder))
    assert table.shape == (6, 4, 3)
    assert np.array_equal(pictures(table), COLOUR)
    assert table.names[-1] == "pixel[5,3,2]"


def test_one_picture_in_colour_makes_all_of_them_colour(tmp_path: Path) -> None:
    folder = saved(tmp_path, GREY)
    Image.fromarray(COLOUR[0]).save(tmp_path / "100.png")
    table = read_table(folder)
    assert table.shape == (6, 4, 3)
    assert np.array_equal(pictures(table)[0], np.repeat(GREY[0][..., None], 3, axis=2))
    assert np.array_equal(pictures(table)[12], COLOUR[0])


def test_jpeg_is_read_as_pillow_reads_it(tmp_path: Path) -> None:
    table = read_table(saved(tmp_path, COLOUR, ".jpg"))
    assert np.array_equal(pictures(table)[3], np.asarray(Image.open(tmp_path / "003.jpg")))


def test_folders_are_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    saved(tmp_path / "dogs", GREY[:5])
    saved(tmp_path / "cats", GREY[5:])
    (tmp_path / "empty").mkdir()
    table = read_table(str(tmp_path))
    assert table.label_names == ["cats", "dogs"]
    assert table.labels is not None
    assert table.labels.tolist() == [0] * 7 + [1] * 5
    assert table.labels.dtype == np.int64
    assert np.array_equal(pictures(table), np.concatenate([GREY[5:], GREY[:5]]))


def test_what_is_no_picture_is_left_out_and_said_so(tmp_path: Path) -> None:
    folder = saved(tmp_path, GREY)
    for name in ("notes.txt", "list.csv", ".DS_Store"):
        (tmp_path / name).write_text("no picture")
    assert read_table(folder).notes == ["2 files are no pictures and are left out"]


def test_on_disk_pictures_are_what_they_are_in_memory(tmp_path: Path) -> None:
    folder = saved(tmp_path, COLOUR)
    small, large = read_table(folder), read_table(folder, limit=100)
    assert (small.x.on_disk, large.x.on_disk) == (False, True)
    assert small.fingerprint == large.fingerprint


def test_pictures_of_two_sizes_are_refused_with_the_flag_that_resizes_them(tmp_path: Path) -> None:
    folder = saved(tmp_path, GREY)
    Image.fromarray(np.zeros((5, 9), np.uint8)).save(tmp_path / "100.png")
    assert refusal(folder) == (
        "FOLDER/000.png is 6x4 (height x width) and FOLDER/100.png 5x9: expected pictures of one size; "
        "add --size 5x4 to resize"
    )
    assert read_table(folder, size=(5, 4)).shape == (5, 4)


def test_resizing_cuts_about_the_centre(tmp_path: Path) -> None:
    """A wide picture whose middle square is white and whose sides are black: only the white is left."""
    wide = np.zeros((40, 120), np.uint8)
    wide[:, 40:80] = 255
    table = read_table(saved(tmp_path, np.stack([wide, 255 - wide])), size=(10, 10))
    assert pictures(table)[0].min() > 230  # the filter reaches a little beyond the cut
    assert pictures(table)[1].max() < 25


def test_the_camera_is_held_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for index, picture in enumerate(GREY):
        Image.fromarray(picture).save(tmp_path / f"{index:03}.png", exif=exif)
    table = read_table(str(tmp_path))
    assert table.shape == (4, 6)
    assert np.array_equal(pictures(table), np.rot90(GREY, -1, axes=(1, 2)))


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    pixels = np.concatenate([COLOUR, np.full((12, 6, 4, 1), 255, np.uint8)], axis=3)
    pixels[:, 0, :, 3] = 0
    table = read_table(saved(tmp_path, pixels))
    assert (pictures(table)[:, 0] == 255).all()
    assert np.array_equal(pictures(table)[:, 1:], COLOUR[:, 1:])
    assert table.notes[0] == "some pictures are transparent: they are laid on white"


def test_sixteen_bits_become_eight_and_black_and_white_become_0_and_255(tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 256 + 77
    assert np.array_equal(pictures(read_table(saved(tmp_path / "deep", deep))), GREY)
    flat = read_table(saved(tmp_path / "flat", GREY > 100))
    assert np.array_equal(pictures(flat), (GREY > 100) * 255)


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.fromarray(picture) for picture in GREY]
    for index in range(3):
        frames[index].save(tmp_path / f"{index}.gif", save_all=True, append_images=frames[5:])
    assert np.array_equal(pictures(read_table(str(tmp_path))), GREY[:3])


def test_palettes_of_colours_are_colours(tmp_path: Path) -> None:
    for index, picture in enumerate(COLOUR):
        Image.fromarray(picture).quantize(24).save(tmp_path / f"{index:03}.png")
    table = read_table(str(tmp_path))
    assert table.shape == (6, 4, 3)
    assert np.array_equal(pictures(table), COLOUR)  # 24 pixels, 24 colours


@pytest.mark.parametrize("content", [b"", b"no picture", b"half"])
def test_a_damaged_picture_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    folder = saved(tmp_path, GREY)
    whole = (tmp_path / "007.png").read_bytes()
    (tmp_path / "007.png").write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    assert refusal(folder) == "FOLDER/007.png is damaged or no picture: remove it"


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    folder = saved(tmp_path, GREY)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "100.png")
    assert refusal(folder) == "FOLDER/100.png unpacks to more pixels than is safe: remove it, or make it smaller"


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    assert "000.tif has pixels of mode F: expected 8 or 16 bits" in refusal(
        saved(tmp_path, GREY.astype(np.float32), ".tif")
    )


def test_pictures_beside_folders_of_pictures_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, GREY)
    saved(tmp_path / "more", GREY)
    assert (
        refusal(str(tmp_path))
        == "FOLDER holds pictures (000.png) and folders of them (more): expected one or the other"
    )


def test_options_of_tables_and_of_pictures_are_not_mixed(tmp_path: Path) -> None:
    assert (
        refusal(saved(tmp_path, GREY), drop=["a"])
        == "FOLDER is a folder of pictures and has no columns: leave --drop out"
    )
    np.save(tmp_path / "a.npy", GREY)
    assert refusal(str(tmp_path / "a.npy"), size=(8, 8)).startswith("--size resizes the pictures of a folder")


def test_a_model_sees_pictures_in_its_own_size_colours_and_range(tmp_path: Path) -> None:
    grey = manifest_of(read_table(saved(tmp_path / "grey", GREY)))
    large = np.repeat(np.repeat(COLOUR, 10, axis=1), 10, axis=2)
    table = read_for_model(saved(tmp_path / "large", large), grey)
    assert table.shape == (6, 4)
    from_colours = np.stack([np.asarray(Image.fromarray(picture).convert("L")) for picture in COLOUR])
    assert np.abs(pictures(table) - from_colours).mean() < 16  # Lanczos over the edges of the enlarged pixels
    digits = read_for_model(str(tmp_path / "grey"), manifest_of(read_table("digits")))
    assert (digits.shape, digits.pixel_range) == ((8, 8), (0, 1))
    assert 0 <= values(digits).min() < 0.2
    assert 0.8 < values(digits).max() <= 1


def test_pictures_for_a_model_of_tables_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RANDOM.standard_normal((10, 3)))
    manifest = manifest_of(read_table(str(tmp_path / "a.npy")))
    with pytest.raises(DataError, match=r"holds pictures: expected rows of shape \[3\], as the model's"):
        read_for_model(saved(tmp_path / "grey", GREY), manifest)
