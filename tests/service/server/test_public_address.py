"""The server does not listen on an address that other machines can reach, unless it has keys or may be insecure."""

import os
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from service.server.run import ServeError, bind, require_keys_if_public
from service.settings import Settings
from tests.conftest import require
from tests.data import ROOT
from tests.preloaded import run_preloaded
from tests.service.access.keys import one_key_per_scope
from tests.service.process import ServerProcess, server_starter

PUBLIC = ["0.0.0.0", "0", "0x0", "::", "::ffff:0.0.0.0"]
LOOPBACK = ["127.0.0.1", "127.1.2.3", "localhost", "2130706433", "0x7f.1", "::1", "::ffff:127.0.0.1"]


HAS_IPV6 = Path("/proc/net/if_inet6").exists()


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    with server_starter() as start_server:
        yield start_server


def check(host: str, **settings: object) -> str:
    """Return the address on which the server may listen. Raise ServeError if it may not."""
    with bind(host, 0) as listener:
        require_keys_if_public(listener, Settings(**settings))  # type: ignore[arg-type] # any setting
        return str(listener.getsockname()[0])


@pytest.mark.parametrize("host", PUBLIC)
def test_public_address_is_refused_without_keys(host: str) -> None:
    require(":" not in host or HAS_IPV6, "this machine has no IPv6")
    with pytest.raises(ServeError) as caught:
        check(host)
    for remedy in ("elbo key add", "ELBO_API_KEYS_FILE", "127.0.0.1", "--insecure", "ELBO_INSECURE=1"):
        assert remedy in str(caught.value)
    check(host, insecure=True)
    check(host, api_keys_file="keys.toml")


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_address_needs_no_keys(host: str) -> None:
    require(":" not in host or HAS_IPV6, "this machine has no IPv6")
    address = ip_address(check(host))
    assert (getattr(address, "ipv4_mapped", None) or address).is_loopback


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"ELBO_INSECURE": "1"}, "(ELBO_INSECURE)"),
        ({"AIP_HTTP_PORT": "8080"}, "Google Vertex AI was recognised"),
        ({"SAGEMAKER_BIND_TO_PORT": "8080"}, "Amazon SageMaker was recognised"),
        ({"SAGEMAKER_BIND_TO_PORT": "8080", "ELBO_INSECURE": "1"}, "(ELBO_INSECURE)"),
    ],
)
def test_warning_of_a_server_without_keys_tells_why_it_needs_none(
    variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check("0.0.0.0")
    (message,) = caplog.messages
    assert "everybody who can reach 0.0.0.0 can use the server" in message
    assert reason in message
    assert ("set ELBO_INSECURE=0" in message) == ("ELBO_INSECURE" not in variables)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("command", [["-m", "service"], ["-c", "from elbo import cli; cli.main(['serve'])"]])
def test_server_exits_before_it_listens_on_a_public_address(tmp_path: Path, command: list[str], workers: int) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ELBO_")}
    settings = {"ELBO_HOST": "0.0.0.0", "ELBO_PORT": "0", "ELBO_ARTIFACTS": str(tmp_path), "ELBO_WORKERS": str(workers)}
    result = run_preloaded([sys.executable, *command], cwd=ROOT, env=inherited | settings, text=True)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "the server does not listen on 0.0.0.0" in result.stderr
    assert "listening" not in result.stdout


@pytest.mark.slow
def test_server_listens_on_a_public_address_with_keys_and_warns_if_it_is_insecure(
    tmp_path: Path, start: Callable[..., ServerProcess]
) -> None:
    keys = one_key_per_scope(tmp_path / "keys.toml")
    with start(tmp_path / "none", HOST="0.0.0.0", API_KEYS_FILE=keys.path).client() as client:
        assert client.get("/models").status_code == 401
        assert client.get("/models", headers=keys.headers("infer")).status_code == 200
    insecure = start(tmp_path / "none", HOST="0.0.0.0", INSECURE=1)
    warnings = [line["message"] for line in insecure.lines if line["level"] == "warning"]
    assert any("everybody who can reach 0.0.0.0 can use the server" in warning for warning in warnings)
    with insecure.client() as client:
        assert client.get("/models").status_code == 200
