"""HTTPS: a server with a certificate, in one process and with workers, and renewed certificates."""

import contextlib
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.data import ROOT
from tests.ports import free_port
from tests.preloaded import run_preloaded
from tests.service.process import ServerProcess, server_starter
from tests.service.raw_http import read_response
from tests.service.tls import issue
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: elbo\r\n\r\n"


def https_client(server: ServerProcess, certificate: Path) -> httpx.Client:
    context = ssl.create_default_context(cafile=str(certificate))
    return httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=context, timeout=20)


def connect(server: ServerProcess) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(server.connect())


def presented(server: ServerProcess) -> str:
    """Return the certificate that the server presents, in the PEM format."""
    with connect(server) as connection:
        content = connection.getpeercert(binary_form=True)
    assert content
    return ssl.DER_cert_to_PEM_cert(content).strip()


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two workers"])
def server(
    request: pytest.FixtureRequest, artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    certificate, key = issue(tmp_path_factory.mktemp("tls"))
    options = {"TLS_CERTIFICATE": certificate, "TLS_KEY": key, "WORKERS": request.param, "REQUEST_TIMEOUT": 2}
    with server_starter() as start_server:
        process = start_server(artifacts, **options)
        process.certificate = certificate  # type: ignore[attr-defined]
        yield process
        assert process.stop() == 0


def test_requests_are_answered_over_https(server: ServerProcess) -> None:
    with https_client(server, server.certificate) as client:  # type: ignore[attr-defined]
        assert client.get("/livez").json() == {"status": "alive"}
        sample = client.post("/sample?model=pca", json={"n": 2, "seed": 7})
        assert (sample.status_code, sample.json()["seed"]) == (200, 7)
        rows = b"[1, 2, 3, 4]\n" * 3
        types = {"content-type": "application/x-ndjson", "accept": "application/x-ndjson"}
        assert client.post("/anomaly?model=hosts", content=rows, headers=types).text.count("\n") == 4
    assert any("listening on https://" in line["message"] for line in server.lines)


def test_https_server_closes_a_plain_http_connection_and_still_serves_others(server: ServerProcess) -> None:
    with server.connect() as plain, server.connect() as silent, connect(server) as connection:
        plain.sendall(LIVEZ)
        with contextlib.suppress(ConnectionError):
            while plain.recv(1024):
                pass
        silent.sendall(b"\x16\x03\x01")  # the beginning of a handshake
        connection.sendall(LIVEZ)
        assert read_response(connection).startswith(b"HTTP/1.1 200")
        with contextlib.suppress(ConnectionError):
            assert silent.recv(1024)[:1] != b"H"  # closed after ELBO_REQUEST_TIMEOUT, with a TLS alert at most


def test_old_versions_of_tls_are_refused(server: ServerProcess) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)), server.connect() as connection:
        context.wrap_socket(connection)


def test_https_client_whose_body_is_too_large_gets_the_response(server: ServerProcess) -> None:
    head = b"POST /encode HTTP/1.1\r\nHost: elbo\r\nContent-Type: application/json\r\nContent-Length: 999999999\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(head)
        response = read_response(connection)
        assert response.startswith(b"HTTP/1.1 413")
        connection.settimeout(20)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert connection.recv(1) == b""  # the server closes the connection although the body never comes


def test_slow_tls_client_is_closed_after_the_request_timeout(server: ServerProcess) -> None:
    with connect(server) as connection:
        connection.sendall(b"POST /sample HTTP/1.1\r\nHost: el")
        assert connection.recv(1) == b""


# Renewal


@pytest.mark.parametrize("workers", [1, 2])
def test_renewed_certificate_is_presented_without_a_restart(vae_only: Path, tmp_path: Path, workers: int) -> None:
    certificate, key = issue(tmp_path)
    first = certificate.read_text().strip()
    with server_starter() as start_server:
        server = start_server(vae_only, TLS_CERTIFICATE=certificate, TLS_KEY=key, WORKERS=workers)
        with connect(server) as older:
            older.sendall(LIVEZ)
            assert read_response(older).startswith(b"HTTP/1.1 200")
            assert presented(server) == first
            new_certificate, new_key = issue(tmp_path, "renewed")
            new_certificate.replace(certificate)  # the key still belongs to the old certificate
            server.wait_for_log("the server keeps the certificate that it has loaded")
            assert presented(server) == first
            new_key.replace(key)
            server.wait_for_log("loaded the renewed certificate")
            wait_until(lambda: presented(server) == certificate.read_text().strip(), seconds=10)
            older.sendall(LIVEZ)
            assert read_response(older).startswith(b"HTTP/1.1 200")
        certificate.unlink()
        server.wait_for_log("the server keeps the certificate that it has loaded")
        with connect(server):
            pass


def test_server_with_open_tls_connections_stops(vae_only: Path, tmp_path: Path) -> None:
    certificate, key = issue(tmp_path)
    with server_starter() as start_server:
        server = start_server(vae_only, TLS_CERTIFICATE=certificate, TLS_KEY=key)
        with connect(server) as idle, https_client(server, certificate) as client:
            assert client.get("/readyz").status_code == 200
            server.popen.send_signal(signal.SIGTERM)
            assert server.popen.wait(20) == 0
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                assert idle.recv(1) == b""


# Errors at the start


@pytest.mark.parametrize("fault", ["no certificate", "no key", "another key", "no PEM file", "a password", "a folder"])
def test_server_does_not_start_with_a_certificate_that_cannot_be_loaded(
    vae_only: Path, tmp_path: Path, fault: str
) -> None:
    certificate, key = issue(tmp_path, password=fault == "a password")
    if fault == "no certificate":
        certificate.unlink()
    elif fault == "no key":
        key.unlink()
    elif fault == "another key":
        _, key = issue(tmp_path, "other")
    elif fault == "no PEM file":
        certificate.write_text("nonsense")
    elif fault == "a folder":
        certificate = tmp_path
    options = {"ARTIFACTS": vae_only, "PORT": 0, "TLS_CERTIFICATE": certificate, "TLS_KEY": key}
    environment = os.environ | {f"ELBO_{name}": str(value) for name, value in options.items()}
    command = [sys.executable, "-m", "service"]
    run = run_preloaded(command, cwd=ROOT, env=environment, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("elbo: cannot load the certificate")
    assert "ELBO_TLS_CERTIFICATE" in run.stderr
    assert run.stderr.count("\n") == 1


def test_key_without_a_certificate_is_refused(tmp_path: Path) -> None:
    environment = os.environ | {"ELBO_TLS_KEY": str(tmp_path / "key.pem")}
    command = [sys.executable, "-m", "service"]
    run = run_preloaded(command, cwd=ROOT, env=environment, text=True)
    assert run.returncode == 1
    assert "ELBO_TLS_KEY: expected ELBO_TLS_CERTIFICATE too" in run.stderr


# The health check of the container


@pytest.mark.parametrize("is_https", [False, True])
def test_health_check_tells_whether_the_server_is_ready(vae_only: Path, tmp_path: Path, is_https: bool) -> None:
    options = dict(zip(("TLS_CERTIFICATE", "TLS_KEY"), issue(tmp_path), strict=True)) if is_https else {}
    environment = os.environ | {f"ELBO_{name}": str(path) for name, path in options.items()}
    command = [sys.executable, "-m", "service.healthcheck"]
    with server_starter() as start_server:
        server = start_server(vae_only, ALLOWED_HOSTS="elbo.example.com", **options)
        environment["ELBO_PORT"] = str(server.port)
        assert subprocess.run(command, cwd=ROOT, env=environment, timeout=60).returncode == 0
    environment["ELBO_PORT"] = str(free_port())
    run = subprocess.run(command, cwd=ROOT, env=environment, timeout=60, capture_output=True, text=True)
    assert run.returncode == 1
    assert "does not answer" in run.stderr
