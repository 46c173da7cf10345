"""The page asks for an API key if the server needs one, keeps it for the tab, and forgets it on request."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, expect

from service.app import create_app
from service.settings import Settings
from tests.data import ROOT
from tests.service.access.keys import KeySet, one_key_per_scope
from tests.service.explorer.browser import MAP, TIMEOUT, click_button
from tests.service.running import running

SCREENSHOTS = ROOT / "screenshots"


@pytest.fixture
def keys(tmp_path: Path) -> KeySet:
    return one_key_per_scope(tmp_path / "keys.toml")


@pytest.fixture
def guarded(artifacts: Path, keys: KeySet) -> Iterator[str]:
    """Yield the URL of a service that needs keys."""
    options = Settings(artifacts=artifacts, api_keys_file=keys.path, log_level="error", poll_seconds=0.05)
    with running(create_app(options)) as client:
        yield str(client.base_url)


@contextmanager
def page_of(browser: Browser) -> Iterator[Page]:
    """Yield a page of a new browser context. Without a valid key, its API requests get status 401 or 403."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        yield page


def type_key(page: Page, value: str) -> None:
    page.get_by_label("API key", exact=True).fill(value)
    click_button(page, "Use this key")


def heading(page: Page, text: str) -> None:
    expect(page.locator("#view h2").first).to_have_text(text)


def test_page_asks_for_a_key_and_works_with_it_until_the_user_forgets_it(
    browser: Browser, guarded: str, keys: KeySet
) -> None:
    sent: list[Request] = []

    def record(request: Request) -> None:
        sent.append(request)

    with page_of(browser) as page:
        page.on("request", record)
        page.goto(f"{guarded}?view=latent&model=vae")
        heading(page, "API key")
        assert [fault["id"] for fault in Axe().run(page).response["violations"]] == []
        expect(page.get_by_role("alert")).to_have_count(0)
        expect(page.get_by_role("button", name="Forget key")).to_be_hidden()
        SCREENSHOTS.mkdir(exist_ok=True)
        page.screenshot(path=SCREENSHOTS / "key.png")

        type_key(page, "elbo_wrong")
        expect(page.get_by_role("alert")).to_contain_text("The API key is not valid")
        page.screenshot(path=SCREENSHOTS / "key-refused.png")

        type_key(page, f"  {keys.values['admin']} ")
        heading(page, "Latent space")
        expect(page.locator(MAP)).to_be_visible()
        with page.expect_response("**/decode**") as decoded:
            page.locator(MAP).click(position={"x": 150, "y": 150})
        assert decoded.value.status == 200
        page.screenshot(path=SCREENSHOTS / "key-accepted.png")
        bearer = f"Bearer {keys.values['admin']}"
        assert decoded.value.request.headers["authorization"] == bearer
        assert all(keys.values["admin"] not in request.url for request in sent)
        assert page.evaluate("JSON.stringify(localStorage)").find("elbo_") == -1
        assert page.evaluate("document.cookie") == ""
        expect(page.get_by_role("link", name="Metrics", exact=True)).to_be_hidden()

        page.reload()
        heading(page, "Latent space")  # the tab still has the key
        with page_of(browser) as other_tab:
            other_tab.goto(guarded)
            heading(other_tab, "API key")

        click_button(page, "Forget key")
        heading(page, "API key")
        assert page.evaluate("sessionStorage.length") == 0


def test_page_asks_again_when_its_key_is_removed(browser: Browser, guarded: str, keys: KeySet) -> None:
    with page_of(browser) as page:
        page.goto(guarded)
        type_key(page, keys.values["infer"])
        heading(page, "Models")
        keys.remove("infer")
        heading(page, "API key")
        expect(page.get_by_role("alert")).to_contain_text("The API key is not valid")
        type_key(page, keys.values["admin"])
        heading(page, "Models")


def test_page_says_which_scope_its_key_lacks(browser: Browser, guarded: str, keys: KeySet) -> None:
    with page_of(browser) as page:
        page.goto(guarded)
        type_key(page, keys.values["metrics"])
        heading(page, "API key")
        expect(page.get_by_role("alert")).to_contain_text("does not have the scope infer")


@pytest.mark.parametrize("view", ["latent", "reconstruct", "anomaly", "pca", "training"])
def test_view_works_with_a_key_that_may_not_read_rows_of_the_training_data(
    browser: Browser, guarded: str, keys: KeySet, view: str
) -> None:
    with page_of(browser) as page:
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(guarded)
        type_key(page, keys.values["infer"])
        heading(page, "Models")
        page.goto(f"{guarded}?view={view}&model=vae")
        expect(page.locator("#view h2").first).not_to_have_text("API key")
        page.wait_for_load_state("networkidle")
        expect(page.locator(".error")).to_have_count(0)
        assert faults == []


def test_key_that_cannot_be_sent_is_refused_by_the_form(browser: Browser, guarded: str) -> None:
    is_valid: Callable[[Page], bool] = lambda page: page.evaluate("document.getElementById('api-key').validity.valid")  # noqa: E731
    with page_of(browser) as page:
        page.goto(guarded)
        type_key(page, "schlüssel")
        assert not is_valid(page)
        heading(page, "API key")
        assert page.evaluate("sessionStorage.length") == 0


def test_page_of_a_server_without_keys_asks_for_none(browser: Browser, artifacts: Path) -> None:
    options = Settings(artifacts=artifacts, log_level="error")
    with running(create_app(options)) as client, page_of(browser) as page:
        page.goto(str(client.base_url))
        heading(page, "Models")
        expect(page.get_by_role("button", name="Forget key")).to_be_hidden()
        expect(page.get_by_role("link", name="Metrics", exact=True)).to_be_visible()
