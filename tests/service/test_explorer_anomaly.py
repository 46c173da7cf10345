"""The explorer's verdicts: one row and why, a feature perturbed, a batch from a file."""

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.service.browsing import Visit, press, write_rows


def test_a_verdict_is_shown_and_a_feature_perturbed(visit: Visit) -> None:
    visit.open("?view=anomaly&model=hosts")
    page = visit.page
    asked = visit.asks(lambda: press(page, "next row"), "/anomaly", model="hosts@1")
    assert asked.json["explain"] == 4
    expect(page.locator(".stamp")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("histogram of calibration scores; threshold"))).to_be_visible()
    expect(page.locator("table.reasons tbody tr")).to_have_count(4)
    asked = visit.asks(lambda: visit.slide("α", -2), "/anomaly")
    assert asked.json["alpha"] == pytest.approx(0.01)
    seen = len(visit.asked)
    page.locator("table.reasons").get_by_role("button", name="load").click()
    expect(page.get_by_role("img", name="score over values of load")).to_be_visible()
    sweep = next(a.json for a in visit.asked[seen:] if a.path == "/anomaly" and len(a.json["inputs"]) > 1)
    varied = np.array(sweep["inputs"])
    assert len(varied) == 41
    assert (np.ptp(varied, axis=0) > 0).tolist() == [False, False, False, True]
    asked = visit.asks(lambda: visit.slide("load", 60), "/anomaly")
    assert asked.json["inputs"][0][3] == pytest.approx(varied[-1, 3])  # at the end of its range
    expect(page.locator(".stamp")).to_have_text("Anomalous")
    press(page, "As it was")
    expect(page.locator(".stamp")).to_have_text("Normal")
    page.get_by_label("Feature").select_option("0")
    expect(page.get_by_role("img", name="score over values of cpu")).to_be_visible()


def test_a_pixel_is_perturbed_by_clicking_it(visit: Visit) -> None:
    visit.open("?view=anomaly&model=vae")
    page = visit.page
    seen_row = page.locator(".triple canvas").first
    expect(page.locator(".triple canvas")).to_have_count(3)
    box = seen_row.bounding_box()
    assert box
    seen_row.click(position={"x": box["width"] * 2.5 / 8, "y": box["height"] * 4.5 / 8})
    expect(page.get_by_label("Feature")).to_have_value(str(4 * 8 + 2))
    expect(page.get_by_role("img", name="score over values of pixel[4,2]")).to_be_visible()


def test_a_batch_lists_the_strangest_first(visit: Visit, tmp_path: Path, digits: np.ndarray) -> None:
    visit.open("?view=anomaly&model=vae")
    page = visit.page
    asked = visit.asks(lambda: press(page, "The held-out rows"), "/anomaly")
    if len(asked.json["inputs"]) == 1:
        asked = next(a for a in visit.asked[::-1] if a.path == "/anomaly" and len(a.json["inputs"]) > 1)
    assert len(asked.json["inputs"]) == 180
    expect(page.locator(".view-anomaly")).to_contain_text("of 180 rows are anomalous")
    rows = np.vstack((digits[:5], np.random.RandomState(0).uniform(size=(1, 64)), digits[5:9])).astype("f4")
    file = write_rows(tmp_path / "batch.npy", rows)
    page.get_by_label("a file of rows to judge").set_input_files(file)
    expect(page.locator(".view-anomaly")).to_contain_text("of 10 rows are anomalous")
    first = page.locator("table.batch tbody tr").first
    expect(first.locator("th")).to_have_text("5")  # the noise
    expect(first).to_contain_text("anomalous")
    seen = len(visit.asked)
    page.get_by_label("control the false discovery rate").check()
    visit.settle()
    assert [a.json.get("fdr") for a in visit.asked[seen:] if a.path == "/anomaly"] == [0.05]
    asked = visit.asks(lambda: press(page, "look at row 5"), "/anomaly")
    np.testing.assert_allclose(asked.json["inputs"][0], rows[5], atol=1e-6)
    expect(page.locator(".stamp")).to_have_text("Anomalous")


def test_a_file_of_tables_is_read_by_its_header(visit: Visit, tmp_path: Path) -> None:
    visit.open("?view=anomaly&model=hosts")
    page = visit.page
    expect(page.locator(".stamp")).to_be_visible()
    (tmp_path / "rows.csv").write_text("load,cpu,memory/used,disk~io\n0,0,100,0\n90,0,100,0\n")
    page.get_by_label("a file of rows to judge").set_input_files(tmp_path / "rows.csv")
    expect(page.locator("table.batch tbody tr").first).to_contain_text("load")
    (tmp_path / "short.csv").write_text("load,cpu\n0,0\n")
    page.get_by_label("a file of rows to judge").set_input_files(tmp_path / "short.csv")
    expect(page.get_by_role("alert")).to_have_text("The header lacks memory/used, disk~io.")


def test_a_file_too_long_for_a_batch_is_said_to_be_cut(visit: Visit, tmp_path: Path) -> None:
    visit.open("?view=anomaly&model=hosts")
    file = write_rows(tmp_path / "long.npy", np.full((5001, 4), [0, 0, 100, 0], np.float32))
    visit.page.get_by_label("a file of rows to judge").set_input_files(file)
    told = "of 5000 rows are anomalous (the first of 5001 in the file"
    expect(visit.page.locator(".view-anomaly")).to_contain_text(told)
