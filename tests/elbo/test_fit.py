"""`elbo.fit`: the model of `elbo train`, options with their names, and errors that say what to do."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import elbo
from elbo.errors import ElboWarning, OptionError
from elbo.notes import warn_of
from models.manifest import read_manifest
from tests.elbo.conftest import metric_rows, series
from training.config import TrainConfig
from training.data.table import read_table
from training.errors import DataError, FitError
from training.progress import SilentReporter
from training.train import train

pytestmark = pytest.mark.slow

ROWS = metric_rows(200)


@pytest.mark.parametrize("kind", ["ae", "ensemble"])
@pytest.mark.filterwarnings("ignore::elbo.errors.ElboWarning")  # few epochs: PCA is better
def test_fitted_model_has_the_weights_that_elbo_train_publishes(kind: Any, tmp_path: Path) -> None:
    pd.DataFrame(ROWS, columns=["a", "b", "c"]).to_csv(tmp_path / "rows.csv", index=False)
    options: dict[str, Any] = {"latents": 1, "hidden": (8,), "epochs": 3, "seed": 5, "calibration": "split"}
    path = train(
        TrainConfig(model=kind, name="web", **options),
        read_table(str(tmp_path / "rows.csv")),
        tmp_path,
        SilentReporter(),
    )
    model = elbo.fit(pd.DataFrame(ROWS, columns=["a", "b", "c"]), kind, name="web", **options)
    expected = read_manifest(path)
    assert model.manifest.weights_sha256 == expected.weights_sha256
    assert model.manifest.metrics == expected.metrics
    assert model.manifest.features == expected.features
    assert model.manifest.training == expected.training


def test_small_tables_are_calibrated_on_all_rows_as_on_the_command_line() -> None:
    model = elbo.fit(ROWS, "pca")
    assert (model.manifest.calibration.method, model.manifest.calibration.rows) == ("cross", 200)


def test_options_for_columns_take_one_name_or_several() -> None:
    frame = pd.DataFrame(ROWS, columns=["a", "b", "c"]).assign(id=range(200))
    for drop in ("id", ["id"], ("id", "c")):
        assert "id" not in elbo.fit(frame, "pca", drop=drop).feature_names


def test_rows_with_times_are_split_by_time() -> None:
    model = elbo.fit(series(60), "pca", time="time", group="host")
    assert model.manifest.timeline is not None
    assert (model.manifest.timeline.group_column, model.manifest.timeline.groups) == ("host", 2)
    assert model.feature_names == ["cpu", "latency", "errors"]


def test_policy_in_a_file_is_the_policy_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text('[features.c]\ndirection = "high"\n')
    frame = pd.DataFrame(ROWS, columns=["a", "b", "c"])
    model = elbo.fit(frame, "pca", policy=tmp_path / "policy.toml")
    low, high = ROWS[:1].copy(), ROWS[:1].copy()
    low[0, 2], high[0, 2] = -60, 60
    assert model.p_value(low)[0] > 0.05 > model.p_value(high)[0]


def test_warnings_about_the_rows_are_warnings_of_python_and_notes_of_the_model() -> None:
    rows = np.random.RandomState(0).standard_normal((300, 2)).cumsum(axis=0).astype(np.float32)
    with pytest.warns(ElboWarning, match="rows that follow each other in the file resemble each other"):
        model = elbo.fit(rows, "pca", calibration="split")
    assert any("train with time COLUMN" in note for note in model.notes)


def test_notes_that_are_warnings_in_any_letters_are_warnings_of_python() -> None:
    with pytest.warns(ElboWarning) as issued:
        warn_of(["WARNING: rows repeat", "warning: PCA is better", "3 rows are copies"], stacklevel=1)
    assert [str(each.message) for each in issued] == ["rows repeat", "PCA is better"]
    assert {each.filename for each in issued} == {__file__}


@pytest.mark.filterwarnings("ignore::elbo.errors.ElboWarning")  # two epochs are too few
def test_progress_is_written_to_standard_error_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    elbo.fit(ROWS, "ae", epochs=2, hidden=[4], calibration="split")
    assert capsys.readouterr() == ("", "")
    elbo.fit(ROWS, "ae", epochs=2, hidden=[4], calibration="split", progress=True)
    output, progress = capsys.readouterr()
    assert output == ""
    assert "training" in progress
    assert "100 %  epoch 2" in progress


@pytest.mark.filterwarnings("ignore::elbo.errors.ElboWarning")
def test_progress_in_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    elbo.fit(ROWS, "ae", epochs=2, hidden=[4], calibration="split", progress=True)
    assert "\x1b[" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


fit: Any = elbo.fit  # mypy would refuse the wrong options, too
FRAME = pd.DataFrame(ROWS, columns=["cpu", "latency", "errors"])
WITH_COUNTER = FRAME.assign(counter=range(200))


@pytest.mark.parametrize(
    ("run", "kind", "message"),
    [
        (lambda: fit(ROWS, "pca", latnts=2), OptionError, "there is no option 'latnts': did you mean 'latents'?"),
        (lambda: fit(ROWS, "pca", zzz=2), OptionError, "there is no option 'zzz': expected one of seed, latents"),
        (lambda: fit(ROWS, "pca", model="ae"), OptionError, "there is no option 'model'"),
        (lambda: fit(ROWS, "pcb"), OptionError, "kind: .*'pca', 'ae', 'vae', 'ensemble' or 'auto', got 'pcb'"),
        (lambda: fit(ROWS, "pca", latents=0), OptionError, "latents: .*greater than or equal to 1, got 0"),
        (lambda: fit(ROWS, "pca", name="a/b"), OptionError, "name: .*got 'a/b'"),
        (lambda: fit(ROWS, "pca", window=5), OptionError, "window: expected time too"),
        (lambda: fit(FRAME, "pca", time="tim"), DataError, "data has no column 'tim' for time"),
        (lambda: fit(ROWS, "pca", time="time"), DataError, "time names a column, and data has no named columns"),
        (lambda: fit(WITH_COUNTER, "pca"), DataError, r"add drop=\['counter'\], or keep=\['counter'\] to learn"),
        (lambda: fit(ROWS[:5], "pca"), DataError, "expected at least 10 rows"),
        (lambda: fit(ROWS, "pca", latents=9), FitError, "9 latents|latents"),
    ],
)
def test_wrong_options_and_rows_raise_a_one_line_error_in_terms_of_python(
    run: Callable[[], object], kind: type[elbo.ElboError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value)


def test_fit_changes_neither_its_rows_nor_its_options() -> None:
    rows, drop = ROWS.copy(), ["x[2]"]
    elbo.fit(rows, "pca", drop=drop)
    assert np.array_equal(rows, ROWS)
    assert drop == ["x[2]"]
