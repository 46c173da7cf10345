"""A server whose models are in a bucket of Google Cloud Storage: an emulator speaks its protocol."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import require
from tests.data import ROOT
from tests.models.builders import D
from tests.models.publishing import publish
from tests.ports import free_port
from tests.service.process import server_starter
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

PYTHON = ROOT / ".venv-remote" / "bin" / "python"
URL = "gs://models/elbo"
# Pulls hosts@2, and pushes another hosts@1. Then writes the index with the tag that was read, with the old tag, and as
# if there were no index. One process does all this, because importing gcsfs takes seconds.
STEPS = """
import sys
from pathlib import Path
from service.repository.copying import copy_versions, open_repository
from service.repository.index import INDEX_NAME
from service.repository.location import parse_location
from service.repository.storage import CopyConflict, RepositoryConflict, open_storage
place, folder = "gs://models/elbo", Path(sys.argv[1])
(copied,) = copy_versions(open_repository(place), open_repository(str(folder / "pulled")))
print(copied.action)
try:
    copy_versions(open_repository(str(folder / "rival")), open_repository(place), ["hosts@1"])
except CopyConflict as error:
    print(error.code)
storage = open_storage(parse_location(place))
tag, content = storage.tag(INDEX_NAME), storage.read(INDEX_NAME)
for expected in (tag, tag, None):
    try:
        storage.write(INDEX_NAME, content + b" ", expected)
        print("written")
    except RepositoryConflict as error:
        print(error.code)
"""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a server with the bucket `models`. The environment names it, as gcsfs reads it."""
    require(
        list((ROOT / ".venv-remote").glob("lib/*/site-packages/gcsfs")),
        "no gcsfs in .venv-remote: remove its file .ready, then make test installs gcsfs",
    )
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [str(PYTHON), "-m", "tests.service.repository.gcs_server", str(port)]
    with pytest.MonkeyPatch.context() as patch, (tmp_path_factory.mktemp("gcs") / "log").open("wb") as log:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            wait_until(lambda: httpx.get(address).status_code == 200, seconds=60, ignore=httpx.TransportError)
            yield address
        finally:
            process.kill()
            process.wait()


def run(*arguments: object) -> str:
    """Return the output of Python in the environment that has gcsfs."""
    result = subprocess.run(
        [PYTHON, *map(str, arguments)], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.usefixtures("bucket")
def test_server_loads_new_versions_and_an_index_that_has_changed_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    publish(folder, name="hosts")
    push = ("-m", "elbo", "push", URL, "--artifacts", folder)
    assert run(*push).startswith("copied hosts@1, ")
    libraries = next((ROOT / ".venv-remote" / "lib").glob("python*/site-packages"))
    with server_starter() as starter:
        prefix = ("env", f"PYTHONPATH={libraries}")
        server = starter(URL, prefix=prefix, CACHE=tmp_path / "cache", POLL_SECONDS=0.2)
        with server.client() as client:
            assert client.post("/reconstruct", json={"inputs": [[0.1] * D]}).status_code == 200
            published = publish(folder, name="hosts", kind="ae")
            run(*push)
            wait_until(lambda: "2" in str([each["version"] for each in client.get("/models").json()["models"]]))
        assert server.stop() == 0
    publish(tmp_path / "rival", name="hosts", kind="ae")
    found = run("-c", STEPS, tmp_path).split()
    assert found == ["copied", "copy_conflict", "written", "repository_conflict", "repository_conflict"]
    assert (tmp_path / "pulled/hosts/2/model.pt").read_bytes() == published.read_bytes()
