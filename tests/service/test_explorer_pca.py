"""The explorer's PCA: the example by hand, and the loaded models' components and angles against numpy's."""

import re

import numpy as np
from playwright.sync_api import expect

from tests.service.browsing import Visit, press

PROJECTION = re.compile(r"−1\.6629.*−0\.2795.*1\.9424", re.DOTALL)


def test_the_example_of_pca_has_the_right_numbers(visit: Visit) -> None:
    visit.open("?view=pca&model=pca")
    page, text = visit.page, visit.page.locator(".step-text")
    expect(text).to_contain_text(PROJECTION)
    press(page, "Back")
    expect(text).to_contain_text("3.3081")
    expect(text).to_contain_text("0.0252")
    expect(text).to_contain_text(re.compile(r"0\.5449\s*0\.8385"))
    press(page, "3 Covariance")
    expect(text).to_contain_text("2.3333")
    press(page, "1 Data")
    page.get_by_label("row 3, column 2").fill("4")
    page.get_by_label("row 3, column 2").press("Enter")
    press(page, "4 Eigenvectors")
    values = np.linalg.eigvalsh(np.cov(np.array([[1, 2], [2, 3], [3, 4.0]]).T))
    expect(text).to_contain_text(f"{values[1]:.4f}")  # 2, and nothing beside it
    press(page, "1 Data")
    press(page, "The example's")
    for _ in range(4):
        press(page, "Next")
    expect(text).to_contain_text(PROJECTION)
    expect(page.get_by_role("button", name="Next", exact=True)).to_be_disabled()


def test_components_and_angles_are_those_of_the_loaded_models(visit: Visit, site: str) -> None:
    visit.open("?view=pca&model=pca")
    page = visit.page
    expect(page.locator(".components canvas")).to_have_count(16)
    decoded = {a.query["model"]: a.rows for a in visit.asked if a.path == "/decode"}
    np.testing.assert_array_equal(decoded["pca@1"], np.vstack((np.zeros(16), np.eye(16))))
    told = page.request.get(f"{site}/models/pca").json()
    share = 100 * sum(told["spectrum"][:16]) / told["total_variance"]
    expect(page.locator(".view-pca")).to_contain_text(f"16 of 64 components are kept. They carry {share:.1f} %")
    press(page, "component 2")
    expect(page.locator(".view-pca")).to_contain_text("Component 2: what one unit of its score adds")
    bases = []
    for name in ("pca", "linear"):
        outputs = page.request.post(f"{site}/decode?model={name}", data={"latents": decoded["pca@1"].tolist()}).json()
        x = np.array(outputs["outputs"])
        bases.append(np.linalg.qr((x[1:] - x[0]).T)[0])
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    largest = np.degrees(np.arccos(cosines.min().clip(-1, 1)))
    expect(page.locator(".view-pca")).to_contain_text(f"largest {largest:.1f}°")
    visit.asks(lambda: page.get_by_label("Compare with").select_option("vae"), "/decode", model="vae@1")
    expect(page.locator(".view-pca")).to_contain_text("with a curved decoder")
