"""Check the zip archive of an artifact before anything is unpacked: number, names, sizes and places of its members.

Python's `zipfile` and the zip reader of torch must see the same members. This module therefore accepts only the plain
zip files that `models.artifact.publish` writes. This module does not import torch.
"""

import encodings.cp437  # noqa: F401 - zipfile imports it later, but a trial (`models.trial`) cannot import modules
import io
import re
import struct
import zipfile
from pathlib import Path

from models.errors import ArtifactUnsafe, printable

MEBIBYTE = 2**20
MAX_FILE_BYTES = 4 * 2**30 - 1  # a larger zip file needs zip64 records, which no artifact has
MAX_MANIFEST_BYTES = 64 * MEBIBYTE
# Lists, objects and commas in a manifest: a model has about 28 per feature, and each can take 100 bytes of memory.
MAX_MANIFEST_VALUES = 4_000_000
MAX_MEMBERS = 20_000
MAX_DIRECTORY_BYTES = 4 * MEBIBYTE
MAX_COMPRESSED_MEMBERS_BYTES = 512 * MEBIBYTE  # the sum of the unpacked sizes of all members that are compressed

# Every member that an artifact may have, the largest unpacked size, and whether the member may be compressed. Weights
# are never compressed, so the size of the file bounds their size.
MEMBERS: tuple[tuple[str, int, bool], ...] = (
    (r"data/[0-9]{1,7}", MAX_FILE_BYTES, False),  # the weights
    (r"constants/[0-9]{1,7}", MAX_FILE_BYTES, False),  # constant tensors of the code
    (r"data\.pkl", MEBIBYTE, False),  # the tree of modules
    (r"constants\.pkl", MEBIBYTE, False),
    (r"code/__torch__/(?:[A-Za-z0-9_]+/){0,16}[A-Za-z0-9_]+\.py", MEBIBYTE, True),
    (r"code/__torch__/(?:[A-Za-z0-9_]+/){0,16}[A-Za-z0-9_]+\.py\.debug_pkl", MEBIBYTE, True),
    (r"version", 16, False),
    (r"byteorder", 16, False),
    (r"\.data/version", 16, False),  # torch adds it if an operator, such as gelu, has had several versions
    (r"\.data/serialization_id", 64, False),
    (r"extra/manifest\.json", MAX_MANIFEST_BYTES, True),
    (r"extra/twin/(?:encode|decode|score|reconstruct)\.onnx", 16 * MEBIBYTE, True),
    (r"extra/twin/(?:encode|decode|score|reconstruct)\.json", MEBIBYTE, True),
    (r"extra/exhibits/(?:held-out\.json|calibration\.json|card\.md|directions\.json)", 64 * MEBIBYTE, True),
    (r"extra/exhibits/trained-rows\.bin", 256 * MEBIBYTE, True),
)
_PATTERNS = [(re.compile(pattern), size, compressed) for pattern, size, compressed in MEMBERS]
_ROOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)

MAX_COMMENT_BYTES = 65_535
_END_SIGNATURE = b"PK\x05\x06"
_END = struct.Struct("<4s4H2LH")  # the end record of a zip file, without its comment
_LOCAL = struct.Struct("<4s5H3L2H")  # the header before the bytes of a member
_FLAGS = 0x8 | 0x800  # 0x8: the sizes follow the bytes; 0x800: the name is in UTF-8; neither changes what a reader sees


def open_archive(content: bytes) -> zipfile.ZipFile:
    """Open the zip archive `content` if its directory is of a sane size.

    Raises:
        zipfile.BadZipFile: `content` is not a plain zip file, or its directory is too large.
    """
    start = content.rfind(_END_SIGNATURE, max(0, len(content) - _END.size - MAX_COMMENT_BYTES))
    if start < 0 or start + _END.size > len(content):
        raise zipfile.BadZipFile("it has no end record")
    _, disk, first_disk, here, members, size, offset, comment = _END.unpack_from(content, start)
    if disk or first_disk or here != members or start + _END.size + comment != len(content) or offset + size != start:
        raise zipfile.BadZipFile("its end record is not that of a plain zip file")
    if members > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        raise zipfile.BadZipFile(f"its directory has {members:,} members and {size:,} bytes, which is too much")
    archive = zipfile.ZipFile(io.BytesIO(content))
    if len(archive.infolist()) != members:
        raise zipfile.BadZipFile("the number of members differs from the one in the end record")
    return archive


def check_archive(archive: zipfile.ZipFile, content: bytes, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Check every member of `archive`, the zip file in `content`. Nothing is unpacked.

    Returns:
        the members by name, without the folder that all names begin with.

    Raises:
        ArtifactUnsafe: a name, a size or a place that no artifact has.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    roots = set()
    for info in archive.infolist():
        root, _, name = info.filename.partition("/")
        shown = printable(info.orig_filename[:100])
        roots.add(root)
        if info.orig_filename != info.filename:
            raise ArtifactUnsafe(f"{path}: the member {shown} has a NUL byte in its name")
        _check_member(info, name, shown, path)
        if name in found:
            raise ArtifactUnsafe(f"{path}: the member {shown} is there twice")
        found[name] = info
    if len(roots) != 1 or not _ROOT.fullmatch(next(iter(roots))):
        raise ArtifactUnsafe(f"{path}: expected all members in one folder, got {printable(str(sorted(roots)[:3]))}")
    if len({name.lower() for name in found}) != len(found):
        raise ArtifactUnsafe(f"{path}: two members have names that differ only in upper and lower case")
    unpacked = sum(info.file_size for info in found.values() if info.compress_type != zipfile.ZIP_STORED)
    if unpacked > MAX_COMPRESSED_MEMBERS_BYTES:
        raise ArtifactUnsafe(
            f"{path}: the compressed members unpack to {unpacked:,} bytes, at most "
            f"{MAX_COMPRESSED_MEMBERS_BYTES:,} are allowed"
        )
    _check_places(archive, content, path)
    return found


def _check_member(info: zipfile.ZipInfo, name: str, shown: str, path: Path) -> None:
    limits = next(((size, compressed) for pattern, size, compressed in _PATTERNS if pattern.fullmatch(name)), None)
    if limits is None:
        raise ArtifactUnsafe(f"{path}: the member {shown} is none that an artifact may have")
    size, compressed = limits
    if info.file_size > size:
        raise ArtifactUnsafe(f"{path}: the member {shown} unpacks to {info.file_size:,} bytes, {size:,} are allowed")
    if info.compress_type != zipfile.ZIP_STORED and not (compressed and info.compress_type == zipfile.ZIP_DEFLATED):
        raise ArtifactUnsafe(f"{path}: the member {shown} is compressed in a way that no artifact uses")
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise ArtifactUnsafe(f"{path}: the member {shown} is not compressed, but its two sizes differ")
    if info.flag_bits & ~_FLAGS:
        raise ArtifactUnsafe(
            f"{path}: the member {shown} has the zip flags {info.flag_bits:#x}, which no artifact uses"
        )


def _check_places(archive: zipfile.ZipFile, content: bytes, path: Path) -> None:
    """Check that the members lie one after another, and that the header before each member has the same name."""
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        start, shown = info.header_offset, printable(info.filename)
        if start < end:
            raise ArtifactUnsafe(f"{path}: the member {shown} lies over another member")
        if start + _LOCAL.size > archive.start_dir:
            raise ArtifactUnsafe(f"{path}: the member {shown} lies outside of the archive")
        signature, *_, name_bytes, extra_bytes = _LOCAL.unpack_from(content, start)
        name_start = start + _LOCAL.size
        if (
            signature != b"PK\x03\x04"
            or content[name_start : name_start + name_bytes] != info.filename.encode()
            or info.extra
        ):
            raise ArtifactUnsafe(f"{path}: the member {shown} has another header than the directory says")
        end = name_start + name_bytes + extra_bytes + info.compress_size
    if end > archive.start_dir:
        raise ArtifactUnsafe(f"{path}: the last member lies over the directory of the archive")
