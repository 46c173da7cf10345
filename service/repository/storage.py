"""Read and write the files of a remote repository: by HTTPS, or by fsspec (S3, Google Cloud Storage, a mounted folder).

Every failure of a repository becomes an ElboError whose message contains no credentials. A full local disk stays an
OSError.

HTTPS needs no fsspec, because httpx is a dependency of Elbo. All files of a poll come through one connection. The
request for the index has If-None-Match, so the web server sends the index only if it has changed.
"""

import errno
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from models.errors import ElboError, printable
from models.manifest import FILE_NAME
from models.signatures import MAX_SIGNATURE_BYTES, SIGNATURE_NAME
from service.repository.index import INDEX_NAME, MAX_FILE_BYTES, MAX_INDEX_BYTES, FileEntry, VersionEntry
from service.repository.location import Location, RepositoryInvalid

CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0
TOTAL_SECONDS = 60.0  # for one small answer or a list of files, also from a server that sends byte by byte
BLOCK_BYTES = 1 << 20
MAX_LISTED_FILES = 100_000
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
SECRET = re.compile(r"(?i)(//)[^/\s]+@|((?:signature|credential|token|key|password)=)[^&\s'\"]+")


class RepositoryUnavailable(ElboError):
    """A remote repository does not respond, or refuses the request."""

    code = "repository_unavailable"


class RepositoryFileMissing(RepositoryUnavailable):
    """A remote repository does not have the file."""

    code = "repository_file_missing"


class RepositoryConflict(RepositoryUnavailable):
    """Another process has changed the file in the meantime."""

    code = "repository_conflict"


class RepositoryCorrupt(ElboError):
    """A file in a remote repository is not the file that its index names."""

    code = "repository_corrupt"


class CopyConflict(ElboError):
    """The destination has another artifact under the same name and version."""

    code = "copy_conflict"


class Interrupted(Exception):
    """The server stops, so the download ends."""


class Storage(Protocol):
    """The files of a remote repository, by their paths from its root.

    All methods block. They raise RepositoryUnavailable if the repository does not respond, RepositoryFileMissing if it
    does not have the file, and RepositoryInvalid if the package for the scheme is not installed.
    """

    def read(self, path: str) -> bytes:
        """Return the content of a small file, such as the index."""

    def download(self, path: str, target: Path, limit: int, is_stopped: Callable[[], bool]) -> None:
        """Write the file to `target`. Raise Interrupted soon after `is_stopped` returns true, except for file:// URLs.

        A file of more than `limit` bytes raises RepositoryCorrupt. An OSError comes from the local disk.
        """

    def list_files(self) -> dict[str, FileEntry]:
        """Return all files that are neither empty nor larger than an artifact may be.

        Raises RepositoryInvalid if the repository cannot list its files.
        """

    def tag(self, path: str) -> str | None:
        """Return a text that changes whenever the file changes, such as its ETag; None if there is no such file."""

    def upload(self, source: Path, path: str, is_new: bool) -> None:
        """Write a local file to the repository.

        Args:
            source: the local file.
            path: the file in the repository.
            is_new: raise RepositoryConflict if the storage finds that it has a file at `path` already.
        """

    def write(self, path: str, content: bytes, expected_tag: str | None) -> None:
        """Write a small file. Raises RepositoryConflict if the storage finds that its tag is not `expected_tag`."""


def open_storage(location: Location, attempts: int = 1) -> Storage:
    """Return the storage of a remote repository. The package for its scheme is imported when the storage is first used.

    Args:
        location: the place of the repository.
        attempts: how often a request to S3 is sent before it fails.
    """
    return HttpStorage(location) if location.scheme in ("http", "https") else FsspecStorage(location, attempts)


@contextmanager
def failures_of(location: Location, path: str, target: Path | None = None) -> Iterator[None]:
    """Turn every exception of the packages that speak to the repository into an ElboError.

    Args:
        location: the repository.
        path: the file in the repository, for messages.
        target: the local file that the block writes: an OSError about this file stays an OSError.
    """
    try:
        yield
    except (ElboError, Interrupted):
        raise
    except FileNotFoundError as error:
        raise RepositoryFileMissing(f"{location} has no {path}") from error
    except FileExistsError as error:  # a conditional write
        raise RepositoryConflict(f"another process has written {path} of {location}: run the command again") from error
    except Exception as error:
        if isinstance(error, OSError) and _is_local(error, target):
            raise
        if isinstance(error, PermissionError) and location.scheme == "file":
            raise RepositoryUnavailable(
                f"cannot read or write {path} of {location} ({error.strerror}): change the permissions of the file and "
                "of the folders above it"
            ) from error
        reason = printable(SECRET.sub(r"\1\2", (str(error) or "no details").splitlines()[0]))[:200]
        raise RepositoryUnavailable(
            f"cannot read or write {path} of {location} ({type(error).__name__}: {reason}): check the network, the "
            "address and the credentials"
        ) from error


def _is_local(error: OSError, target: Path | None) -> bool:
    """Return whether an error is about the local disk, or about the local file `target`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    return target is not None and error.filename is not None and Path(error.filename) == target


class FsspecStorage:
    """A repository that fsspec reads and writes. The package of the scheme finds the credentials by itself."""

    def __init__(self, location: Location, attempts: int = 1) -> None:
        self._location = location
        self._attempts = attempts
        self._root = location.url.removeprefix("file://")
        self._file_system: Any = None

    def _open(self) -> Any:
        """Return the file system. The package of the scheme is imported now, because it takes a second to import."""
        if self._file_system is None:
            package = _PACKAGES.get(self._location.scheme, "fsspec")
            if package == "gcsfs":
                # Otherwise, gcsfs asks for the type of the bucket before each request, and logs a warning each time if
                # it may not know. Only zonal buckets need this.
                os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            try:
                import fsspec

                self._file_system = fsspec.filesystem(
                    self._location.scheme, skip_instance_cache=True, use_listings_cache=False, **self._options()
                )
            except ImportError as error:
                raise RepositoryInvalid(
                    f"{self._location} needs the package {package}: install Elbo with pip install 'elbo[remote]'"
                    + (" gcsfs" if package == "gcsfs" else "")
                ) from error
            if self._location.scheme == "s3":
                self._file_system.retries = self._attempts
        return self._file_system

    def _options(self) -> dict[str, Any]:
        if self._location.scheme != "s3":
            return {}
        return {
            "config_kwargs": {
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": READ_SECONDS,
                "retries": {"total_max_attempts": self._attempts, "mode": "standard"},
            }
        }

    def _deadline(self) -> dict[str, float]:
        """Return the arguments that end a call after TOTAL_SECONDS, for file systems that are asynchronous inside."""
        return {"timeout": TOTAL_SECONDS} if self._location.scheme in _PACKAGES else {}

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    def read(self, path: str) -> bytes:
        """See `Storage`."""
        with failures_of(self._location, path):
            content: bytes = self._open().cat_file(self._path(path), end=MAX_INDEX_BYTES + 1, **self._deadline())
        if len(content) > MAX_INDEX_BYTES:
            raise RepositoryInvalid(f"{self._location}/{path} has more than {MAX_INDEX_BYTES:,} bytes")
        return content

    def download(self, path: str, target: Path, limit: int, is_stopped: Callable[[], bool]) -> None:
        """See `Storage`."""
        with failures_of(self._location, path, target):
            file_system = self._open()
            size = file_system.info(self._path(path), **self._deadline())["size"]
            _require_size(self._location, path, size, limit)
            from fsspec.callbacks import Callback

            class StopCallback(Callback):  # type: ignore[misc] # fsspec has no types
                def relative_update(self, inc: int = 1) -> None:
                    if is_stopped():
                        raise Interrupted
                    super().relative_update(inc)

            file_system.get_file(self._path(path), str(target), callback=StopCallback())

    def list_files(self) -> dict[str, FileEntry]:
        """See `Storage`."""
        try:
            with failures_of(self._location, "list of files"):
                # Only s3fs can end a list early. Otherwise, the address of another, large bucket would fill the memory.
                most = {"max_items": MAX_LISTED_FILES + 1} if self._location.scheme == "s3" else {}
                found = self._open().find(self._root, detail=True, **most, **self._deadline())
        except RepositoryFileMissing as error:
            raise RepositoryUnavailable(f"{self._location} does not exist: create the bucket or the folder") from error
        if len(found) > MAX_LISTED_FILES:
            raise RepositoryInvalid(
                f"{self._location} has no index and more than {MAX_LISTED_FILES:,} files: run elbo index on it"
            )
        prefix = self._root.removeprefix("s3://").removeprefix("gs://") + "/"
        return {
            name.removeprefix(prefix): FileEntry(bytes=each["size"], tag=_tag(each))
            for name, each in found.items()
            if each["size"] and each["size"] <= MAX_FILE_BYTES
        }

    def tag(self, path: str) -> str | None:
        """See `Storage`."""
        try:
            with failures_of(self._location, path):
                return _tag(self._open().info(self._path(path), **self._deadline()))
        except RepositoryFileMissing:
            return None

    def upload(self, source: Path, path: str, is_new: bool) -> None:
        """See `Storage`. S3 and Google Cloud Storage never replace a file that is new; `file://` may."""
        mode = {"mode": "create"} if is_new and self._location.scheme in _PACKAGES else {}
        with failures_of(self._location, path):
            self._write_if(
                path,
                lambda file_system, condition: file_system.put_file(str(source), self._path(path), **condition),
                mode,
            )

    def write(self, path: str, content: bytes, expected_tag: str | None) -> None:
        """See `Storage`. S3 and Google Cloud Storage compare the tag when they write; `file://` does not."""
        condition = {}
        if self._location.scheme == "s3":
            condition = {"IfMatch": expected_tag} if expected_tag else {"IfNoneMatch": "*"}
        elif self._location.scheme == "gs" and expected_tag is None:
            condition = {"mode": "create"}
        with failures_of(self._location, path):
            if self._location.scheme == "gs" and expected_tag is not None:
                self._replace_generation(path, content, expected_tag)
                return
            self._write_if(
                path,
                lambda file_system, condition: file_system.pipe_file(self._path(path), content, **condition),
                condition,
            )

    def _replace_generation(self, path: str, content: bytes, generation: str) -> None:
        """Replace an object of Google Cloud Storage that has this generation; gcsfs has no argument for it.

        If the generation is another, gcsfs raises FileExistsError for the status 412.
        """
        file_system = self._open()
        bucket, key, _ = file_system.split_path(self._path(path))
        file_system.call(
            "POST",
            file_system.base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o",
            bucket,
            uploadType="media",
            name=key,
            ifGenerationMatch=generation,
            headers={"Content-Type": "application/octet-stream"},
            data=content,
            **self._deadline(),
        )

    def _write_if(self, path: str, write: Callable[[Any, dict[str, str]], None], condition: dict[str, str]) -> None:
        """Write a file under a condition. Raise RepositoryConflict if the storage finds that it does not hold."""
        try:
            write(self._open(), condition)
        except OSError as error:
            # Status 412; or 409, for two conditional writes at the same time. Other reasons are EINVAL, too.
            if condition and (error.errno == errno.EBUSY or "pre-condition" in str(error)):
                raise RepositoryConflict(
                    f"another process writes {path} of {self._location}: run the command again"
                ) from error
            if error.errno != errno.ENOSYS:
                raise
            write(self._open(), {})  # an S3 server without conditional writes


class HttpStorage:
    """A repository on a web server, which Elbo only reads. It needs an index, because HTTP cannot list files.

    HTTPS_PROXY sets a proxy, and SSL_CERT_FILE the file of certificates.
    """

    def __init__(self, location: Location) -> None:
        self._location = location
        parts = urlsplit(location.url)
        # The credentials are no part of the URLs of requests, because httpx logs these.
        self._auth = (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None
        self._client: Any = None
        self._read: dict[str, tuple[str, bytes]] = {}  # tag and content of the files that `read` has returned

    def _open(self) -> Any:
        if self._client is None:
            import httpx

            timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
            self._client = httpx.Client(
                auth=self._auth, timeout=timeout, follow_redirects=False, headers={"Accept-Encoding": "identity"}
            )
        return self._client

    def _get(self, path: str, headers: dict[str, str]) -> Any:
        return self._open().stream("GET", f"{self._location}/{path}", headers=headers)

    def read(self, path: str) -> bytes:
        """See `Storage`."""
        known = self._read.get(path)
        with (
            failures_of(self._location, path),
            self._get(path, {"If-None-Match": known[0]} if known else {}) as response,
        ):
            if known and response.status_code == 304:
                return known[1]
            content = b"".join(self._blocks(response, path, MAX_INDEX_BYTES, monotonic() + TOTAL_SECONDS))
            tag = response.headers.get("etag")
        if tag:
            self._read[path] = tag, content
        return content

    def download(self, path: str, target: Path, limit: int, is_stopped: Callable[[], bool]) -> None:
        """See `Storage`."""
        with (
            failures_of(self._location, path, target),
            self._get(path, {}) as response,
            target.open("wb") as file,
        ):
            for block in self._blocks(response, path, limit):
                if is_stopped():
                    raise Interrupted
                file.write(block)

    def _blocks(self, response: Any, path: str, limit: int, deadline: float = math.inf) -> Iterator[bytes]:
        if response.status_code == 404:
            raise RepositoryFileMissing(f"{self._location} has no {path}")
        if response.status_code != 200:
            raise RepositoryUnavailable(
                f"{self._location} answered the request for {path} with status {response.status_code}, expected 200"
            )
        received = 0
        for block in response.iter_bytes(BLOCK_BYTES):
            received += len(block)
            _require_size(self._location, path, received, limit)
            if monotonic() > deadline:
                raise RepositoryUnavailable(f"{self._location} did not send {path} within {TOTAL_SECONDS:g} s")
            yield block

    def list_files(self) -> dict[str, FileEntry]:
        """See `Storage`."""
        raise RepositoryInvalid(
            f"{self._location} has no {INDEX_NAME}, and HTTP lists no files: run elbo index on the folder that the "
            "server publishes"
        )

    def tag(self, path: str) -> str | None:
        """See `Storage`."""
        raise self._read_only(path)

    def upload(self, source: Path, path: str, is_new: bool) -> None:  # noqa: ARG002 - as in `Storage`
        """See `Storage`."""
        raise self._read_only(path)

    def write(self, path: str, content: bytes, expected_tag: str | None) -> None:  # noqa: ARG002 - as in `Storage`
        """See `Storage`."""
        raise self._read_only(path)

    def _read_only(self, path: str) -> RepositoryInvalid:
        return RepositoryInvalid(
            f"cannot write {path} to {self._location}: repositories behind HTTP are only read; push to the folder or "
            "bucket that the server publishes"
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_size(location: Location, path: str, size: int, limit: int) -> None:
    if size > limit:
        raise RepositoryCorrupt(
            f"{location}/{path} has at least {size:,} bytes, expected at most {limit:,}: push the version again"
        )


def _tag(info: dict[str, Any]) -> str:
    """Return the generation or the ETag of an object; of a file in a folder, its size, inode and time of change."""
    found = info.get("generation") or info.get("ETag") or info.get("etag")
    return str(found) if found else f"{info['size']}-{info.get('ino')}-{info.get('mtime')}"


def entry_of_folder(folder: Path) -> VersionEntry:
    """Return the entry, with hashes, of the version whose files are in `folder`.

    Raises:
        RepositoryCorrupt: a file is empty or too large.
        OSError: a file cannot be read.
    """
    signature = folder / SIGNATURE_NAME
    return VersionEntry(
        model=_file_entry(folder / FILE_NAME, MAX_FILE_BYTES),
        signature=_file_entry(signature, MAX_SIGNATURE_BYTES) if signature.exists() else None,
    )


def _file_entry(path: Path, most: int) -> FileEntry:
    size = path.stat().st_size
    if not 1 <= size <= most:
        remedy = "sign the version again" if path.name == SIGNATURE_NAME else "remove the version"
        raise RepositoryCorrupt(f"{path} has {size:,} bytes, expected 1 to {most:,}: {remedy}")
    return FileEntry(bytes=size, sha256=sha256_of(path))
