"""The model registry of MLflow as a repository: `elbo push mlflow:` and `elbo pull mlflow:`.

A version of a model becomes a version of a registered model of the same name. MLflow numbers its versions itself, so
the tags of each have Elbo's number, and the size and the SHA-256 of the files. The folder of the version has the
artifact, its signature, and a file MLmodel, with which `mlflow.pyfunc.load_model` loads the model; see `elbo.mlflow`.

MLFLOW_TRACKING_URI, MLFLOW_REGISTRY_URI, MLFLOW_EXPERIMENT_NAME and the other variables of MLflow name the server and
give the credentials.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from platform import python_version
from typing import Any
from uuid import uuid4

from pydantic import ValidationError

from models.manifest import FILE_NAME, NAME, VERSION, read_manifest
from models.signatures import SIGNATURE_NAME
from service.repository.index import Entries, FileEntry, VersionEntry, VersionName
from service.repository.location import Location, RepositoryInvalid
from service.repository.storage import (
    SECRET,
    CopyConflict,
    RepositoryCorrupt,
    entry_of_folder,
    failures_of,
    sha256_of,
)

PLACE = "mlflow:"
FOLDER = "model"  # of a version, in the artifacts of its run
EXPERIMENT = "elbo"
PAGE = 200  # versions in a response of the registry
NUMBER, BYTES, HASH = "elbo.version", "elbo.bytes", "elbo.sha256"  # tags of a version
SIGNATURE_BYTES, SIGNATURE_HASH = "elbo.signature.bytes", "elbo.signature.sha256"
NEXT_SIGNATURE_HASH = "elbo.signature.next"  # hashes of signatures that replace it: the file may have any of them
ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
DEFAULTS = {  # of variables of MLflow; by default, MLflow tries for minutes to reach a server that is away
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
LOADER = "elbo.mlflow"  # the module that `mlflow.pyfunc` calls


class MlflowRepository:
    """The model registry that the variables of MLflow name.

    Raises:
        RepositoryInvalid: MLflow is not installed, or no variable names the registry.
    """

    def __init__(self) -> None:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        try:
            import mlflow
        except ImportError as error:
            raise RepositoryInvalid(
                f"{PLACE} needs the package mlflow-skinny: install Elbo with pip install 'elbo[mlflow]'"
            ) from error
        if not any(os.environ.get(name) for name in ADDRESSES):
            raise RepositoryInvalid(
                f"{PLACE} needs the address of MLflow: set MLFLOW_TRACKING_URI, for example to http://mlflow:5000"
            )
        self._mlflow: Any = mlflow
        self._location = Location("mlflow", SECRET.sub(r"\1\2", mlflow.get_registry_uri()))
        with self._failures():
            self._client: Any = mlflow.MlflowClient()
        self._found: dict[VersionName, Any] = {}

    def _failures(self, path: str = "model registry") -> Any:
        return failures_of(self._location, path)

    def entries(self) -> Entries:
        """See `Repository`. Versions without the tags of `elbo push` are left out."""
        found: Entries = {}
        for name, registered in self._registered():
            if name not in self._found and (entry := _entry_in(registered.tags)):
                self._found[name] = registered
                found.setdefault(name.name, {})[name.version] = entry
        return {name: dict(sorted(numbers.items())) for name, numbers in sorted(found.items())}

    def _registered(self, name: str | None = None) -> Iterator[tuple[VersionName, Any]]:
        """Yield the versions of the model `name`, or of all models, in the order of MLflow's numbers."""
        condition, token = f"name = '{name}'" if name else None, None
        versions: list[Any] = []
        while token != "":
            with self._failures():
                page = self._client.search_model_versions(condition, max_results=PAGE, page_token=token)
            versions += page
            token = page.token or ""
        for each in sorted(versions, key=lambda each: int(each.version)):
            number = each.tags.get(NUMBER, "")
            if NAME.fullmatch(each.name) and VERSION.fullmatch(number):
                yield VersionName(each.name, int(number)), each

    def complete(self, name: VersionName, entry: VersionEntry) -> VersionEntry:  # noqa: ARG002 - as in `Repository`
        """See `Repository`."""
        return entry

    def fetch(self, name: VersionName, entry: VersionEntry, staging: Path) -> None:
        """See `Repository`."""
        registered = self._found[name]
        with self._failures():
            place = self._client.get_model_version_download_uri(name.name, registered.version)
            listed = self._client.list_artifacts(registered.run_id, FOLDER) if registered.run_id else ()
        sizes = {Path(file.path).name: file.file_size for file in listed}
        for file, expected in ((FILE_NAME, entry.model), (SIGNATURE_NAME, entry.signature)):
            if expected is None:
                continue
            if file == FILE_NAME and (size := sizes.get(file)) not in (None, expected.bytes):
                raise RepositoryCorrupt(
                    f"{file} of {name} in MLflow (version {registered.version}) has {size} bytes, and its tag names "
                    f"{expected.bytes}: the file was altered or damaged after it was pushed"
                )
            with self._failures(f"{file} of {name}"):
                self._mlflow.artifacts.download_artifacts(artifact_uri=f"{place}/{file}", dst_path=str(staging))
            found = sha256_of(staging / file)
            if found != expected.sha256 and not (file == SIGNATURE_NAME and self._is_signature(name, found)):
                raise RepositoryCorrupt(
                    f"{file} of {name} in MLflow (version {registered.version}) has the SHA-256 {found}, and its tag "
                    f"names {expected.sha256}: the file was altered or damaged after it was pushed"
                )

    def _is_signature(self, name: VersionName, digest: str) -> bool:
        """Return whether the tags of a version allow the signature `digest` now: another push may have replaced it."""
        with self._failures():
            tags = self._client.get_model_version(name.name, self._found[name].version).tags
        return digest in (tags.get(SIGNATURE_HASH), *_next_hashes(tags))

    def store(self, name: VersionName, staging: Path, only_signature: bool) -> None:
        """See `Repository`. The version appears in the registry after its files are in the artifacts of a run."""
        entry = entry_of_folder(staging)
        if only_signature:
            with self._failures():
                self._replace_signature(name, staging / SIGNATURE_NAME, _tags(name, entry))
            return
        with tempfile.TemporaryDirectory() as folder:
            _write_model(Path(folder), staging, name)
            with self._failures():
                registered = self._register(name, Path(folder), _tags(name, entry))
        self._found[name] = self._first(name) or registered
        if self._found[name].version != registered.version:
            with self._failures():
                self._client.delete_model_version(name.name, registered.version)
            self._join(name, entry, staging)

    def _replace_signature(self, name: VersionName, signature: Path, tags: dict[str, str]) -> None:
        """Replace the signature of a version. Readers accept the version at any moment, also if this process ends.

        MLflow cannot change a file and its tags at once. The first tag therefore allows the new file, too, and still
        the file of a push that was killed. Two pushes of different signatures at the same time are not safe.
        """
        registered = self._found[name]
        present = self._client.get_model_version(name.name, registered.version).tags
        allowed = dict.fromkeys([*_next_hashes(present), tags[SIGNATURE_HASH]])
        self._client.set_model_version_tag(name.name, registered.version, NEXT_SIGNATURE_HASH, " ".join(allowed))
        self._client.log_artifact(registered.run_id, str(signature), FOLDER)
        for tag, value in tags.items():
            self._client.set_model_version_tag(name.name, registered.version, tag, value)
        self._client.delete_model_version_tag(name.name, registered.version, NEXT_SIGNATURE_HASH)

    def _register(self, name: VersionName, folder: Path, tags: dict[str, str]) -> Any:
        """Return a new version of MLflow with the files in `folder`, which are the artifacts of a new run."""
        run = self._client.create_run(self._experiment(), run_name=str(name), tags=tags)
        try:
            self._client.log_artifacts(run.info.run_id, str(folder), FOLDER)
            self._create_model(name.name)
            source = f"{run.info.artifact_uri}/{FOLDER}"
            registered = self._client.create_model_version(name.name, source, run.info.run_id, tags=tags)
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                self._client.set_terminated(run.info.run_id, "FAILED")
            raise
        self._client.set_terminated(run.info.run_id)
        return registered

    def _first(self, name: VersionName) -> Any:
        """Return the oldest version of MLflow for `name`; None if there is none."""
        return next(
            (each for other, each in self._registered(name.name) if other == name and _entry_in(each.tags)), None
        )

    def _join(self, name: VersionName, entry: VersionEntry, staging: Path) -> None:
        """Check that the version which another process has pushed meanwhile is the same; add the signature to it."""
        first = self._found[name]
        if first.tags.get(HASH) != entry.model.sha256:
            raise CopyConflict(
                f"another process has pushed another {name} to MLflow meanwhile, as version {first.version}: pull it, "
                "so that the next model that you train gets a new number"
            )
        if entry.signature and SIGNATURE_HASH not in first.tags:
            self.store(name, staging, only_signature=True)

    def _experiment(self) -> str:
        """Return the id of the experiment of the runs: MLFLOW_EXPERIMENT_NAME, or else `elbo`."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def _create_model(self, name: str) -> None:
        try:
            self._client.create_registered_model(name)
        except self._mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def write_index(self, added: Entries) -> None:
        """See `Repository`. The registry is the index."""

    def rewrite_index(self) -> Entries:
        """See `Repository`."""
        raise RepositoryInvalid(f"{PLACE} needs no index: the registry of MLflow lists the versions")


def _next_hashes(tags: Mapping[str, str]) -> list[str]:
    """Return the hashes of the signatures that may have replaced the signature of a version."""
    return tags.get(NEXT_SIGNATURE_HASH, "").split()


def _tags(name: VersionName, entry: VersionEntry) -> dict[str, str]:
    """Return the tags of a version: texts, as MLflow stores them."""
    tags = {NUMBER: str(name.version), BYTES: str(entry.model.bytes), HASH: str(entry.model.sha256)}
    if entry.signature:
        tags |= {SIGNATURE_BYTES: str(entry.signature.bytes), SIGNATURE_HASH: str(entry.signature.sha256)}
    return tags


def _entry_in(tags: dict[str, str]) -> VersionEntry | None:
    """Return the entry that the tags of a version describe; None if they were not written by `elbo push`."""
    try:
        signature = None
        if HASH not in tags:
            return None
        if SIGNATURE_HASH in tags:
            signature = FileEntry(bytes=int(tags[SIGNATURE_BYTES]), sha256=tags[SIGNATURE_HASH])
        return VersionEntry(model=FileEntry(bytes=int(tags[BYTES]), sha256=tags[HASH]), signature=signature)
    except (KeyError, ValueError, ValidationError):
        return None


def _write_model(folder: Path, staging: Path, name: VersionName) -> None:
    """Write the files of a model of MLflow into `folder`: the files in `staging`, and MLmodel."""
    for file in (FILE_NAME, SIGNATURE_NAME):
        if (staging / file).exists():
            shutil.copyfile(staging / file, folder / file)
    manifest = read_manifest(staging / FILE_NAME)
    flavor = {"loader_module": LOADER, "data": FILE_NAME, "python_version": python_version(), "env": {}}
    described = {
        "flavors": {
            "python_function": flavor,
            "elbo": {"kind": manifest.kind, "name": name.name, "version": name.version},
        },
        "model_uuid": uuid4().hex,
        "utc_time_created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }
    (folder / "MLmodel").write_text(json.dumps(described, indent=1))  # JSON is YAML, too
    (folder / "requirements.txt").write_text(f"elbo[serve]=={installed_version('elbo')}\n")
