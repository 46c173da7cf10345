"""Zip files that `zipfile` and torch could read differently, and pickles with tensors that do not fit, are refused.

`test_hostile_artifacts.py` loads whole artifacts. Here, only the checks run, which take a millisecond per case.
"""

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from models.archive_check import check_archive, open_archive
from models.errors import ArtifactUnsafe
from models.pickle_check import PickledTensor, check_pickle

PATH = Path("model.pt")
NAMES = [f"a/extra/exhibits/{name}" for name in ("held-out.json", "calibration.json", "card.md", "directions.json")]
END_RECORD = {"disk": 4, "here": 8, "members": 10}  # offsets of fields in the end record
SIZES = {"packed": 20, "unpacked": 24}  # offsets of fields in an entry of the directory


def zipped(names: Sequence[str] = ("a/version", "a/byteorder"), compression: int = zipfile.ZIP_STORED) -> bytearray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in names:
            archive.writestr(name, b"3\n")
    return bytearray(buffer.getvalue())


def unpacking_to(size: int) -> bytes:
    """Return a zip file with three compressed members, each of which unpacks to `size` bytes by the directory."""
    names = ["a/extra/exhibits/trained-rows.bin", *NAMES[:2]]
    content = zipped(names, zipfile.ZIP_DEFLATED)
    for entry in re.finditer(b"PK\x01\x02", bytes(content)):
        struct.pack_into("<L", content, entry.start() + SIZES["unpacked"], size)
    return bytes(content)


def with_end_record(**fields: int) -> bytes:
    """Return a zip file of two members whose end record has these values."""
    content = zipped()
    for field, value in fields.items():
        struct.pack_into("<H", content, content.rindex(b"PK\x05\x06") + END_RECORD[field], value)
    return bytes(content)


def with_entry(place: int, format_: str, value: int) -> bytes:
    """Return a zip file whose last directory entry has `value` at the offset `place`."""
    content = zipped()
    struct.pack_into(format_, content, content.rindex(b"PK\x01\x02") + place, value)
    return bytes(content)


def with_sizes(size: int) -> bytes:
    """Return a zip file whose last member has `size` bytes according to the directory."""
    content = zipped()
    struct.pack_into("<LL", content, content.rindex(b"PK\x01\x02") + SIZES["packed"], size, size)
    return bytes(content)


def check(content: bytes) -> list[str]:
    """Return the names of the members."""
    return list(check_archive(open_archive(content), content, PATH))


def test_plain_zip_file_is_accepted_with_all_its_members() -> None:
    assert check(bytes(zipped(("a/version", "a/byteorder", "a/data.pkl")))) == ["version", "byteorder", "data.pkl"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bytes(zipped(("a/version", "a/byt_order"))).replace(b"byt_", b"byt\0"), "has a NUL byte in its name"),
        (bytes(zipped(("a/version", "a/versioN"))).replace(b"versioN", b"version"), "a/version is there twice"),
        (bytes(zipped(("a/version", "b/byteorder"))), "expected all members in one folder, got ['a', 'b']"),
        (bytes(zipped((".a/version",))), "expected all members in one folder, got ['.a']"),
        (with_entry(SIZES["unpacked"], "<L", 3), "is not compressed, but its two sizes differ"),
        (with_entry(8, "<H", 1), "has the zip flags 0x1, which no artifact uses"),
        (with_entry(42, "<L", len(zipped()) - 150), "lies outside of the archive"),
        (with_entry(42, "<L", 1), "lies over another member"),
        (with_sizes(3), "the last member lies over the directory of the archive"),
        (bytes(zipped(("a/secrets.txt",))), "a/secrets.txt is none that an artifact may have"),
        (bytes(zipped(("a/code/__torch__/m.py", "a/code/__torch__/M.py"))), "differ only in upper and lower case"),
        (bytes(zipped(("a/version",), zipfile.ZIP_DEFLATED)), "is compressed in a way that no artifact uses"),
        (bytes(zipped(NAMES[:1], zipfile.ZIP_BZIP2)), "is compressed in a way that no artifact uses"),
        (unpacking_to(65 * 2**20), "unpacks to 68,157,440 bytes, 67,108,864 are allowed"),
        (bytes(zipped()).replace(b"a/version", b"a/Version", 1), "has another header than the directory says"),
    ],
)
def test_zip_file_that_readers_may_read_differently_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ArtifactUnsafe) as refusal:
        check(content)
    assert reason in str(refusal.value)


def test_compressed_members_that_unpack_to_too_much_together_are_refused() -> None:
    """The headers before the members still have the true sizes: they are checked later."""
    content = zipped([f"a/code/__torch__/m{n}.py" for n in range(513)], zipfile.ZIP_DEFLATED)
    for entry in re.finditer(b"PK\x01\x02", bytes(content)):
        struct.pack_into("<L", content, entry.start() + SIZES["unpacked"], 2**20)
    with pytest.raises(ArtifactUnsafe, match="the compressed members unpack to 537,919,488 bytes"):
        check(bytes(content))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has no end record"),
        (bytes(zipped())[:-1], "it has no end record"),
        (bytes(zipped()) + b"x", "its end record is not that of a plain zip file"),
        (with_end_record(disk=1), "its end record is not that of a plain zip file"),
        (with_end_record(here=1), "its end record is not that of a plain zip file"),
        (with_end_record(here=3, members=3), "the number of members differs from the one in the end record"),
        (with_end_record(here=20_001, members=20_001), "its directory has 20,001 members"),
    ],
)
def test_directory_that_readers_may_read_differently_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(zipfile.BadZipFile, match=reason):
        open_archive(content)


def part(value: Any) -> bytes:
    """Return the operations of a pickle that push `value`."""
    return pickle.dumps(value, 2)[2:-1]


WEIGHT = ("storage", "torch.FloatStorage", "0", "cpu", 6)


def pickled_tensor(offset: Any = 0, size: Any = (2, 3), stride: Any = (3, 1), weight: Any = WEIGHT) -> bytes:
    arguments = part(weight) + b"Q" + part(offset) + part(size) + part(stride)
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR."


def load(content: bytes) -> Any:
    return check_pickle(content, "data.pkl", PATH, (), {"0": 24})


@pytest.mark.parametrize("arguments", [{}, {"stride": (0, 0)}, {"offset": 3, "size": (3,), "stride": (1,)}])
def test_tensor_within_its_weight_is_accepted(arguments: dict[str, Any]) -> None:
    assert isinstance(load(pickled_tensor(**arguments)), PickledTensor)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickled_tensor(offset=1), "has a tensor of size [2, 3] in a weight of 6 numbers"),
        (pickled_tensor(stride=(4, 1)), "has a tensor of size [2, 3] in a weight of 6 numbers"),
        (pickled_tensor(size=(7, 1), stride=(0, 0)), "has a tensor of size [7, 1] in a weight of 6 numbers"),
        (pickled_tensor(size=(0, 3)), "has a tensor of size [0, 3] in a weight of 6 numbers"),
        (pickled_tensor(offset=-1), "has a tensor without a valid size"),
        (pickled_tensor(stride=(-3, 1)), "has a tensor without a valid size"),
        (pickled_tensor(size=[2, 3]), "has a tensor without a valid size"),
        (pickled_tensor(size=(2.0, 3)), "has a tensor without a valid size"),
        (pickled_tensor(size=(6,)), "has a tensor with 1 dimensions"),
        (pickled_tensor(size=(1,) * 9, stride=(1,) * 9), "has a tensor with 9 dimensions"),
        (pickled_tensor(weight=(*WEIGHT[:4], 7)), "has 7 numbers in weight '0', but 24 bytes in its member"),
        (
            pickled_tensor(weight=(*WEIGHT[:2], "1", "cpu", 6)),
            "has 6 numbers in weight '1', but None bytes in its member",
        ),
        (pickled_tensor(weight="0"), "has a weight that the archive does not contain"),
        (b"\x80\x02N" + b"r" + struct.pack("<L", 2**31) + b".", "has a memo that is larger than the pickle"),
        (pickle.dumps(2**80, 2), "has a number of more than 64 bits"),
        (pickle.dumps(1.5, 2) + b"N.", "has bytes after its end"),
        (pickle.dumps("text", 2)[:-1], "is damaged"),
        (b"\x80\x02R.", "is damaged (UnpicklingError)"),
        (pickle.dumps(b"bytes", 4), "has the operation FRAME"),
    ],
)
def test_pickle_that_no_artifact_has_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ArtifactUnsafe) as refusal:
        load(content)
    assert reason in str(refusal.value)
