"""The servers that `compare_servers.py` measures: how each server is started, and which protocol it uses."""

import io
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from benchmarks.data import ROOT
from benchmarks.serving.load_generators import Request

Array = npt.NDArray[np.float32]
JSON = {"Content-Type": "application/json"}
NPY = {"Content-Type": "application/x-npy", "Accept": "application/x-npy"}


class Protocol(ABC):
    """The format in which a server receives rows and returns reconstructions."""

    echoes = False  # whether responses contain the input rows instead of reconstructions

    @abstractmethod
    def create_request(self, x: Array, binary: bool) -> Request | None:
        """Return the request for rows x [B, D], or None if `binary` is true and the protocol has no binary form."""

    @abstractmethod
    def parse_response(self, body: bytes, binary: bool) -> Array:
        """Return the reconstructions in a response body."""


@dataclass(frozen=True)
class ListProtocol(Protocol):
    """A protocol in JSON. A request is `{"inputs": [[…], …]}`. A response is `{"outputs": [[…], …]}` or a bare list.

    Args:
        path: path and query of the endpoint.
        npy: whether the protocol has a binary form, in which requests and responses are npy arrays.
        echoes: whether a response repeats the request, and so contains the input rows.
    """

    path: str
    npy: bool = False
    echoes: bool = False

    def create_request(self, x: Array, binary: bool) -> Request | None:
        """See Protocol."""
        if binary:
            return Request(self.path, NPY, _to_npy(x)) if self.npy else None
        return Request(self.path, JSON, orjson.dumps({"inputs": x}, option=orjson.OPT_SERIALIZE_NUMPY))

    def parse_response(self, body: bytes, binary: bool) -> Array:
        """See Protocol."""
        if binary:
            return np.asarray(np.load(io.BytesIO(body)), np.float32)
        response = orjson.loads(body)
        if isinstance(response, dict):
            response = response["inputs" if self.echoes else "outputs"]
        return np.asarray(response, np.float32)


@dataclass(frozen=True)
class OpenInferenceProtocol(Protocol):
    """The Open Inference Protocol, version 2, optionally with Triton's extension for binary tensors.

    Args:
        path: path of the endpoint.
        binary: whether the server supports binary tensors. A binary tensor is JSON followed by the bytes of the floats.
    """

    path: str
    binary: bool

    def create_request(self, x: Array, binary: bool) -> Request | None:
        """See Protocol."""
        tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32"}
        if not binary:
            body = {"inputs": [{**tensor, "data": x.ravel()}]}
            return Request(self.path, JSON, orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
        if not self.binary:
            return None
        inputs = {**tensor, "parameters": {"binary_data_size": x.nbytes}}
        outputs = {"name": "x_hat", "parameters": {"binary_data": True}}
        head = json.dumps({"inputs": [inputs], "outputs": [outputs]}).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        return Request(self.path, headers, head + x.tobytes())

    def parse_response(self, body: bytes, binary: bool) -> Array:
        """See Protocol."""
        if not binary:
            return np.asarray(orjson.loads(body)["outputs"][0]["data"], np.float32)
        head, _ = json.JSONDecoder().raw_decode(body.decode("latin-1"))
        return np.frombuffer(body[-head["outputs"][0]["parameters"]["binary_data_size"] :], np.float32)


@dataclass(frozen=True)
class ServerKind:
    """How a server is started, and which protocol it uses.

    Args:
        title: name of the server in the tables.
        protocol: protocol of the server.
        module: module that `python -m` runs.
        arguments: function that returns the arguments of the module, given the artifact and the port.
        package: package to install into the server's own environment, .venv-peers-<name>. None if the server runs in
            the environment of this process.
    """

    title: str
    protocol: Protocol
    module: str
    arguments: Callable[[Path, int], list[str]]
    package: str | None = None

    def python(self, name: str) -> str:
        """Return the path of the server's Python interpreter."""
        return str(ROOT / f".venv-peers-{name}" / "bin" / "python") if self.package else sys.executable

    def why_unavailable(self, name: str) -> str | None:
        """Return the reason why the server cannot be measured, or None if it can."""
        folder = Path(self.python(name)).parent.parent
        if not self.package or (folder / ".ready").is_file():
            return None
        return (
            f"{folder.name} is missing: `make bench-serve` creates it, or prints why {self.package} cannot be installed"
        )


def server_kinds(workers: int) -> dict[str, ServerKind]:
    """Return all servers by name. Elbo is the first one.

    Args:
        workers: number of processes of each echo server. Use the number of Elbo's workers.
    """

    def peer(title: str, module: str, protocol: Protocol, package: str | None = None) -> ServerKind:
        return ServerKind(title, protocol, f"benchmarks.serving.peers.{module}", _model_and_port, package)

    def echo(title: str, path: str) -> ServerKind:
        protocol = ListProtocol(path, npy=True, echoes=True)
        return ServerKind(title, protocol, "benchmarks.serving.peers.echo", lambda _, port: [str(workers), str(port)])

    infer = "/v2/models/vae/infer"
    triton = OpenInferenceProtocol(infer, binary=True)
    small = ListProtocol("/reconstruct", npy=True)
    return {
        "elbo": ServerKind("Elbo", ListProtocol("/reconstruct?model=vae", npy=True), "service", lambda *_: []),
        "plain": peer("plain FastAPI, pydantic lists", "plain_fastapi", ListProtocol("/reconstruct")),
        "litserve": peer("LitServe", "litserve_server", ListProtocol("/predict"), "litserve"),
        "bentoml": peer("BentoML", "bentoml_server", ListProtocol("/reconstruct"), "bentoml"),
        "ray": peer("Ray Serve", "ray_server", ListProtocol("/"), "ray"),
        "mlserver": peer("MLServer", "mlserver_server", OpenInferenceProtocol(infer, binary=False), "mlserver"),
        "pytriton": peer("PyTriton, Python model", "pytriton_server", triton, "nvidia-pytriton"),
        "granian": peer("Granian + ONNX Runtime", "granian_onnx", small, "granian"),
        "asyncio": peer("asyncio.Protocol + ONNX Runtime", "asyncio_onnx", small, "uvloop"),
        "echo": echo("echo: uvicorn", "/"),
        "echo-fastapi": echo("echo: uvicorn and FastAPI", "/fastapi"),
    }


def environment(name: str, artifacts: Path, port: int, elbo_settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of the server `name`.

    They limit each worker to one torch thread. Elbo also gets its settings.
    """
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    if name != "elbo":
        return shared
    return {**shared, "ELBO_PORT": str(port), "ELBO_ARTIFACTS": str(artifacts), **elbo_settings}


def package_versions(servers: Mapping[str, ServerKind]) -> str:
    """Return the name and version of each server's `package`, separated by commas."""
    found = []
    for name, kind in servers.items():
        if kind.package:
            site = next((ROOT / f".venv-peers-{name}" / "lib").glob("python3*")) / "site-packages"
            info = next(site.glob(f"{kind.package.replace('-', '_')}-*.dist-info"))
            found.append(info.name.removesuffix(".dist-info").replace("-", " "))
    return ", ".join(found)


def _model_and_port(model: Path, port: int) -> list[str]:
    return [str(model), str(port)]


def _to_npy(x: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()
