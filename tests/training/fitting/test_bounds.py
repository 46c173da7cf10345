"""Bounds and whole numbers of samples and imputed values."""

from typing import Literal

import polars as pl
import pytest
import torch

from models.completion import CompletingPipeline
from models.observation import Observation
from tests.mixed_tables import mixed_frame
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.readers import InMemory
from training.data.table import read_table
from training.errors import FitError
from training.fitting.observation import set_bounds
from training.progress import SilentReporter
from training.train import fit_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return mixed_frame(300)


def test_given_bounds_limit_samples_and_imputed_values_and_stay_in_the_artifact(frame: pl.DataFrame) -> None:
    config = TrainConfig(model="pca", name="bounds", bounds=("cpu=25:60", "mem=:20", "count=3:"))
    model = fit_model(config, read_table(InMemory(frame)), SilentReporter()).model
    assert isinstance(model, CompletingPipeline)
    names = ["cpu", "mem", "secure", "count"]
    random = torch.Generator().manual_seed(0)
    width = len(model.scaling.shift)
    noise = torch.randn(500, model.prior.means.shape[1], generator=random)
    drawn = model.draw(noise, torch.rand(500, generator=random))
    rows = model.observe(model.decode(drawn), torch.randn(500, width, generator=random))
    cpu, mem, secure, count = (rows[:, names.index(name)] for name in names)
    assert (float(cpu.min()), float(cpu.max())) == (25.0, 60.0)
    assert float(mem.max()) == 20.0
    assert (
        float(mem.min()) >= float(frame["mem"].to_numpy().min()) - 1e-4
    )  # the end that is not given is that of the training rows
    assert float(count.min()) == 3.0
    assert torch.equal(count, count.round())
    assert set(secure.tolist()) == {0.0, 1.0}
    assert rows[:, 4:].sum(dim=1).tolist() == [2.0] * 500  # one level of each of the two categories
    gaps = rows.clone()
    gaps[:, 0], gaps[:, 3] = torch.nan, torch.nan
    mean, _, low, high = model.impute(gaps)
    assert 25.0 <= float(mean[:, 0].min()) <= float(mean[:, 0].max()) <= 60.0
    assert float(mean[:, 3].min()) >= 3.0
    assert torch.equal(mean[:, 3], mean[:, 3].round())
    assert ((low <= mean) & (mean <= high)).all()


@pytest.mark.parametrize("bounds", ["cpu", "cpu=1", "cpu=2:1", "cpu=a:b", "=0:1", "cpu=1:1", "cpu=nan:1"])
def test_invalid_bounds_are_refused_with_an_example(bounds: str) -> None:
    with pytest.raises(ValueError, match="such as load=0:100"):
        TrainConfig(model="pca", name="bounds", bounds=(bounds,))


@pytest.mark.parametrize("name", ["disk", "protocol", "protocol=tcp"])
def test_bounds_of_a_column_without_numbers_are_refused(frame: pl.DataFrame, name: str) -> None:
    config = TrainConfig(model="pca", name="bounds", bounds=(f"{name}=0:1",))
    with pytest.raises(FitError, match=rf"--bounds names '{name}', .* expected cpu, mem"):
        fit_model(config, read_table(InMemory(frame)), SilentReporter())


def observation_of(whole: bool) -> Observation:
    """Return the observation of one feature between 0 and 10."""
    return Observation(torch.zeros(1), torch.tensor([0.0]), torch.tensor([10.0]), torch.tensor([whole]))


@pytest.mark.parametrize(
    ("entry", "whole", "expected"),
    [
        ("load=0.5:9.5", True, (1.0, 9.0)),
        ("load=0.5:9.5", False, (0.5, 9.5)),
        ("load=:20", True, (0.0, 20.0)),
        ("load=-1e300:", False, (-torch.finfo(torch.float32).max, 10.0)),
    ],
)
def test_bounds_of_whole_numbers_are_whole_and_those_of_all_numbers_are_finite(
    entry: str, whole: bool, expected: tuple[float, float]
) -> None:
    observation = observation_of(whole)
    set_bounds(observation, [entry], ["load"])
    assert (float(observation.low), float(observation.high)) == expected


@pytest.mark.parametrize(("entry", "whole"), [("load=11:", False), ("load=:-1", False), ("load=2.2:2.8", True)])
def test_bounds_that_leave_no_value_are_refused(entry: str, whole: bool) -> None:
    with pytest.raises(FitError, match=f"--bounds {entry} .* leave no (whole number|value) for load"):
        set_bounds(observation_of(whole), [entry], ["load"])


@pytest.mark.parametrize("model", ["ae", "auto"])
def test_bounds_that_leave_no_value_are_refused_before_the_training(frame: pl.DataFrame, model: Literal["ae"]) -> None:
    config = TrainConfig(model=model, name="bounds", epochs=1, bounds=("cpu=1000:",))
    report = RecordingReporter()
    with pytest.raises(FitError, match=r"--bounds cpu=1000: .* leave no (whole number|value) for cpu"):
        fit_model(config, read_table(InMemory(frame)), report)
    assert (report.started, report.epochs) == ([], [])


def test_bounds_of_a_bernoulli_model_are_refused(frame: pl.DataFrame) -> None:
    config = TrainConfig(model="vae", name="bounds", likelihood="bernoulli", bounds=("cpu=0:1",))
    with pytest.raises(FitError, match="--bounds is not for --likelihood bernoulli"):
        fit_model(config, read_table(InMemory(frame)), SilentReporter())
