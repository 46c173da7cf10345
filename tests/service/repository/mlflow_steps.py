"""Push versions to a server of MLflow, pull them, and let MLflow load one. Print JSON.

    .venv-remote/bin/python -m tests.service.repository.mlflow_steps FOLDER ROWS

FOLDER has the artifact folders `own`, with web@1 and web@2, `other`, with another web@1, and `signed`, with web@1 and
its signature, and the key `second.key`. ROWS is JSON. The steps run in one process, because importing MLflow takes
seconds.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np

from models.keys import read_private_key
from models.signatures import sign
from service.repository.copying import copy_versions, open_repository
from service.repository.index import VersionName
from service.repository.storage import CopyConflict, RepositoryUnavailable


def copied(source: str, destination: str, *names: str) -> list[str]:
    found = copy_versions(open_repository(source), open_repository(destination), names)
    return [f"{each.action} {each.name}" for each in found]


class Killed(Exception):
    """Ends a push."""


def replace_signature(folder: Path, signed: str) -> list[str]:
    """Replace the signature of web@1, and end the push after the file. Return what a pull and the next push do."""
    repository: Any = open_repository("mlflow:")
    name = VersionName("web", 1)
    repository.entries()
    sign(folder / "signed/web/1/model.pt", read_private_key(folder / "second.key"))
    log_artifact = repository._client.log_artifact

    def log_and_end(*arguments: str) -> None:
        log_artifact(*arguments)
        raise Killed

    repository._client.log_artifact = log_and_end
    with suppress(Killed, RepositoryUnavailable):
        repository.store(name, folder / "signed/web/1", only_signature=True)
    return [
        *copied("mlflow:", str(folder / "between"), "web@1"),
        *copied(signed, "mlflow:"),
        *copied("mlflow:", str(folder / "after"), "web@1"),
    ]


def main(folder: Path, rows: str) -> None:
    """Print the results of all steps as one JSON object."""
    own, other, signed, pulled = (str(folder / name) for name in ("own", "other", "signed", "pulled"))
    late = open_repository("mlflow:")
    late.entries()
    found: dict[str, object] = {
        "pushed": copied(own, "mlflow:", "web@2", "web@1"),
        "again": copied(own, "mlflow:"),
    }
    copied("mlflow:", pulled, "web@1", "web@2")
    try:
        copied(other, "mlflow:")
    except CopyConflict as error:
        found["conflict"] = error.code
    # Pushes that listed the registry before the first push ended
    late.store(VersionName("web", 1), folder / "signed/web/1", only_signature=False)
    try:
        late.store(VersionName("web", 1), folder / "other/web/1", only_signature=False)
    except CopyConflict as error:
        found["late conflict"] = error.code
    found["signed"] = copied(signed, "mlflow:"), copied("mlflow:", pulled, "web@1")
    found["after a push that ended half-way"] = replace_signature(folder, signed)
    model = mlflow.pyfunc.load_model("models:/web/1")
    found["predicted"] = model.predict(np.array(json.loads(rows), np.float32)).to_dict(orient="list")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
