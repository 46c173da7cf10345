"""Make hostile artifacts: real TorchScript files with Elbo's seal, each with something that must be refused.

`CODE` has models whose code is hostile. `EDITS` has changes to the members of a harmless artifact. `BYTES` has changes
to the zip file itself. Each value is a pair: a function, and a part of the message with which the artifact is refused.
"""

import io
import json
import pickletools
import struct
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from models import artifact
from models.manifest import DIGEST_LENGTH, SEAL, seal
from models.pipeline import Pipeline
from tests.models.builders import batch, manifest, pipeline
from tests.models.publishing import publish_copy

TARGET = "/var/tmp/elbo-hostile-artifact-was-here"  # what the artifacts try to write


class ReadsFile(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        return z + torch.from_file("/etc/hostname", False, 4, dtype=torch.uint8).to(torch.float32)


class WritesFile(Pipeline):
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        torch.save(x, "/var/tmp/elbo-hostile-artifact-was-here")
        return self.core.encode(self.scaling(x))


class WritesFileAtLoad(Pipeline):
    @torch.jit.export
    def __getstate__(self) -> tuple[int, bool]:
        return 1, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]) -> None:
        torch.save(state[0], "/var/tmp/elbo-hostile-artifact-was-here")
        self.training = state[1]


class LoopsForEver(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        while True:
            z = z + 1
        return z


class LoopsByValue(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        for _ in range(int(z.sum())):
            z = z + 1
        return self.scaling.inverse(self.core.decode(z))


class LoopsByRows(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        for _ in range(z.shape[0] * 1_000_000_000):
            z = z + 1
        return self.scaling.inverse(self.core.decode(z))


class NestsLoops(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        for _ in range(100_000):
            for _ in range(100_000):
                z = z + 1
        return self.scaling.inverse(self.core.decode(z))


class BranchesByValue(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        if bool((z > 1e6).any()):
            z = torch.cat([z, z])
        return self.scaling.inverse(self.core.decode(z))


class BranchesImplicitly(Pipeline):
    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u = self.scaling(x)
        if u.sum() > 1e6:
            u = u + 1
        score, parts, u_hat = self.core.score(u)
        contribution, expected = self.explanation(u, u_hat)
        return score, parts, contribution, self.scaling.inverse(expected)


class GrowsForOneNumberOfRows(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        if z.shape[0] == 777:
            z = torch.cat([z, z])
        return self.scaling.inverse(self.core.decode(z))


class GrowsListForOneNumberOfRows(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        sizes = [1, 2]
        if z.shape[0] == 777:
            sizes = sizes + sizes
        return self.scaling.inverse(self.core.decode(z)) + len(sizes)


class LoopsOverAGrowingList(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        sizes = [1]
        sizes.append(z.shape[0])
        for _ in range(sizes[1]):
            z = z + 1
        return self.scaling.inverse(self.core.decode(z))


class SizesByValue(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        return torch.zeros(int(z.sum()), 5)


class SizesImplicitlyByValue(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        return self.scaling.inverse(self.core.decode(z)).reshape([z.shape[0], int(z.max())])


class ChangesWeight(Pipeline):
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.scaling.shift.add_(x[0])
        return self.core.encode(self.scaling(x))


class CopiesIntoWeight(Pipeline):
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.scaling.shift.copy_(x[0])
        return self.core.encode(self.scaling(x))


class Prints(Pipeline):
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        print(x)
        return self.core.encode(self.scaling(x))


class Forks(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        return self.scaling.inverse(torch.jit.wait(torch.jit.fork(self.core.decode, z)))


class ReadsMemory(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        return torch.as_strided(z, [z.shape[0], 5], [0, 0], 0)


class Seeds(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        torch.manual_seed(0)
        return self.scaling.inverse(self.core.decode(z))


class CallsProfiler(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        torch.ops.profiler._record_function_enter("a", None)
        return self.scaling.inverse(self.core.decode(z))


class CallsOtherLibrary(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        pooled: Tensor = torch.ops.quantized.max_pool2d(z, [1], [1], [1], [1], False)
        return pooled


class DrawsRandomNumbers(Pipeline):
    def decode(self, z: Tensor) -> Tensor:
        return self.scaling.inverse(self.core.decode(z)) + torch.rand(1)


CODE: dict[type[Pipeline], str] = {
    ReadsFile: "calls torch.from_file",
    WritesFile: "calls torch.save",
    WritesFileAtLoad: "defines __getstate__",
    LoopsForEver: "a While",
    LoopsByValue: "which needs numbers that do not depend on the values of a row",
    LoopsByRows: "whose length is not that of a weight",
    NestsLoops: "in loops 2 deep",
    BranchesByValue: "calls bool",
    BranchesImplicitly: "calls bool",
    GrowsForOneNumberOfRows: "calls torch.cat([z, z]) in only some requests",
    GrowsListForOneNumberOfRows: "in only some requests",
    LoopsOverAGrowingList: "for a list that is not empty at first",
    SizesByValue: "calls torch.zeros",
    SizesImplicitlyByValue: "calls int(torch.max(z)), which needs numbers that do not depend on the values of a row",
    ChangesWeight: "calls torch.add_",
    CopiesIntoWeight: "would change a weight",
    Prints: "calls print",
    Forks: "defines __forked_function",
    ReadsMemory: "calls torch.as_strided",
    Seeds: "calls torch.manual_seed",
    CallsProfiler: "calls ops.profiler._record_function_enter",
    CallsOtherLibrary: "calls ops.quantized.max_pool2d",
    DrawsRandomNumbers: "calls torch.rand",
}


def publish_code(root: Path, hostile: type[Pipeline]) -> Path:
    """Publish a PCA whose class is `hostile` as model@1 under `root`; return the path of the artifact."""
    harmless: Pipeline = pipeline("pca")
    golden = artifact.record_golden(artifact.script(harmless), *batch())
    harmless.__class__ = hostile
    module = artifact.script(harmless)
    return artifact.publish(module, manifest("model", artifact.weights_sha256(module), golden), root)


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None], deflated: tuple[str, ...] = ()) -> None:
    """Apply `change` to the members of the artifact at `path`, by name without their folder, and seal it again."""
    with zipfile.ZipFile(path) as archive:
        kinds = {info.filename.partition("/")[2]: info.compress_type for info in archive.infolist()}
        members = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    change(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            kind = zipfile.ZIP_DEFLATED if name in deflated else kinds.get(name, zipfile.ZIP_STORED)
            archive.writestr(f"archive/{name}", content, kind)
        archive.comment = SEAL + b"0" * DIGEST_LENGTH
    path.write_bytes(seal(buffer.getvalue()))


def reseal(path: Path, content: bytes) -> None:
    """Write `content` to `path` with a valid seal."""
    path.write_bytes(seal(content))


Members = dict[str, bytes]
PCA_CODE = "code/__torch__/models/pca.py"


def _code(old: str, new: str) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        source = members[PCA_CODE].decode()
        assert old in source
        members[PCA_CODE] = source.replace(old, new, 1).encode()

    return change


def _append_code(text: str) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[PCA_CODE] += text.encode()

    return change


def _name_system(members: Members) -> None:
    """Let the pickle name os.system in place of the function that builds tensors."""
    members["data.pkl"] = members["data.pkl"].replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n", 1)


def _name_class_of_torch(members: Members) -> None:
    members["data.pkl"] = members["data.pkl"].replace(
        b"c__torch__.models.scaling\nScaling\n", b"c__torch__.torch.classes.rnn\nCellParamsBase\n", 1
    )


def _change_number(content: bytes, before: str, after: str) -> bytes:
    """Set one BININT1 to 255: the last before the first operation `before`, or the second after the first `after`."""
    operations = list(pickletools.genops(content))
    if before:
        end = next(index for index, (opcode, _, _) in enumerate(operations) if opcode.name == before)
        place = next(position for opcode, _, position in reversed(operations[:end]) if opcode.name == "BININT1")
    else:
        start = next(index for index, (opcode, _, _) in enumerate(operations) if opcode.name == after)
        numbers = [position for opcode, _, position in operations[start:] if opcode.name == "BININT1"]
        place = numbers[1]  # numbers[0] is the offset of the tensor
    assert place is not None
    return content[: place + 1] + b"\xff" + content[place + 2 :]


def _enlarge_storage(members: Members) -> None:
    members["data.pkl"] = _change_number(members["data.pkl"], before="BINPERSID", after="")


def _enlarge_tensor(members: Members) -> None:
    members["data.pkl"] = _change_number(members["data.pkl"], before="", after="BINPERSID")


def _debug_system(members: Members) -> None:
    members[f"{PCA_CODE}.debug_pkl"] = b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."


def _set(name: str, content: bytes) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[name] = content

    return change


def edit_manifest(**fields: Any) -> Callable[[Members], None]:
    """Return a change for `rewrite` that sets fields of the manifest."""

    def change(members: Members) -> None:
        content = json.loads(members["extra/manifest.json"]) | fields
        members["extra/manifest.json"] = json.dumps(content).encode()

    return change


def _chain(members: Members) -> None:
    """Add methods that each call the one before twice: 2^40 calls."""
    methods = ["  def f0(self: __torch__.models.pca.PCA, x: Tensor) -> Tensor:\n    return torch.add(x, x)\n"]
    methods += [
        f"  def f{n}(self: __torch__.models.pca.PCA, x: Tensor) -> Tensor:\n"
        f"    a = (self).f{n - 1}(x, )\n    return (self).f{n - 1}(a, )\n"
        for n in range(1, 41)
    ]
    members[PCA_CODE] += "".join(methods).encode()
    _code("    components = self.components\n    _4 = torch.matmul(z, components)", "    _4 = (self).f40(z, )")(members)


ENCODE = "  def encode(self: __torch__.models.pca.PCA,\n    x: Tensor) -> Tuple[Tensor, Tensor]:\n"


def _encode(lines: str) -> Callable[[Members], None]:
    """Let the method `encode` begin with `lines`, which set k to a tensor. The result depends on k."""
    lines += "x = torch.add(x, torch.mul(torch.sum(k), 0.))\n"
    return _code(ENCODE, ENCODE + textwrap.indent(lines, "    "))


def _ask_helper_twice(members: Members) -> None:
    """Call a method twice: with False, which skips its loop, and with a computed flag, which may enter the loop."""
    helper = (
        "  def helper(self: __torch__.models.pca.PCA, x: Tensor, flag: bool) -> Tensor:\n    k = x\n    if flag:\n"
        "      for i in range(int(torch.sum(x))):\n        k = torch.add(k, 1)\n    else:\n      pass\n    return k\n"
    )
    calls = "a = (self).helper(x, False, )\nk = (self).helper(a, torch.eq(torch.dim(self.mean), 1), )\n"
    _encode(calls)(members)
    members[PCA_CODE] = members[PCA_CODE].replace(ENCODE.encode(), (helper + ENCODE).encode(), 1)


SCALING_CODE = "code/__torch__/models/scaling.py"


def _pickle_smaller_object(members: Members) -> None:
    """Let the pickle have an object without attributes in the place of the scaling."""
    members[SCALING_CODE] += b"class Small(Module):\n  __parameters__ = []\n  __buffers__ = []\n  training : bool\n"
    scaling, small = (f"c__torch__.models.scaling\n{name}\n".encode() for name in ("Scaling", "Small"))
    members["data.pkl"] = members["data.pkl"].replace(scaling, small, 1)


def _declare_tuple(members: Members) -> None:
    """Let the class of the scaling declare three tensors where the pickle has one."""
    members[SCALING_CODE] = members[SCALING_CODE].replace(
        b"  shift : Tensor\n", b"  shift : Tuple[Tensor, Tensor, Tensor]\n", 1
    )


MASK = "m = torch.gt(x, 1000000.)\nk = torch.index(x, annotate(List[Optional[Tensor]], [m]))\n"
FOR_777_ROWS = "k = x\nif torch.eq((torch.size(x))[0], 777):\n"
EDITS: dict[str, tuple[Callable[[Members], None], str]] = {
    "code selects numbers by a mask": (_encode(MASK), "with places that are not those of torch.searchsorted"),
    "code selects numbers by a mask of whole numbers": (
        _encode(MASK.replace("m = torch.gt(x, 1000000.)", "m = torch.to(torch.gt(x, 1000000.), 0)")),
        "with places that are not those of torch.searchsorted",
    ),
    "code lists the places of large numbers": (
        _encode("w = torch.where(torch.gt(x, 1000000.))\nk = torch.to(w[0], 6)\n"),
        "with a size that depends on the values of a row",
    ),
    "code loops for one number of rows": (
        _encode(FOR_777_ROWS + "  for i in range(1000000000000):\n    k = torch.add(k, 1)\nelse:\n  pass\n"),
        "the loop over range(1000000000000) in only some requests",
    ),
    "code loops over the rows": (
        _encode("k = x\nfor i in range(torch.len(x)):\n  k = torch.add(k, 1)\n"),
        "whose length is not that of a weight",
    ),
    "code makes an endless text for one number of rows": (
        _encode(
            FOR_777_ROWS + '  a = torch.format("{}{}", "aaaa", "aaaa")\n  b = torch.format("{}{}", a, a)\n'
            '  ops.prim.RaiseException(b, "builtins.ValueError")\nelse:\n  pass\n'
        ),
        "with a text that torch.format has made",
    ),
    "code divides by -1": (
        _encode("n = (torch.size(x))[0]\nk = torch.mul(x, torch.floordiv(torch.sub(-9223372036854775031, n), -1))\n"),
        "which does not divide by a positive number",
    ),
    "code writes to a weight by name": (_encode("c = self.mean\nk = torch.add(c, 1., out=c)\n"), "the argument out"),
    "code takes a tuple for a longer one": (
        _encode("t = (x,)\na, b, k = unchecked_cast(Tuple[Tensor, Tensor, Tensor], t)\n"),
        "only List[int] may follow unchecked_cast",
    ),
    "code hides a branch behind a variable that may be False": (
        _encode(
            "flag = torch.eq(torch.dim(self.mean), 1)\nif torch.eq(torch.dim(self.mean), 2):\n  flag = False\nelse:\n"
            "  pass\nk = x\nif flag:\n  for i in range(int(torch.sum(x))):\n    k = torch.add(k, 1)\nelse:\n  pass\n"
        ),
        "which needs numbers that do not depend on the values of a row",
    ),
    "code hides a branch behind an argument that may be False": (
        _ask_helper_twice,
        "which needs numbers that do not depend on the values of a row",
    ),
    "code lets a list of the model grow": (
        _encode("s = [1]\nl = [[(torch.size(x))[0]], s]\n_9 = torch.append(l[1], 1)\nk = torch.mul(x, torch.len(s))\n"),
        "for a list that is not empty at first",
    ),
    "pickle has a smaller object than the class declares": (_pickle_smaller_object, "but the pickle has another type"),
    "pickle has a tensor where the class declares a tuple": (_declare_tuple, "but the pickle has another type"),
    "pickle names os.system": (_name_system, "data.pkl names os.system"),
    "pickle names a class of torch.classes": (_name_class_of_torch, "names __torch__.torch.classes.rnn"),
    "weight is longer than its member": (_enlarge_storage, "has 255 numbers in weight '0', but"),
    "tensor is longer than its weight": (_enlarge_tensor, "has a tensor of size [255]"),
    "debug pickle names os.system": (_debug_system, "debug_pkl names os.system"),
    "code calls itself": (_code("return (self).log_likelihood(x, )", "return (self).log_weight(x, noise, )"), "itself"),
    "code calls methods 2^40 times": (_chain, "operators"),
    "code calls open": (_code(ENCODE, ENCODE + '    f = open("/etc/passwd")\n'), "calls open"),
    "code calls a method of a tensor": (_code(ENCODE, ENCODE + "    y = (x).storage()\n"), "not a module"),
    "code calls by another name": (_code(ENCODE, ENCODE + "    f = torch.save\n    _0 = f(x, x)\n"), "calls f"),
    "code hides a call in a name": (_code(ENCODE, ENCODE + "    _9 = torch.save\n    _8 = _9(x, x)\n"), "torch.save"),
    "code has a comment": (_code(ENCODE, ENCODE + "    # harmless\n"), "has the character '#'"),
    "code has an escape": (_code(ENCODE, ENCODE + '    a = "\\n"\n'), "has the character"),
    "code has a loop without bound": (_code(ENCODE, ENCODE + "    while True:\n      pass\n"), "a While"),
    "code branches by value": (
        _code(ENCODE, ENCODE + "    if torch.sum(x):\n      a = 1\n    else:\n      pass\n"),
        "depends on the values of a row",
    ),
    "code sets a size by value": (
        _code(ENCODE, ENCODE + "    y = torch.reshape(x, [torch.sum(x)])\n"),
        "with a size that depends on the values of a row",
    ),
    "class runs code at load": (
        _code("  mean : Tensor\n", '  mean : Tensor\n  a : Final[int] = torch.from_file("x")\n'),
        "has the value torch.from_file",
    ),
    "default of an argument runs code": (
        _code(ENCODE, ENCODE.replace("x: Tensor", "x: Tensor=torch.zeros_like(1)")),
        "has the value torch.zeros_like(1)",
    ),
    "code has a lambda": (_code(ENCODE, ENCODE + "    f = lambda: x\n"), "Lambda"),
    "code imports": (_append_code("import os\n"), "has import os"),
    "code has a named tuple": (_append_code("class T(NamedTuple):\n  a : Tensor\n"), "whose base is not Module"),
    "code has deep brackets": (_append_code("x = " + "(" * 5000 + ")" * 5000 + "\n"), "nested more than"),
    "code of more than 2 MiB": (
        lambda members: members.update({f"code/__torch__/long{index}.py": b"\n" * 2**20 for index in range(2)}),
        "at most 2,097,152 are allowed",
    ),
    "code is not text": (_set(PCA_CODE, b"\xff\xfe"), "outside of ASCII"),
    "code is missing": (lambda members: members.__delitem__(PCA_CODE), "names __torch__.models.pca.PCA"),
    "member with bytecode": (_set("bytecode.pkl", b"\x80\x02)."), "the member archive/bytecode.pkl"),
    "member with a native library": (
        _set("extra/files/model.so", b"\x7fELF"),
        "the member archive/extra/files/model.so",
    ),
    "member outside of the folder": (_set("../../evil", b"x"), "the member archive/../../evil"),
    "members that differ in case": (_set("code/__torch__/models/PCA.py", b""), "upper and lower case"),
    "weights are compressed": (lambda _: None, "is compressed in a way that no artifact uses"),
    "member unpacks to 65 MiB": (_set("extra/exhibits/card.md", bytes(65 * 2**20)), "unpacks to 68,157,440 bytes"),
    "20,000 members": (
        lambda members: members.update({f"data/{n}": b"" for n in range(100, 20_100)}),
        "which is too much",
    ),
    "manifest with another name": (edit_manifest(name="../../escaped"), "name: string should match pattern"),
    "manifest with negative rows": (edit_manifest(calibration={"rows": -5, "floor": 0.1}), "calibration.rows"),
    "manifest with a fraction of a latent": (edit_manifest(latents=1.5), "latents"),
    "manifest with a huge number": (edit_manifest(latents=10**300), "latents"),
    "manifest with a shape that does not fit": (
        edit_manifest(shape=[10**9, 10**9]),
        "1000000000000000000 features",
    ),
    "manifest with NaN": (edit_manifest(total_variance=float("nan")), "no valid manifest"),
    "manifest with a text of 1 MB": (edit_manifest(kind="k" * 10**6), "kind"),
    "manifest without golden inputs": (edit_manifest(golden={"inputs": {}, "outputs": {}}), "golden inputs"),
    "manifest with 20 million lists": (
        _set("extra/manifest.json", b'{"format_version":2,"a":[' + b"[]," * 20 * 2**20 + b"0]}"),
        "no valid manifest",
    ),
    "manifest with nested lists": (
        _set("extra/manifest.json", b"[" * 200_000 + b"]" * 200_000),
        "no valid manifest",
    ),
}
DEFLATED = {"weights are compressed": ("data/0", "data/3"), "member unpacks to 65 MiB": ("extra/exhibits/card.md",)}


def publish_edited(root: Path, edit: str) -> Path:
    """Publish a PCA as model@1 under `root`, with the change EDITS[edit]; return the path of the artifact."""
    path = publish_copy(root, twin=edit.startswith("twin"))
    rewrite(path, EDITS[edit][0], DEFLATED.get(edit, ()))
    return path


def _duplicate(content: bytes) -> bytes:
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archive.writestr("archive/data.pkl", b"\x80\x02).")
    return buffer.getvalue()


def _overlap(content: bytes) -> bytes:
    """Let the directory say that data/1 lies where data/0 does."""
    places = [
        found for found in _find_all(content, b"PK\x01\x02") if content[found + 46 : found + 60] == b"archive/data/1"
    ]
    return content[: places[0] + 42] + struct.pack("<L", 0) + content[places[0] + 46 :]


def _other_header(content: bytes) -> bytes:
    """Let the header before data/0 have another name than the directory."""
    return content.replace(b"archive/data/0", b"archive/data/x", 1)


def _second_directory(content: bytes) -> bytes:
    """Insert bytes between the directory and its end record."""
    end = content.rindex(b"PK\x05\x06")
    return content[:end] + b"PK\x01\x02hidden" + content[end:]


def _find_all(content: bytes, wanted: bytes) -> list[int]:
    found, start = [], content.find(wanted)
    while start >= 0:
        found.append(start)
        start = content.find(wanted, start + 1)
    return found


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "member twice": (_duplicate, "is there twice"),
    "members that overlap": (_overlap, "lies over another member|another header"),
    "header with another name": (_other_header, "another header than the directory says"),
    "bytes behind the directory": (_second_directory, "its end record is not that of a plain zip file"),
}


def publish_bytes(root: Path, edit: str) -> Path:
    """Publish a PCA as model@1 under `root`, with the change BYTES[edit]; return the path of the artifact."""
    path = publish_copy(root)
    reseal(path, BYTES[edit][0](path.read_bytes()))
    return path


def _external(model: Any) -> None:
    model.graph.initializer[0].external_data[0].value = "/etc/passwd"


def _constant_in_file(model: Any) -> None:
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location="EXTERNAL")
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["secret"], value=tensor))


def _nested(model: Any) -> None:
    inner = onnx.helper.make_graph([], "g", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["rows"], ["y"], then_branch=inner, else_branch=inner))


def _function(model: Any) -> None:
    opset = onnx.helper.make_opsetid("", 18)
    model.functions.append(onnx.helper.make_function("d", "f", ["a"], ["a"], [], [opset]))


def _other_domain(model: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("FusedGemm", ["rows"], ["y"], domain="com.microsoft"))


def _other_operator(model: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("RandomNormal", [], ["y"], shape=[10**9]))


def _size_by_value(model: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("Cast", ["rows"], ["sizes"], to=7))
    model.graph.node.append(onnx.helper.make_node("ConstantOfShape", ["sizes"], ["y"]))


def _integer_division(model: Any) -> None:
    """Divide the rows as whole numbers by -1, which ends the process if one of them is -2^63."""
    minus_one = onnx.helper.make_tensor("t", 7, [1], b"\xff" * 8, raw=True)
    model.graph.node.append(onnx.helper.make_node("Cast", ["rows"], ["whole"], to=7))
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["minus_one"], value=minus_one))
    model.graph.node.append(onnx.helper.make_node("Div", ["whole", "minus_one"], ["y"]))


def _other_shape(model: Any) -> None:
    model.graph.initializer[0].dims[:] = [10**6]


def _sparse(model: Any) -> None:
    model.graph.sparse_initializer.add().dims.append(10**12)


TWINS: dict[str, tuple[Callable[[Any], None], str]] = {
    "weight in a file": (_external, r"with data in \['/etc/passwd'\]"),
    "constant in a file": (_constant_in_file, "Constant with data in a file"),
    "graph within a node": (_nested, "has the field 6 in attribute|has the operator If"),
    "function": (_function, "has the field 25 in model"),
    "operator of another domain": (_other_domain, "has the operator com.microsoftFusedGemm"),
    "other operator": (_other_operator, "has the operator RandomNormal"),
    "size that depends on the rows": (_size_by_value, "with a size that depends on the values of a row"),
    "division of whole numbers": (_integer_division, "has the operator Div for numbers that are not floats"),
    "weight that the module does not have": (_other_shape, "that the module does not have"),
    "sparse weight": (_sparse, "has the field 15 in graph"),
}


def _truncate(members: Members) -> None:
    members["extra/twin/encode.onnx"] = members["extra/twin/encode.onnx"][:-300]


def _list_another_weight(members: Members) -> None:
    members["extra/twin/encode.json"] = json.dumps(["unknown"]).encode()


EDITS |= {
    "twin is truncated": (_truncate, "the graph extra/twin/encode.onnx"),
    "twin lists another weight": (_list_another_weight, "has weights that differ from those in its list"),
    "twin without a list of its weights": (
        lambda members: members.__delitem__("extra/twin/encode.json"),
        "the member extra/twin/encode.json is missing",
    ),
}


def publish_hostile_twin(root: Path, edit: str) -> Path:
    """Publish a PCA with an ONNX twin as model@1 under `root`, with the change TWINS[edit] to the graph `encode`."""
    path = publish_copy(root, twin=True)

    def change(members: Members) -> None:
        model = onnx.load_from_string(members["extra/twin/encode.onnx"])
        TWINS[edit][0](model)
        members["extra/twin/encode.onnx"] = model.SerializeToString()

    rewrite(path, change)
    return path
