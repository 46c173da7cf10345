"""The figures of a model are drawn without pyplot, and show the numbers of the model."""

import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import elbo
from elbo.errors import NotSupportedError
from elbo.model import Model
from tests.data import ROOT
from tests.elbo.conftest import Site, metric_rows
from tests.preloaded import run_preloaded
from training.errors import DataError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def web(site: Site) -> Model:
    return site.fitted["web"]


def png_of(figure: Figure) -> bytes:
    """Return the PNG that a notebook shows."""
    png: bytes = figure._repr_png_()  # type: ignore[attr-defined]  # figures of Elbo have it
    assert png.startswith(b"\x89PNG")
    return png


@pytest.mark.parametrize("name", ["web", "vae", "conditional"])
def test_every_figure_of_a_model_is_an_image_in_a_notebook(site: Site, name: str) -> None:
    model = site.fitted[name]
    rows = metric_rows(60, seed=2) if name == "web" else site.digits[:60]
    labels = ["a", "b"] * 30
    figures = [
        model.plot_samples(),
        model.plot_samples(rows, seed=3),
        model.plot_reconstructions(),
        model.plot_reconstructions(rows[:3]),
        model.plot_latents(),
        model.plot_latents(rows, labels),
        model.plot_scores(rows),
        model.plot_explanation(rows[:1]),
    ]
    sizes = {len(png_of(figure)) for figure in figures}
    assert len(sizes) > 4  # they differ


def test_figure_of_scores_shows_every_score_and_the_threshold(web: Model) -> None:
    rows = metric_rows(80, seed=6)
    rows[:8, 1] += 400
    left, right = web.plot_scores(rows, alpha=0.1).axes
    points = np.concatenate([line.get_xydata() for line in left.lines if line.get_marker() == "."])
    scores = np.full(80, np.nan)
    scores[points[:, 0].astype(int)] = points[:, 1]
    np.testing.assert_allclose(scores, web.score(rows), rtol=1e-6)
    (threshold,) = [line for line in left.lines if line.get_linestyle() == "--"]
    assert isinstance(threshold, Line2D)
    assert threshold.get_ydata() == pytest.approx([web.threshold(0.1)] * 2)
    assert left.get_title() == f"{int(web.is_anomaly(rows, alpha=0.1).sum())} of 80 rows anomalous"
    assert right.get_xlabel() == "score"


def test_figure_of_an_explanation_shows_the_largest_contributions_first(web: Model) -> None:
    row = metric_rows(1)
    row[0, 1] += 400
    (axis,) = web.plot_explanation(row, 2).axes
    (verdict,) = web.explain(row, 2)
    assert [label.get_text() for label in axis.get_yticklabels()] == [each.name for each in verdict.features]
    widths = [bar.get_width() for bar in axis.patches]  # type: ignore[attr-defined]  # bars are rectangles
    assert widths == pytest.approx([each.contribution for each in verdict.features])
    assert "expected" in axis.texts[0].get_text()
    assert " ms" in axis.texts[0].get_text()


def test_figure_of_an_explanation_shows_the_levels_of_a_column_of_text() -> None:
    load = np.random.RandomState(0).standard_normal(60)
    frame = {
        "cpu [%]": (50 + 5 * load).tolist(),
        "latency [ms]": (200 + 20 * load**2).tolist(),
        "mode": np.where(load > 0, "busy", "idle").tolist(),
    }
    model = elbo.fit(frame, "pca", category="mode", calibration="split")
    row = {name: values[:1] for name, values in frame.items()}
    (axis,) = model.plot_explanation(row).axes
    of_mode = next(each for each in model.explain(row)[0].features if each.name == "mode")
    texts = [text.get_text().strip() for text in axis.texts]
    assert f"{of_mode.value}, expected {of_mode.expected}" in texts


def test_figure_of_the_history_has_a_point_per_epoch(site: Site) -> None:
    figure = site.fitted["vae"].plot_history()
    line = figure.axes[0].lines[0]
    assert len(line.get_xdata()) == len(site.fitted["vae"].manifest.history) == 6  # type: ignore[arg-type]  # an array


def test_figures_that_need_what_the_model_lacks_raise_an_error(site: Site, web: Model) -> None:
    with pytest.raises(NotSupportedError, match="web has no history"):
        web.plot_history()
    with pytest.raises(NotSupportedError, match="hosts has no held-out rows in its artifact: pass rows to this method"):
        site.fitted["hosts"].plot_reconstructions()
    with pytest.raises(DataError, match="labels has 3 entries for 20 rows"):
        web.plot_latents(metric_rows(20), [1, 2, 3])
    with pytest.raises(DataError, match="row has 2 rows: expected one"):
        web.plot_explanation(metric_rows(2))


def test_figures_load_no_pyplot_and_leave_the_settings_of_matplotlib_alone(site: Site) -> None:
    program = f"""
import sys
import elbo, matplotlib, numpy as np
def settings():  # reading "backend" would choose a backend, and import pyplot
    return {{name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}}
before = settings()
model = elbo.load({str(site.artifacts / "web")!r})
rows = np.random.RandomState(0).standard_normal((30, 3)) * 10 + [50, 200, 3]
for figure in (model.plot_samples(), model.plot_scores(rows), model.plot_explanation(rows[:1])):
    figure._repr_png_()
print("matplotlib.pyplot" in sys.modules, settings() == before)
"""
    result = run_preloaded([sys.executable, "-c", program], cwd=ROOT, text=True)
    assert result.stdout.split() == ["False", "True"], result.stderr
