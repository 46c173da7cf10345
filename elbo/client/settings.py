"""Code that both clients share: settings, requests, refusals, proxies and certificates."""

import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpx

from elbo.client.calls import Call, Options
from elbo.client.connections import connect_seconds, origin_of
from elbo.client.errors import ElboHTTPError, InvalidReply, from_response
from elbo.client.http1 import Received, request_head
from elbo.client.results import Array, Model
from elbo.client.retries import Attempts, Retries, parse_retry_after
from elbo.client.rows import split

T = TypeVar("T")
DEFAULT_TIMEOUT = 30.0
CHUNK_ROWS = 2048
DESCRIPTION_SECONDS = 10.0  # the features of a model are remembered for this time; then a new version is used
Verify = ssl.SSLContext | bool


@lru_cache(maxsize=512)
def _url(base_url: str, path: str) -> httpx.URL:
    return httpx.URL(base_url + path)


def _user_agent() -> str:
    try:
        return f"elbo-client/{version('elbo')}"
    except PackageNotFoundError:  # a checkout that is not installed
        return "elbo-client"


class Settings:
    """The settings of a client. The arguments are those of `Client`."""

    def __init__(
        self,
        base_url: str,
        model: str | None,
        key: str | None,
        timeout: float | None,
        retries: Retries | None,
        headers: Mapping[str, str] | None,
        chunk_rows: int,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        url = httpx.URL(self.base_url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"expected an address such as http://127.0.0.1:8000, got {base_url!r}")
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
        self.model = model
        self.timeout = timeout
        self.retries = retries or Retries()
        self.chunk_rows = chunk_rows
        self._headers = [(b"host", url.netloc), (b"user-agent", _user_agent().encode())]
        if key:
            self._headers.append((b"authorization", b"Bearer " + key.encode()))
        self._headers += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        for name, value in self._headers:
            if set(b"\r\n\0") & set(name + value):
                source = "key" if name == b"authorization" else f"the header {name.decode()!r}"
                raise ValueError(f"{source} contains a line break or a NUL: remove it, for example with .strip()")
        self.origin = origin_of(url)
        self._head_start = lru_cache(maxsize=256)(self._write_head_start)
        self._descriptions: dict[str | None, tuple[float, Model]] = {}

    def attempts(self, call: Call[Any], options: Options) -> Attempts:
        """Return the attempts of `call`, whose time begins now, unless it is a part of a call with a deadline."""
        seconds = options.get("timeout", self.timeout)
        return Attempts(self.retries, call.is_safe, seconds, self.base_url, options.get("deadline"))

    def with_deadline(self, options: Options) -> Options:
        """Return `options` with the deadline of a call that may consist of several requests. Its time begins now."""
        seconds = options.get("timeout", self.timeout)
        if seconds is None or "deadline" in options:
            return options
        return {**options, "deadline": time.monotonic() + seconds}

    def request(self, call: Call[Any], seconds: float | None) -> httpx.Request:
        """Return a request that may take `seconds`. The header X-Request-Timeout tells the server so."""
        headers = [*self._headers, (b"accept", call.accept.encode())]
        if seconds is not None:
            headers.append((b"x-request-timeout", b"%.3f" % max(seconds, 0.001)))
        if call.body is not None:
            headers.append((b"content-type", call.content_type.encode()))
            headers.append((b"content-length", b"%d" % len(call.body)))
        return httpx.Request(
            "GET" if call.body is None else "POST",
            _url(self.base_url, call.path),
            headers=headers,
            stream=httpx.ByteStream(call.body or b""),
            extensions=timeouts(seconds),
        )

    def head(self, call: Call[Any], seconds: float | None) -> bytes:
        """Return the head of a request that may take `seconds`, as `request` would write it."""
        start = self._head_start(call.path, call.accept, call.content_type if call.body is not None else "")
        limit = b"" if seconds is None else b"x-request-timeout: %.3f\r\n" % max(seconds, 0.001)
        length = b"" if call.body is None else b"content-length: %d\r\n" % len(call.body)
        return start + limit + length + b"\r\n"

    def _write_head_start(self, path: str, accept: str, content_type: str) -> bytes:
        """Return the lines of a head that are the same for many requests."""
        call: Call[Any] = Call(lambda _: None, path, b"" if content_type else None, content_type, accept)
        request = self.request(call, None)
        request.headers.pop("content-length", None)
        return request_head(request).removesuffix(b"\r\n")

    def stream_request(self, path: str, media_type: str, seconds: float | None) -> httpx.Request:
        """Return a request whose body the caller sends in chunks."""
        headers = [
            *self._headers,
            (b"accept", media_type.encode()),
            (b"content-type", media_type.encode()),
            (b"transfer-encoding", b"chunked"),
        ]
        url = _url(self.base_url, path)
        return httpx.Request("POST", url, headers=headers, stream=httpx.ByteStream(b""), extensions=timeouts(seconds))

    def remember(self, reference: str | None, model: Model) -> None:
        """Remember the features of the model that `reference` names; None names the default model."""
        self._descriptions[reference] = time.monotonic(), model

    def remembered(self, reference: str | None) -> Model | None:
        """Return the model that `reference` names, if it was remembered at most DESCRIPTION_SECONDS ago."""
        moment, model = self._descriptions.get(reference, (0.0, None))
        return model if model and time.monotonic() - moment < DESCRIPTION_SECONDS else None

    def forget(self, reference: str | None) -> bool:
        """Forget the model that `reference` names. Return whether it was remembered."""
        return self._descriptions.pop(reference, None) is not None

    def parts(self, array: Array, options: Options) -> Iterator[tuple[Array, Options]]:
        """Yield the rows and the options of each request for `array` [N, ...], at most `chunk_rows` rows each.

        Samples are not split: the noise of a row depends on its place in the request.
        """
        if options.get("sample") or len(array) <= self.chunk_rows:
            yield array, options
            return
        conditions = options.get("condition")
        for number, part in enumerate(split(array, self.chunk_rows)):
            if isinstance(conditions, Sequence):
                start = number * self.chunk_rows
                yield part, {**options, "condition": conditions[start : start + len(part)]}
            else:
                yield part, options


def timeouts(seconds: float | None) -> dict[str, Any]:
    """Return the extensions of httpx for a request that may take `seconds`."""
    return {"timeout": {"connect": connect_seconds(seconds), "read": seconds, "write": seconds, "pool": seconds}}


def received(response: httpx.Response) -> Received:
    """Return the parts of a response of httpx whose body has been read."""
    headers = {name.lower(): value for name, value in response.headers.raw}
    return Received(response.status_code, response.reason_phrase, headers, response.content)


def refusal(response: Received) -> ElboHTTPError:
    """Return the exception for a response with another status than 200."""
    retry_after = parse_retry_after(response.header(b"retry-after"))
    reason, location = response.reason or str(response.status), response.header(b"location")
    if location:
        reason = f"{reason}, a redirect to {location}, which the client does not follow: give it the new address"
    return from_response(response.status, response.content, response.header(b"x-request-id"), retry_after, reason)


def result(call: Call[T], response: Received) -> T:
    """Return the result of a successful response. Raises InvalidReply."""
    try:
        return call.parse(response)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"the response to {call.path} lacks a field or has another form: {error!r}; is this an Elbo server?"
        raise InvalidReply(message) from error


def proxy_of(base_url: str, trust_env: bool) -> str | None:
    """Return the proxy that the environment names for `base_url` (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY)."""
    url = httpx.URL(base_url)
    if not trust_env or proxy_bypass(url.host):
        return None
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def ssl_context_of(base_url: str, verify: Verify, cert: Any, trust_env: bool) -> ssl.SSLContext | None:
    """Return the context that verifies the server, as httpx makes it; None for http://."""
    if httpx.URL(base_url).scheme != "https":
        return None
    return httpx.create_ssl_context(verify=verify, cert=cert, trust_env=trust_env)
