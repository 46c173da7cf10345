"""The certificate of an HTTPS server, which is loaded again when its files change."""

import logging
import ssl
from pathlib import Path

from models.errors import ElboError

log = logging.getLogger("elbo.service")


class TlsError(ElboError):
    """The certificate or its key cannot be loaded."""

    code = "tls_error"


class Certificate:
    """A certificate with its private key, and the TLS context that uses them for new connections.

    Args:
        certificate: path of a PEM file with the certificate, followed by the intermediate certificates.
        key: path of a PEM file with the private key, without a password; None if the key is in the first file.

    Attributes:
        context: the TLS context. It stays the same object when the files are loaded again.

    Raises:
        TlsError: a file cannot be read, is no PEM file, or the key does not belong to the certificate.
    """

    def __init__(self, certificate: Path, key: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._state = self._read_state()
        self.context = self._load(_new_context())

    def refresh(self) -> None:
        """Load the files again if they have changed. If this fails, log an error and keep the loaded certificate.

        A program that renews a certificate may write the two files one after the other. Until both are written, they
        do not fit together. The second change then leads to another attempt.
        """
        state = self._read_state()
        if state == self._state:
            return
        self._state = state
        try:
            self._load(_new_context())  # a failure must not touch the context in use
            self._load(self.context)
        except TlsError as error:
            log.error("%s; the server keeps the certificate that it has loaded", error)
        else:
            log.info("loaded the renewed certificate %s", self._certificate)

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        """Load the certificate and the key into `context`, and return it."""
        try:
            context.load_cert_chain(self._certificate, self._key, password=_refuse_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise TlsError(
                f"cannot load the certificate {self._certificate} with the key {self._key or self._certificate} "
                f"({reason}): expected PEM files of a certificate and of its private key without a password; check "
                "ELBO_TLS_CERTIFICATE and ELBO_TLS_KEY"
            ) from error
        return context

    def _read_state(self) -> tuple[object, ...]:
        """Return a value that changes when one of the files, or a symbolic link to it, is replaced."""
        return tuple(_file_state(path) for path in (self._certificate, self._key or self._certificate))


def _new_context() -> ssl.SSLContext:
    """Return a TLS context for the server's side: TLS 1.2 or newer, HTTP/1.1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _refuse_password() -> str:
    """Raise ValueError, because OpenSSL would otherwise ask for the password on the terminal."""
    raise ValueError("the key has a password")


def _file_state(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
