"""What a page of another site can make a browser send: requests for other hosts, untyped bodies, bodies of text."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser
from pydantic import ValidationError

from service.app import create_app
from service.settings import Settings
from tests.service.explorer.browser import chromium
from tests.service.process import ServerProcess, server_starter
from tests.service.raw_http import read_response
from tests.service.running import running

BODY = b'{"n": 1, "seed": 7}'
POLICIES = {"x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer"}


@pytest.fixture(scope="module")
def named(artifacts: Path) -> Iterator[httpx.Client]:
    """Yield a client of a server that allows some hosts."""
    hosts = "elbo.example.com, *.internal.example, [::1]"
    app = create_app(Settings(artifacts=artifacts, log_level="error", allowed_hosts=hosts))
    with running(app, app.state.protocol) as client:
        yield client


@pytest.fixture
def server(artifacts: Path) -> Iterator[ServerProcess]:
    with server_starter() as start_server:
        yield start_server(artifacts)


# Hosts


@pytest.mark.parametrize(
    "host",
    [
        "elbo.example.com",
        "ELBO.example.com:8000",
        "elbo.example.com.",
        "a.internal.example",
        "b.a.internal.example:1",
        "[::1]:8000",
    ],
)
def test_request_for_an_allowed_host_is_answered(named: httpx.Client, host: str) -> None:
    assert named.post("/sample?model=pca", json={"n": 1}, headers={"host": host}).status_code == 200
    assert named.get("/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/models", "/", "/static/explorer/main.js", "/docs", "/openapi.json", "/metrics", "/nothing"]
)
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1",
        "elbo.example.com.evil.example",
        "internal.example",
        "xinternal.example",
        "elbo.example.com@evil.example",
        "",
    ],
)
def test_request_for_another_host_is_refused(named: httpx.Client, path: str, host: str) -> None:
    response = named.get(path, headers={"host": host})
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")
    assert "ELBO_ALLOWED_HOSTS" in response.json()["hint"]


def test_post_for_another_host_is_refused_and_probes_are_answered(named: httpx.Client) -> None:
    response = named.post("/sample", json={"n": 1}, headers={"host": "evil.example"})
    assert response.status_code == 400
    for path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert named.get(path, headers={"host": "10.0.0.7:8000"}).status_code == 200


@pytest.mark.parametrize(
    ("url", "host", "status"),
    [
        ("http://evil.example/models", "Host: elbo.example.com", 400),
        ("http://evil.example:80/models", "Host: elbo.example.com", 400),
        ("http://elbo.example.com@evil.example/models", "Host: elbo.example.com", 400),
        ("http://evil.example?/elbo.example.com", "Host: elbo.example.com", 400),
        ("http://elbo.example.com/models", "Host: evil.example", 200),
        ("HTTP://user@ELBO.example.com:8000/models?a=b://evil.example", "Host: evil.example", 200),
        ("http://[::1]:8000/models", "Host: evil.example", 200),
        ("/models?url=http://evil.example/", "Host: elbo.example.com", 200),
        ("http://elbo.example.com/models", "Accept: */*", 400),
        ("http://elbo.example.com/models", "Host: elbo.example.com\r\nHost: elbo.example.com", 400),
    ],
)
def test_request_for_a_whole_url_is_judged_by_the_host_in_the_url(
    named: httpx.Client, url: str, host: str, status: int
) -> None:
    with socket.create_connection(("127.0.0.1", named.base_url.port or 0), timeout=20) as connection:
        connection.sendall(f"GET {url} HTTP/1.1\r\n{host}\r\nConnection: close\r\n\r\n".encode())
        response = read_response(connection)
    assert response.startswith(f"HTTP/1.1 {status} ".encode()), response
    assert (b'"models":' in response) == (status == 200)


@pytest.mark.parametrize(("name", "status"), [("elbo.example.com", 200), ("evil.example", 400)])
def test_request_for_a_whole_url_in_http_1_0_needs_no_host_header(named: httpx.Client, name: str, status: int) -> None:
    with socket.create_connection(("127.0.0.1", named.base_url.port or 0), timeout=20) as connection:
        connection.sendall(f"GET http://{name}/models HTTP/1.0\r\n\r\n".encode())
        assert read_response(connection).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("hosts", ["https://elbo.example.com", "elbo.example.com:8000", "*", "a b", "*.", "a/b"])
def test_allowed_hosts_that_are_no_names_are_refused(hosts: str) -> None:
    with pytest.raises(ValidationError, match="host names such as"):
        Settings(allowed_hosts=hosts)


# Content types


@pytest.mark.slow
def test_body_without_content_type_is_refused(server: ServerProcess) -> None:
    for path in ("/sample", "/encode", "/anomaly", "/interpolate", "/decode", "/reconstruct"):
        for framing in ("Content-Length: 19", "Transfer-Encoding: chunked"):
            body = BODY if "Length" in framing else b"13\r\n%b\r\n0\r\n\r\n" % BODY
            with server.connect() as connection:
                connection.sendall(f"POST {path} HTTP/1.1\r\nHost: elbo\r\n{framing}\r\n\r\n".encode() + body)
                response = read_response(connection)
            assert response.startswith(b"HTTP/1.1 415 ")
            assert b"no Content-Type" in response
            assert b"send the header Content-Type: application/json" in response


def test_request_without_body_needs_no_content_type(client: httpx.Client) -> None:
    response = client.post("/sample?n=2", headers={"content-length": "0"})
    assert (response.status_code, len(response.json()["outputs"])) == (200, 2)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://elbo.example", 200),
        ("https://evil.example", 415),
        ("null", 415),
        ("http://elbo.example.evil", 415),
    ],
)
def test_text_is_read_unless_a_page_of_another_site_sends_it(
    client: httpx.Client, origin: str | None, status: int
) -> None:
    headers = {"host": "elbo.example", "content-type": "text/plain"} | ({"origin": origin} if origin else {})
    row = str([0.1] * 64).encode()
    response = client.post("/anomaly?model=vae&observe=false", content=b'{"inputs": [%b]}' % row, headers=headers)
    assert response.status_code == status, response.text


@pytest.mark.slow
def test_page_of_another_site_cannot_post_rows(server: ServerProcess) -> None:
    """A real browser, on a page of another origin, sends every type of body that needs no CORS preflight."""
    before = server.metric_total("elbo_rows_total")
    with chromium() as browser, _site() as evil:
        statuses = _send_from_another_origin(browser, evil, f"http://127.0.0.1:{server.port}")
    assert statuses == ["opaque"] * 4  # the browser has sent all four, and hides the responses
    assert server.metric_total("elbo_rows_total") == before
    refused = [server.wait_for_log("request", method="POST", path="/anomaly")["status"] for _ in range(4)]
    assert refused == [415] * 4


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<h1>another site</h1>")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _site() -> Iterator[str]:
    """Yield the URL of another site."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Page) as site:
        threading.Thread(target=site.serve_forever).start()
        yield f"http://127.0.0.1:{site.server_port}/"
        site.shutdown()


def _send_from_another_origin(browser: Browser, evil: str, url: str) -> list[str]:
    """Send four bodies to /anomaly from the page `evil`, and return the types of the responses."""
    page = browser.new_page()
    page.goto(evil)
    statuses: list[str] = page.evaluate(
        """async url => {
          const rows = JSON.stringify({inputs: [Array(64).fill(1e6)]});
          const form = new FormData(); form.append("inputs", rows);
          const bodies = [new Blob([rows]), rows, form, new URLSearchParams({inputs: rows})];
          const types = [];
          for (const body of bodies)
            types.push((await fetch(url + "/anomaly", {method: "POST", mode: "no-cors", body})).type);
          return types;
        }""",
        url,
    )
    return statuses


# Security headers


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/static/explorer/main.js",
        "/static/page.css",
        "/static/nothing.js",
        "/static/docs/swagger-ui.css",
        "/models",
        "/nothing",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_every_page_and_static_file_has_the_security_headers(client: httpx.Client, path: str, method: str) -> None:
    response = client.request(method, path)
    assert POLICIES.items() <= dict(response.headers).items()
    assert response.headers.get_list("content-security-policy") == [response.headers["content-security-policy"]]
    policy = response.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} <= set(policy)


def test_policy_of_the_reference_page_allows_only_its_own_inline_script(client: httpx.Client) -> None:
    policy = client.get("/docs").headers["content-security-policy"]
    scripts = next(part for part in policy.split("; ") if part.startswith("script-src"))
    assert "unsafe" not in scripts
    assert scripts.count("'sha256-") == 1


@pytest.mark.slow
def test_browser_shows_the_reference_page_without_complaints(server: ServerProcess) -> None:
    complaints: list[str] = []
    with chromium() as browser:
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.port}/docs")
        page.get_by_text("/interpolate").first.wait_for()
    assert complaints == []
