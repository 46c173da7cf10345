"""The anomaly view replays a history that is dropped on it, and draws the alerts."""

import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, Page, expect

from service.app import create_app
from service.settings import Settings
from tests.service.explorer.browser import ExplorerPage
from tests.service.running import running
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.table import read_table
from training.train import train

START = 1_767_225_600  # 2026-01-01
INCIDENT = range(200, 230)  # minutes of host b
KNOWN = "start,end,host\n2026-01-01T03:20:00Z,2026-01-01T03:29:00Z,b\n2026-01-01 00:10:00,2026-01-01 00:11:00,a\n"


def metrics_csv(rows: int, start: int, seed: int, incident: range = range(0)) -> str:
    """Return rows of two hosts as CSV, a row a minute. In the incident, the disk of host b is far too full."""
    random = np.random.default_rng(seed)
    lines = ["ts,host,cpu,disk,load"]
    for minute in range(rows):
        for host in ("a", "b"):
            cpu, disk, load = random.normal(size=3)
            disk += 9 if host == "b" and minute in incident else 0
            moment = datetime.fromtimestamp(start + 60 * minute, UTC).isoformat()
            lines.append(f"{moment},{host},{cpu:.4f},{disk:.4f},{load + cpu:.4f}")
    return "\n".join(lines) + "\n"


def drop(page: Page, name: str, content: str) -> None:
    """Drop a file on the card, as a file manager does."""
    transfer = page.evaluate_handle(
        """([name, content]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([content], name));
            return transfer;
        }""",
        [name, content],
    )
    card = page.locator("section.rehearsal")
    card.dispatch_event("dragover", {"dataTransfer": transfer})
    expect(card).to_have_class(re.compile("drop-target"))
    card.dispatch_event("drop", {"dataTransfer": transfer})
    expect(card).not_to_have_class(re.compile("drop-target"))


def test_dropped_history_shows_the_alerts_of_each_group_and_errors_say_what_to_do(
    browser: Browser, tmp_path: Path
) -> None:
    (tmp_path / "train.csv").write_text(metrics_csv(500, START - 10**6, 0))
    table = read_table(str(tmp_path / "train.csv"), time="ts", group="host")
    config = TrainConfig(model="pca", name="fleet", latents=2, time="ts", group="host")
    train(config, table, tmp_path / "a", RecordingReporter())
    settings = Settings(artifacts=tmp_path / "a", log_level="error", backend="torchscript", max_rows=1000)
    with running(create_app(settings)) as client, browser.new_context() as context:
        explorer = ExplorerPage(context.new_page(), str(client.base_url))
        page = explorer.page
        explorer.open("?view=anomaly&model=fleet")
        card = page.locator("section.rehearsal")
        drop(page, "history.csv", metrics_csv(400, START, 1, INCIDENT))
        expect(card.get_by_role("status")).to_contain_text("in 800 rows of 2 groups, 2026-01-01 00:00:00 to")
        by_alpha = card.get_by_role("region", name="alerts by α").locator("tbody tr")
        expect(by_alpha).to_have_count(3)
        groups = card.get_by_role("region", name="alerts by group").locator("tbody tr")
        expect(groups).to_have_count(2)
        expect(groups.first).to_contain_text("b400")  # the group with most alerts
        drawings = card.get_by_role("img", name="severity over time")
        expect(drawings).to_have_count(2)
        assert drawings.first.locator("rect.alert").count() >= 1
        worst = card.locator("figure", has_text="expected").first
        expect(worst).to_contain_text(re.compile(r"b, 2026-01-01 03:2\d:00: severity .* disk 1?\d(\.\d+)? \(expected"))
        assert "around the alert" in (worst.get_by_role("img").get_attribute("aria-label") or "")
        colour = "element => getComputedStyle(element).fill"
        assert worst.locator("rect.alert").evaluate(colour) not in ("rgb(0, 0, 0)", "none")
        expect(card.get_by_role("heading", name="Worst alerts")).to_be_visible()
        drop(page, "incidents.csv", KNOWN)
        incidents = card.get_by_role("region", name="known incidents").locator("tbody tr")
        expect(incidents).to_have_count(2)
        expect(incidents.nth(0)).to_have_text(re.compile(r"2026-01-01 03:20:00 ?2026-01-01 03:29:00 ?b ?\d"))
        expect(incidents.nth(1)).to_contain_text(re.compile(r"2026-01-01 00:10:00.*a.*not found"))
        head = card.get_by_role("region", name="alerts by α").locator("thead")
        expect(head).to_contain_text("incidents found")
        expect(card.get_by_role("heading", name="Worst")).to_have_count(0)  # there is no false alert to list
        assert card.get_by_role("img", name="severity over time").first.locator("rect.known").count() == 1
        page.screenshot(path=tmp_path / "rehearsal.png", full_page=True)
        assert explorer.errors == []
        for name, content, message in (
            ("history.txt", "ts\n", "history.txt is neither a CSV nor an NDJSON file."),
            ("history.csv", "cpu,disk,load\n1,2,3\n", "No row has a time"),
            ("history.csv", "ts,memory\n1,2\n", "missing from the CSV header"),
            ("large.csv", metrics_csv(600, START, 2), "use the command elbo backtest fleet large.csv"),
        ):
            drop(page, name, content)
            expect(card.get_by_role("alert")).to_contain_text(message)
        with page.expect_request("**/backtest?**") as sent:
            card.get_by_label("Column of times").fill("when")
            card.get_by_label("Column of times").press("Enter")
        assert "time=when" in sent.value.url
