"""Run Elbo's server for a long time under honest load while clients, disks, publishers and workers fail.

    python benchmarks/serving/soak.py                # 30 minutes
    python benchmarks/serving/soak.py --minutes 5
    python benchmarks/serving/soak.py --smoke        # one round of faults, under 30 s

Honest clients send rows to a server with two workers. Each response is compared with the output of the version that it
names. The clock jumps for a second server, which serves the same models with one worker. Meanwhile a publisher adds a
version of the model every few seconds and removes old ones, and FAULTS happen in turn. After each round of faults, the
server gets a pause with honest load only, and then the benchmark measures:

- the memory of all processes without pages of files, and that of the oldest worker, which is never killed;
- the open file descriptors of all processes;
- the number of metric series.

The program exits with code 1 if a response is wrong, if a request is lost, or if the server misbehaves during a fault.
Connections that end within KILL_SECONDS of the kill of a worker count apart: they belong to that worker. Unless --smoke
is given, the program also exits with 1 if memory grows by 2 % after the warm-up or if descriptors are left open.

The benchmark needs Linux. Faults of the disk need root, and jumps of the clock need libfaketime (Debian's package
faketime). If they are missing, the benchmark prints which faults it leaves out, and why. To add a fault, write a
function that takes a `Soak`, and add it to FAULTS.
"""

import argparse
import asyncio
import errno
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPException
from pathlib import Path
from statistics import median
from time import monotonic, time

import numpy as np
import orjson
import torch

from benchmarks.data import ROOT, describe_machine
from benchmarks.serving.checking_client import (
    TOLERANCE,
    Array,
    Connection,
    is_near,
    request_bytes,
    rows_request,
    wait_until_listening,
)
from benchmarks.serving.server_process import (
    ServerProcess,
    adopt_orphans,
    free_port,
    open_files,
    own_memory,
)
from benchmarks.serving.workload import FEW_FEATURES, train_vae
from models import artifact
from models.errors import ArtifactUnwritable
from models.manifest import resolve

MIB = 2**20
MODEL = "hosts"
CLIENTS = 8  # number of honest clients
PAUSE_SECONDS = 0.02  # between two requests of an honest client
ANSWER_SECONDS = 40.0  # a request without a response after this time is lost; the server promises one in 30 s
KILL_SECONDS = 2.0  # connections that end within this time after the kill of a worker belong to that worker
KEPT_VERSIONS = 10  # versions of MODEL on the disk: a version stays longer than a worker needs to load it
APPEAR_SECONDS = 60.0  # a new version must be served after this time, also on a busy machine
PROCESSES = 4  # the two workers, the trial process, and the keeper that starts it again (service/inference/trial.py)
DISK_BYTES = 32 * MIB  # size of the small disk with the artifacts, and of the one with the log
WARM_UP_SHARE = 0.2  # share of the time after which growth counts
MAX_GROWTH = 0.02
MAX_MORE_FILES = 4  # descriptors that may be open for a moment, such as the connection that asks for the metrics
REFUSALS = (429, 503, 504)  # statuses with which a busy server may respond to an honest request
SLOW_ROWS = 10_000  # rows of a response that does not fit into the buffers of a socket
CLOCK_SHIFTS = ("+3600s", "-3600s", "+86400s", "+0")
FAKETIME = Path("/usr/lib")
HALF_CLOSED_SECONDS = 0.25  # the server abandons a half-closed connection if no response begins within this time
DOOMED = "doomed"  # the model whose publishers are killed


@dataclass
class Tally:
    """Counts of what honest clients received, and the reasons for what they should not have received."""

    correct: int = 0
    wrong: int = 0
    lost: int = 0
    reset_by_kill: int = 0
    refusals: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def fail(self, kind: str, reason: str) -> None:
        """Count a failure of `kind`, the name of a counter."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.reasons[f"{kind}: {reason}"] += 1


@dataclass(frozen=True)
class Variant:
    """A trained model, and what it makes of the rows x [N, D]: outputs [N, D], scores [N] and p-values [N]."""

    loaded: artifact.Artifact
    x: Array
    outputs: Array
    scores: Array
    p_values: Array

    def publish(self, root: Path, name: str = MODEL) -> int:
        """Publish a copy as the next version of `name`, as `elbo calibrate` does. Return the version."""
        manifest = self.loaded.manifest.model_copy(update={"name": name, "created": datetime.now(UTC).isoformat()})
        twin = self.loaded.twin.graphs if self.loaded.twin else None
        module = artifact.thaw(self.loaded)
        return int(artifact.publish(module, manifest, root, twin, self.loaded.exhibits).parent.name)

    def is_correct(self, path: str, answer: dict[str, object], rows: list[int]) -> bool:
        """Return whether `answer` is right for the rows with indices `rows`."""
        if path == "/reconstruct":
            return is_near(answer["outputs"], self.outputs[rows])
        results: list[dict[str, float]] = answer["results"]  # type: ignore[assignment] # parsed JSON
        if len(results) != len(rows) or answer["errors"]:
            return False
        one_rank = self.loaded.manifest.calibration.floor  # a score may tie with a calibration score
        scores, p_values = ([each[name] for each in results] for name in ("score", "p_value"))
        return np.allclose(scores, self.scores[rows], rtol=TOLERANCE) and np.allclose(
            p_values, self.p_values[rows], atol=1.001 * one_rank
        )


def load_variant(root: Path) -> Variant:
    """Load the model in `root`, and compute what it makes of random rows."""
    loaded = artifact.load(resolve(root, MODEL))
    x = np.random.RandomState(3).uniform(size=(256, FEW_FEATURES)).astype(np.float32)
    with torch.inference_mode():
        rows = torch.from_numpy(x)
        scores = loaded.module.score(rows)[0]
        outputs = artifact.reconstruct(loaded.module, rows, gaps=False)[0]
        return Variant(loaded, x, outputs.numpy(), scores.numpy(), loaded.module.p_value(scores).numpy())


class Soak:
    """The state of a run.

    Args:
        folder: temporary folder.
        artifacts: the artifact folder.
        disks: the folders that are small disks of their own; empty without root.
        smoke: whether one short round is enough.
    """

    def __init__(self, folder: Path, artifacts: Path, log: Path, disks: list[Path], smoke: bool) -> None:
        self.folder, self.artifacts, self.disks, self.smoke = folder, artifacts, disks, smoke
        self.tally = Tally()
        self.port = free_port()
        self.random = random.Random(0)
        self.events: Counter[str] = Counter()  # what happened, by kind
        self.faults: list[str] = []  # what the server did wrong, apart from responses to honest clients
        self.errors: Counter[str] = Counter()  # lines of the log at level error
        self.variants = [load_variant(folder / str(seed)) for seed in range(2)]
        self.published = {self.variants[0].publish(artifacts): self.variants[0]}
        self.swapping = asyncio.Event()
        self.swapping.set()
        self.stopped = False
        self.read_bytes = 0  # of the log
        self.killed = -1e9  # time of the last kill of a worker
        self.process = self._start_server(self.port, log, workers=2)
        self.clock = folder / "clock"
        self.clock.write_text("+0")
        self.clock_port = free_port()
        self.clock_process = self._start_server_with_jumping_clock()

    def _start_server(
        self, port: int, log: Path, workers: int, environment: Mapping[str, str] | None = None
    ) -> ServerProcess:
        variables = {
            "OMP_NUM_THREADS": "1",
            "ELBO_PORT": str(port),
            "ELBO_ARTIFACTS": str(self.artifacts),
            "ELBO_WORKERS": str(workers),
            "ELBO_POLL_SECONDS": "0.5",
            **(environment or {}),
        }
        return ServerProcess([sys.executable, "-m", "service"], variables, log)

    def _start_server_with_jumping_clock(self) -> ServerProcess | None:
        """Start a second server, whose wall clock follows the file `clock`. Return None without libfaketime.

        The server has one worker, so it never forks while its log thread runs. With libfaketime 0.9.10, such a fork
        hangs for ever if the log thread holds the lock of libfaketime at that moment.
        """
        library = faketime_library()
        if library is None:
            return None
        environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self.clock),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # as on a machine whose clock is set: only the wall clock jumps
            # Otherwise libfaketime takes deadlines on the monotonic clock for times on the wall clock, which are long
            # past. Threads that wait for Python's interpreter lock then never sleep, and requests wait for seconds.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }
        return self._start_server(self.clock_port, self.folder / "clock.log", workers=1, environment=environment)

    def fetch(self, path: str) -> str:
        """Return the body of a GET."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=ANSWER_SECONDS) as response:
            text: str = response.read().decode()
        return text

    async def wait_for_ready_workers(self, count: int, offset: int = 0) -> None:
        """Wait until the log, from byte `offset`, says of `count` workers that they are ready.

        Raises:
            TimeoutError: this takes longer than 60 s. The message has the end of the log.
            RuntimeError: the server has exited.
        """
        try:
            async with asyncio.timeout(APPEAR_SECONDS):
                while self.log_after(offset).count(b" is ready") < count:
                    self.process.require_alive()
                    await asyncio.sleep(0.1)
        except TimeoutError:
            end = self.log_after(offset).decode(errors="replace")[-1000:]
            raise TimeoutError(f"expected {count} ready workers; the log ends with {end!r}") from None

    def log_after(self, offset: int) -> bytes:
        """Return the log from byte `offset`."""
        with self.process.log.open("rb") as file:
            file.seek(offset)
            return file.read()

    async def send(self, connection: Connection, path: str, rows: list[int]) -> None:
        """Send an honest request, and count its response."""
        request = rows_request(f"{path}?model={MODEL}", self.variants[0].x[rows])
        started = monotonic()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                status, answer = await connection.send(request)
        except TimeoutError:
            connection.close()
            self.tally.fail("lost", f"no response in {ANSWER_SECONDS:g} s")
        except ConnectionError as error:
            if started < self.killed + KILL_SECONDS and monotonic() >= self.killed:
                self.tally.reset_by_kill += 1
            else:
                self.tally.fail("lost", str(error) or type(error).__name__)
        else:
            await self.count(path, rows, status, answer)

    async def count(self, path: str, rows: list[int], status: int, body: bytes) -> None:
        """Count the response to an honest request."""
        if status in REFUSALS:
            self.tally.refusals[status] += 1
        elif status != 200:
            with suppress(orjson.JSONDecodeError):
                body = orjson.loads(body)["detail"].encode()
            self.tally.fail("wrong", f"status {status}: {body[:200]!r}")
        else:
            answer = orjson.loads(body)
            if answer["version"] not in self.published:
                await asyncio.sleep(1.0)  # `publish` has renamed the folder, but not yet returned
            variant = self.published.get(answer["version"])
            if variant and variant.is_correct(path, answer, rows):
                self.tally.correct += 1
            else:
                self.tally.fail("wrong", f"{path} of version {answer['version']} ({len(rows)} rows)")

    async def send_honest_requests(self, seed: int) -> None:
        """Send honest requests until the end."""
        generator, connection = random.Random(seed), Connection(self.port)
        while not self.stopped:
            rows = [generator.randrange(256) for _ in range(generator.randrange(1, 33))]
            await self.send(connection, generator.choice(("/reconstruct", "/anomaly")), rows)
            await asyncio.sleep(PAUSE_SECONDS)
        connection.close()

    async def swap_models(self, seconds: float) -> None:
        """Publish a version every few seconds, alternately of two models, and remove the oldest version."""
        turn = 0
        while not self.stopped:
            await asyncio.sleep(seconds)
            await self.swapping.wait()
            turn += 1
            variant = self.variants[turn % 2]
            with suppress(ArtifactUnwritable):  # the disk is full or read-only: a fault of this run
                version = await asyncio.to_thread(variant.publish, self.artifacts)
                self.published[version] = variant
                self.events["versions published"] += 1
                numbers = sorted(int(path.name) for path in (self.artifacts / MODEL).iterdir() if path.name.isdigit())
                for number in numbers[:-KEPT_VERSIONS]:
                    shutil.rmtree(self.artifacts / MODEL / str(number), ignore_errors=True)
                await wait_for(self, partial(serves, MODEL, version), "/models", "the next version")

    async def check(self, title: str, condition: bool) -> None:
        """Note a fault of the server unless `condition` holds."""
        if not condition:
            self.faults.append(title)

    def read_log(self) -> None:
        """Count the errors in the log, and free its space on the disk. The server writes on behind the free space."""
        text = self.log_after(self.read_bytes)
        self.read_bytes += len(text)
        for line in text.splitlines():
            with suppress(orjson.JSONDecodeError):  # a full disk cuts lines
                entry = orjson.loads(line)
                if entry["level"] in ("error", "critical"):
                    message = entry["message"].strip().splitlines()[-1][:300]
                    self.errors["".join("#" if char.isdigit() else char for char in message)] += 1
        os.truncate(self.process.log, 0)


# Faults


async def crash_in_the_middle_of_bodies(soak: Soak) -> None:
    """Clients crash: they send half a body, and then reset the connection."""
    request = request_bytes(f"/reconstruct?model={MODEL}", b'{"inputs":[' + b"[0.5]," * 10_000)
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", soak.port)
        writer.write(request[: soak.random.randrange(1, len(request))])
        await asyncio.sleep(0.02)
        reset_on_close(writer)
        writer.transport.abort()
        soak.events["clients crashed"] += 1


async def half_close(soak: Soak) -> None:
    """Clients close their half of the connection after a request, and must still get the response."""
    for _ in range(20):
        rows = [soak.random.randrange(256) for _ in range(8)]
        request = rows_request(f"/reconstruct?model={MODEL}", soak.variants[0].x[rows])
        reader, writer = await asyncio.open_connection("127.0.0.1", soak.port)
        writer.write(request)
        writer.write_eof()
        started = monotonic()
        response = await reader.read()
        writer.close()
        head, _, content = response.partition(b"\r\n\r\n")
        if head:
            await soak.count("/reconstruct", rows, int(head.split()[1]), content)
        elif monotonic() - started >= HALF_CLOSED_SECONDS:
            soak.events["half-closed connections abandoned after 0.25 s"] += 1
        else:
            soak.tally.fail("lost", "no response to a half-closed connection")
        soak.events["half-closed connections"] += 1


async def read_slowly(soak: Soak) -> None:
    """Clients read a large response slowly, or not at all. The slow ones must get all of it."""
    body = orjson.dumps({"n": SLOW_ROWS, "seed": 7})
    request = request_bytes(f"/sample?model={MODEL}", body, host="elbo\r\nAccept: application/x-npy")

    async def read(pause: float | None) -> None:
        connection = socket.create_connection(("127.0.0.1", soak.port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        reader, writer = await asyncio.open_connection(sock=connection, limit=16_384)
        writer.write(request)
        if pause is None:
            await asyncio.sleep(3.0)
            writer.transport.abort()
            return
        response = b""
        with suppress(OSError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            while len(response) < length and (part := await reader.read(32_768)):
                response += part
                await asyncio.sleep(pause)
            await soak.check(
                f"slow reader: status {head.split()[1]!r}, {len(response)} of {length} bytes",
                int(head.split()[1]) in REFUSALS
                or (len(response) == length and b" 200 " in head[:16] and length > 4 * FEW_FEATURES * SLOW_ROWS),
            )
        writer.close()

    await asyncio.gather(*(read(pause) for pause in (0.05, 0.05, 0.1, None, None, None)))
    soak.events["slow readers"] += 6


MALFORMED = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /nowhere HTTP/1.1\r\nHost: elbo\r\n\r\n",
    b"GET /anomaly HTTP/1.1\r\nHost: elbo\r\n\r\n",
    b"POST /anomaly HTTP/1.1\r\nHost: elbo\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /anomaly HTTP/1.1\r\nHost: elbo\r\nContent-Length: -1\r\n\r\n",
    b"POST /anomaly HTTP/1.1\r\nHost: elbo\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /anomaly HTTP/1.1\r\nHost: elbo\r\nContent-Type: text/csv\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n",
    b"GET / HTTP/1.1\r\nHost: elbo\r\nX: " + b"x" * 400_000 + b"\r\n\r\n",
    request_bytes("/anomaly?model=hosts", b'{"inputs":[[1,'),
    request_bytes("/anomaly?model=hosts", b'{"inputs":[[1,2]]}'),
    request_bytes("/anomaly?model=hosts", b'{"inputs":[[NaN]]}'),
    request_bytes("/anomaly?model=hosts", b"\xff\xfe", "text/csv"),
    request_bytes("/anomaly?model=hosts", b"x\n" * 1000, "application/x-ndjson"),
    request_bytes("/anomaly?model=hosts", b"not gzip", "application/json\r\nContent-Encoding: gzip"),
    request_bytes("/anomaly?model=hosts&alpha=2", b'{"inputs":[[1]]}'),
    request_bytes("/anomaly?model=absent", b'{"inputs":[[1]]}'),
    request_bytes("/reconstruct?model=hosts", b"\x93NUMPY", "application/x-npy"),
)


async def send_malformed_requests(soak: Soak) -> None:
    """Send malformed requests. Each must get a status from 400 to 499."""
    for request in MALFORMED:
        connection = Connection(soak.port)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                status, _ = await connection.send(request)
            reason = "" if 400 <= status < 500 else f"status {status}"
        except (TimeoutError, ConnectionError) as error:
            reason = str(error) or type(error).__name__
        await soak.check(f"malformed request {request[:80]!r}: {reason}", not reason)
        connection.close()
        soak.events["malformed requests"] += 1


async def kill_a_worker(soak: Soak) -> None:
    """Kill the youngest worker. The oldest one stays, so that its memory shows growth."""
    oldest, *others = soak.process.workers()
    offset = soak.process.log.stat().st_size
    soak.killed = monotonic()
    os.kill(others[-1], signal.SIGKILL)
    soak.events["workers killed"] += 1
    await soak.wait_for_ready_workers(1, offset)
    await soak.check("the oldest worker ended, though nobody killed it", oldest in soak.process.workers())


async def kill_a_publisher(soak: Soak) -> None:
    """Kill a process that publishes versions, while it writes one. Every version that it leaves must load."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving.soak",
        "--publish",
        str(soak.folder / "0"),
        str(soak.artifacts),
    ]
    publisher = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
    folder = soak.artifacts / DOOMED
    try:
        async with asyncio.timeout(60):
            while not list(folder.glob(".staging-*/model.pt")):
                await asyncio.sleep(0.0001)  # the file is there for a few milliseconds
    finally:
        publisher.kill()
        await publisher.wait()
    soak.events["publishers killed"] += 1
    soak.events["staging folders left behind"] += len([path for path in folder.glob(".staging-*") if path.is_dir()])
    await asyncio.to_thread(soak.variants[0].publish, soak.artifacts, DOOMED)  # removes what the dead one left
    await soak.check("the staging folder of a killed publisher stays", not list(folder.glob(".staging-*")))
    newest = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    await wait_for(soak, partial(serves, DOOMED, newest), "/models", "the version after a killed publisher")
    failures = [line for line in soak.fetch("/metrics").splitlines() if line.startswith("elbo_model_load_failures ")]
    await soak.check(f"a version of a killed publisher does not load: {failures}", failures[0].endswith(" 0.0"))
    shutil.rmtree(folder)
    await wait_for(soak, lambda text: DOOMED not in text, "/models", "the removal of a model")


async def fill_the_disks(soak: Soak) -> None:
    """Fill the disks of the artifacts and of the log. Publishing fails; the server responds as before."""
    fillers = [disk / "filler" for disk in soak.disks]
    for filler in fillers:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    await expect_unwritable(soak, "full")
    await asyncio.sleep(1.0 if soak.smoke else 5.0)
    for filler in fillers:
        filler.unlink()
    soak.events["disks filled"] += len(fillers)


async def make_artifacts_read_only(soak: Soak) -> None:
    """Make the artifact folder read-only for a while."""
    soak.swapping.clear()
    command = ["mount", "-o", "remount,ro", str(soak.artifacts.parent)]
    while subprocess.run(command, check=False, capture_output=True).returncode:
        await asyncio.sleep(0.1)  # a version is being published
    await expect_unwritable(soak, "read-only")
    await asyncio.sleep(1.0 if soak.smoke else 5.0)
    subprocess.run(["mount", "-o", "remount,rw", str(soak.artifacts.parent)], check=True)
    soak.swapping.set()
    soak.events["folders made read-only"] += 1


async def expect_unwritable(soak: Soak, state: str) -> None:
    """Check that a version cannot be published."""
    try:
        await asyncio.to_thread(soak.variants[0].publish, soak.artifacts, DOOMED)
    except ArtifactUnwritable:
        return
    soak.faults.append(f"a version was published on a disk that is {state}")


async def let_the_clock_jump(soak: Soak) -> None:
    """Let the wall clock of a server jump: an hour forward, an hour back, a day forward, and to the true time."""
    await wait_until_listening(soak.clock_port, APPEAR_SECONDS)
    connection = Connection(soak.clock_port)
    for shift in CLOCK_SHIFTS:
        soak.clock.write_text(shift)
        await asyncio.sleep(0.5 if soak.smoke else 2.0)  # libfaketime reads the file once a second
        jumped = False
        for _ in range(20):
            drift = (await asyncio.to_thread(server_time, soak.clock_port)) - time() - int(shift.rstrip("s"))
            await soak.send(connection, "/anomaly", [soak.random.randrange(256) for _ in range(8)])
            if jumped := abs(drift) < 3:
                break
            await asyncio.sleep(0.5)
        await soak.check(f"the clock of the server did not jump by {shift}", jumped)
        soak.events["clock jumps"] += 1
    connection.close()


FAULTS: dict[str, Callable[[Soak], Awaitable[None]]] = {
    "crashing clients": crash_in_the_middle_of_bodies,
    "half-closed connections": half_close,
    "slow readers": read_slowly,
    "malformed requests": send_malformed_requests,
    "killed worker": kill_a_worker,
    "killed publisher": kill_a_publisher,
    "full disk": fill_the_disks,
    "read-only folder": make_artifacts_read_only,
    "clock jumps": let_the_clock_jump,
}


def server_time(port: int) -> float:
    """Return the time on the clock of the server, in seconds since 1970."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=10) as response:
        return parsedate_to_datetime(response.headers["date"]).timestamp()


def reset_on_close(writer: asyncio.StreamWriter) -> None:
    """Let the socket send a reset when it is closed, as the kernel does for a client that has crashed."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def serves(model: str, version: int, models: str) -> bool:
    """Return whether the response of GET /models has `model` in `version`."""
    return f'"name":"{model}","version":{version},' in models


async def wait_for(soak: Soak, is_reached: Callable[[str], bool], path: str, title: str) -> None:
    """Wait until GET `path` gives a body for which `is_reached` is true, for each of ten requests in a row."""
    try:
        async with asyncio.timeout(APPEAR_SECONDS):
            in_a_row = 0
            while in_a_row < 10:  # each request may reach another worker
                reached = False
                with suppress(OSError, HTTPException):  # the worker was killed
                    reached = is_reached(await asyncio.to_thread(soak.fetch, path))
                in_a_row = in_a_row + 1 if reached else 0
                await asyncio.sleep(0.02)
    except TimeoutError:
        soak.faults.append(f"{title} did not appear in {path} within {APPEAR_SECONDS:g} s")


def faketime_library() -> Path | None:
    """Return libfaketime for programs with threads, or None if it is not installed."""
    return next(iter(sorted(FAKETIME.glob("*/faketime/libfaketimeMT.so.1"))), None)


@contextmanager
def small_disks(folder: Path) -> Iterator[list[Path]]:
    """Mount two small disks in memory, and unmount them at the end. Yield an empty list if this is not possible."""
    disks = [folder / "disk", folder / "log"]
    for disk in disks:
        disk.mkdir()
    mounted: list[Path] = []
    try:
        for disk in disks:
            command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "elbo-soak", str(disk)]
            if os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0:
                mounted.append(disk)
        yield mounted if mounted == disks else []
    finally:
        for disk in mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=False)


# Measurement


@dataclass(frozen=True)
class Measurement:
    """What the server uses: bytes, descriptors and metric series."""

    minutes: float
    memory: float
    oldest: float
    files: float
    series: int


async def measure(soak: Soak, started: float) -> Measurement:
    """Pause the swaps until the server has settled, and measure. Each figure is the median of five."""
    soak.swapping.clear()
    settled = 0
    async with asyncio.timeout(APPEAR_SECONDS):
        while settled < (5 if soak.smoke else 20):  # each process that tries a version out is a further descendant
            settled = settled + 1 if len(soak.process.descendants()) == PROCESSES else 0
            await asyncio.sleep(0.2)
    samples = []
    for _ in range(5):
        processes = [soak.process.pid, *soak.process.descendants()]
        memory = sum(map(own_memory, processes))
        samples.append((memory, own_memory(soak.process.workers()[0]), sum(map(open_files, processes))))
        await asyncio.sleep(0.2)
    text = await asyncio.to_thread(soak.fetch, "/metrics")
    series = sum(1 for line in text.splitlines() if line and line[0] != "#")
    soak.swapping.set()
    memory, oldest, files = (median(column) for column in zip(*samples, strict=True))
    found = Measurement((monotonic() - started) / 60, memory, oldest, files, series)
    tally = soak.tally
    print(
        f"| {found.minutes:.1f} | {memory / MIB:.1f} | {oldest / MIB:.1f} | {files:g} | {series:,} | {tally.correct:,} "
        f"| {tally.wrong} | {tally.lost} | {tally.reset_by_kill} | {sum(tally.refusals.values())} |",
        flush=True,
    )
    return found


def growth(values: list[float]) -> float:
    """Return by which share the median of the last third is above the median of the first third."""
    third = max(1, len(values) // 3)
    return median(values[-third:]) / median(values[:third]) - 1


def report(soak: Soak, found: list[Measurement], seconds: float) -> bool:
    """Print the results, and return whether every target is met."""
    tally, ok = soak.tally, True
    warm = [each for each in found if each.minutes * 60 >= WARM_UP_SHARE * seconds]
    print("\n| | target | measured | |\n|---|---|---|---|")

    def line(title: str, target: str, measured: str, met: bool | None) -> None:
        nonlocal ok
        ok &= met is not False
        print(f"| {title} | {target} | {measured} | {'' if met is None else 'met' if met else 'missed'} |")

    if soak.smoke or len(warm) < 2:
        print("| growth | < 2 % | not measured: the run is too short | |")
    else:
        for title, values in {
            "memory of all processes": [each.memory for each in warm],
            "memory of the oldest worker": [each.oldest for each in warm],
        }.items():
            rise = growth(values)
            line(f"growth of the {title} after the warm-up", f"< {MAX_GROWTH:.0%}", f"{rise:+.2%}", rise < MAX_GROWTH)
        files = [each.files for each in warm]
        more = median(files[-max(1, len(files) // 3) :]) - median(files[: max(1, len(files) // 3)])
        line("more open descriptors", f"<= {MAX_MORE_FILES}", f"{more:+g}", more <= MAX_MORE_FILES)
        line("metric series", "", f"{warm[0].series:,} to {warm[-1].series:,}", None)
    line("wrong responses", "0", str(tally.wrong), not tally.wrong)
    line("lost requests", "0", str(tally.lost), not tally.lost)
    line("faults of the server", "0", str(len(soak.faults)), not soak.faults)
    refusals = ", ".join(f"{status}: {count:,}" for status, count in tally.refusals.items()) or "0"
    line("correct responses", "", f"{tally.correct:,}", None)
    line("refusals of honest requests", "", refusals, None)
    line("connections that ended with a killed worker", "", str(tally.reset_by_kill), None)
    for title, count in soak.events.items():
        line(title, "", f"{count:,}", None)
    for title, counts in (("failed", tally.reasons), ("fault", Counter(soak.faults)), ("logged error", soak.errors)):
        for reason, count in counts.most_common(10):
            print(f"\n{title}, {count} times: {reason}")
    return ok


async def run(soak: Soak, faults: dict[str, Callable[[Soak], Awaitable[None]]], seconds: float) -> bool:
    """Let the faults happen in turn for `seconds`, and measure after each round. Return whether all targets are met."""
    await soak.wait_for_ready_workers(2)
    print(
        "| minutes | memory, MiB | oldest worker, MiB | descriptors | series | correct | wrong | lost "
        "| reset by a kill | refused |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    started = monotonic()
    tasks = [asyncio.create_task(soak.send_honest_requests(seed)) for seed in range(CLIENTS)]
    tasks.append(asyncio.create_task(soak.swap_models(1.5 if soak.smoke else 3.0)))
    found: list[Measurement] = []
    while not found or (monotonic() - started < seconds and not soak.smoke):
        for name, fault in faults.items():
            soak.process.require_alive()
            try:
                await fault(soak)
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                soak.faults.append(f"{name}: {type(error).__name__} {error}")
            await asyncio.sleep(0.1 if soak.smoke else 1.0)
        try:
            found.append(await measure(soak, started))
        except TimeoutError:
            soak.faults.append(f"the server did not settle within {APPEAR_SECONDS:g} s")
            break
        soak.read_log()
    soak.stopped = True
    await asyncio.gather(*tasks)
    return report(soak, found, seconds)


def choose_faults(disks: list[Path]) -> dict[str, Callable[[Soak], Awaitable[None]]]:
    """Return the faults that can happen on this machine. Print why the others are left out."""
    faults = dict(FAULTS)
    if not disks:
        for name in ("full disk", "read-only folder"):
            print(f"left out: {name}, because this user cannot mount a small disk")
            del faults[name]
    if faketime_library() is None:
        print(f"left out: clock jumps, because libfaketime is not installed in {FAKETIME} (Debian's package faketime)")
        del faults["clock jumps"]
    return faults


def publish_until_killed(source: Path, root: Path) -> None:
    """Publish one version of DOOMED after another."""
    variant = load_variant(source)
    while True:
        variant.publish(root, DOOMED)


def main() -> None:
    """Train the models, start the server, and run the faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one round of faults, under 30 s")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long faults happen (default 30)")
    parser.add_argument("--publish", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.publish:
        publish_until_killed(*options.publish)
    adopt_orphans()
    print(f"{describe_machine('torch', 'uvicorn')}; 2 workers\n")
    with tempfile.TemporaryDirectory(prefix="elbo-soak-") as name, small_disks(Path(name)) as disks:
        folder = Path(name)
        faults = choose_faults(disks)
        for seed in range(2):
            train_vae(folder / str(seed), MODEL, FEW_FEATURES, hidden=(64, 32), latents=4, seed=seed)
        soak = Soak(folder, folder / "disk" / "artifacts", folder / "log" / "elbo.log", disks, options.smoke)
        with soak.process:
            ok = asyncio.run(run(soak, faults, 60 * options.minutes))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
