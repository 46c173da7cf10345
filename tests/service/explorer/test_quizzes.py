"""The quizzes: the page explains every answer and keeps it in the address."""

import pytest
from playwright.sync_api import expect

from tests.service.explorer.browser import ExplorerPage


@pytest.mark.parametrize(("quiz", "wrong", "right"), [("Quiz 1", 0, 1), ("Quiz 2", 1, 2)])
def test_answer_is_explained_and_kept_in_the_address(explorer: ExplorerPage, quiz: str, wrong: int, right: int) -> None:
    explorer.open("?view=quizzes")
    card = explorer.page.locator(".quiz", has=explorer.page.get_by_role("heading", name=quiz))
    card.get_by_role("radio").nth(wrong).check()
    expect(card.locator(".feedback")).to_contain_text("✗")
    card.get_by_role("radio").nth(right).check()
    expect(card.locator(".feedback")).to_contain_text("✓ Right.")
    explorer.wait_for(f"location.search.includes('={right}')")
    explorer.page.reload()
    expect(card.locator(".feedback")).to_contain_text("✓ Right.")
    card.get_by_role("button", name="Try again").click()
    expect(card.locator(".feedback")).to_be_empty()
