"""Models that are trained with a policy: the false-alarm rate holds under every rule, and each rule does what it says.

The rows are of five features: cpu and load depend on each other, so do latency and errors, and io depends on both.
"""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import betabinom

from models.artifact import Artifact, load
from models.policy_rules import AlarmRule, FeatureRule, Policy, Silence
from service.inference.backends import OnnxModule
from tests.training.reporters import RecordingReporter
from training.config import EVERY_KIND, TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table
from training.data.timeline import Timeline
from training.errors import DataError, FitError
from training.fitting.pipeline import fit_pipeline
from training.fitting.windows import prepare, with_window
from training.progress import SilentReporter
from training.publishing.recalibrate import recalibrate
from training.train import train

NAMES = ["cpu", "load", "latency", "errors", "io"]
UNITS = ["%", None, "ms", None, None]
SCALES = np.array([20.0, 2.0, 5.0, 1.0, 3.0])
ROWS, NEW_ROWS, ALPHA = 3000, 4000, 0.05
RULES = {
    "high": Policy(features={"cpu": FeatureRule(direction="high"), "latency": FeatureRule(direction="high")}),
    "low": Policy(features={"io": FeatureRule(direction="low")}),
    "least": Policy(features={name: FeatureRule(least=scale) for name, scale in zip(NAMES, SCALES, strict=True)}),
    "range": Policy(features={"cpu": FeatureRule(minimum=20.0), "errors": FeatureRule(maximum=2.0)}),
    "alone": Policy(features={"errors": FeatureRule(alone=False), "io": FeatureRule(alone=False)}),
}
EVERYTHING = Policy(
    features={
        "cpu": FeatureRule(direction="high", minimum=0.0),
        "load": FeatureRule(direction="high"),
        "latency": FeatureRule(direction="high", least=2.0),
        "errors": FeatureRule(alone=False),
        "io": FeatureRule(direction="low", maximum=40.0),
    }
)


def values(count: int, seed: int) -> np.ndarray:
    """Return rows float32 [N, 5]."""
    random = np.random.RandomState(seed)
    work, trouble = random.standard_normal((2, count))
    noise = 0.4 * random.standard_normal((count, 5))
    standard = np.column_stack((work, work, trouble, trouble, 0.7 * work + 0.7 * trouble)) + noise
    return np.asarray(np.array([50.0, 10.0, 50.0, 0.0, 20.0]) + SCALES * standard, np.float32)


def table(x: np.ndarray, timeline: Timeline | None = None) -> Table:
    return Table(
        RowStore(x), (5,), NAMES, UNITS, None, None, "made up", missing=np.zeros(5, np.int64), timeline=timeline
    )


def trained(root: Path, kind: str = "pca", policy: Policy | None = None, rows: np.ndarray | None = None) -> Artifact:
    config = TrainConfig(model=kind, name="m", epochs=5)
    data = table(values(ROWS, 0) if rows is None else rows)
    return load(train(config, data, root, RecordingReporter(), policy=policy))


def severities(artifact: Artifact, x: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    with torch.inference_mode():
        score = artifact.module.score(torch.from_numpy(x))[0]
        return np.asarray(artifact.module.severity(score, alpha).numpy())


def band_of_false_alarms(artifact: Artifact, rows: int) -> tuple[float, float]:
    """Return the smallest and the largest number of false alarms among `rows` new rows, each with probability .999."""
    count = artifact.manifest.calibration.rows
    allowed = int(ALPHA * (count + 1) + 1e-9)
    low, high = betabinom(rows, allowed, count + 1 - allowed).interval(0.999)
    return float(low), float(high)


def assert_rate_holds(artifact: Artifact, x: np.ndarray) -> None:
    """Assert that the number of false alarms among new rows x is in the band that the theory gives."""
    low, high = band_of_false_alarms(artifact, len(x))
    assert low <= int((severities(artifact, x) > 1).sum()) <= high


def is_inside(policy: Policy, x: np.ndarray) -> np.ndarray:
    inside = np.ones(len(x), bool)
    for name, rule in policy.features.items():
        column = x[:, NAMES.index(name)]
        inside &= (column >= (rule.minimum or -np.inf)) & (column <= (rule.maximum or np.inf))
    return inside


def usual_row(**changes: float) -> np.ndarray:
    """Return the mean row [1, 5], in which features deviate by so many standard deviations."""
    row = values(ROWS, 0).mean(axis=0, keepdims=True)
    for name, deviation in changes.items():
        row[0, NAMES.index(name)] += deviation * SCALES[NAMES.index(name)]
    return np.asarray(row, np.float32)


def is_anomaly(artifact: Artifact, **changes: float) -> bool:
    return bool(severities(artifact, usual_row(**changes))[0] > 1)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.slow
def test_false_alarm_rate_holds_under_each_rule(tmp_path: Path, name: str) -> None:
    artifact, new = trained(tmp_path, policy=RULES[name]), values(NEW_ROWS, 1)
    assert_rate_holds(artifact, new[is_inside(RULES[name], new)])


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.slow
def test_every_kind_keeps_the_false_alarm_rate_and_follows_the_rules(tmp_path: Path, kind: str) -> None:
    artifact, without = trained(tmp_path, kind, EVERYTHING), trained(tmp_path, kind)
    new = values(NEW_ROWS, 1)
    assert_rate_holds(artifact, new[is_inside(EVERYTHING, new)])
    for changes in ({"cpu": -2.4}, {"cpu": -2.4, "load": -8.0}, {"latency": -8.0}, {"io": 4.0}, {"errors": 8.0}):
        assert is_anomaly(without, **changes), changes
        assert not is_anomaly(artifact, **changes), changes
    for changes in ({"cpu": 8.0}, {"load": 8.0}, {"latency": 8.0}, {"io": -8.0}, {"cpu": 8.0, "errors": 8.0}):
        assert is_anomaly(artifact, **changes), changes
    assert (
        severities(artifact, np.vstack([usual_row(cpu=-2.6), usual_row(io=7.0)]), 0.002) > 1
    ).all()  # no valid values
    assert artifact.twin is not None
    twin = OnnxModule(artifact.twin, artifact.module, 1)
    x = torch.from_numpy(new[:200])
    for own, of_twin in zip(artifact.module.score(x), twin.score(x), strict=True):
        torch.testing.assert_close(of_twin, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


@pytest.mark.slow
def test_explanation_names_the_deviations_that_matter_and_not_the_neutral_ones(tmp_path: Path) -> None:
    artifact = trained(tmp_path, policy=EVERYTHING)
    x = usual_row(cpu=-2.4, latency=8.0)
    _, parts, contribution, expected = (part[0] for part in artifact.module.score(torch.from_numpy(x)))
    assert int(contribution.argmax()) == NAMES.index("latency")
    assert float(contribution[NAMES.index("cpu")]) == 0.0
    assert (
        abs(float(expected[NAMES.index("cpu")]) - usual_row()[0, 0]) < 0.5 * SCALES[0]
    )  # the usual value, not the row's
    assert artifact.manifest.parts == ["t2", "q", "range"]
    assert float(parts[-1]) == 0.0


@pytest.mark.slow
def test_scores_of_a_row_are_the_same_in_every_batch(tmp_path: Path) -> None:
    """A p-value allows for rounding errors of 1e-5: see `models.calibration`."""
    artifact, new = trained(tmp_path, policy=EVERYTHING), torch.from_numpy(values(500, 2))
    together = artifact.module.score(new)[0]
    alone = torch.cat([artifact.module.score(row.unsqueeze(0))[0] for row in new])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5 * float(together.median()))


@pytest.mark.slow
def test_rows_outside_of_a_valid_range_do_not_calibrate_and_are_counted(tmp_path: Path) -> None:
    rows = values(ROWS, 0)
    rows[::10, 0] = -1.0
    report = RecordingReporter()
    policy = Policy(features={"cpu": FeatureRule(minimum=0.0)})
    artifact = load(train(TrainConfig(model="pca", name="m"), table(rows), tmp_path, report, policy=policy))
    applied = artifact.manifest.policy
    assert applied is not None
    assert 40 <= applied.outside <= 80  # about a tenth of 600
    assert artifact.manifest.calibration.rows + applied.outside == 600
    assert any(note.startswith(f"left {applied.outside} rows out of the calibration") for note in report.notes)
    assert (severities(artifact, rows[::10], 0.002) > 1).all()


def timeline_of(rows: int) -> Timeline:
    start = int(datetime(2024, 3, 25, tzinfo=UTC).timestamp())
    return Timeline(
        time=(start + 600 * np.arange(rows)) * 10**9,
        group=np.zeros(rows, np.int32),
        groups=("",),
        time_column="time",
        group_column=None,
        source_rows=np.arange(rows),
    )


@pytest.mark.slow
def test_silenced_rows_do_not_calibrate_and_the_budget_gives_the_default_alpha(tmp_path: Path) -> None:
    x, timeline = values(ROWS, 0), timeline_of(ROWS)
    hours = (timeline.time // (3600 * 10**9)) % 24
    x[(hours >= 2) & (hours < 4)] *= 5.0  # the backup
    silence = Silence(start="02:00", end="04:00")
    policy = Policy(silences=[silence], alarms=AlarmRule(per_day=3.0))
    config = TrainConfig(model="pca", name="m", time="time")
    artifact = load(train(config, table(x, timeline), tmp_path, RecordingReporter(), policy=policy))
    applied = artifact.manifest.policy
    assert applied is not None
    assert applied.silenced == pytest.approx(600 / 12, abs=12)
    assert applied.alpha == pytest.approx(3.0 / 144, rel=0.4)  # 144 rows a day
    assert artifact.manifest.parts == ["t2", "q"]
    threshold = float(artifact.module.threshold(ALPHA))
    unsilenced = load(train(config, table(x, timeline), tmp_path, RecordingReporter()))
    assert float(unsilenced.module.threshold(ALPHA)) > 2 * threshold  # the rows of the backup set it


@pytest.mark.slow
def test_policy_that_leaves_no_calibration_row_is_refused_before_the_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the policy leaves none of the 600 calibration rows: 600 have a value outside"):
        trained(tmp_path, policy=Policy(features={"cpu": FeatureRule(minimum=1e6)}))


@pytest.mark.slow
def test_budget_of_rows_without_times_is_refused_before_the_fit(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="name the column of the times with --time"):
        trained(tmp_path, policy=Policy(alarms=AlarmRule(per_day=2.0)))


@pytest.mark.slow
def test_model_with_an_empty_policy_equals_a_model_without_one(tmp_path: Path) -> None:
    plain, empty = trained(tmp_path), trained(tmp_path, policy=Policy())
    assert empty.manifest.weights_sha256 == plain.manifest.weights_sha256
    assert '"policy"' not in empty.manifest.model_dump_json()


@pytest.mark.parametrize("kind", ["pca", "vae"])
@pytest.mark.slow
def test_recalibration_gives_a_model_a_policy_keeps_it_and_removes_it(tmp_path: Path, kind: str) -> None:
    first, later = trained(tmp_path, kind), values(ROWS, 3)

    def again(parent: Artifact, policy: Policy | None) -> Artifact:
        return load(recalibrate(parent, table(later), tmp_path, ALPHA, policy=policy).path)

    second = again(first, EVERYTHING)
    assert (second.twin is not None) == (kind == "pca")
    assert is_anomaly(first, latency=-8.0)
    new = values(NEW_ROWS, 1)
    for artifact in (second, again(second, None)):
        assert artifact.manifest.policy is not None
        assert artifact.manifest.policy.rules == EVERYTHING
        assert artifact.manifest.parts[-1] == "range"
        assert not is_anomaly(artifact, latency=-8.0)
        assert is_anomaly(artifact, latency=8.0)
        assert is_anomaly(artifact, cpu=-2.6)
        assert_rate_holds(artifact, new[is_inside(EVERYTHING, new)])
    last = again(second, Policy())
    assert last.manifest.policy is None
    assert last.manifest.parts == first.manifest.parts
    rows = torch.from_numpy(new[:100])
    torch.testing.assert_close(last.module.score(rows)[0], first.module.score(rows)[0])


@pytest.mark.slow
def test_recalibration_with_a_policy_completes_rows_as_before_and_keeps_the_rate_of_rows_with_gaps(
    tmp_path: Path,
) -> None:
    first = trained(tmp_path)
    second = load(recalibrate(first, table(values(ROWS, 3)), tmp_path, ALPHA, policy=EVERYTHING).path)
    rows = values(1000, 1)
    rows = rows[is_inside(EVERYTHING, rows)]
    rows[np.arange(len(rows)), np.arange(len(rows)) % 5] = np.nan
    rows[::2, 1] = np.nan
    x = torch.from_numpy(rows)
    with torch.inference_mode():
        for before, after in zip(first.module.impute(x[:64]), second.module.impute(x[:64]), strict=True):
            torch.testing.assert_close(before, after)
        score = torch.cat([second.module.score_gaps(part)[0] for part in x.split(64)])
        false_alarms = int((second.module.severity(score, ALPHA) > 1).sum())
    low, high = band_of_false_alarms(second, len(rows))
    assert low <= false_alarms <= high


@pytest.mark.slow
def test_least_deviation_is_in_the_units_of_the_feature(tmp_path: Path) -> None:
    artifact = trained(tmp_path, policy=Policy(features={"cpu": FeatureRule(least=60.0)}))
    assert not is_anomaly(artifact, cpu=2.8)  # 56 %
    assert is_anomaly(artifact, cpu=3.3)  # 66 %


WINDOW = 9  # rows


def trained_on_windows(root: Path, policy: Policy | None, kind: str = "pca", rows: int = ROWS) -> Artifact:
    config = TrainConfig(model=kind, name="m", epochs=3, time="time", window=WINDOW)
    return load(train(config, table(values(rows, 0), timeline_of(rows)), root, RecordingReporter(), policy=policy))


def windows_of(x: np.ndarray) -> np.ndarray:
    """Return x [B x N, 5] split into windows [B, N, 5] that share no row."""
    return x[: len(x) // WINDOW * WINDOW].reshape(-1, WINDOW, 5)


def usual_window(newest_rows: int = WINDOW, **changes: float) -> np.ndarray:
    """Return a normal window [1, N, 5] plus `changes`, in standard deviations, in its newest rows."""
    window = windows_of(values(WINDOW, 7)).copy()
    for name, deviation in changes.items():
        column = NAMES.index(name)
        window[0, -newest_rows:, column] += deviation * SCALES[column]
    return window


def new_windows(policy: Policy) -> np.ndarray:
    """Return new windows [B, N, 5] that share no row, and whose newest rows are inside of the ranges of `policy`."""
    new = windows_of(values(30_000, 1))
    return np.asarray(new[is_inside(policy, new[:, -1])])


def assert_rate_of_windows_holds(severity: np.ndarray, calibration_rows: int) -> None:
    """Assert the same as `assert_rate_holds` for the severities [B] of windows that share no row.

    Windows of calibration rows overlap, so only the number of windows that share no row counts.
    """
    count = calibration_rows // WINDOW
    allowed = int(ALPHA * (count + 1))
    low, high = betabinom(len(severity), allowed, count + 1 - allowed).interval(0.999)
    assert low <= int((severity > 1).sum()) <= high


@pytest.mark.parametrize(
    ("kind", "policy", "rows"),
    [
        *(pytest.param("pca", policy, 12_000, id=name) for name, policy in RULES.items()),
        *(pytest.param(kind, EVERYTHING, 6_000, id=kind) for kind in ("ae", "vae", "ensemble")),
    ],
)
@pytest.mark.slow
def test_false_alarm_rate_of_windows_holds_under_every_rule_and_for_every_kind(
    kind: str, policy: Policy, rows: int
) -> None:
    options = {} if kind == "pca" else {"epochs": 3}
    config = TrainConfig(model=kind, name="m", time="time", window=WINDOW, **options)
    data, _ = prepare(config, table(values(rows, 0), timeline_of(rows)), policy)
    model = with_window(fit_pipeline(config, data, SilentReporter()), data)
    with torch.no_grad():
        score = model.score(torch.from_numpy(new_windows(policy)))[0]
        severity = model.severity(score, ALPHA).numpy()
    assert_rate_of_windows_holds(severity, len(data.split.calibration))


@pytest.mark.slow
def test_rules_hold_for_rows_and_means_of_windows(tmp_path: Path) -> None:
    artifact, without = trained_on_windows(tmp_path, EVERYTHING), trained_on_windows(tmp_path, None)
    for rows in (1, WINDOW):
        for changes in ({"cpu": -2.4}, {"latency": -8.0}, {"io": 4.0}, {"errors": 8.0}):
            window = usual_window(rows, **changes)
            assert severities(without, window)[0] > 1, (rows, changes)
            assert severities(artifact, window)[0] <= 1, (rows, changes)
        for changes in ({"load": 8.0}, {"latency": 8.0}, {"io": -8.0}, {"load": 8.0, "errors": 8.0}):
            assert severities(artifact, usual_window(rows, **changes))[0] > 1, (rows, changes)
    new = torch.from_numpy(windows_of(values(1800, 1)))
    assert artifact.twin is not None
    for own, of_twin in zip(
        artifact.module.score(new), OnnxModule(artifact.twin, artifact.module, 1).score(new), strict=True
    ):
        torch.testing.assert_close(of_twin, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


def test_values_outside_of_their_ranges_do_not_enter_the_means_and_deviations_of_windows() -> None:
    x, policy = values(400, 0), Policy(features={"cpu": FeatureRule(minimum=20.0), "io": FeatureRule(maximum=30.0)})
    x[100:115, 0] = 0.0  # some windows have no valid value of cpu
    config = TrainConfig(model="pca", name="m", time="time", window=WINDOW)
    data, _ = prepare(config, table(x, timeline_of(400)), policy)
    assert data.windows is not None
    scaling, window = data.windows.scaling, data.windows.window
    u = ((x - scaling.shift.numpy()) / scaling.scale.numpy()).astype(float)
    valid = (x >= [20.0, -np.inf, -np.inf, -np.inf, -np.inf]) & (x <= [np.inf, np.inf, np.inf, np.inf, 30.0])
    assert 0.1 < (~valid).any(axis=1).mean() < 0.5
    found = data.table.x.take(np.arange(len(data.table.x)))
    for place, row in enumerate(range(window.least_rows - 1, 400)):
        part = slice(max(0, row - WINDOW + 1), row + 1)
        count = valid[part].sum(axis=0)
        mean = (u[part] * valid[part]).sum(axis=0) / np.maximum(count, 1)
        repaired = np.where(valid[part], u[part], mean)
        last = [repaired[-scale:] for scale in window.scales]
        expected = [u[row], *(rows.mean(axis=0) for rows in last), *(rows.std(axis=0) for rows in last)]
        np.testing.assert_allclose(found[place], np.concatenate(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_value_outside_of_its_range_raises_an_alarm_only_while_its_row_is_the_newest(tmp_path: Path) -> None:
    artifact, without = trained_on_windows(tmp_path, EVERYTHING), trained_on_windows(tmp_path, None)
    for age in range(WINDOW):
        window = usual_window(0)
        window[0, -1 - age, NAMES.index("cpu")] = -999.0
        assert severities(without, window)[0] > 1
        assert (severities(artifact, window, 0.01)[0] > 1) == (age == 0)
        _, parts, contribution, _ = artifact.module.score(torch.from_numpy(window))
        assert (float(parts[0, -1]) > 0) == (age == 0)
        assert (int(contribution[0].argmax()) == NAMES.index("cpu")) == (age == 0)


@pytest.mark.slow
def test_recalibration_adds_a_policy_to_a_model_with_a_window_and_removes_it(tmp_path: Path) -> None:
    policy = Policy(features={name: rule for name, rule in EVERYTHING.features.items() if rule.alone})
    first = trained_on_windows(tmp_path, None)
    later = timeline_of(ROWS)
    later = replace(later, time=later.time + 10**9 * 600 * ROWS)

    def again(parent: Artifact, new: Policy | None) -> Artifact:
        return load(recalibrate(parent, table(values(ROWS, 3), later), tmp_path, ALPHA, policy=new).path)

    for artifact in (second := again(first, policy), again(second, None)):
        assert artifact.twin is not None
        assert severities(artifact, usual_window(latency=-8.0))[0] <= 1
        assert severities(artifact, usual_window(latency=8.0))[0] > 1
        assert severities(artifact, usual_window(1, cpu=-6.0))[0] > 1  # below the minimum of cpu
    last, x = again(second, Policy()), torch.from_numpy(windows_of(values(900, 1)))
    torch.testing.assert_close(last.module.score(x)[0], first.module.score(x)[0])
    with pytest.raises(FitError, match="no held-out windows in its artifact, and alone=false"):
        again(first, EVERYTHING)
