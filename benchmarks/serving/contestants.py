"""Who competes in `serving.py`, how each is started, and how each wants to be asked."""

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
from benchmarks.serving.load import Request

Array = npt.NDArray[np.float32]
JSON = {"Content-Type": "application/json"}
NPY = {"Content-Type": "application/x-npy", "Accept": "application/x-npy"}


class Protocol(ABC):
    """How to ask for reconstructions, and how to read them."""

    echoes = False  # whether it answers with the rows themselves

    @abstractmethod
    def ask(self, x: Array, binary: bool) -> Request | None:
        """The request for rows x [B, D]; None if there is no binary form."""

    @abstractmethod
    def read(self, body: bytes, binary: bool) -> Array:
        """The reconstructions in an answer."""


@dataclass(frozen=True)
class Lists(Protocol):
    """`{"inputs": [[…], …]}` and `{"outputs": [[…], …]}`, or the rows alone; in npy where the server has it."""

    path: str
    npy: bool = False
    echoes: bool = False

    def ask(self, x: Array, binary: bool) -> Request | None:
        """See Protocol."""
        if binary:
            return Request(self.path, NPY, _npy(x)) if self.npy else None
        return Request(self.path, JSON, orjson.dumps({"inputs": x}, option=orjson.OPT_SERIALIZE_NUMPY))

    def read(self, body: bytes, binary: bool) -> Array:
        """See Protocol."""
        if binary:
            return np.asarray(np.load(io.BytesIO(body)), np.float32)
        answer = orjson.loads(body)
        return np.asarray(
            answer["inputs" if self.echoes else "outputs"] if isinstance(answer, dict) else answer, np.float32
        )


@dataclass(frozen=True)
class V2(Protocol):
    """The Open Inference Protocol with binary tensors (Triton's extension): JSON, then the raw floats."""

    path: str
    binary: bool

    def ask(self, x: Array, binary: bool) -> Request | None:
        """See Protocol."""
        tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32"}
        if not binary:
            body = {"inputs": [{**tensor, "data": x.ravel()}]}
            return Request(self.path, JSON, orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))
        if not self.binary:
            return None
        given = {**tensor, "parameters": {"binary_data_size": x.nbytes}}
        wanted = {"name": "x_hat", "parameters": {"binary_data": True}}
        head = json.dumps({"inputs": [given], "outputs": [wanted]}).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        return Request(self.path, headers, head + x.tobytes())

    def read(self, body: bytes, binary: bool) -> Array:
        """See Protocol."""
        if not binary:
            return np.asarray(orjson.loads(body)["outputs"][0]["data"], np.float32)
        head, _ = json.JSONDecoder().raw_decode(body.decode("latin-1"))
        return np.frombuffer(body[-head["outputs"][0]["parameters"]["binary_data_size"] :], np.float32)


@dataclass(frozen=True)
class Contestant:
    """One server."""

    title: str
    protocol: Protocol
    module: str  # python -m …
    arguments: Callable[[Path, int], list[str]]  # of the module, given the artifact and the port
    package: str | None = None  # of an environment of its own, .venv-peers-<name>

    def python(self, name: str) -> str:
        """Its interpreter."""
        return str(ROOT / f".venv-peers-{name}" / "bin" / "python") if self.package else sys.executable

    def missing(self, name: str) -> str | None:
        """Why it cannot take part, or None."""
        folder = Path(self.python(name)).parent.parent
        if not self.package or (folder / ".ready").is_file():
            return None
        return f"{folder.name} is not set up: run make bench-serve, or see what it says of {self.package}"


def contestants(workers: int) -> dict[str, Contestant]:
    """By name, Elbo first. `workers`: how many processes the echo gets, as many as Elbo."""

    def peer(title: str, module: str, protocol: Protocol, package: str | None = None) -> Contestant:
        return Contestant(title, protocol, f"benchmarks.serving.peers.{module}", _model_and_port, package)

    def echo(title: str, path: str) -> Contestant:
        protocol = Lists(path, npy=True, echoes=True)
        return Contestant(title, protocol, "benchmarks.serving.peers.echo", lambda _, port: [str(workers), str(port)])

    return {
        "elbo": Contestant("Elbo", Lists("/reconstruct?model=vae", npy=True), "service", lambda *_: []),
        "plain": peer("plain FastAPI, pydantic lists", "plain", Lists("/reconstruct")),
        "litserve": peer("LitServe", "lit", Lists("/predict"), "litserve"),
        "bentoml": peer("BentoML", "bento", Lists("/reconstruct"), "bentoml"),
        "ray": peer("Ray Serve", "ray_serve", Lists("/"), "ray"),
        "mlserver": peer("MLServer", "ml_server", V2("/v2/models/vae/infer", binary=False), "mlserver"),
        "triton": peer("Triton (PyTriton)", "triton", V2("/v2/models/vae/infer", binary=True), "nvidia-pytriton"),
        "echo": echo("an echo: uvicorn", "/"),
        "echo-fastapi": echo("an echo: uvicorn and FastAPI", "/fastapi"),
    }


def environment(name: str, artifacts: Path, port: int, elbo: Mapping[str, str]) -> dict[str, str]:
    """What a contestant is started with: one thread a model, and for Elbo its settings."""
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    if name != "elbo":
        return shared
    return {**shared, "ELBO_PORT": str(port), "ELBO_ARTIFACTS": str(artifacts), **elbo}


def versions(people: Mapping[str, Contestant]) -> str:
    """`package version` of those with an environment of their own."""
    found = []
    for name, contestant in people.items():
        if contestant.package:
            site = next((ROOT / f".venv-peers-{name}" / "lib").glob("python3*")) / "site-packages"
            info = next(site.glob(f"{contestant.package.replace('-', '_')}-*.dist-info"))
            found.append(info.name.removesuffix(".dist-info").replace("-", " "))
    return ", ".join(found)


def _model_and_port(model: Path, port: int) -> list[str]:
    return [str(model), str(port)]


def _npy(x: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()
