"""Proxies and browsers: path prefixes with a real nginx, keep-alive, cross-origin requests, and ambiguous heads."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
from pydantic import ValidationError

from service.settings import Settings
from tests.conftest import require
from tests.plain_http import NO_AUTHORITIES
from tests.ports import free_port
from tests.service.explorer.browser import chromium
from tests.service.process import ServerProcess, server_starter
from tests.service.raw_http import read_response, read_to_end
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

SAMPLE = b'{"n": 1, "seed": 7}'
CHUNKED_SAMPLE = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SAMPLE), SAMPLE)
ORIGIN = "https://app.example.com"
HEADERS = ("Host: elbo", "Content-Type: application/json", "Connection: close")

# With default settings, nginx forwards requests in HTTP/1.0. /elbo/ removes the prefix, /kept/ keeps it.
NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  upstream elbo {{ server 127.0.0.1:{upstream}; keepalive 8; }}
  server {{
    listen 127.0.0.1:{port};
    location /elbo/ {{ proxy_pass http://elbo/; }}
  }}
  server {{
    listen 127.0.0.1:{port_kept};
    location /elbo {{ proxy_pass http://elbo; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}
}}
"""


@pytest.fixture(scope="module")
def server(artifacts: Path) -> Iterator[ServerProcess]:
    """Yield a server under a path, with a short keep-alive, that one other origin may call."""
    with server_starter() as start_server:
        process = start_server(
            artifacts, ROOT_PATH="/elbo", KEEP_ALIVE_SECONDS=1, CORS_ORIGINS=ORIGIN, DEFAULT_MODEL="pca"
        )
        yield process
        assert process.stop() == 0
        assert process.stderr() == ""


@pytest.fixture(scope="module", params=["prefix removed", "prefix kept"])
def proxy(
    request: pytest.FixtureRequest, server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """Yield a client of an nginx that publishes the server under /elbo."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    require(program, "the test needs nginx")
    assert program
    folder = tmp_path_factory.mktemp("nginx")
    ports = {"port": free_port(), "port_kept": free_port()}
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, upstream=server.port, **ports))
    nginx = subprocess.Popen([program, "-e", f"{folder}/error.log", "-p", folder, "-c", f"{folder}/nginx.conf"])
    port = ports["port" if request.param == "prefix removed" else "port_kept"]
    try:
        with httpx.Client(
            verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{port}", timeout=20, follow_redirects=True
        ) as client:
            wait_until(lambda: client.get("/elbo/livez").status_code == 200, ignore=httpx.TransportError)
            yield client
    finally:
        nginx.terminate()
        nginx.wait()


def links(page: httpx.Response) -> set[str]:
    """Return the absolute URLs of everything that an HTML page loads or links to."""
    found = re.findall(r"""(?:href|src)="([^"#?]+)["?#]|url: ['"]([^'"]+)['"]""", page.text)
    return {urljoin(str(page.url), first or second) for first, second in found}


def respond(server: ServerProcess, request: bytes) -> bytes:
    """Send `request` and return everything that arrives until the server closes the connection."""
    with server.connect() as connection:
        connection.sendall(request)
        return read_to_end(connection)


# Path prefixes


@pytest.mark.parametrize("path", ["/elbo/", "/elbo", "/elbo/docs"])
def test_every_link_of_a_page_works_behind_a_path_prefix(proxy: httpx.Client, path: str) -> None:
    page = proxy.get(path)
    assert page.status_code == 200
    found = links(page)
    assert len(found) >= 3
    for url in found:
        assert url.startswith(str(proxy.base_url.join("/elbo/")))
        assert proxy.get(url).status_code == 200, url


def test_openapi_document_names_the_path_prefix_as_its_server(proxy: httpx.Client) -> None:
    document = proxy.get("/elbo/openapi.json").json()
    assert document["servers"] == [{"url": "/elbo"}]
    for path in ("/models", "/livez", "/readyz", "/metrics"):
        assert path in document["paths"]
        assert proxy.get(document["servers"][0]["url"] + path).status_code == 200


def test_requests_and_streams_are_answered_behind_a_path_prefix(proxy: httpx.Client) -> None:
    sample = proxy.post("/elbo/sample", json={"n": 1, "seed": 7})
    assert (sample.status_code, sample.json()["seed"]) == (200, 7)
    media_type = "application/x-ndjson"
    headers = {"content-type": media_type, "accept": media_type}
    stream = proxy.post("/elbo/anomaly?model=hosts", content=b"[1, 2, 3, 4]\n" * 3, headers=headers)
    assert [json.loads(line).get("row") for line in stream.text.splitlines()] == [0, 1, 2, None]
    assert json.loads(stream.text.splitlines()[-1])["rows"] == 3


def test_explorer_shows_the_models_behind_a_path_prefix(proxy: httpx.Client) -> None:
    with chromium() as browser:
        page = browser.new_page()
        failed: list[str] = []
        page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
        page.goto(str(proxy.base_url.join("/elbo/")))
        page.get_by_role("heading", name="pca").first.wait_for()
        assert failed == []


def test_metrics_name_the_endpoint_without_the_path_prefix(server: ServerProcess) -> None:
    with server.client() as client:
        assert client.post("/elbo/sample", json={"n": 1}).status_code == 200
        assert client.get("/elbo/models/pca").status_code == 200
        text = client.get("/metrics").text
    assert 'elbo_requests_total{endpoint="/sample",model="pca",status="200",version="1"}' in text
    assert 'elbo_requests_total{endpoint="/models/{reference}",' in text


def test_path_that_only_begins_like_the_prefix_is_not_found(server: ServerProcess) -> None:
    with server.client() as client:
        assert client.get("/elbowroom").status_code == 404
        assert client.post("/elboencode", json={}).status_code == 404


@pytest.mark.parametrize("value", ["elbo", "/el bo", "//elbo", "/elbo?x", "http://host/elbo"])
def test_root_path_that_is_no_path_is_refused(value: str) -> None:
    with pytest.raises(ValidationError, match="expected a path such as /elbo"):
        Settings(root_path=value)


@pytest.mark.parametrize(("value", "path"), [("/", ""), ("/elbo/", "/elbo"), ("/a/b-c", "/a/b-c")])
def test_root_path_ends_without_a_slash(value: str, path: str) -> None:
    assert Settings(root_path=value).root_path == path


# Keep-alive


def test_idle_connection_is_closed_after_the_keep_alive_seconds(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: elbo\r\n\r\n")
        assert read_response(connection).endswith(b'{"status":"alive"}')
        started = time.monotonic()
        assert connection.recv(1) == b""
        assert 0.5 < time.monotonic() - started < 3


@pytest.mark.parametrize("held_seconds", [60, 90, 120])  # nginx and AWS ALB, Traefik and Go, Caddy
def test_idle_connection_stays_open_for_longer_than_common_proxies_keep_it(held_seconds: float) -> None:
    assert Settings().keep_alive_seconds > held_seconds


# Cross-origin requests


def test_only_the_origins_in_the_setting_may_call_the_server(server: ServerProcess) -> None:
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    with server.client() as client:
        allowed = client.options("/sample", headers={"origin": ORIGIN, **preflight})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN
        assert "content-type" in allowed.headers["access-control-allow-headers"].lower()
        refused = client.options("/sample", headers={"origin": "https://evil.example.com", **preflight})
        assert "access-control-allow-origin" not in refused.headers
        response = client.post("/sample", json={"n": 1, "seed": 7}, headers={"origin": ORIGIN})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, ORIGIN)
        assert "Elbo-Seed" in response.headers["access-control-expose-headers"]
        error = client.post("/sample", json={"n": -1}, headers={"origin": ORIGIN})
        assert (error.status_code, error.headers["access-control-allow-origin"]) == (422, ORIGIN)


def test_no_origin_may_call_the_server_by_default(client: httpx.Client) -> None:
    response = client.get("/models", headers={"origin": ORIGIN})
    assert not [name for name in response.headers if name.startswith("access-control")]
    preflight = client.options("/sample", headers={"origin": ORIGIN, "access-control-request-method": "POST"})
    assert preflight.status_code == 405


@pytest.mark.parametrize("value", ["example.com", "https://a.example.com/path", "https://a.example.com,b", "null"])
def test_cors_origins_that_are_no_origins_are_refused(value: str) -> None:
    with pytest.raises(ValidationError, match=re.escape("expected * or origins such as")):
        Settings(cors_origins=value)


# Heads that two servers could read in different ways


@pytest.mark.parametrize(
    ("version", "hosts", "status"),
    [
        ("1.1", [], b"400"),
        ("1.1", ["Host: a", "Host: b"], b"400"),
        ("1.1", ["Host: a", "host: a"], b"400"),
        ("1.0", ["Host: a", "Host: b"], b"400"),
        ("1.0", [], b"200"),
        ("1.1", ["Host: a"], b"200"),
        ("1.1", ["Host: a", "X-Tag: 1", "X-Tag: 2"], b"200"),
    ],
)
@pytest.mark.parametrize("request_line", ["GET /livez", "POST /sample"])
def test_request_without_exactly_one_host_gets_400(
    server: ServerProcess, request_line: str, version: str, hosts: list[str], status: bytes
) -> None:
    lines = [f"{request_line} HTTP/{version}", *hosts, "Connection: close", "", ""]
    response = respond(server, "\r\n".join(lines).encode())
    assert response.split()[1] == status
    assert (b'"code":"bad_request"' in response) == (status == b"400")


@pytest.mark.parametrize(
    "headers",
    [
        ["Transfer-Encoding: gzip, chunked"],
        ["Transfer-Encoding: gzip,chunked"],
        ["transfer-encoding: GZIP, Chunked"],
        ["Transfer-Encoding: gzip", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: identity, chunked"],
        ["Transfer-Encoding: gzip"],
        ["Transfer-Encoding: chunked, gzip"],
        ["Transfer-Encoding: chunked", f"Content-Length: {len(CHUNKED_SAMPLE)}"],
    ],
)
def test_body_with_a_transfer_encoding_other_than_chunked_gets_400(server: ServerProcess, headers: list[str]) -> None:
    lines = ["POST /sample HTTP/1.1", "Host: elbo", "Content-Type: application/json", *headers, "", ""]
    response = respond(server, "\r\n".join(lines).encode() + CHUNKED_SAMPLE)
    assert response.startswith(b"HTTP/1.1 400")
    assert response.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("value", ["chunked", "Chunked", " chunked "])
def test_chunked_body_is_read(server: ServerProcess, value: str) -> None:
    lines = ["POST /sample HTTP/1.1", *HEADERS, f"Transfer-Encoding: {value}", "", ""]
    response = respond(server, "\r\n".join(lines).encode() + CHUNKED_SAMPLE)
    assert response.startswith(b"HTTP/1.1 200")
    assert json.loads(response.partition(b"\r\n\r\n")[2])["seed"] == 7


def test_header_in_the_trailer_of_a_body_is_ignored(server: ServerProcess) -> None:
    lines = ["POST /sample HTTP/1.1", *HEADERS, "Transfer-Encoding: chunked", "", ""]
    trailer = b"Host: other\r\nX-Request-Timeout: never\r\nContent-Type: text/csv\r\n\r\n"
    response = respond(server, "\r\n".join(lines).encode() + CHUNKED_SAMPLE.removesuffix(b"\r\n") + trailer)
    assert response.startswith(b"HTTP/1.1 200")
