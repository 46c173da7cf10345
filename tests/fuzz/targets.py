"""The fuzz targets: every reader of request bodies and of artifacts, with valid inputs made by code."""

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from PIL import Image
from starlette.datastructures import QueryParams

from models import manifest
from models.code_check import check_code
from models.errors import ArtifactError, ElboError
from models.inspection import inspect_artifact
from models.onnx_check import check_twin
from models.pickle_check import check_operations, check_pickle
from service.codec import ndjson, npy, open_inference, remote_write, safetensors
from service.codec.budget import Budget
from service.codec.compression import decompress_gzip
from service.codec.feature_names import FeatureSelectors
from service.codec.pictures import PictureRow
from service.codec.request_body import read_fields
from service.codec.row_schema import RowSchema
from service.endpoints.inference import ANOMALY, ENCODE
from service.endpoints.open_inference.endpoints import read_for_model
from service.endpoints.open_inference.models import ProtocolModel
from service.endpoints.query_options import read_options
from service.endpoints.validation import merge, validate
from service.errors import ServiceError
from service.inference.served_model import ServedModel
from tests.fuzz import mutations
from tests.fuzz.oracle import MAX_BODY_BYTES, MAX_ROWS, Target
from tests.models.publishing import pca_artifacts
from tests.service.hosts import HOST_FEATURES, JSON, NDJSON, as_inputs, as_ndjson, host_records, host_rows

PATH = Path("model.pt")  # for messages: no target reads a file
PICTURE = PictureRow((2, 2), (0.0, 16.0))
UNITS = ("%", "MB", None, None)
ARTIFACT_BYTES = 64 * 2**20  # the parsed code of an artifact, as Python objects


@lru_cache(maxsize=1)
def _served() -> ServedModel:
    """Return what readers ask of a model of four features: its names, units and shape. No reader runs the model."""
    schema = RowSchema((4,), HOST_FEATURES, medians=(0.0,) * 4, units=UNITS)
    selectors = FeatureSelectors({name: name for name in HOST_FEATURES})
    without_times = SimpleNamespace(
        timeline=None, window=None, policy=None, width=4, latents=2, parts=["t2"], only_reconstructs=False
    )
    return cast(
        ServedModel,
        SimpleNamespace(
            name="hosts",
            row_schema=schema,
            window_schema=None,
            selectors=selectors,
            manifest=without_times,
            conditions=None,
            columns=None,
            default_alpha=None,
        ),
    )


def _read_request(
    body: bytes, budget: Budget, *, media_type: str, spec: Any = ANOMALY, compressed: bool = False, query: str = ""
) -> None:
    """Read a body of `media_type` as `service.endpoints.pipeline.parse_request` does."""
    content = decompress_gzip(body, MAX_BODY_BYTES, budget) if compressed else body
    fields = read_fields(media_type, content, spec.array_field, 4, spec.readers, PICTURE, budget)
    options = read_options(spec.schema, tuple(QueryParams(query).multi_items()))
    request = validate(spec.schema, merge(fields.values, options.values))
    spec.read(_served(), request, fields.may_contain_non_floats or options.may_contain_non_floats, budget)


def _read_query(text: bytes, budget: Budget) -> None:
    _read_request(b"", budget, media_type=JSON, query=text.decode("latin-1"))


def _read_stream(body: bytes, budget: Budget) -> None:
    """Read the lines of an NDJSON stream, which arrives in chunks of 7,000 bytes."""
    splitter = ndjson.LineSplitter(budget)
    for start in range(0, len(body), 7000):
        for _ in splitter.feed(body[start : start + 7000]):
            budget.check_time()
    splitter.finish()


def _read_series(body: bytes, budget: Budget) -> None:
    reader = remote_write.SeriesReader(body, MAX_BODY_BYTES, budget)
    while reader.has_more:
        reader.read()


def _read_inference(body: bytes, budget: Budget) -> None:
    """Read a request of the Open Inference Protocol: the length of its JSON object in one line, then its body."""
    length, newline, content = body.partition(b"\n")
    asked = open_inference.read_request(content, length if newline and length else None, budget)
    read_for_model(ProtocolModel(_served(), ""), asked, MAX_ROWS, budget)


def _inference_seeds() -> list[bytes]:
    def request(count: int, *, is_binary: bool, **fields: Any) -> bytes:
        x = np.array(host_rows(count), np.float32)
        tensor: dict[str, Any] = {"name": "x", "shape": [count, 4], "datatype": "FP32"}
        tensor |= {"parameters": {"binary_data_size": x.nbytes}} if is_binary else {"data": x.tolist()}
        head = json.dumps({"inputs": [tensor], **fields}).encode()
        return b"%d\n" % len(head) + head + (x.tobytes() if is_binary else b"")

    wanted = [{"name": "score", "parameters": {"binary_data": True}}, {"name": "x_hat"}]
    return [
        request(3, is_binary=True, id="a", outputs=wanted, parameters={"alpha": 0.1, "timeout": 10**6}),
        request(900, is_binary=True, parameters={"binary_data_output": True}),
        *(b"\n" + request(count, is_binary=False).partition(b"\n")[2] for count in (3, 900)),
    ]


def _json_seeds(**options: object) -> list[bytes]:
    return [as_inputs(host_rows(3))[0], json.dumps({"inputs": host_rows(900)} | options).encode()]


def _record_seeds() -> list[bytes]:
    records = [
        record | {"host": "a", "timestamp": 1.7e9 + row} for row, record in enumerate(host_records(host_rows(3)))
    ]
    with_units = [{"cpu [%]": 1, "memory/used [MB]": 2.5, "disk~io": None, "load": 3}]
    return [
        json.dumps({"records": some, "half_life_rows": 3}).encode() for some in (records, with_units, records * 300)
    ]


def _ndjson_seeds() -> list[bytes]:
    return [as_ndjson(host_rows(5))[0], "\n".join(map(json.dumps, host_rows(300))).encode()]


def _csv_seeds() -> list[bytes]:
    header = ",".join(HOST_FEATURES)
    plain = [",".join(map(str, row)) for row in host_rows(900)]
    named = [f'2026-11-27T10:00:00Z,"rack, {number}",{row},no' for number, row in enumerate(plain[:3])]
    return ["\n".join(lines).encode() for lines in (
        [header, *plain[:3]], [f"timestamp,host,{header},active", *named], [header, *plain],
    )]  # fmt: skip


def _telegraf_seeds() -> list[bytes]:
    def batch(count: int) -> bytes:
        metrics = [
            {"name": name, "tags": {"host": "a"}, "fields": {field: value}, "timestamp": 1.7e9 + row}
            for row, values in enumerate(host_rows(count))
            for name, field, value in zip(
                ("", "memory", "", ""), ("cpu", "used", "disk~io", "load"), values, strict=True
            )
        ]
        return json.dumps({"metrics": metrics}).encode()

    return [batch(2), batch(300)]


def _npy_seeds() -> list[bytes]:
    return [npy.dumps(np.array(host_rows(count), np.float32)) for count in (1, 2, 900)]


def _safetensors_seeds() -> list[bytes]:
    return [safetensors.dumps({"inputs": np.array(host_rows(count), np.float32)}, {"a": "b"}) for count in (1, 900)]


def _picture_seeds(format_name: str) -> list[bytes]:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pictures = [Image.fromarray(levels), Image.fromarray(levels[:8, :8]).convert("RGB")]
    if format_name == "PNG":
        pictures += [Image.fromarray(levels).convert("P"), Image.fromarray(levels.astype(np.uint16) * 257)]
        pictures.append(Image.fromarray(levels).convert("RGBA"))
    files = [io.BytesIO() for _ in pictures]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file, format_name)
    return [file.getvalue() for file in files]


def _series_seeds() -> list[bytes]:
    def series(count: int) -> list[remote_write.Series]:
        samples = [(1_700_000_000_000 + 15_000 * number, 1.5) for number in range(count)]
        return [(((remote_write.METRIC_NAME_LABEL, name), ("instance", "a:9100")), samples) for name in HOST_FEATURES]

    return [remote_write.dumps(series(count)) for count in (1, 3)] + [remote_write.dumps(series(1) * 200)]


def _query_seeds() -> list[bytes]:
    return [
        b"inputs=[[1,2,3,4]]&alpha=.05&explain=1&impute=True&half_life_rows=3e2&detail=none&time=t&group=%22g%22",
        b"inputs=[[1,2,3,4]]&fdr=0.1",
        b'records=[{"cpu":1,"memory/used":2,"disk~io":3,"load":4}]&half_life_rows=3&extrapolated=false',
    ]


def _artifacts() -> list[bytes]:
    return list(pca_artifacts())


def _members(start: str, end: str) -> dict[str, bytes]:
    """Return the members of the first artifact whose names, without the folder, begin and end so."""
    with zipfile.ZipFile(io.BytesIO(_artifacts()[0])) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        return {
            name: archive.read(full) for name, full in names.items() if name.startswith(start) and name.endswith(end)
        }


def _seeds_of_members(start: str, end: str) -> list[bytes]:
    return list(_members(start, end).values())


def _inspect(content: bytes, _: Budget) -> None:
    manifest.parse(content, PATH)
    inspect_artifact(content, PATH)


def _inspect_despite_manifest(content: bytes, _: Budget) -> None:
    inspect_artifact(content, PATH)


def _read_manifest(text: bytes, _: Budget) -> None:
    manifest.parse(mutations.zipped({f"archive/{manifest.MEMBER}": text}, {}), PATH)


def _check_pickle(content: bytes, _: Budget) -> None:
    sizes = {name.removeprefix("data/"): len(weights) for name, weights in _members("data/", "").items()}
    check_pickle(content, "data.pkl", PATH, check_code(_members("code/", ".py"), PATH).classes, sizes)


def _check_debug_pickle(content: bytes, _: Budget) -> None:
    check_operations(content, "model.debug_pkl", PATH, {"torch.jit._pickle.build_intlist"})


def _check_twin(graph: bytes, _: Budget) -> None:
    check_twin(graph, _members("extra/twin/", "score.json")["extra/twin/score.json"], "score.onnx", PATH)


def _check_code(source: bytes, _: Budget) -> None:
    code = check_code({"code/__torch__/models/pca.py": source}, PATH)
    code.check_methods("__torch__.models.pca.PCA", ("encode", "decode", "score"))


def _compressed(seeds: Callable[[], list[bytes]]) -> list[bytes]:
    return [gzip.compress(seed, mtime=0) for seed in seeds()]


def _of_request(
    media_type: str, seeds: Callable[[], list[bytes]], mutate: mutations.Mutate, **options: Any
) -> dict[str, Target]:
    """Return the targets for bodies of `media_type`: as they are, and compressed with gzip."""
    name = options.pop("name")
    return {
        name: Target(partial(_read_request, media_type=media_type, **options), seeds, mutate, ServiceError),
        f"{name}-gzip": Target(
            partial(_read_request, media_type=media_type, compressed=True, **options),
            partial(_compressed, seeds),
            mutations.mutate_gzip(mutate),
            ServiceError,
            may_be_small=False,
        ),
    }


def _of_artifact(
    read: Callable[[bytes, Budget], object], seeds: Callable[[], list[bytes]], mutate: mutations.Mutate,
    refusals: type[ElboError] = ArtifactError,
) -> Target:  # fmt: skip
    return Target(read, seeds, mutate, refusals, free_bytes=ARTIFACT_BYTES)


_json, _lines = mutations.mutate_json, mutations.mutate_lines
TARGETS: dict[str, Target] = {
    **_of_request(JSON, partial(_json_seeds, alpha=0.01, explain=2, detail="none"), _json, name="json"),
    **_of_request(JSON, _json_seeds, _json, name="json-encode", spec=ENCODE),
    **_of_request(JSON, _record_seeds, _json, name="records"),
    **_of_request("text/plain", _telegraf_seeds, _json, name="telegraf"),
    **_of_request(NDJSON, _ndjson_seeds, _lines(_json), name="ndjson"),
    **_of_request("text/csv", _csv_seeds, _lines(mutations.mutate_cells), name="csv"),
    **_of_request(npy.MEDIA_TYPE, _npy_seeds, mutations.mutate_npy, name="npy"),
    **_of_request(safetensors.MEDIA_TYPE, _safetensors_seeds, mutations.mutate_safetensors, name="safetensors"),
    **_of_request("image/png", partial(_picture_seeds, "PNG"), mutations.mutate_png, name="png"),
    **_of_request("image/jpeg", partial(_picture_seeds, "JPEG"), mutations.mutate_jpeg, name="jpeg"),
    "open-inference": Target(_read_inference, _inference_seeds, mutations.mutate_inference, ServiceError),
    "ndjson-stream": Target(_read_stream, _ndjson_seeds, _lines(_json), ServiceError),
    "remote-write": Target(_read_series, _series_seeds, mutations.mutate_snappy, ServiceError, may_be_small=False),
    "query": Target(_read_query, _query_seeds, mutations.mutate_query, ServiceError),
    "artifact": _of_artifact(_inspect, _artifacts, mutations.mutate_artifact),
    "archive": _of_artifact(_inspect_despite_manifest, _artifacts, mutations.mutate_artifact),
    "manifest": _of_artifact(_read_manifest, partial(_seeds_of_members, "extra/manifest", ".json"), _json),
    "pickle": _of_artifact(_check_pickle, partial(_seeds_of_members, "data", ".pkl"), mutations.mutate_pickle),
    "debug-pickle": _of_artifact(
        _check_debug_pickle, partial(_seeds_of_members, "code/", ".debug_pkl"), mutations.mutate_pickle
    ),
    "onnx": _of_artifact(
        _check_twin, partial(_seeds_of_members, "extra/twin/score", ".onnx"), mutations.mutate_protobuf
    ),
    "code": _of_artifact(
        _check_code, partial(_seeds_of_members, "code/__torch__/models/pca", ".py"), mutations.mutate_code
    ),
}
