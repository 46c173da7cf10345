"""Compare the serving speed of this checkout with that of another checkout, for example of the commit before a change.

    git worktree add ../before COMMIT
    python benchmarks/serving/compare_checkouts.py ../before

Both servers run with the same interpreter, models and requests. The other checkout trains the models, because a release
reads the artifacts of older releases, but not always those of newer ones. For each kind of load, the two servers are
measured in turn. Their order alternates from round to round, so that a change in the machine's speed affects both. The
table shows the median rate of each server over the rounds. The rate ratio is the rate of this checkout divided by the
rate of the other checkout in the same round. The table shows the median of this ratio over the rounds, with the
quartiles in brackets. The cost ratio compares the processor time per response in the same way. On a shared machine, the
cost ratio varies less than the rate ratio.

Options: --rounds (default 10), --seconds per measurement (default 2), --only (the loads whose titles contain a text,
such as /sample), --keys (both servers need an API key), --smoke (one short round, against this checkout itself).
"""

import argparse
import http.client
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, sleep

import orjson

from benchmarks.data import ROOT
from benchmarks.serving.load_generators import Request, run_closed_loop
from benchmarks.serving.server_process import ServerProcess, adopt_orphans, free_port
from benchmarks.serving.servers import JSON, NPY, ListProtocol
from benchmarks.serving.workload import Workload, open_workload
from service.access import key_file
from service.access.scopes import Scope

START_SECONDS = 60.0
SMOKE_LOADS = ("1 row JSON, c=1", "/anomaly, 1 row JSON, c=32")  # titles of the loads of a smoke test
TRAINING = """
import sys
from pathlib import Path
from benchmarks.serving.workload import create_workload
create_workload(Path(sys.argv[1]))
"""


@dataclass(frozen=True)
class Load:
    """A kind of request, sent by a number of connections in a closed loop."""

    title: str
    request: Request
    connections: int


@dataclass(frozen=True)
class Measurement:
    """One measurement: responses per second, and processor seconds per response."""

    rate: float
    cost: float


@dataclass(frozen=True)
class Server:
    """A running server of one checkout."""

    process: ServerProcess
    port: int

    def wait_until_ready(self) -> None:
        """Wait until /readyz responds with status 200. Raise RuntimeError if this takes longer than START_SECONDS."""
        deadline = monotonic() + START_SECONDS
        while monotonic() < deadline:
            self.process.require_alive()
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            sleep(0.1)
        raise RuntimeError(f"the server was not ready after {START_SECONDS:g} s: see {self.process.log}")

    def response_size(self, request: Request) -> int:
        """Return the size of the response body in bytes. Raise RuntimeError if the status is not 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", request.path, request.body, request.headers)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise RuntimeError(f"{request.path} answered {response.status}: {body[:200]!r}")
        return len(body)

    def measure(self, load: Load, seconds: float) -> Measurement:
        """Measure `load` in a closed loop. Raise RuntimeError if a response is wrong."""
        size = self.response_size(load.request)
        before = self.process.processor_seconds()
        sample = run_closed_loop(self.port, load.request, size, load.connections, seconds)
        if sample.correct_share < 1:
            raise RuntimeError(f"{load.title}: only {sample.correct_share:.1%} of the responses were right")
        spent = self.process.processor_seconds() - before
        return Measurement(sample.rate, spent / (sample.rate * max(1, round(seconds))))


def loads(workload: Workload, headers: dict[str, str] | None = None, *, smoke: bool = False) -> list[Load]:
    """Return the loads to compare; for a smoke test, only SMOKE_LOADS. Requests have `headers` besides their own."""
    protocol = ListProtocol("/reconstruct?model=vae", npy=True)
    one = protocol.create_request(workload.rows[1], binary=False)
    many = protocol.create_request(workload.rows[32], binary=False)
    large = protocol.create_request(workload.rows[256], binary=True)
    assert one
    assert many
    assert large
    body = orjson.dumps({"inputs": workload.few_features}, option=orjson.OPT_SERIALIZE_NUMPY)
    anomaly = Request("/anomaly?model=hosts", JSON, body)
    sample = Request("/sample?model=vae", JSON, orjson.dumps({"n": 1, "seed": 0}))  # the seed fixes the length
    found = [
        Load("1 row JSON, c=1", one, 1),
        Load("1 row JSON, c=32", one, 32),
        Load("32 rows JSON, c=32", many, 32),
        Load("256 rows npy, c=8", Request(large.path, NPY, large.body), 8),
        Load("/anomaly, 1 row JSON, c=1", anomaly, 1),
        Load("/anomaly, 1 row JSON, c=32", anomaly, 32),
        Load("/sample, 1 row JSON, c=1", sample, 1),
        Load("/sample, 1 row JSON, c=32", sample, 32),
    ]
    if smoke:
        by_title = {load.title: load for load in found}
        found = [by_title[title] for title in SMOKE_LOADS]
    return [
        replace(load, request=replace(load.request, headers=load.request.headers | (headers or {}))) for load in found
    ]


def make_key(path: Path) -> dict[str, str]:
    """Write a file with one API key, and return the header with which clients send the key."""
    value = key_file.new_value()
    scopes = frozenset((Scope.INFER, Scope.WRITE))
    key_file.add(path, "client", key_file.ApiKey(sha256=key_file.hash_of(value), scopes=scopes))
    return {"X-API-Key": value}


def start(
    checkout: Path,
    workload: Workload,
    stack: ExitStack,
    name: str,
    variables: dict[str, str] | None = None,
    module: str = "service",
) -> Server:
    """Start the server of `checkout` with further environment variables, and wait until it is ready.

    `module` runs the server.
    """
    port = free_port()
    environment = {
        "ELBO_PORT": str(port), "ELBO_ARTIFACTS": str(workload.folder / "artifacts"), "ELBO_LOG_LEVEL": "info",
        "ELBO_BACKEND": "onnx", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(checkout),
        **(variables or {}),
    }  # fmt: skip
    command = [sys.executable, "-m", module]
    process = ServerProcess(command, environment, workload.folder / f"{name}.log", folder=checkout)
    server = Server(stack.enter_context(process), port)
    server.wait_until_ready()
    return server


def train_models(checkout: Path, folder: Path) -> Workload:
    """Train the models with the code of `checkout`, and publish them under `folder`."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, "-c", TRAINING, str(folder)], cwd=checkout, env=environment, check=True)
    return open_workload(folder)


def describe(ratios: list[float]) -> str:
    """Return the median of `ratios`, and their quartiles in brackets."""
    if len(ratios) == 1:
        return f"{ratios[0]:.3f}"
    low, _, high = quantiles(ratios, n=4)
    return f"{median(ratios):.3f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("other", nargs="?", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=10, help="rounds (10)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per measurement (2)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the loads whose titles contain TEXT")
    parser.add_argument("--keys", action="store_true", help="both servers need an API key")
    parser.add_argument(
        "--smoke", action="store_true", help="one short round of two loads against this checkout itself"
    )
    options = parser.parse_args()
    if options.smoke:
        options.other, options.rounds, options.seconds = options.other or ROOT, 1, 0.1
    if options.other is None or not (options.other / "service").is_dir():
        parser.error("give the folder of another checkout")
    adopt_orphans()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workload = train_models(options.other.resolve(), Path(folder))
        headers, variables = {}, {}
        if options.keys:
            keys = Path(folder) / "keys.toml"
            headers, variables = make_key(keys), {"ELBO_API_KEYS_FILE": str(keys)}
        servers = {
            "this": start(ROOT, workload, stack, "this", variables),
            "other": start(options.other.resolve(), workload, stack, "other", variables),
        }
        print("| load | this, 1/s | other, 1/s | rate ratio | cost ratio |\n|---|---|---|---|---|")
        chosen = [load for load in loads(workload, headers, smoke=options.smoke) if options.only in load.title]
        for load in chosen:
            found: dict[str, list[Measurement]] = {"this": [], "other": []}
            for server in servers.values():
                server.measure(load, min(1.0, options.seconds))  # warm-up
            for turn in range(options.rounds):
                for name in ("this", "other") if turn % 2 else ("other", "this"):
                    found[name].append(servers[name].measure(load, options.seconds))
            rate = {name: median(one.rate for one in measurements) for name, measurements in found.items()}
            pairs = list(zip(found["this"], found["other"], strict=True))
            rates = describe([this.rate / other.rate for this, other in pairs])
            costs = describe([this.cost / other.cost for this, other in pairs])
            print(f"| {load.title} | {rate['this']:,.0f} | {rate['other']:,.0f} | {rates} | {costs} |", flush=True)


if __name__ == "__main__":
    main()
