"""Drive the explorer in Chromium, and record the requests and console errors of the explorer."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np
import numpy.typing as npt
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from tests.conftest import require

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
TIMEOUT = 10_000  # ms
expect.set_options(timeout=TIMEOUT)
MAP = ".map-card .map canvas:last-child"
MAP_BASE = ".map-card .map canvas:first-child"
OUTPUT = ".point-card .output canvas"
# A promise that resolves after 60 ms plus one frame of the page, however slow the machine is.
PAGE_PAUSE = "() => new Promise(done => setTimeout(() => requestAnimationFrame(() => setTimeout(done)), 60))"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield the system's Chromium, headless; skip the test if there is none."""
    require(CHROMIUM, "the tests of the page need Chromium (Debian package chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class ApiRequest:
    """A request of the page to the service."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    sent: Request  # Playwright's object for this request

    @property
    def json(self) -> Any:
        """The parsed JSON body."""
        return json.loads(self.body)

    @property
    def rows(self) -> npt.NDArray[np.float32]:
        """The array of the npy body."""
        array: npt.NDArray[np.float32] = np.load(io.BytesIO(self.body), allow_pickle=False)
        return array


@dataclass
class ExplorerPage:
    """The explorer in a browser page, with its API requests and console errors since the page was created."""

    page: Page
    base_url: str
    requests: list[ApiRequest] = field(default_factory=list)  # without the regular looks for new models
    errors: list[str] = field(default_factory=list)
    _pending: set[Request] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(TIMEOUT)
        self.page.on("request", self._record_request)
        self.page.on("requestfinished", self._forget_request)
        self.page.on("requestfailed", self._forget_request)
        self.page.on("console", self._record_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, query: str = "") -> None:
        """Open the view that `query` names and wait for its heading."""
        self.page.goto(self.base_url + query)
        expect(self.page.locator("#view h2")).to_be_visible()

    def requests_to(self, path: str, since: int = 0) -> list[ApiRequest]:
        """Return the requests to `path` whose index in `requests` is at least `since`."""
        return [request for request in self.requests[since:] if request.path == path]

    def expect_request(self, action: Callable[[], object], path: str, **query: str) -> ApiRequest:
        """Run `action`, wait until a request to `path` has a response with status 200, and return the request."""
        self.wait_until_idle()
        before = len(self.requests)
        action()
        for _ in range(TIMEOUT // 10):
            for request in self.requests_to(path, since=before):
                if query.items() <= request.query.items():
                    response = request.sent.response()
                    if response is not None:
                        response.finished()
                        assert response.status == 200, response.text()
                        return request
            self.page.wait_for_timeout(10)
        raise AssertionError(f"no request to {path}, only to {[request.path for request in self.requests[before:]]}")

    def wait_until_idle(self) -> None:
        """Wait until every request has its response and the page makes no new request."""
        for _ in range(TIMEOUT // 60):
            count = len(self.requests)
            self.page.evaluate(PAGE_PAUSE)
            if count == len(self.requests) and not self._pending:
                return
        raise AssertionError(f"the page does not become idle: {len(self._pending)} pending requests")

    def wait_for(self, condition: str, argument: object = None) -> None:
        """Wait until the JavaScript `condition` holds.

        `page.wait_for_function` does not work here: the Content-Security-Policy forbids it to evaluate a string.
        """
        for _ in range(TIMEOUT // 20):
            if self.page.evaluate(condition, argument):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"timed out waiting for {condition} on {self.page.url}")

    def set_slider(self, label: str, value: float) -> None:
        """Move a slider as a user does, with an input event."""
        self.page.get_by_role("slider", name=label).evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }", str(value)
        )

    def _record_request(self, request: Request) -> None:
        url = urlsplit(request.url)
        if url.scheme == "blob" or url.path.startswith("/static") or url.path == "/models":
            return
        self._pending.add(request)
        body = request.post_data_buffer or b""
        self.requests.append(ApiRequest(request.method, unquote(url.path), dict(parse_qsl(url.query)), body, request))

    def _forget_request(self, request: Request) -> None:
        self._pending.discard(request)

    def _record_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)


def click_button(page: Page, name: str) -> None:
    """Click the button with exactly this accessible name."""
    page.get_by_role("button", name=name, exact=True).click()


_PIXELS = """canvas => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  const data = new Uint32Array(copy.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
"""


def canvas_hash(page: Page, selector: str) -> int:
    """Return a hash of the pixels of a canvas."""
    script = _PIXELS + "return data.reduce((sum, value) => (Math.imul(sum, 31) + value) | 0, 0); }"
    result: int = page.locator(selector).first.evaluate(script)
    return result


def count_colours(page: Page, selector: str) -> int:
    """Return the number of distinct colours on a canvas."""
    result: int = page.locator(selector).first.evaluate(_PIXELS + "return new Set(data).size; }")
    return result


def save_npy(path: Path, rows: npt.NDArray[Any]) -> Path:
    """Write `rows` as a .npy file and return its path."""
    np.save(path, rows)
    return path
