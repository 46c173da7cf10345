"""Change valid bodies and artifacts in ways that know their formats.

A fuzzer that changes bytes at random mostly gets as far as the first check. These functions keep the outer form valid
and change the inside: sizes, nesting, repeated and empty members, numbers out of range, wrong counts. A function gets
bytes and a source of randomness, and returns other bytes. Bytes in another format are changed at random.
"""

import gzip
import io
import json
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import cramjam

from models.manifest import DIGEST_LENGTH, SEAL, seal

Mutate = Callable[[bytes, Random], bytes]

MAX_BYTES = 256 * 1024  # a longer result is cut off
EXTREME_INTEGERS = (0, 1, -1, 2**31, -(2**31), 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**400)
EXTREME_FLOATS = (1e39, -1e308, 5e-324, -0.0, float("nan"), float("inf"))
EXTREME_TEXTS = ("", "NaN", "\0", "\ud800", "é" * 300, "x" * 5000, "1e999", "2026-11-27T00:00:00Z", "../..", "a\nb")
COUNTS = (2, 3, 100, 1000, 20_000)
DEPTHS = (2, 50, 500, 990, 1100, 50_000)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Cut, repeat or overwrite a part of `data`."""
    start = random.randrange(len(data) + 1)
    end = min(len(data), start + random.choice((1, 2, 4, 8, 100, 1000)))
    size = random.choice((0, 1, 127, 128, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1))
    part = random.choice((
        b"",
        data[start:end] * random.choice(COUNTS),
        random.randbytes(end - start),
        struct.pack(random.choice("<>") + "I", size),
        bytes([size & 255]),
    ))  # fmt: skip
    return _limit(data[:start] if random.random() < 0.1 else data[:start] + part + data[end:])


def mutate_json(data: bytes, random: Random) -> bytes:
    """Change a value, a key or a count within a JSON document."""
    nests: dict[str, bytes] = {}
    try:
        text = json.dumps(mutate_value(json.loads(data), random, nests)).encode()
    except (ValueError, RecursionError):  # no JSON, or nested deeply by an earlier change
        return mutate_bytes(data, random)
    for mark, nest in nests.items():
        text = text.replace(f'"{mark}"'.encode(), nest)
    if random.random() < 0.1:  # the grammar itself: commas, duplicate keys, text after the end
        place = random.choice([index for index, byte in enumerate(text) if byte in b'[]{},:"'] or [0])
        text = (
            text[:place] + random.choice((b",", b"]", b"{", b'"inputs":[],', b"\\u0000", b" " * 70_000)) + text[place:]
        )
    return _limit(text)


def mutate_value(value: Any, random: Random, nests: dict[str, bytes]) -> Any:
    """Return `value` with a change in one place.

    A string in the result may stand for lists that are nested deeply: `nests` then gets its JSON text.
    """
    if isinstance(value, dict) and value and random.random() < 0.8:
        key = random.choice(list(value))
        return value | {key: mutate_value(value[key], random, nests)}
    if isinstance(value, list) and value and random.random() < 0.8:
        index = random.randrange(len(value))
        return [*value[:index], mutate_value(value[index], random, nests), *value[index + 1 :]]
    change = random.randrange(6)
    if change == 0:
        return random.choice((*EXTREME_INTEGERS, *EXTREME_FLOATS, *EXTREME_TEXTS))
    if change == 1:
        return random.choice((None, True, False, [], {}, [[]], [{}], {"": {}}))
    if change == 2:
        count = max(1, min(random.choice(COUNTS), MAX_BYTES // (len(str(value)) + 1)))
        return [value] * count
    if change == 3:
        depth, (opening, closing) = random.choice(DEPTHS), random.choice(((b"[", b"]"), (b'{"a":', b"}")))
        mark = f"nest {len(nests)}"
        nests[mark] = opening * depth + b"1" + closing * depth
        return mark
    if isinstance(value, dict):
        return _mutate_keys(value, random)
    if isinstance(value, list):
        return random.choice((value * 2, value[:-1], value[1:], [*value, *value[:1]], value[::-1]))
    if isinstance(value, int | float):
        return random.choice((str(value), -value, value + 1, value * 10))
    return [value]


def _mutate_keys(value: dict[str, Any], random: Random) -> dict[str, Any]:
    keys = list(value)
    if random.random() < 0.3:
        return value | {f"k{index}": index for index in range(random.choice(COUNTS) // 10)}
    if not keys:
        return {"": 1}
    key = random.choice(keys)
    changed = {name: one for name, one in value.items() if name != key}
    return changed if random.random() < 0.5 else changed | {random.choice((key.upper(), *EXTREME_TEXTS)): value[key]}


def mutate_inference(data: bytes, random: Random) -> bytes:
    """Change the JSON object, its stated length or the binary numbers of a request of the Open Inference Protocol."""
    stated, _, body = data.partition(b"\n")
    length = int(stated) if stated.isdigit() else len(body)
    head, numbers = body[:length], body[length:]
    change = random.randrange(10)
    if change < 6:
        head = mutate_json(head, random)
        stated = b"%d" % len(head) if stated else b""
    elif change < 8:
        numbers = mutate_bytes(numbers, random)
    else:
        stated = random.choice((b"", b"0", b"-1", b"%d" % (length + 1), b"%d" % (length - 1), b"9" * 30, b"\xb2"))
    return _limit(stated + b"\n" + head + numbers)


def mutate_lines(mutate_line: Mutate) -> Mutate:
    """Return a function that changes, repeats, empties or joins lines."""

    def mutate(data: bytes, random: Random) -> bytes:
        lines = data.split(b"\n")
        index = random.randrange(len(lines))
        change = random.randrange(5)
        if change == 0:
            lines[index:index] = [lines[index]] * min(random.choice(COUNTS), MAX_BYTES // (len(lines[index]) + 1))
        elif change == 1:
            lines[index:index] = [
                random.choice((b"", b"\r", b" ", b"\xef\xbb\xbf", b"x", b'"', b"[", b"\xff" * 50))
            ] * (random.choice(COUNTS))
        elif change == 2 and len(lines) > 1:
            del lines[index]
        else:
            lines[index] = mutate_line(lines[index], random)
        return _limit(b"\n".join(lines))

    return mutate


def mutate_cells(line: bytes, random: Random) -> bytes:
    """Change, repeat or remove the cells of a line of CSV."""
    cells = line.split(b",")
    index = random.randrange(len(cells))
    change = random.randrange(4)
    if change == 0:
        cells[index:index] = [cells[index]] * min(random.choice(COUNTS), MAX_BYTES // (len(line) + 1))
    elif change == 1:
        del cells[index]
    else:
        cells[index] = random.choice((
            b"", b'"', b'""', b'"a', b'a"b', b'"a,b"', b'"a\nb"', b"1e999", b"nan", b"true", b"no", b"1,5", b"\x00",
            b"\xff", b"9" * 5000, b"-", b" 1 ", b"0x10", b"1_000", b";" * 100,
        ))  # fmt: skip
    return b",".join(cells)


def mutate_query(data: bytes, random: Random) -> bytes:
    """Change, repeat or remove the options of a query string."""
    options = data.split(b"&")
    index = random.randrange(len(options))
    name, _, text = options[index].partition(b"=")
    change = random.randrange(4)
    if change == 0:
        options[index:index] = [options[index]] * random.choice(COUNTS[:3])
    elif change == 1:
        options[index] = b"=".join((name, mutate_json(text, random)))
    else:
        text = random.choice((
            b"", b"9" * 5000, b"1e999", b"-0", b"%00", b"%ff", b"+1", b".", b"[" * 1100, b'"a"', b'{"a":1,"a":2}',
            b"true",
            b"%22%5cud800%22", b"%5B%5D",
        ))  # fmt: skip
        options[index] = b"=".join((name, text))
    return _limit(b"&".join(options))


def mutate_gzip(mutate_content: Mutate) -> Mutate:
    """Return a function that changes the content of a gzip body, or the members that it consists of."""

    def mutate(data: bytes, random: Random) -> bytes:
        try:
            content = zlib.decompressobj(31).decompress(data, MAX_BYTES)  # the first member
        except zlib.error:
            return mutate_bytes(data, random)
        change = random.randrange(6)
        if change == 0:  # a bomb
            content = content * (random.choice((1, 2, 8, 16)) * MAX_BYTES // (len(content) + 1))
        elif change == 1:
            middle = random.randrange(len(content) + 1)
            return _limit(gzip.compress(content[:middle]) + gzip.compress(content[middle:]))
        elif change == 2:
            return _limit(gzip.compress(b"") * random.choice(COUNTS) + data)
        elif change == 3:
            return mutate_bytes(data, random)
        else:
            content = mutate_content(content, random)
        return _limit(gzip.compress(content, 1, mtime=0))

    return mutate


def mutate_protobuf(data: bytes, random: Random) -> bytes:
    """Repeat, remove or change the fields of a protobuf message, at any depth."""
    fields = _protobuf_fields(data)
    if not fields:
        return mutate_bytes(data, random)
    index = random.randrange(len(fields))
    key, content = fields[index]
    change = random.randrange(6)
    if change == 0:
        fields[index:index] = [fields[index]] * min(random.choice(COUNTS), MAX_BYTES // (len(content) + 4))
    elif change == 1:
        del fields[index]
    elif change == 2:
        fields[index] = (random.choice((key, key + 8, 1 << 3 | 2, 2 << 3 | 2, 99 << 3 | 2)), random.choice((
            b"", b"x" * 70_000, b"\xff" * 10, content,
        )))  # fmt: skip
    elif key & 7 == 2:
        fields[index] = (key, mutate_protobuf(content, random))
    else:
        fields[index] = (key, varint(random.choice((0, 1, 127, 2**31, 2**63, 2**64 - 1))))
    message = b"".join(
        varint(key) + (varint(len(content)) if key & 7 == 2 else b"") + content for key, content in fields
    )
    return _limit(mutate_bytes(message, random) if random.random() < 0.05 else message)


def _protobuf_fields(data: bytes) -> list[tuple[int, bytes]]:
    """Return the key and the content of every field; none if `data` is no message."""
    fields, position = [], 0
    try:
        while position < len(data):
            key, start = _read_varint(data, position)
            kind = key & 7
            if kind == 2:
                size, start = _read_varint(data, start)
                position = start + size
            else:
                position = _read_varint(data, start)[1] if kind == 0 else start + {1: 8, 5: 4}[kind]
            if position > len(data):
                return []
            fields.append((key, data[start:position]))
    except (IndexError, KeyError):
        return []
    return fields


def varint(number: int) -> bytes:
    """Return `number` as protobuf writes it."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[position]
        number |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return number, position


def mutate_snappy(data: bytes, random: Random) -> bytes:
    """Change the protobuf message in a snappy block, or the size that the block begins with."""
    try:
        if cramjam.snappy.decompress_raw_len(data) > MAX_BYTES:
            return mutate_bytes(data, random)
        content = bytes(cramjam.snappy.decompress_raw(data))
    except cramjam.DecompressionError:
        return mutate_bytes(data, random)
    if random.random() < 0.1:
        return varint(random.choice((0, 1, 2**20, 2**31, 2**32 - 1))) + data[1:]
    if random.random() < 0.1:
        content *= random.choice((2, 100)) if len(content) < 2000 else 1
    return _limit(bytes(cramjam.snappy.compress_raw(mutate_protobuf(content, random))))


def mutate_npy(data: bytes, random: Random) -> bytes:
    """Change the header or the numbers of an npy file."""
    change = random.randrange(5)
    if change == 0 or data[:6] != b"\x93NUMPY":
        return mutate_bytes(data, random)
    shape = random.choice((
        "()", "(0, 4)", "(1, 4)", "(-1, 4)", "(2, 4)", "(4,)", "(1, 2, 2)", f"({2**62}, 4)", f"({10**30}, 0)",
        "(1" * 90 + ",)" * 90,
        "(True, 4)", "(1.0, 4)", "('a', 4)", "(" + "1, " * 33 + ")", "(1, 4), 'x': (1, 4)", "9" * 4400,
    ))  # fmt: skip
    dtype = random.choice((
        "'<f4'", "'>f8'", "'<f2'", "'|u1'", "'<i8'", "'|O'", "'<U9'", "'|V0'", "[('a', '<f4')]", "'<f16'", "'?'",
        "'f0'", "1",
        "'<m8[s]'", "'" + "(2,)f4" + "'",
    ))  # fmt: skip
    order = random.choice(("False", "True", "0", "None"))
    header = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    major = random.choice((1, 1, 1, 2, 2, 3, 9))
    size = len(header) + random.choice((0, 0, 0, 0, -1, 1, 60_000))
    length = struct.pack("<H" if major == 1 else "<I", max(0, size))
    numbers = random.choice((data[-16:], b"", data[-32:], random.randbytes(16), b"\xff" * 16))
    return _limit(data[:6] + bytes((major, random.choice((0, 0, 0, 1)))) + length + header + numbers)


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Change the JSON header, the size of the header, or the bytes of a safetensors file."""
    if len(data) < 8 or (size := struct.unpack_from("<Q", data)[0]) > len(data):
        return mutate_bytes(data, random)
    header, numbers = data[8 : 8 + size], data[8 + size :]
    change = random.randrange(5)
    if change == 0:
        numbers = mutate_bytes(numbers, random)
    elif change == 1:
        return struct.pack("<Q", random.choice((0, 1, size + 1, 2**32, 2**63, 2**64 - 1))) + data[8:]
    else:
        header = mutate_json(header, random)
    return _limit(struct.pack("<Q", len(header)) + header + numbers)


def mutate_png(data: bytes, random: Random) -> bytes:
    """Change, repeat or add the chunks of a PNG file; the checksums stay right."""
    chunks, position = [], 8
    while position + 12 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        chunks.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + size]))
        position += 12 + size
    if data[:8] != b"\x89PNG\r\n\x1a\n" or not chunks or random.random() < 0.1:
        return mutate_bytes(data, random)
    index = random.randrange(len(chunks))
    name, content = chunks[index]
    change = random.randrange(4)
    if change == 0 and name == b"IHDR" and len(content) == 13:
        width, height = (random.choice((0, 1, 8, 9, 2048, 2**16, 2**31 - 1)) for _ in range(2))
        depth, colour, interlace = (
            random.choice((1, 2, 4, 8, 16, 7)),
            random.choice((0, 2, 3, 4, 6, 5)),
            random.choice((0, 1)),
        )
        chunks[index] = (name, struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    elif change == 1:
        chunks[index:index] = [chunks[index]] * random.choice(COUNTS[:4])
    elif change == 2:
        chunks.insert(index, random.choice((
            (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22))), (b"iCCP", b"a\0\0" + zlib.compress(bytes(2**22))),
            (b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**22))), (b"eXIf", _exif(random)), (b"PLTE",
            b"\1\2\3" * 256),
            (b"tRNS", b"\0\1"), (b"acTL", struct.pack(">II", 2**31, 0)), (b"fcTL", bytes(26)), (b"gAMA", b""),
            (b"IEND", b""),
        )))  # fmt: skip
    else:
        chunks[index] = (name, mutate_bytes(content, random))
    return _limit(
        data[:8]
        + b"".join(
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
            for name, content in chunks
        )
    )


def _exif(random: Random) -> bytes:
    """Return EXIF data with a few entries, of which the first is the orientation, with wrong types and counts."""
    count = random.choice((0, 1, 3, 500))
    entry = struct.pack(
        "<HHII", 0x0112, random.choice((1, 2, 3, 5, 12, 99)), random.choice((0, 1, 2**31)), random.choice((0, 6, 9))
    )
    return b"II*\0" + struct.pack("<IH", random.choice((8, 0, 2**32 - 1)), count) + entry * min(count, 100)


def mutate_jpeg(data: bytes, random: Random) -> bytes:
    """Change, repeat or add the segments of a JPEG file."""
    starts = [index for index in range(len(data) - 4) if data[index] == 0xFF and data[index + 1] not in (0, 0xFF)]
    if not starts or random.random() < 0.2:
        return mutate_bytes(data, random)
    start = random.choice(starts)
    size = int.from_bytes(data[start + 2 : start + 4], "big")
    end, change = min(len(data), start + 2 + size), random.randrange(4)
    if change == 0 and 0xC0 <= data[start + 1] <= 0xCF:
        sides = struct.pack(">HH", random.choice((0, 1, 8, 2048, 65535)), random.choice((0, 1, 8, 2048, 65535)))
        return data[: start + 5] + sides + data[start + 9 :]
    if change == 1:
        return _limit(data[:end] + data[start:end] * random.choice(COUNTS[:3]) + data[end:])
    if change == 2:
        exif = b"Exif\0\0" + _exif(random)
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    return data[:start] + mutate_bytes(data[start:end], random) + data[end:]


def mutate_pickle(data: bytes, random: Random) -> bytes:
    """Change, repeat, remove or exchange the operations of a pickle."""
    try:
        places = [position or 0 for _, _, position in pickletools.genops(data)]
    except Exception:  # noqa: BLE001 - damaged pickles raise almost any exception
        return mutate_bytes(data, random)
    operations = [data[start:end] for start, end in zip(places, [*places[1:], len(data)], strict=True)]
    index = random.randrange(len(operations))
    change = random.randrange(6)
    if change == 0:
        operations[index:index] = [operations[index]] * random.choice(COUNTS)
    elif change == 1:
        del operations[index]
    elif change == 2:
        operations[index] = random.choice(operations)
    elif change == 3:
        operations.insert(index, random.choice((
            b"cos\nsystem\n", b"r\xff\xff\xff\x7f", b"\x8a\xff" + b"\x7f" * 255, b"\x8b\xff\xff\xff\x7f",
            b"J\xff\xff\xff\xff",
            b"X\xff\xff\xff\x7f", b"(", b"l", b"0", b"2", b"b", b"R", b"\x81", b"Q", b"j\x00\x00\x00\x00", b"h\x00",
            b"e", b"u", b"s",
            b"\x95" + b"\xff" * 8, b"I999\n", b"G" + b"\xff" * 8, b"(" * 1000 + b"t" * 1000, b"]" * 1000 + b"a" * 999,
            b"\x86" * 50,
        )))  # fmt: skip
    else:
        operations[index] = operations[index][:1] + mutate_bytes(operations[index][1:], random)
    return _limit(b"".join(operations))


def mutate_code(data: bytes, random: Random) -> bytes:
    """Change, repeat, remove or add lines of TorchScript code."""
    lines = data.split(b"\n")
    index = random.randrange(len(lines))
    change = random.randrange(5)
    if change == 0:
        lines[index:index] = [lines[index]] * random.choice(COUNTS)
    elif change == 1:
        del lines[index]
    elif change == 2:
        lines[index] = random.choice(lines)
    elif change == 3:
        lines.insert(index, random.choice((
            b"    while True:\n      pass", b"    a = " + b"(" * 5000, b"    b = torch.from_file(x)",
            b"    c = " + b"-" * 20_000 + b"1",
            b"    d = 1" + b" + 1" * 20_000, b"    e = x" + b".a" * 20_000, b"    f = [" + b"0, " * 20_000 + b"]",
            b"  g : Tensor",
            b"    return", b"class A(Module):", b"\tx", b"    h = 0x" + b"f" * 5000, b"    i = " + b"9" * 5000,
            b"    if x:", b"\x00",
            b"    j = x if x else x", b"    k = not " * 2000, b"    l = 'a' 'b'", b'    m = f"{x}"', b"    x[0] = x",
            b"    n = x" + b"[0]" * 3000,
        )))  # fmt: skip
    else:
        lines[index] = mutate_bytes(lines[index], random)
    return _limit(b"\n".join(lines))


def mutate_artifact(data: bytes, random: Random) -> bytes:
    """Change one member of an artifact in its own format, or the zip file itself, and seal the result."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = {info.filename: info for info in archive.infolist() if info.file_size <= MAX_BYTES}
            members = {name: archive.read(name) for name in infos}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OSError, RuntimeError):
        return mutate_bytes(data, random)
    if not members or random.random() < 0.2:
        return resealed(mutate_bytes(data[: -(len(SEAL) + DIGEST_LENGTH)], random))
    name = random.choice([name for name in members if "/data/" not in name] or list(members))
    suffix = name.rpartition(".")[2]
    change = {
        "json": mutate_json,
        "pkl": mutate_pickle,
        "debug_pkl": mutate_pickle,
        "py": mutate_code,
        "onnx": mutate_protobuf,
    }
    if random.random() < 0.1:
        members[random.choice((name + "x", name.upper(), "../" + name, "x/" + name, "archive/data/9999999"))] = (
            members.pop(name)
        )
    else:
        members[name] = change.get(suffix, mutate_bytes)(members[name], random)
    return zipped(members, {name: info.compress_type for name, info in infos.items()})


def zipped(members: dict[str, bytes], compression: dict[str, int]) -> bytes:
    """Return a sealed zip file of `members`. `compression`: the method for each name; by default not compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression.get(name, zipfile.ZIP_STORED))
        archive.comment = SEAL + b"0" * DIGEST_LENGTH
    return seal(buffer.getvalue())


def resealed(data: bytes) -> bytes:
    """Return `data`, a zip file without its comment, with a seal as comment."""
    return seal(data + SEAL + b"0" * DIGEST_LENGTH)


def _limit(data: bytes) -> bytes:
    return data[:MAX_BYTES]
