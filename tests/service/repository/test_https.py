"""A repository that an HTTPS server publishes, with a certificate of its own."""

import http.server
import logging
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from service.repository.copying import copy_versions, open_repository
from service.repository.index import INDEX_NAME
from service.repository.location import RepositoryInvalid, parse_location
from service.repository.mirror import Mirror, read_failures
from tests.service.repository.folders import add_version, files_in, write_index
from tests.service.tls import issue


class Site(http.server.SimpleHTTPRequestHandler):
    """Publishes a folder with ETags, as web servers do. `requests`, `refusal` and `refused` belong to the server."""

    def send_head(self) -> Any:
        server: Any = self.server
        if server.refusal and server.refused in self.path:
            self.send_error(server.refusal)
            return None
        path = Path(self.translate_path(self.path))
        tag = f'"{path.stat().st_mtime_ns}"' if path.is_file() else ""
        is_known = bool(tag) and self.headers.get("If-None-Match") == tag
        server.requests.append((self.path, 304 if is_known else 200, self.headers.get("Authorization")))
        if is_known:
            self.send_response(304)
            self.end_headers()
            return None
        self.tag = tag
        return super().send_head()

    def end_headers(self) -> None:
        if tag := getattr(self, "tag", ""):
            self.send_header("ETag", tag)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the standard library
        """Log nothing."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a running HTTPS server of tmp_path/remote, which has hosts@1 and hosts@2."""
    root = tmp_path / "remote"
    for version in (1, 2):
        add_version(root, "hosts", version)
    write_index(root)
    certificate, key = issue(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(root)))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.requests, server.refusal, server.refused = [], 0, ""
    server.url = f"https://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def mirror_of(url: str, cache: Path, clock: Callable[[], float] = lambda: 0.0) -> Mirror:
    return Mirror(parse_location(url), cache, 2, clock=clock)


def test_poll_asks_for_the_index_only_if_it_has_changed(site: Any, tmp_path: Path) -> None:
    mirror = mirror_of(site.url, tmp_path / "cache")
    assert [mirror.poll().outcome for _ in range(3)] == ["ok"] * 3
    index = f"/{INDEX_NAME}"
    assert [request[:2] for request in site.requests] == [
        (index, 200), ("/hosts/2/model.pt", 200), ("/hosts/1/model.pt", 200), (index, 304), (index, 304)
    ]  # fmt: skip
    add_version(tmp_path / "remote", "hosts", 3)
    write_index(tmp_path / "remote")
    assert mirror.poll().changed
    assert site.requests[-1][:2] == ("/hosts/3/model.pt", 200)
    assert files_in(tmp_path / "cache") == [f"hosts/{version}/model.pt" for version in (1, 2, 3)]


def test_password_of_the_url_is_sent_and_is_in_no_message(
    site: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = site.url.replace("https://", "https://reader:secret@")
    mirror = mirror_of(url, tmp_path / "cache")
    assert mirror.poll().outcome == "ok"
    assert site.requests[0][2] == "Basic cmVhZGVyOnNlY3JldA=="
    site.refusal = 503
    assert mirror.poll().outcome == "failed"
    (failure,) = read_failures(tmp_path / "cache")
    assert "status 503, expected 200; the models in the cache stay served" in failure.detail
    assert "secret" not in failure.detail
    site.shutdown()
    site.server_close()
    assert mirror.poll().outcome == "failed"
    (failure,) = read_failures(tmp_path / "cache")
    assert "ConnectError" in failure.detail
    assert "secret" not in failure.detail
    assert f"GET {site.url}/{INDEX_NAME}" in caplog.text  # httpx logs the URL
    assert "secret" not in caplog.text


def test_certificate_that_is_not_trusted_is_refused(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    assert mirror_of(site.url, tmp_path / "cache").poll().outcome == "failed"
    assert "CERTIFICATE_VERIFY_FAILED" in read_failures(tmp_path / "cache")[0].detail
    assert site.requests == []


def test_download_that_the_end_of_the_server_interrupts_leaves_nothing(site: Any, tmp_path: Path) -> None:
    mirror = mirror_of(site.url, tmp_path / "cache")
    mirror.is_stopped = True
    assert mirror.poll().outcome == "skipped"
    assert site.requests[-1][0] == "/hosts/2/model.pt"
    assert files_in(tmp_path / "cache") == []
    mirror.is_stopped = False
    assert mirror.poll().outcome == "ok"


def test_version_that_the_site_refuses_does_not_keep_other_models_out_of_the_cache(site: Any, tmp_path: Path) -> None:
    add_version(tmp_path / "remote", "web", 1)
    write_index(tmp_path / "remote")
    site.refusal, site.refused = 403, "/hosts/2/"
    mirror = mirror_of(site.url, tmp_path / "cache")
    assert mirror.poll().outcome == "incomplete"
    assert files_in(tmp_path / "cache") == ["hosts/1/model.pt", "web/1/model.pt"]
    (failure,) = read_failures(tmp_path / "cache")
    assert (failure.name, failure.version, failure.code) == ("hosts", 2, "repository_unavailable")
    assert "403" in failure.detail


def test_artifact_that_is_larger_than_the_index_says_is_refused_while_it_is_downloaded(
    site: Any, tmp_path: Path
) -> None:
    with (tmp_path / "remote/hosts/2/model.pt").open("ab") as file:
        file.truncate(50_000_000)
    assert mirror_of(site.url, tmp_path / "cache").poll().outcome == "incomplete"
    assert files_in(tmp_path / "cache") == ["hosts/1/model.pt"]
    assert "expected at most" in read_failures(tmp_path / "cache")[0].detail


def test_site_without_an_index_says_how_to_write_it(site: Any, tmp_path: Path) -> None:
    (tmp_path / "remote" / INDEX_NAME).unlink()
    assert mirror_of(site.url, tmp_path / "cache").poll().outcome == "failed"
    assert "run elbo index on the folder" in read_failures(tmp_path / "cache")[0].detail


def test_push_to_a_site_is_refused_before_anything_is_written(site: Any, tmp_path: Path) -> None:
    add_version(tmp_path / "own", "vae", 1)
    with pytest.raises(RepositoryInvalid, match="repositories behind HTTP are only read"):
        open_repository(site.url).write_index({})
    assert copy_versions(open_repository(str(tmp_path / "nothing")), open_repository(site.url)) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "'ftp' is no scheme"),
        ("http://models.example.com/elbo", "use https"),
        ("https:///elbo", "expected https://, then a host"),
        ("s3://bucket/../other", "'..'"),
        ("https://host/elbo?token=secret", "has a query"),
        ("file://host/path", "expected an absolute path"),
        ("s3://key:secret@bucket/elbo", "credentials"),
    ],
)
def test_url_that_is_not_valid_is_refused(url: str, message: str) -> None:
    with pytest.raises(RepositoryInvalid, match=message):
        parse_location(url)
