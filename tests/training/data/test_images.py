"""Folders of images: the values that are read from them, and folders that are refused."""

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


def save_images(folder: Path, pixels: np.ndarray, suffix: str = ".png") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:03}{suffix}")
    return str(folder)


def images_of(table: Table) -> np.ndarray:
    return values(table).reshape(-1, *table.shape)


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_table(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(source, "FOLDER")


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".tiff", ".gif"])
def test_grey_images_are_read_as_matrices_of_values_from_0_to_255(tmp_path: Path, suffix: str) -> None:
    table = read_table(save_images(tmp_path / "photos", GREY, suffix))
    assert (table.shape, table.pixel_range, table.labels, table.notes) == ((6, 4), (0, 255), None, [])
    assert np.array_equal(images_of(table), GREY)
    assert (table.names[-1], table.missing.tolist()) == ("pixel[5,3]", [0] * 24)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".webp"])
def test_colour_images_have_three_channels_as_the_last_dimension(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, image in enumerate(COLOUR):
        Image.fromarray(image).save(folder / f"{index:03}{suffix}", lossless=True)  # WebP is lossy by default
    table = read_table(str(folder))
    assert table.shape == (6, 4, 3)
    assert np.array_equal(images_of(table), COLOUR)
    assert table.names[-1] == "pixel[5,3,2]"


def test_grey_images_become_colour_images_if_the_folder_contains_a_colour_image(tmp_path: Path) -> None:
    folder = save_images(tmp_path, GREY)
    Image.fromarray(COLOUR[0]).save(tmp_path / "100.png")
    table = read_table(folder)
    assert table.shape == (6, 4, 3)
    assert np.array_equal(images_of(table)[0], np.repeat(GREY[0][..., None], 3, axis=2))
    assert np.array_equal(images_of(table)[12], COLOUR[0])


def test_jpeg_has_the_pixels_that_pillow_decodes(tmp_path: Path) -> None:
    table = read_table(save_images(tmp_path, COLOUR, ".jpg"))
    assert np.array_equal(images_of(table)[3], np.asarray(Image.open(tmp_path / "003.jpg")))


def test_names_of_sub_folders_become_labels_in_alphabetical_order(tmp_path: Path) -> None:
    save_images(tmp_path / "dogs", GREY[:5])
    save_images(tmp_path / "cats", GREY[5:])
    (tmp_path / "empty").mkdir()
    table = read_table(str(tmp_path))
    assert table.label_names == ["cats", "dogs"]
    assert table.labels is not None
    assert table.labels.tolist() == [0] * 7 + [1] * 5
    assert table.labels.dtype == np.int64
    assert np.array_equal(images_of(table), np.concatenate([GREY[5:], GREY[:5]]))


def test_files_that_are_not_images_are_ignored_with_a_note(tmp_path: Path) -> None:
    folder = save_images(tmp_path, GREY)
    for name in ("notes.txt", "list.csv", ".DS_Store"):
        (tmp_path / name).write_text("text")
    assert read_table(folder).notes == ["2 files are not images and are ignored"]


def test_images_on_disk_equal_images_in_memory(tmp_path: Path) -> None:
    folder = save_images(tmp_path, COLOUR)
    in_memory, on_disk = read_table(folder), read_table(folder, limit=100)
    assert (in_memory.x.on_disk, on_disk.x.on_disk) == (False, True)
    assert in_memory.fingerprint == on_disk.fingerprint


def test_error_about_images_of_two_sizes_names_the_option_that_resizes_them(tmp_path: Path) -> None:
    folder = save_images(tmp_path, GREY)
    Image.fromarray(np.zeros((5, 9), np.uint8)).save(tmp_path / "100.png")
    assert refusal(folder) == (
        "FOLDER/100.png is 5x9 (height x width), FOLDER/000.png is 6x4: expected images of one size; "
        "add --size 5x4 to resize"
    )
    assert read_table(folder, size=(5, 4)).shape == (5, 4)


def test_resizing_crops_around_the_centre(tmp_path: Path) -> None:
    """Each image has a square in the middle, and the opposite colour on both sides of it. Only the square remains."""
    wide = np.zeros((40, 120), np.uint8)
    wide[:, 40:80] = 255
    table = read_table(save_images(tmp_path, np.stack([wide, 255 - wide])), size=(10, 10))
    assert images_of(table)[0].min() > 230  # the resizing filter mixes in a few pixels from outside the square
    assert images_of(table)[1].max() < 25


def test_images_with_an_exif_orientation_are_rotated(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: rotated by 90 degrees
    for index, image in enumerate(GREY):
        Image.fromarray(image).save(tmp_path / f"{index:03}.png", exif=exif)
    table = read_table(str(tmp_path))
    assert table.shape == (4, 6)
    assert np.array_equal(images_of(table), np.rot90(GREY, -1, axes=(1, 2)))


def test_transparent_pixels_become_white_with_a_note(tmp_path: Path) -> None:
    pixels = np.concatenate([COLOUR, np.full((12, 6, 4, 1), 255, np.uint8)], axis=3)
    pixels[:, 0, :, 3] = 0
    table = read_table(save_images(tmp_path, pixels))
    assert (images_of(table)[:, 0] == 255).all()
    assert np.array_equal(images_of(table)[:, 1:], COLOUR[:, 1:])
    assert table.notes[0] == "some images are transparent: they are blended with a white background"


@pytest.mark.parametrize(("bits", "white"), [(8, 511), (10, 1023), (12, 4095), (14, 16383), (16, 65535)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_images_of_16_bits_keep_every_level(tmp_path: Path, bits: int, white: int, suffix: str) -> None:
    deep = RANDOM.randint(0, 2**bits, (40, 9, 8)).astype(np.uint16)
    deep[0, 0, 0] = 2**bits - 1
    table = read_table(save_images(tmp_path / "deep", deep, suffix))
    assert np.array_equal(images_of(table), deep)
    assert (table.shape, table.pixel_range) == ((9, 8), (0, white))
    assert table.notes == [f"the images have 16 bits: 0 is read as black and {white} as white"]
    again = read_for_model(str(tmp_path / "deep"), manifest_of(table))
    assert again.fingerprint == table.fingerprint
    shallow = read_for_model(save_images(tmp_path / "shallow", np.full((3, 9, 8), 255, np.uint8)), manifest_of(table))
    assert (values(shallow) == white).all()


def test_deep_images_on_disk_equal_images_in_memory(tmp_path: Path) -> None:
    deep = RANDOM.randint(0, 4096, (70, 9, 8)).astype(np.uint16)
    folder = save_images(tmp_path, deep)
    on_disk = read_table(folder, limit=100)
    assert on_disk.x.on_disk
    assert np.array_equal(images_of(on_disk), deep)


def test_deep_images_are_resized_without_loss_of_depth(tmp_path: Path) -> None:
    deep = np.broadcast_to(np.linspace(0, 4000, 12)[:, None, None], (12, 18, 16)).astype(np.uint16)
    table = read_table(save_images(tmp_path, deep), size=(9, 8))
    assert table.shape == (9, 8)
    assert np.array_equal(images_of(table), deep[:, :9, :8])


def test_deep_images_are_scaled_to_the_range_of_the_model(tmp_path: Path) -> None:
    deep = RANDOM.randint(0, 65536, (5, 8, 8)).astype(np.uint16)
    source = save_images(tmp_path / "deep", deep)
    fine = read_for_model(source, manifest_of(read_table("digits")))
    assert np.abs(images_of(fine) - deep / 65535).max() < 1e-6
    coarse = manifest_of(read_table(save_images(tmp_path / "grey", RANDOM.randint(0, 256, (9, 8, 8)).astype(np.uint8))))
    table = read_for_model(source, coarse)
    assert np.abs(images_of(table) - deep / 257).max() < 1e-4
    assert table.notes == []


def test_image_of_16_bits_among_images_of_8_bits_is_scaled_to_255_and_keeps_every_grey_level(tmp_path: Path) -> None:
    folder = save_images(tmp_path, GREY)
    deep = np.arange(GREY[0].size, dtype=np.uint16).reshape(GREY[0].shape) * 100  # 12 bits or so
    Image.fromarray(deep).save(tmp_path / "100.png")
    table = read_table(folder)
    assert np.abs(images_of(table)[12] - deep / 257).max() < 1e-4
    assert len(np.unique(images_of(table)[12])) == deep.size
    assert np.array_equal(images_of(table)[:12], GREY)
    assert (table.pixel_range, table.notes) == (
        (0, 255),
        ["some images have 16 bits and others 8: 65535 is read as 255, and fractions are kept"],
    )


def test_images_of_1_bit_are_black_and_white(tmp_path: Path) -> None:
    flat = read_table(save_images(tmp_path / "flat", GREY > 100))
    assert np.array_equal(images_of(flat), (GREY > 100) * 255)


def test_animation_is_read_as_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(image) for image in GREY]
    for index in range(3):
        frames[index].save(tmp_path / f"{index}.gif", save_all=True, append_images=frames[5:])
    assert np.array_equal(images_of(read_table(str(tmp_path))), GREY[:3])


def test_images_with_a_colour_palette_are_read_as_colour_images(tmp_path: Path) -> None:
    for index, image in enumerate(COLOUR):
        Image.fromarray(image).quantize(24).save(tmp_path / f"{index:03}.png")
    table = read_table(str(tmp_path))
    assert table.shape == (6, 4, 3)
    assert np.array_equal(images_of(table), COLOUR)  # exact: 24 pixels have at most 24 colours


@pytest.mark.parametrize("content", [b"", b"not an image", b"half"])
def test_error_about_a_damaged_image_names_the_file(tmp_path: Path, content: bytes) -> None:
    folder = save_images(tmp_path, GREY)
    whole = (tmp_path / "007.png").read_bytes()
    (tmp_path / "007.png").write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    assert refusal(folder) == "FOLDER/007.png is damaged or not an image: remove it, or save it again"


@pytest.mark.slow
def test_decompression_bomb_raises_before_it_is_decoded(tmp_path: Path) -> None:
    folder = save_images(tmp_path, GREY)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "100.png")
    assert refusal(folder) == "FOLDER/100.png has more pixels than is safe to decode: remove it, or make it smaller"


def test_image_with_floating_point_pixels_raises(tmp_path: Path) -> None:
    assert "000.tif has pixels of mode F: expected 8 or 16 bits" in refusal(
        save_images(tmp_path, GREY.astype(np.float32), ".tif")
    )


def test_folder_raises_if_it_contains_both_images_and_folders_of_images(tmp_path: Path) -> None:
    save_images(tmp_path, GREY)
    save_images(tmp_path / "more", GREY)
    assert (
        refusal(str(tmp_path))
        == "FOLDER contains images (000.png) and folders of images (more): expected one or the other; "
        "move the images into a folder, or the folders elsewhere"
    )


def test_options_for_tables_raise_for_images_and_vice_versa(tmp_path: Path) -> None:
    assert (
        refusal(save_images(tmp_path, GREY), drop=["a"])
        == "FOLDER is a folder of images and has no columns to drop: leave --drop out"
    )
    np.save(tmp_path / "a.npy", GREY)
    assert refusal(str(tmp_path / "a.npy"), size=(8, 8)).startswith("--size resizes the images of a folder")


def test_images_are_converted_to_the_size_colours_and_range_that_the_model_takes(tmp_path: Path) -> None:
    grey = manifest_of(read_table(save_images(tmp_path / "grey", GREY)))
    large = np.repeat(np.repeat(COLOUR, 10, axis=1), 10, axis=2)
    table = read_for_model(save_images(tmp_path / "large", large), grey)
    assert table.shape == (6, 4)
    from_colours = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in COLOUR])
    assert np.abs(images_of(table) - from_colours).mean() < 16  # Lanczos blurs the edges of the enlarged pixels
    digits = read_for_model(str(tmp_path / "grey"), manifest_of(read_table("digits")))
    assert (digits.shape, digits.pixel_range) == ((8, 8), (0, 1))
    assert 0 <= values(digits).min() < 0.2
    assert 0.8 < values(digits).max() <= 1


def test_reading_images_raises_if_the_model_takes_tables(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RANDOM.standard_normal((10, 3)))
    manifest = manifest_of(read_table(str(tmp_path / "a.npy")))
    with pytest.raises(DataError, match=r"contains images: expected rows of shape \[3\], as the model takes"):
        read_for_model(save_images(tmp_path / "grey", GREY), manifest)
