"""The PCA view: the worked example, and the components and principal angles, compared with NumPy."""

import re

import numpy as np
from playwright.sync_api import expect

from tests.service.explorer.browser import ExplorerPage, click_button

PROJECTION = re.compile(r"−1\.6629.*−0\.2795.*1\.9424", re.DOTALL)


def test_worked_example_has_the_right_numbers(explorer: ExplorerPage) -> None:
    explorer.open("?view=pca&model=pca")
    page, text = explorer.page, explorer.page.locator(".step-text")
    expect(text).to_contain_text("Step 1")
    plot = page.locator(".step-plot")
    expect(plot).to_contain_text("column 1")
    expect(plot).to_contain_text("column 2")
    click_button(page, "5 Project")
    expect(text).to_contain_text(PROJECTION)
    expect(plot).to_contain_text("centred column 2")
    click_button(page, "Back")
    expect(text).to_contain_text("3.3081")
    expect(text).to_contain_text("0.0252")
    expect(text).to_contain_text(re.compile(r"0\.5449\s*0\.8385"))
    click_button(page, "3 Covariance")
    expect(text).to_contain_text("2.3333")
    click_button(page, "1 Data")
    page.get_by_label("row 3, column 2").fill("4")
    page.get_by_label("row 3, column 2").press("Enter")
    click_button(page, "4 Eigenvectors")
    values = np.linalg.eigvalsh(np.cov(np.array([[1, 2], [2, 3], [3, 4.0]]).T))
    expect(text).to_contain_text(f"{values[1]:.4f}")  # the second eigenvalue is 0
    click_button(page, "1 Data")
    click_button(page, "Reset")
    for _ in range(4):
        click_button(page, "Next")
    expect(text).to_contain_text(PROJECTION)
    expect(page.get_by_role("button", name="Next", exact=True)).to_be_disabled()


def test_components_and_angles_are_those_of_the_served_models(explorer: ExplorerPage, site_url: str) -> None:
    explorer.open("?view=pca&model=pca")
    page = explorer.page
    expect(page.locator(".components canvas")).to_have_count(16)
    decoded = {request.query["model"]: request.rows for request in explorer.requests_to("/decode")}
    np.testing.assert_array_equal(decoded["pca@1"], np.vstack((np.zeros(16), np.eye(16))))
    manifest = page.request.get(f"{site_url}/models/pca").json()
    share = 100 * sum(manifest["spectrum"][:16]) / manifest["total_variance"]
    expect(page.locator(".view-pca")).to_contain_text(
        f"16 of 64 components are kept. Together they explain {share:.1f} %"
    )
    click_button(page, "component 2")
    expect(page.locator(".view-pca")).to_contain_text("Component 2: change of each feature per unit of the score")
    bases = []
    for name in ("pca", "linear"):
        outputs = page.request.post(
            f"{site_url}/decode?model={name}", data={"latents": decoded["pca@1"].tolist()}
        ).json()
        x = np.array(outputs["outputs"])
        bases.append(np.linalg.qr((x[1:] - x[0]).T)[0])
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    largest = np.degrees(np.arccos(cosines.min().clip(-1, 1)))
    expect(page.locator(".view-pca")).to_contain_text(f"largest {largest:.1f}°")
    explorer.expect_request(lambda: page.get_by_label("Compare with").select_option("vae"), "/decode", model="vae@1")
    expect(page.locator(".view-pca")).to_contain_text("is nonlinear")
