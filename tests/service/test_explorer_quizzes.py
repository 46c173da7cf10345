"""The explorer's quizzes: each answer is explained."""

import pytest
from playwright.sync_api import expect

from tests.service.browsing import Visit


@pytest.mark.parametrize(("quiz", "wrong", "right"), [("Quiz 1", 0, 1), ("Quiz 2", 1, 2)])
def test_an_answer_is_explained(visit: Visit, quiz: str, wrong: int, right: int) -> None:
    visit.open("?view=quizzes")
    card = visit.page.locator(".quiz", has=visit.page.get_by_role("heading", name=quiz))
    card.get_by_role("radio").nth(wrong).check()
    expect(card.locator(".verdict")).to_contain_text("✗")
    card.get_by_role("radio").nth(right).check()
    expect(card.locator(".verdict")).to_contain_text("✓ Right.")
    visit.until(f"location.search.includes('={right}')")
    visit.page.reload()
    expect(card.locator(".verdict")).to_contain_text("✓ Right.")
    card.get_by_role("button", name="Try again").click()
    expect(card.locator(".verdict")).to_be_empty()
