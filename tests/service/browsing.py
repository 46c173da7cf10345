"""A real Chromium on the real service: what the page shows, what it asked, what the console said."""

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
SOON = 10_000  # ms: what is expected on the page comes within this, or never
expect.set_options(timeout=SOON)
MOMENT = "() => new Promise(done => setTimeout(() => requestAnimationFrame(() => setTimeout(done)), 60))"
MAP = ".map-card .map canvas:last-child"
OUTPUT = ".point-card .output canvas"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, headless, until the block ends."""
    require(CHROMIUM, "the page's tests need Chromium (Debian's package chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Asked:
    """A request that the page made of the service."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    request: Request

    @property
    def json(self) -> Any:
        """Its JSON body."""
        return json.loads(self.body)

    @property
    def rows(self) -> npt.NDArray[np.float32]:
        """Its npy body."""
        array: npt.NDArray[np.float32] = np.load(io.BytesIO(self.body), allow_pickle=False)
        return array


@dataclass
class Visit:
    """One page, from its opening: everything that it asked of the service, everything that went wrong."""

    page: Page
    base: str
    asked: list[Asked] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    _open: set[Request] = field(default_factory=set)  # what it asks and has no answer to yet

    def __post_init__(self) -> None:
        self.page.set_default_timeout(SOON)
        self.page.on("request", self._note)
        self.page.on("requestfinished", self._end)
        self.page.on("requestfailed", self._end)
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))

    def open(self, query: str = "") -> None:
        """The view that `query` names, once it stands."""
        self.page.goto(self.base + query)
        expect(self.page.locator("#view h2")).to_be_visible()

    def asks(self, act: Callable[[], object], path: str, **query: str) -> Asked:
        """What the page asks at `path` in consequence of `act`; the answer has come and is no error."""
        self.settle()
        seen = len(self.asked)
        act()
        deadline = SOON
        while deadline > 0:
            for asked in self.asked[seen:]:
                if asked.path == path and query.items() <= asked.query.items():
                    response = asked.request.response()
                    if response is not None:
                        response.finished()
                        assert response.status == 200, response.text()
                        return asked
            self.page.wait_for_timeout(10)
            deadline -= 10
        raise AssertionError(f"the page did not ask {path}, but {[a.path for a in self.asked[seen:]]}")

    def settle(self) -> None:
        """Wait until all is answered and the page asks nothing new for a moment, of its own time however busy it is."""
        for _ in range(SOON // 60):
            count = len(self.asked)
            self.page.evaluate(MOMENT)
            if count == len(self.asked) and not self._open:
                return
        raise AssertionError(f"the page does not come to rest: {len(self._open)} requests under way")

    def until(self, condition: str, argument: object = None) -> None:
        """Wait until the JavaScript `condition` holds. Playwright's own waiting evaluates text: the policy bars it."""
        for _ in range(SOON // 20):
            if self.page.evaluate(condition, argument):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"waited in vain for {condition} on {self.page.url}")

    def slide(self, label: str, value: float) -> None:
        """Move the range that is called `label` to `value`, as a hand does: input events."""
        self.page.get_by_role("slider", name=label).evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }", str(value)
        )

    def _note(self, request: Request) -> None:
        url = urlsplit(request.url)
        if url.scheme == "blob" or url.path.startswith("/static"):
            return
        self._open.add(request)
        body = request.post_data_buffer or b""
        self.asked.append(Asked(request.method, unquote(url.path), dict(parse_qsl(url.query)), body, request))

    def _end(self, request: Request) -> None:
        self._open.discard(request)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(message.text)


def press(page: Page, name: str) -> None:
    """Click the button that is called `name`."""
    page.get_by_role("button", name=name, exact=True).click()


_PIXELS = """canvas => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  const data = new Uint32Array(copy.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
"""


def ink(page: Page, selector: str) -> int:
    """A fingerprint of what a canvas shows."""
    script = _PIXELS + "return data.reduce((sum, value) => (Math.imul(sum, 31) + value) | 0, 0); }"
    found: int = page.locator(selector).first.evaluate(script)
    return found


def colours(page: Page, selector: str) -> int:
    """How many different colours a canvas shows."""
    found: int = page.locator(selector).first.evaluate(_PIXELS + "return new Set(data).size; }")
    return found


def write_rows(path: Path, rows: npt.NDArray[Any]) -> Path:
    """`rows` as a .npy file for the page to read."""
    np.save(path, rows)
    return path
