"""The anomaly view: the verdict on a row, a varied feature, and a batch from a file."""

import json
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.sync_api import expect

from tests.plain_http import NO_AUTHORITIES
from tests.service.explorer.browser import ExplorerPage, click_button, save_npy
from tests.service.scrape import scrape, total


def test_verdict_depends_on_alpha_on_the_row_and_on_a_varied_feature(explorer: ExplorerPage) -> None:
    explorer.open("?view=anomaly&model=hosts")
    page = explorer.page
    request = explorer.expect_request(lambda: click_button(page, "next row"), "/anomaly", model="hosts@1")
    assert request.json["explain"] == 4
    expect(page.locator(".verdict")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("histogram of calibration scores; threshold"))).to_be_visible()
    expect(page.locator("table.contributions tbody tr")).to_have_count(4)
    request = explorer.expect_request(lambda: explorer.set_slider("α", -2), "/anomaly")
    assert request.json["alpha"] == pytest.approx(0.01)
    expect(page.locator(".view-anomaly")).to_contain_text("At this α, no row is called anomalous")  # 1/81 > 0.01
    request = explorer.expect_request(lambda: explorer.set_slider("α", -1), "/anomaly")
    assert request.json["alpha"] == pytest.approx(0.1)
    before = len(explorer.requests)
    page.locator("table.contributions").get_by_role("button", name="load").click()
    expect(page.get_by_role("img", name="score over values of load")).to_be_visible()
    batches = [np.array(request.json["inputs"]) for request in explorer.requests_to("/anomaly", since=before)]
    varied = max(batches, key=len)
    assert len(varied) == 41
    assert (np.ptp(varied, axis=0) > 0).tolist() == [False, False, False, True]
    request = explorer.expect_request(lambda: explorer.set_slider("load", 60), "/anomaly")
    assert request.json["inputs"][0][3] == pytest.approx(varied[-1, 3])  # the slider stops at the end of the range
    expect(page.locator(".verdict")).to_have_text("Anomalous")
    click_button(page, "Reset")
    expect(page.locator(".verdict")).to_have_text("Normal")
    page.get_by_label("Feature").select_option("0")
    expect(page.get_by_role("img", name="score over values of cpu")).to_be_visible()


def test_click_on_a_pixel_selects_its_feature(explorer: ExplorerPage) -> None:
    explorer.open("?view=anomaly&model=vae")
    page = explorer.page
    row_image = page.locator(".image-row canvas").first
    expect(page.locator(".image-row canvas")).to_have_count(3)
    box = row_image.bounding_box()
    assert box
    row_image.click(position={"x": box["width"] * 2.5 / 8, "y": box["height"] * 4.5 / 8})
    expect(page.get_by_label("Feature")).to_have_value(str(4 * 8 + 2))
    expect(page.get_by_role("img", name="score over values of pixel[4,2]")).to_be_visible()


def test_batch_lists_the_most_anomalous_rows_first(explorer: ExplorerPage, tmp_path: Path, digits: np.ndarray) -> None:
    explorer.open("?view=anomaly&model=vae")
    page = explorer.page
    request = explorer.expect_request(lambda: click_button(page, "Use the held-out rows"), "/anomaly")
    if len(request.json["inputs"]) == 1:
        request = next(other for other in explorer.requests_to("/anomaly")[::-1] if len(other.json["inputs"]) > 1)
    assert len(request.json["inputs"]) == 180
    expect(page.locator(".view-anomaly")).to_contain_text("of 180 rows are anomalous")
    rows = np.vstack((digits[:5], np.random.RandomState(0).uniform(size=(1, 64)), digits[5:9])).astype("f4")
    file = save_npy(tmp_path / "batch.npy", rows)
    page.get_by_label("file of rows to score").set_input_files(file)
    expect(page.locator(".view-anomaly")).to_contain_text("of 10 rows are anomalous")
    first = page.locator("table.batch tbody tr").first
    expect(first.locator("th")).to_have_text("5")  # the noise
    expect(first).to_contain_text("anomalous")
    before = len(explorer.requests)
    page.get_by_label("control the false discovery rate").check()
    explorer.wait_until_idle()
    assert [request.json.get("fdr") for request in explorer.requests_to("/anomaly", since=before)] == [0.05]
    request = explorer.expect_request(lambda: click_button(page, "inspect row 5"), "/anomaly")
    np.testing.assert_allclose(request.json["inputs"][0], rows[5], atol=1e-6)
    expect(page.locator(".verdict")).to_have_text("Anomalous")


def test_csv_columns_are_matched_by_name(explorer: ExplorerPage, tmp_path: Path) -> None:
    explorer.open("?view=anomaly&model=hosts")
    page = explorer.page
    expect(page.locator(".verdict")).to_be_visible()
    (tmp_path / "rows.csv").write_text("load,cpu,memory/used,disk~io\n0,0,100,0\n90,0,100,0\n")
    page.get_by_label("file of rows to score").set_input_files(tmp_path / "rows.csv")
    expect(page.locator("table.batch tbody tr").first).to_contain_text("load")
    (tmp_path / "short.csv").write_text("load,cpu\n0,0\n")
    page.get_by_label("file of rows to score").set_input_files(tmp_path / "short.csv")
    expect(page.get_by_role("alert")).to_have_text("The header lacks memory/used, disk~io.")


def test_keys_of_json_records_may_have_units_and_must_be_known_if_a_feature_is_absent(
    explorer: ExplorerPage, tmp_path: Path
) -> None:
    explorer.open("?view=anomaly&model=hosts")
    record = {"load": 90, "cpu [%]": 0, "memory/used [MB]": 100, "disk~io": 0, "timestamp": 1, "rack": "a"}
    (tmp_path / "rows.json").write_text(json.dumps([record, record | {"load": 0}]))
    choose = explorer.page.get_by_label("file of rows to score").set_input_files
    request = explorer.expect_request(lambda: choose(tmp_path / "rows.json"), "/anomaly")
    assert request.json["inputs"] == [[0, 100, 0, 90], [0, 100, 0, 0]]
    (tmp_path / "other.json").write_text(json.dumps([{"laod": 90, "cpu": 0, "memory/used": 100, "disk~io": 0}]))
    choose(tmp_path / "other.json")
    expect(explorer.page.get_by_role("alert")).to_have_text("A record lacks load, and laod is not a feature.")


def test_only_the_first_5000_rows_of_a_long_file_are_scored_and_a_note_says_so(
    explorer: ExplorerPage, tmp_path: Path
) -> None:
    explorer.open("?view=anomaly&model=hosts")
    file = save_npy(tmp_path / "long.npy", np.full((5001, 4), [0, 0, 100, 0], np.float32))
    explorer.page.get_by_label("file of rows to score").set_input_files(file)
    note = "of 5000 rows are anomalous (the first of 5001 in the file"
    expect(explorer.page.locator(".view-anomaly")).to_contain_text(note)


def test_anomaly_view_counts_no_row_as_live_traffic(explorer: ExplorerPage, site_url: str) -> None:
    """A visitor who looks at abnormal rows must not raise an alert."""
    with httpx.Client(verify=NO_AUTHORITIES, base_url=site_url) as client:
        before = scrape(client)
        explorer.open("?view=anomaly&model=hosts")
        page = explorer.page
        expect(page.locator(".verdict")).to_be_visible()
        page.get_by_label("Feature").select_option("0")
        expect(page.get_by_role("img", name="score over values of cpu")).to_be_visible()
        explorer.expect_request(lambda: click_button(page, "Use the held-out rows"), "/anomaly")
        expect(page.locator(".view-anomaly")).to_contain_text("rows are anomalous")
        after = scrape(client)
    for name in ("elbo_scored_rows_total", "elbo_alarms_total", "elbo_anomalies_total", "elbo_p_value_count"):
        assert total(after, name) == total(before, name), name
    assert total(after, "elbo_unobserved_rows_total") - total(before, "elbo_unobserved_rows_total") > 40
