"""A server whose models are in an S3 bucket: moto's server speaks the protocol of S3, and s3fs reads it.

The outage is shortened: the bucket is gone for twenty polls instead of ten minutes.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from service.repository.index import INDEX_NAME
from service.repository.storage import sha256_of
from tests.conftest import require
from tests.data import ROOT
from tests.models.builders import D
from tests.models.publishing import publish
from tests.ports import free_port
from tests.service.process import ServerProcess, server_starter
from tests.service.repository.folders import write_index
from tests.service.scrape import scrape
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

PYTHON = ROOT / ".venv-remote" / "bin" / "python"
URL = "s3://models/elbo"
POLL_SECONDS = 0.2
PUT = "import s3fs, sys; s3fs.S3FileSystem().pipe_file(sys.argv[1], sys.stdin.buffer.read())"
# Stores model0@1 as a push does that has seen a repository without this version: first the same file, then another.
PUSH_LATE = """
import sys
from pathlib import Path
from service.repository.copying import open_repository
from service.repository.index import VersionName
from service.repository.storage import CopyConflict
repository, folder = open_repository("s3://models/elbo"), Path(sys.argv[1])
for artifact in ("model0", "model1"):
    staging = folder.with_name(artifact) / artifact / "1"
    try:
        repository.store(VersionName("model0", 1), staging, only_signature=False)
        print("same")
    except CopyConflict as error:
        print(error.code)
"""


class Bucket:
    """The bucket `models` on moto's server, which forgets its objects when it stops."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}/models"
        self._log = log
        self.start()

    def start(self) -> None:
        """Start the server, and create the bucket."""
        command = [str(PYTHON), "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(lambda: httpx.put(self.url).status_code == 200, seconds=60, ignore=httpx.TransportError)

    def stop(self) -> None:
        """Kill the server."""
        self._process.kill()
        self._process.wait()


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Yield a bucket. The environment has its address and its credentials, as S3's clients read them."""
    require(PYTHON.exists(), "no .venv-remote: make test installs it")
    port = free_port()
    credentials = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "a-secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**credentials, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setenv(name, value)
    running = Bucket(port, tmp_path / "moto.log")
    yield running
    running.stop()


def elbo(*arguments: object) -> str:
    """Return the output of a command, which runs in the environment that has s3fs."""
    command = [str(PYTHON), "-m", "elbo", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def start_server(starter: Callable[..., ServerProcess], cache: Path, workers: int = 1) -> ServerProcess:
    libraries = next((ROOT / ".venv-remote" / "lib").glob("python*/site-packages"))
    prefix = ("env", f"PYTHONPATH={libraries}")
    return starter(URL, prefix=prefix, CACHE=cache, POLL_SECONDS=POLL_SECONDS, KEEP_VERSIONS=1, WORKERS=workers)


def served(client: httpx.Client) -> list[str]:
    """Return the versions that one of the workers serves."""
    return [f"{model['name']}@{model['version']}" for model in client.get("/models").json()["models"]]


def polls(client: httpx.Client, outcome: str) -> float:
    """Return the number of polls with this outcome."""
    return scrape(client).get(("elbo_repository_polls_total", frozenset({("outcome", outcome)})), 0.0)


def put_damaged(path: Path) -> str:
    """Put a damaged copy of the artifact at `path`, and the index of its folder, into the bucket.

    Return the SHA-256 that the index names.
    """
    folder = path.parents[2]
    write_index(folder)
    contents = {
        str(path.relative_to(folder)): path.read_bytes()[:-1] + b"x",
        INDEX_NAME: (folder / INDEX_NAME).read_bytes(),
    }
    for name, content in contents.items():
        command = [str(PYTHON), "-c", PUT, f"models/elbo/{name}"]
        subprocess.run(command, input=content, check=True, timeout=60)
    return sha256_of(path)


@pytest.mark.usefixtures("bucket")
def test_server_loads_new_versions_from_a_bucket_and_refuses_a_damaged_one(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    publish(folder, name="hosts")
    assert elbo("push", URL, "--artifacts", folder).startswith("copied hosts@1, ")
    with server_starter() as starter:
        server = start_server(starter, tmp_path / "cache", workers=2)
        server.wait_for_worker()
        with server.client() as client:
            assert served(client) == ["hosts@1"]
            publish(folder, name="hosts", kind="ae")
            elbo("push", URL, "--artifacts", folder)
            wait_until(lambda: "hosts@2" in served(client))
            digest = put_damaged(publish(folder, name="hosts"))
            wait_until(lambda: client.get("/models").json()["failures"])
            (failure,) = client.get("/models").json()["failures"]
            assert (failure["name"], failure["version"], failure["code"]) == ("hosts", 3, "repository_corrupt")
            assert digest in failure["detail"]
            assert served(client) == ["hosts@2"]
            assert polls(client, "incomplete") > 0
        assert server.stop() == 0
        server.wait_for_log("mirrored hosts@2 from s3://models/elbo")


def test_server_outlives_the_absence_of_its_bucket_also_after_a_restart(bucket: Bucket, tmp_path: Path) -> None:
    folder, cache = tmp_path / "artifacts", tmp_path / "cache"
    publish(folder, name="hosts")
    elbo("push", URL, "--artifacts", folder)
    rows = {"inputs": [[0.1] * D]}
    with server_starter() as starter:
        server = start_server(starter, cache)
        with server.client() as client:
            answer = client.post("/reconstruct", json=rows).json()
            bucket.stop()
            wait_until(lambda: polls(client, "failed") >= 20, seconds=60)
            assert client.get("/readyz").status_code == 200
            assert client.post("/reconstruct", json=rows).json() == answer
            (failure,) = client.get("/models").json()["failures"]
            assert failure["code"] == "repository_unavailable"
        assert server.stop() == 0
        restarted = start_server(starter, cache)
        with restarted.client() as client:
            assert client.post("/reconstruct", json=rows).json() == answer
            publish(folder, name="hosts", kind="ae")
            bucket.start()
            elbo("push", URL, "hosts@1", "hosts@2", "--artifacts", folder)
            wait_until(lambda: "hosts@2" in served(client))
            assert client.get("/models").json()["failures"] == []
        assert restarted.stop() == 0
        for process in (server, restarted):
            assert "a-secret" not in process.stderr() + str(process.lines)


@pytest.mark.usefixtures("bucket")
def test_pushes_at_the_same_time_lose_no_version(tmp_path: Path) -> None:
    names = [f"model{number}" for number in range(4)]
    for name in names:
        publish(tmp_path / name, name=name)
    command = [str(PYTHON), "-m", "elbo", "push", URL, "--artifacts"]
    processes = [subprocess.Popen([*command, str(tmp_path / name)], cwd=ROOT) for name in names]
    assert [process.wait(120) for process in processes] == [0] * len(names)
    assert elbo("pull", URL, "--artifacts", tmp_path / "pulled").count("copied") == len(names)
    assert "already there" in elbo("pull", URL, "--artifacts", tmp_path / "pulled")
    result = subprocess.run(
        [PYTHON, "-c", PUSH_LATE, str(tmp_path / "rival")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.splitlines() == ["same", "copy_conflict"], result.stderr
