"""Access over HTTP: which requests need a key, which keys may do what, and what the server answers to the others."""

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from starlette.routing import Mount

from service.access.scopes import ANY_KEY, OPEN, ROUTES, scope_of
from service.app import create_app
from service.settings import Settings
from tests.plain_http import NO_AUTHORITIES
from tests.service.access.keys import KeySet, one_key_per_scope
from tests.service.running import running
from tests.service.scrape import scrape
from tests.service.serving import serving

KEYS = ("infer", "write", "metrics", "admin")
Headers = dict[str, str]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeySet:
    return one_key_per_scope(tmp_path_factory.mktemp("keys") / "keys.toml")


@pytest.fixture(scope="module")
def empty(keys: KeySet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a client of a server with keys and without models."""
    options = Settings(artifacts=tmp_path_factory.mktemp("empty"), api_keys_file=keys.path, log_level="error")
    with running(create_app(options)) as client:
        yield client


def concrete(route: str) -> str:
    values = {"{reference}": "vae", "{path:path}": "page.css", "{name}": "vae", "{version}": "1"}
    for parameter, value in values.items():
        route = route.replace(parameter, value)
    return route


def send(client: httpx.Client, route: str, headers: Headers | None = None) -> httpx.Response:
    posts = (
        "/api",
        "/anomaly",
        "/backtest",
        "/feedback",
        "/reconstruct",
        "/encode",
        "/decode",
        "/sample",
        "/interpolate",
    )
    is_post = route.startswith(posts) or route.endswith("/infer")
    return client.request("POST" if is_post else "GET", concrete(route), headers=headers)


def test_table_of_scopes_lists_every_route_of_the_application(tmp_path: Path) -> None:
    found = set()
    for route in create_app(Settings(artifacts=tmp_path)).router.routes:
        path: str = route.path  # type: ignore[attr-defined] # every route of this application has one
        found.add(f"{path}/{{path:path}}" if isinstance(route, Mount) else path)
    assert found - {"/static/docs/{path:path}"} == set(ROUTES)
    assert scope_of("/static/docs/swagger-ui.css") is OPEN


@pytest.mark.parametrize("route", ROUTES)
def test_route_needs_a_key_unless_it_is_open(empty: httpx.Client, route: str) -> None:
    status = send(empty, route).status_code
    assert (status == 401) == (ROUTES[route] is not OPEN)
    assert status in ((200, 503) if ROUTES[route] is OPEN else (401,))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("route", ROUTES)
def test_key_is_accepted_exactly_where_its_scope_permits_it(
    empty: httpx.Client, keys: KeySet, route: str, key: str
) -> None:
    response = send(empty, route, keys.headers(key))
    permitted = ROUTES[route] in (OPEN, key) or key == "admin"
    assert (response.status_code == 403) == (not permitted)
    assert response.status_code != 401
    if not permitted and route.startswith("/v2"):
        assert "does not have the scope" in response.json()["error"]
    elif not permitted:
        assert response.json()["code"] == "forbidden"
        challenge = f'Bearer realm="elbo", error="insufficient_scope", scope="{ROUTES[route]}"'
        assert response.headers["www-authenticate"] == challenge


WRONG = "elbo_" + 43 * "A"


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        ({}, 'Bearer realm="elbo"'),
        ({"Authorization": "Basic YTpi"}, 'Bearer realm="elbo"'),
        ({"Authorization": "Bearer"}, 'Bearer realm="elbo"'),
        ({"X-API-Key": ""}, 'Bearer realm="elbo"'),
        ({"Authorization": f"Bearer {WRONG}"}, 'Bearer realm="elbo", error="invalid_token"'),
        ({"X-API-Key": WRONG}, 'Bearer realm="elbo", error="invalid_token"'),
        ({"X-API-Key": 60_000 * "x"}, 'Bearer realm="elbo", error="invalid_token"'),
        ({"Authorization": "Bearer \xff\xfe"}, 'Bearer realm="elbo", error="invalid_token"'),
    ],
)
def test_request_without_a_valid_key_gets_401_in_the_format_of_all_errors(
    empty: httpx.Client, headers: Headers, challenge: str
) -> None:
    encoded = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    response = empty.post("/encode", json={}, headers=encoded)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == challenge
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["code"] == "unauthorized"
    assert problem["request_id"] == response.headers["x-request-id"]
    is_absent = "error=" not in challenge
    assert ("Authorization: Bearer" in problem["hint"]) == is_absent
    assert WRONG not in response.text


def variants(value: str) -> dict[str, str]:
    """Return values that resemble a valid one."""
    return {
        "last character": value[:-1] + ("A" if value[-1] != "A" else "B"),
        "one more": value + "A",
        "one less": value[:-1],
        "prefix": value[:20],
        "other case": value.swapcase(),
        "without elbo_": value.removeprefix("elbo_"),
        "twice": value + value,
        "with text behind it": value + ",x",
        "with 300 more": value + 300 * "x",
    }


@pytest.mark.parametrize("name", variants("elbo_x"))
def test_value_that_resembles_a_key_is_refused(empty: httpx.Client, keys: KeySet, name: str) -> None:
    value = variants(keys.values["infer"])[name]
    assert empty.get("/models", headers={"Authorization": f"Bearer {value}"}).status_code == 401


def test_hash_of_a_key_is_not_a_key(empty: httpx.Client, keys: KeySet) -> None:
    line = keys.path.read_text().splitlines()[0]
    digest = line.partition('sha256 = "')[2].partition('"')[0]
    assert empty.get("/models", headers={"X-API-Key": digest}).status_code == 401


@pytest.mark.parametrize(
    "form", ["Authorization: Bearer {}", "authorization: bearer {}", "Authorization: BEARER  {}", "x-api-key: {}"]
)
def test_key_is_accepted_in_either_header(empty: httpx.Client, keys: KeySet, form: str) -> None:
    name, _, value = form.format(keys.values["infer"]).partition(": ")
    assert empty.get("/models", headers={name: value}).status_code == 200


def test_key_beside_credentials_for_a_proxy_is_accepted(empty: httpx.Client, keys: KeySet) -> None:
    headers = {"Authorization": "Basic YTpi", "X-API-Key": keys.values["infer"]}
    assert empty.get("/models", headers=headers).status_code == 200


@pytest.mark.parametrize("name", ["Authorization", "X-API-Key"])
def test_request_that_repeats_the_header_of_its_key_gets_400(empty: httpx.Client, keys: KeySet, name: str) -> None:
    value = keys.values["infer"] if name == "X-API-Key" else f"Bearer {keys.values['infer']}"
    response = empty.get("/models", headers=[(name, value), (name, value)])
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")
    assert keys.values["infer"] not in response.text


@pytest.mark.parametrize(("bearer", "other"), [("infer", "admin"), ("admin", "infer"), ("infer", ""), ("", "infer")])
def test_request_with_two_different_keys_gets_400(empty: httpx.Client, keys: KeySet, bearer: str, other: str) -> None:
    first, second = keys.values.get(bearer, WRONG), keys.values.get(other, WRONG)
    response = empty.get("/models", headers={"Authorization": f"Bearer {first}", "X-API-Key": second})
    assert (response.status_code, response.json()["code"]) == (400, "bad_request")
    assert response.headers["www-authenticate"] == 'Bearer realm="elbo", error="invalid_request"'
    assert not any(value in response.text for value in (first, second))
    assert empty.get("/models", headers={"Authorization": f"Bearer {first}", "X-API-Key": first}).status_code == (
        200 if bearer else 401
    )


@pytest.mark.parametrize(
    "path",
    [
        "/metrics%0A", "/metrics/", "//metrics", "/METRICS", "/%6Detrics", "/./metrics", "/static/../metrics",
        "/static/%2e%2e/metrics", "/static//metrics", "/metrics?x", "/metrics%00", "/livez/../metrics", "/metrics;a",
        "/models/../metrics", "/docs/../metrics",
    ],
)  # fmt: skip
def test_metrics_stay_closed_however_their_path_is_spelt(empty: httpx.Client, keys: KeySet, path: str) -> None:
    url = httpx.URL(empty.base_url).copy_with(raw_path=path.encode())
    for headers in ({}, keys.headers("infer"), keys.headers("write")):
        response = empty.get(url, headers=headers)
        assert response.status_code in (401, 403, 404)
        assert "elbo_requests_total" not in response.text


@pytest.mark.parametrize("path", ["/models/vae/held-out%0A", "/models/vae/held-out", "/models/vae%2Fheld-out"])
def test_rows_of_the_training_data_need_the_scope_admin_however_the_path_is_spelt(
    empty: httpx.Client, keys: KeySet, path: str
) -> None:
    url = httpx.URL(empty.base_url).copy_with(raw_path=path.encode())
    assert empty.get(url, headers=keys.headers("infer")).status_code == 403
    assert empty.get(url, headers=keys.headers("admin")).status_code == 503  # no model is served


def test_only_a_client_with_a_key_learns_whether_a_path_exists(empty: httpx.Client, keys: KeySet) -> None:
    assert scope_of("/nope") is ANY_KEY
    assert empty.get("/nope").status_code == 401
    for key in KEYS:
        assert empty.get("/nope", headers=keys.headers(key)).status_code == 404
    assert empty.delete("/encode").status_code == 401
    assert empty.delete("/encode", headers=keys.headers("infer")).status_code == 405
    assert empty.head("/models").status_code == 401
    assert empty.head("/models", headers=keys.headers("infer")).status_code == 200


def test_server_without_a_key_file_accepts_requests_and_ignores_their_keys(tmp_path: Path) -> None:
    with running(create_app(Settings(artifacts=tmp_path, log_level="error"))) as client:
        response = client.get("/models", headers=[("X-API-Key", WRONG), ("X-API-Key", WRONG)])
        assert response.status_code == 200
        assert not {"ratelimit", "ratelimit-policy"} & set(response.headers)
        document = client.get("/openapi.json").json()
        assert "securitySchemes" not in document["components"]
        assert not any(labels for name, labels in scrape(client) if dict(labels).get("key") is not None)


def test_route_needs_the_same_scope_with_and_without_the_prefix_of_a_proxy(tmp_path: Path, keys: KeySet) -> None:
    options = Settings(artifacts=tmp_path, api_keys_file=keys.path, root_path="/elbo", log_level="error")
    with running(create_app(options)) as client:
        for prefix in ("", "/elbo"):
            assert client.get(f"{prefix}/metrics").status_code == 401
            assert client.get(f"{prefix}/metrics", headers=keys.headers("infer")).status_code == 403
            assert client.get(f"{prefix}/metrics", headers=keys.headers("metrics")).status_code == 200
            assert client.get(f"{prefix}/livez").status_code == 200
            assert client.get(f"{prefix}/static/page.css").status_code == 200
        assert client.get("/elbo").status_code == 307
        assert client.get("/elbolivez/metrics").status_code == 401


def test_page_of_an_allowed_origin_can_read_the_401_response(tmp_path: Path, keys: KeySet) -> None:
    options = Settings(artifacts=tmp_path, api_keys_file=keys.path, cors_origins="https://a.example", log_level="error")
    with running(create_app(options)) as client:
        preflight = {
            "Origin": "https://a.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        allowed = client.options("/encode", headers=preflight)
        assert allowed.status_code == 200
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        refused = client.post("/encode", json={}, headers={"Origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        assert "WWW-Authenticate" in refused.headers["access-control-expose-headers"]


def test_openapi_document_says_which_scope_each_endpoint_needs(empty: httpx.Client) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    document = empty.get("/openapi.json").json()
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []
    schemes = document["components"]["securitySchemes"]
    assert schemes["bearer"]["scheme"] == "bearer"
    assert (schemes["header"]["in"], schemes["header"]["name"]) == ("header", "X-API-Key")
    for path, operations in document["paths"].items():
        for operation in operations.values():
            scope = ROUTES[path]
            expected = [] if scope is OPEN else [{"bearer": [scope]}, {"header": [scope]}]
            assert operation.get("security", []) == expected, path
            assert ({"401", "403", "429"} <= set(operation["responses"])) == (scope is not OPEN)


# The file is read again while the server runs


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition does not become true"
        time.sleep(0.02)


def test_change_of_the_file_takes_effect_and_a_broken_file_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = KeySet(tmp_path / "keys.toml")
    keys.add("first", "infer")
    options = Settings(artifacts=tmp_path / "none", api_keys_file=keys.path, poll_seconds=0.05, log_level="error")
    with running(create_app(options)) as client:

        def status(name: str) -> int:
            return client.get("/models", headers=keys.headers(name)).status_code

        def errors() -> int:
            return sum("the API keys stay as they are" in record.getMessage() for record in caplog.records)

        assert status("first") == 200
        keys.add("second", "infer")
        wait_for(lambda: status("second") == 200)
        good = keys.path.read_text()
        for number, broken in enumerate([b"first = {", b"\xff", None], start=1):
            if broken is None:
                keys.path.unlink()
            else:  # in one step: the server may read a file that is being written
                (tmp_path / "broken").write_bytes(broken)
                (tmp_path / "broken").replace(keys.path)
            wait_for(lambda number=number: errors() == number)  # type: ignore[misc] # keeps the present number
            time.sleep(0.2)
            assert errors() == number  # logged once, not at every poll
            assert (status("first"), status("second")) == (200, 200)
        keys.path.write_text(good)
        keys.remove("first")
        wait_for(lambda: status("first") == 401)
        assert status("second") == 200
        keys.remove("second")
        wait_for(lambda: status("second") == 401)


def test_secret_that_is_replaced_by_a_new_symbolic_link_is_read_again(tmp_path: Path) -> None:
    """Kubernetes and docker replace mounted secrets in this way."""
    old, new = (KeySet(tmp_path / name) for name in ("old", "new"))
    old.add("first", "infer")
    new.add("second", "infer")
    link = tmp_path / "keys.toml"
    link.symlink_to(old.path)
    options = Settings(artifacts=tmp_path / "none", api_keys_file=link, poll_seconds=0.05, log_level="error")
    with running(create_app(options)) as client:
        assert client.get("/models", headers=old.headers("first")).status_code == 200
        (tmp_path / "next").symlink_to(new.path)
        (tmp_path / "next").replace(link)
        wait_for(lambda: client.get("/models", headers=new.headers("second")).status_code == 200)
        assert client.get("/models", headers=old.headers("first")).status_code == 401


def test_limits_that_have_not_changed_keep_their_count_when_the_file_is_read_again(tmp_path: Path) -> None:
    keys = KeySet(tmp_path / "keys.toml")
    keys.add("slow", "infer", requests_per_second=0.001, burst=2)
    options = Settings(artifacts=tmp_path / "none", api_keys_file=keys.path, poll_seconds=0.05, log_level="error")
    with running(create_app(options)) as client:
        statuses = [client.get("/models", headers=keys.headers("slow")).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        keys.add("other", "infer")
        wait_for(lambda: client.get("/models", headers=keys.headers("other")).status_code == 200)
        refused = client.get("/models", headers=keys.headers("slow"))
        assert refused.status_code == 429
        assert refused.json()["code"] == "rate_limited"
        assert refused.headers["ratelimit-policy"] == '"requests";q=2;w=2000'
        assert refused.headers["ratelimit"].startswith('"requests";r=0;t=')
        assert 1 <= int(refused.headers["retry-after"]) <= 1000
        assert client.get("/livez", headers=keys.headers("slow")).status_code == 200


def test_metrics_label_requests_with_the_name_of_their_key_but_never_with_a_guessed_key(
    empty: httpx.Client, keys: KeySet
) -> None:
    empty.get("/models", headers=keys.headers("infer"))
    for number in range(20):
        empty.get("/models", headers={"X-API-Key": f"guess{number}"})
    with httpx.Client(verify=NO_AUTHORITIES, base_url=empty.base_url, headers=keys.headers("metrics")) as client:
        samples = scrape(client)
    names = {dict(labels)["key"] for name, labels in samples if name == "elbo_requests_total"}
    assert {"infer", "", "metrics"} <= names <= {"", *KEYS}


# On the wire


def exchange(settings: Settings, *messages: bytes) -> bytes:
    """Send `messages` on one connection, and return what arrives until the server closes it or stays silent."""

    async def scenario() -> bytes:
        async with serving(settings) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for message in messages:
                writer.write(message)
            received = b""
            try:
                async with asyncio.timeout(1):
                    while piece := await reader.read(65536):
                        received += piece
            except TimeoutError:
                pass
            writer.close()
            return received

    return asyncio.run(scenario())


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: elbo", *lines, "", ""]).encode()


@pytest.mark.parametrize("path", ["/encode", "/api/v1/write", "/nope"])
def test_request_without_a_key_is_refused_before_its_body_arrives(tmp_path: Path, keys: KeySet, path: str) -> None:
    settings = Settings(artifacts=tmp_path, api_keys_file=keys.path, log_level="error")
    answer = exchange(settings, head(path, "Content-Length: 60000000", "Content-Type: application/json"))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b'Bearer realm="elbo"' in answer


def test_client_that_waits_for_permission_to_send_a_body_gets_401_and_no_permission(
    tmp_path: Path, keys: KeySet
) -> None:
    settings = Settings(artifacts=tmp_path, api_keys_file=keys.path, log_level="error")
    answer = exchange(settings, head("/encode", "Content-Length: 9", "Expect: 100-continue"))
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_every_request_of_a_connection_is_checked(tmp_path: Path, keys: KeySet) -> None:
    settings = Settings(artifacts=tmp_path, api_keys_file=keys.path, log_level="error")
    good = b"GET /models HTTP/1.1\r\nHost: elbo\r\nX-API-Key: " + keys.values["infer"].encode() + b"\r\n\r\n"
    bad = b"GET /models HTTP/1.1\r\nHost: elbo\r\n\r\n"
    answer = exchange(settings, good + bad + good + bad)
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", answer)
    assert statuses == [b"200", b"401", b"200", b"401"]


@pytest.mark.parametrize(
    "line", ["X-API-Key:{}", "X-API-Key:   {}   ", "Authorization:\tBearer {}\t", "authorization: bearer  {} "]
)
def test_white_space_around_a_key_is_ignored(tmp_path: Path, keys: KeySet, line: str) -> None:
    settings = Settings(artifacts=tmp_path, api_keys_file=keys.path, log_level="error")
    request = f"GET /models HTTP/1.1\r\nHost: elbo\r\n{line.format(keys.values['infer'])}\r\n\r\n"
    assert exchange(settings, request.encode()).startswith(b"HTTP/1.1 200 ")


def test_key_in_the_trailer_of_a_body_is_ignored(tmp_path: Path, keys: KeySet) -> None:
    settings = Settings(artifacts=tmp_path, api_keys_file=keys.path, log_level="error")
    body = b"0\r\nX-API-Key: " + keys.values["infer"].encode() + b"\r\n\r\n"
    assert exchange(settings, head("/encode", "Transfer-Encoding: chunked") + body).startswith(b"HTTP/1.1 401 ")


def test_refused_request_occupies_no_place_in_the_queue(tmp_path: Path, keys: KeySet) -> None:
    async def scenario() -> None:
        settings = Settings(artifacts=tmp_path, api_keys_file=keys.path, log_level="error")
        async with serving(settings) as (service, port):
            for _ in range(5):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head("/encode", "Content-Length: 2") + b"{}")
                assert (await reader.readline()).startswith(b"HTTP/1.1 401")
                writer.close()
            async with asyncio.timeout(20):
                while service.admission.requests.amount:
                    await asyncio.sleep(0.01)

    asyncio.run(scenario())
