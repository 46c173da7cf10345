"""Run the code blocks of a page against a real server.

The `bash`, `python` and `javascript` blocks run in order, in one folder. A `json` block directly after one of them
shows a part of the JSON that the code printed, and is compared with that output. The `console`, `sh` and `text` blocks
do not run.
"""

import json
import math
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from models.manifest import names, versions
from tests.forked_command import forked_elbo
from tests.plain_http import NO_AUTHORITIES
from tests.preloaded import run_preloaded
from tests.service.process import ServerProcess
from tests.waiting import wait_until

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN: dict[str, list[str]] = {  # by language: the command that runs a block
    "bash": ["bash", "-euo", "pipefail", "-c"],
    "python": [sys.executable, "-c"],
    "javascript": ["node", "--input-type=module", "--eval"],
}
TOLERANCE = 0.1  # relative: pages round their numbers, and trained networks differ slightly between processors


@dataclass(frozen=True)
class Servers:
    """A running server, its artifact folder, a stand-in for Alertmanager, and a folder with the program `elbo`."""

    port: int
    artifacts: Path
    alertmanager_port: int
    programs: Path

    def published(self) -> set[tuple[str, int]]:
        """Return the names and versions in the folder."""
        return {(name, version) for name in names(self.artifacts) for version in versions(self.artifacts, name)}

    def has_loaded_everything(self) -> bool:
        """Return whether the newest version of every model in the folder, and no removed one, is served."""
        models = httpx.get(f"http://127.0.0.1:{self.port}/models", verify=NO_AUTHORITIES).json()["models"]
        served = {(model["name"], model["version"]) for model in models}
        newest = {(name, max(versions(self.artifacts, name))) for name in names(self.artifacts)}
        return newest <= served <= self.published()

    @contextmanager
    def without_new_models(self) -> Iterator[None]:
        """Remove, after the block, the models that it publishes, so that no page depends on the models of another."""
        before = self.published()
        yield
        for name, version in self.published() - before:
            shutil.rmtree(self.artifacts / name / str(version))
            if not versions(self.artifacts, name):
                shutil.rmtree(self.artifacts / name)
        wait_until(self.has_loaded_everything, 60, httpx.TransportError)


@contextmanager
def alertmanager() -> Iterator[int]:
    """Run a server that accepts alerts like Alertmanager, and yield its port.

    A GET request returns all alerts. If none has arrived, it first waits up to 30 s for one.
    """
    alerts: list[Any] = []
    arrived = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            alerts.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            arrived.set()
            self._respond(b"")

        def do_GET(self) -> None:
            arrived.wait(30)
            self._respond(json.dumps(alerts).encode())

        def _respond(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Write nothing, to keep the output of the test short."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving(artifacts: Path) -> Iterator[Servers]:
    """Serve `artifacts` until the block ends."""
    with tempfile.TemporaryDirectory() as folder, forked_elbo(Path(folder)) as programs, alertmanager() as alerts:
        process = ServerProcess(artifacts, ALERTMANAGER_URL=f"http://127.0.0.1:{alerts}")
        try:
            servers = Servers(process.port, artifacts, alerts, programs)
            wait_until(servers.has_loaded_everything, 60, httpx.TransportError)
            yield servers
        finally:
            process.close()


def run_page(page: Path, servers: Servers, folder: Path) -> list[str]:
    """Run the blocks of `page` in `folder`; return the standard output of each block that ran."""
    blocks = BLOCK.findall(page.read_text())
    assert blocks, f"{page} has no code block"
    outputs = []
    with servers.without_new_models():
        for index, (language, code) in enumerate(blocks):
            if language in RUN:
                outputs.append(_run(language, code, servers, folder))
                wait_until(servers.has_loaded_everything, 60, httpx.TransportError)
            elif language == "json" and index and blocks[index - 1][0] in RUN:
                difference = _difference(json.loads(code), json.loads(outputs[-1]), "output")
                assert difference is None, f"{page.name}: {difference}"
    return outputs


def _run(language: str, code: str, servers: Servers, folder: Path) -> str:
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{servers.port}")
    code = code.replace("127.0.0.1:9093", f"127.0.0.1:{servers.alertmanager_port}")
    code = code.replace("curl -s", "curl -sS --fail-with-body")
    environment = os.environ | {
        "PATH": os.pathsep.join([str(servers.programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "ELBO_ARTIFACTS": str(servers.artifacts),
        "ELBO_PLOTS": "false",  # no page shows them
    }
    result = run_preloaded([*RUN[language], code], cwd=folder, env=environment, text=True, timeout=120)
    assert result.returncode == 0, f"{code}\n{result.stdout}\n{result.stderr}"
    return str(result.stdout)


def _difference(shown: Any, got: Any, where: str) -> str | None:
    """Return how the output `got` differs from the part that the page shows, or None if they agree."""
    if isinstance(shown, dict) and isinstance(got, dict):
        missing = [f"{where} lacks {key!r}" for key in shown if key not in got]
        inner = [_difference(value, got.get(key), f"{where}.{key}") for key, value in shown.items()]
        return next(filter(None, [*missing, *inner]), None)
    if isinstance(shown, list) and isinstance(got, list):
        if len(shown) > len(got):
            return f"{where} has {len(got)} items, the page shows {len(shown)}"
        inner = [_difference(a, b, f"{where}[{index}]") for index, (a, b) in enumerate(zip(shown, got, strict=False))]
        return next(filter(None, inner), None)
    if isinstance(shown, float) and isinstance(got, float):
        same = math.isclose(shown, got, rel_tol=TOLERANCE, abs_tol=TOLERANCE / 10)
    else:
        same = shown == got
    return None if same else f"{where} is {got!r}, the page shows {shown!r}"
