"""The URL of a remote repository. This module imports no package that speaks to a remote repository."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from models.errors import ElboError, printable

SCHEMES = ("s3", "gs", "https", "http", "file")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(.+)", re.DOTALL)  # one slash, because a Path drops the other one
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class RepositoryInvalid(ElboError):
    """The URL or the index of a remote repository is not valid, or the package for its scheme is not installed."""

    code = "repository_invalid"


@dataclass(frozen=True)
class Location:
    """The place of a remote repository.

    Args:
        scheme: one of SCHEMES.
        url: the URL without a slash at the end. It may contain a password: print `str(location)` instead.
    """

    scheme: str
    url: str

    def __str__(self) -> str:
        """Return the URL without a user name and a password."""
        parts = urlsplit(self.url)
        return (
            self.url.replace(f"{parts.netloc}", parts.netloc.rpartition("@")[2], 1) if "@" in parts.netloc else self.url
        )

    def cache_folder(self, cache: Path | None) -> Path:
        """Return the folder of this repository in `cache`, by default in the user's cache folder."""
        root = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elbo"
        digest = hashlib.sha256(str(self).encode()).hexdigest()[:16]
        return root / f"{self.scheme}-{digest}"


def is_url(text: str) -> bool:
    """Return whether `text` has the form of a URL, and not of a path."""
    return _URL.fullmatch(text) is not None


def parse_location(text: str) -> Location:
    """Return the location that the URL `text` names.

    Raises:
        RepositoryInvalid: the URL is not valid, its scheme is unknown, or a part of it is missing or superfluous.
    """
    found = _URL.fullmatch(text)
    scheme = found[1].lower() if found else ""
    if not found or scheme not in SCHEMES:
        raise RepositoryInvalid(
            f"{printable(scheme or text)[:100]!r} is no scheme of a remote repository: expected "
            f"{', '.join(f'{each}://' for each in SCHEMES)}"
        )
    url = f"{scheme}://{found[2]}".rstrip("/")
    try:
        parts = urlsplit(url)
    except ValueError as error:  # the URL is left out of the message, because it may contain a password
        raise RepositoryInvalid(f"the URL of the remote repository is not valid: {error}") from error
    location = Location(scheme, url)
    if parts.query or parts.fragment or any(part in (".", "..") for part in parts.path.split("/")):
        raise RepositoryInvalid(
            f"{location} has a query, a fragment or '..': expected only a host or bucket, and a path"
        )
    if scheme == "file" and (parts.netloc or not parts.path):
        raise RepositoryInvalid(f"{location}: expected an absolute path, such as file:///srv/models")
    if scheme != "file" and not parts.hostname:
        raise RepositoryInvalid(f"{location}: expected {scheme}://, then a host or bucket")
    if scheme in ("s3", "gs") and "@" in parts.netloc:
        raise RepositoryInvalid(f"{location}: expected a bucket without credentials, which come from the environment")
    if scheme == "http" and parts.hostname not in _LOOPBACK:
        raise RepositoryInvalid(
            f"{location}: anybody on the network path could replace models that come by http, and an artifact is a "
            "program: use https"
        )
    return location
