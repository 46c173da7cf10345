"""Inspect an artifact before torch reads it: the archive, the code, the pickles and the ONNX twin.

`inspect_artifact` proves nothing about what a model computes. It makes sure that loading and running the model calls
only operators that `models.allowed_code` lists, on memory that belongs to the model. This module does not import torch.
"""

import hashlib
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.archive_check import check_archive, open_archive
from models.code_check import Code, check_code
from models.errors import ArtifactUnsafe
from models.onnx_check import TwinWeight, check_twin
from models.pickle_check import INT_LIST, check_operations, check_pickle

MAX_CODE_BYTES = 2 * 2**20  # limit on the sum of all code members; enough for hundreds of layers
ENTRY_METHODS = (
    "forward", "encode", "decode", "draw", "observe", "score", "log_weight", "p_value", "severity", "threshold",
    "impute", "complete",
)  # fmt: skip


TWIN_FOLDER = "extra/twin/"
MAX_REMEMBERED = 32  # artifacts; one takes some 10 KB


@dataclass(frozen=True)
class Inspected:
    """What `inspect_artifact` found.

    Args:
        members: the members of the archive by name, without the folder that all names begin with.
        twin_weights: for each graph of the ONNX twin, by the name of its member, the weights of the module that the
            graph uses. Each weight has a name, a type (as ONNX numbers it) and a shape.
    """

    members: Mapping[str, zipfile.ZipInfo]
    twin_weights: Mapping[str, Mapping[str, TwinWeight]]


# What passed the inspection in this process, by SHA-256. The result depends on the bytes alone, and an inspection takes
# a quarter of the time of loading a small model, which a program may do often.
_passed: OrderedDict[bytes, Inspected] = OrderedDict()


def inspect_artifact(content: bytes, path: Path) -> Inspected:
    """Refuse an artifact that could harm this machine. Bytes that have passed are not inspected again.

    Args:
        content: the bytes of the artifact.
        path: the path of the artifact, for messages.

    Raises:
        ArtifactUnsafe: the artifact has something that no artifact needs; the message says what and where.
    """
    digest = hashlib.sha256(content).digest()
    if (known := _passed.get(digest)) is not None:
        return known
    try:
        with open_archive(content) as archive:
            found = _passed[digest] = _inspect(archive, content, path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ArtifactUnsafe(f"{path}: the zip file cannot be unpacked: {error}") from error
    if len(_passed) > MAX_REMEMBERED:
        _passed.popitem(last=False)
    return found


def _inspect(archive: zipfile.ZipFile, content: bytes, path: Path) -> Inspected:
    members = check_archive(archive, content, path)
    code = _check_code_members(archive, members, path)
    pickled = {}
    for name in ("data", "constants"):
        folder = f"{name}/"
        sizes = {
            member.removeprefix(folder): info.file_size for member, info in members.items() if member.startswith(folder)
        }
        content = _read(archive, members, f"{name}.pkl", path)
        pickled[name] = check_pickle(content, f"{name}.pkl", path, code.classes, sizes)
    code.check_attributes(pickled["data"])
    code.check_methods(pickled["data"].type, ENTRY_METHODS)
    graphs = [name for name in members if name.startswith(TWIN_FOLDER) and name.endswith(".onnx")]
    twin_weights = {}
    for name in graphs:
        listed = _read(archive, members, name.removesuffix(".onnx") + ".json", path)
        twin_weights[name] = check_twin(archive.read(members[name]), listed, name, path)
    return Inspected(members, twin_weights)


def _check_code_members(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], path: Path) -> Code:
    sources = {name: info for name, info in members.items() if name.startswith("code/")}
    if (size := sum(info.file_size for info in sources.values())) > MAX_CODE_BYTES:
        raise ArtifactUnsafe(f"{path}: the code has {size:,} bytes, at most {MAX_CODE_BYTES:,} are allowed")
    for name, info in sources.items():
        if name.endswith(".debug_pkl"):
            check_operations(archive.read(info), name, path, {INT_LIST})
    return check_code({name: archive.read(info) for name, info in sources.items() if name.endswith(".py")}, path)


def _read(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str, path: Path) -> bytes:
    if name not in members:
        raise ArtifactUnsafe(f"{path}: the member {name} is missing")
    return archive.read(members[name])
