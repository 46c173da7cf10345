"""A certificate for tests of HTTPS."""

import shutil
import subprocess
from pathlib import Path

from tests.conftest import require


def issue(folder: Path, name: str = "server", *, password: bool = False) -> tuple[Path, Path]:
    """Write a self-signed certificate for 127.0.0.1 and its key. Return the two paths."""
    require(shutil.which("openssl"), "the test needs the program openssl")
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    secrecy = ["-passout", "pass:secret"] if password else ["-nodes"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", *secrecy]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", f"/CN={name}"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return certificate, key
