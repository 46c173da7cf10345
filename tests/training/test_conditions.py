"""`elbo train --condition`: what a model learns of a condition, and how the other commands use it."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from models.artifact import Artifact, load
from models.manifest import read_manifest
from service.inference.backend_selection import select_backend
from tests.commands import in_process
from tests.training.conditions import FEATURES, KINDS, SHIFTS, rows_with_conditions, write_table
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.conditions import NO_LEVEL, learn_conditions, one_hot
from training.data.table import read_table, split_rows
from training.errors import DataError, FitError
from training.train import train


@pytest.fixture(scope="module")
def kinds(conditional_models: Path) -> Artifact:
    return load(conditional_models / "artifacts" / "kinds" / "1" / "model.pt")


@pytest.fixture(scope="module")
def digits(conditional_models: Path) -> Artifact:
    return load(conditional_models / "artifacts" / "digits" / "1" / "model.pt")


def draw(artifact: Artifact, codes: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a sample for each of the conditions with `codes` [N, J], without noise."""
    assert artifact.manifest.conditions is not None
    random = torch.Generator().manual_seed(seed)
    condition = torch.from_numpy(one_hot(artifact.manifest.conditions, codes))
    noise = torch.cat((torch.randn(len(codes), artifact.manifest.latents, generator=random), condition), dim=1)
    with torch.inference_mode():
        z = artifact.module.draw(noise, torch.rand(len(codes), generator=random))
        return np.asarray(artifact.module.decode(z).numpy())


def test_independent_classifier_finds_the_requested_class_in_samples(digits: Artifact) -> None:
    table = read_table("digits", condition=("label",))
    x, labels = table.x.take(np.arange(len(table.x))), table.conditions[0].codes
    split = split_rows(len(x), 0, 64, table.copies)
    judge = SVC(gamma=0.25, C=10).fit(x[split.calibration], labels[split.calibration])  # not training rows
    assert judge.score(x[split.fit], labels[split.fit]) > 0.96
    codes = np.arange(10).repeat(100)[:, None]
    accuracy = (judge.predict(draw(digits, codes)) == codes[:, 0]).mean()
    # Training in full gives 0.989: see docs/explanation/models.md.
    assert accuracy >= 0.95


def test_samples_of_two_columns_have_the_levels_of_both(kinds: Artifact) -> None:
    x, kind, shift = rows_with_conditions(2000, seed=5)
    judge = SVC().fit(x, 2 * kind + shift)
    codes = np.array([[k, s] for k in range(3) for s in range(2)]).repeat(100, axis=0)
    drawn = draw(kinds, codes)
    assert (judge.predict(drawn) == 2 * codes[:, 0] + codes[:, 1]).mean() > 0.95
    for combination in range(6):
        of_rows = x[2 * kind + shift == combination].mean(axis=0)
        of_samples = drawn[100 * combination : 100 * (combination + 1)].mean(axis=0)
        np.testing.assert_allclose(of_samples, of_rows, atol=1.0)


@pytest.mark.parametrize("known", [(True, True), (False, False), (True, False)])
def test_p_values_are_valid_for_rows_with_and_without_their_levels(kinds: Artifact, known: tuple[bool, bool]) -> None:
    x, *columns = rows_with_conditions(3000, seed=9)
    codes = np.stack(
        [np.where(is_known, each, NO_LEVEL) for each, is_known in zip(columns, known, strict=True)], axis=1
    )
    assert kinds.manifest.conditions is not None
    inputs = np.concatenate((x, one_hot(kinds.manifest.conditions, codes)), axis=1).astype(np.float32)
    with torch.inference_mode():
        score, parts, _, _ = kinds.module.score(torch.from_numpy(inputs))
        p_values = kinds.module.p_value(score).numpy()
    assert kinds.manifest.parts[-1] == "condition"
    assert bool(parts[:, -1].any()) == (known != (True, True))
    rows = kinds.manifest.calibration.rows
    for alpha in (0.1, 0.05):
        # Of n calibration rows and N new rows, the false alarms follow a beta-binomial distribution.
        error = np.sqrt(alpha * (1 - alpha) * (1 / rows + 1 / len(x)))
        assert (p_values <= alpha).mean() == pytest.approx(alpha, abs=4 * error)


def test_twin_of_a_conditional_model_is_verified_and_is_part_of_the_artifact(digits: Artifact) -> None:
    assert digits.twin is not None
    assert select_backend(digits, requested="onnx").backend.name == "onnx"


def test_manifest_lists_levels_and_shares_only_if_the_model_has_conditions(conditional_models: Path) -> None:
    root = conditional_models / "artifacts"
    conditions = read_manifest(root / "kinds" / "1" / "model.pt").conditions
    assert conditions is not None
    assert {column.name: column.levels for column in conditions.columns} == {"kind": KINDS, "shift": SHIFTS}
    by_kind = np.zeros(3)
    for (kind, _), share in zip(conditions.combinations, conditions.shares, strict=True):
        by_kind[kind] += share
    np.testing.assert_allclose(by_kind, (0.5, 0.3, 0.2), atol=0.06)
    with zipfile.ZipFile(root / "plain" / "1" / "model.pt") as archive:
        name = next(name for name in archive.namelist() if name.endswith("extra/manifest.json"))
        plain = json.loads(archive.read(name))
    assert "conditions" not in plain
    assert "condition" not in plain["training"]


def test_training_with_a_condition_is_deterministic(tmp_path: Path) -> None:
    x, kind, _ = rows_with_conditions(200, seed=2)
    source = write_table(tmp_path / "t.csv", x, kind=[KINDS[k] for k in kind])
    config = TrainConfig(model="vae", name="m", condition=("kind",), epochs=2, hidden=(8,))
    hashes = []
    for _ in range(2):
        table = read_table(source, condition=("kind",))
        path = train(config, table, tmp_path / "a", RecordingReporter(), force=True)
        hashes.append(read_manifest(path).weights_sha256)
    assert hashes[0] == hashes[1]


def test_convolutions_know_the_condition_of_an_image(tmp_path: Path) -> None:
    options = {"model": "ae", "name": "m", "network": "conv", "hidden": (8,), "epochs": 1, "condition": ("label",)}
    table = read_table("digits", condition=("label",))
    path = train(TrainConfig.model_validate(options), table, tmp_path, RecordingReporter(), force=True)
    module, x = load(path).module, torch.rand(1, 64).repeat(2, 1)
    condition = torch.eye(10)[[3, 7]]
    mean, _ = module.encode(torch.cat((x, condition), dim=1))
    assert not torch.allclose(mean[0, :-10], mean[1, :-10])


def test_labels_of_an_array_and_folders_of_images_are_conditions(tmp_path: Path) -> None:
    from PIL import Image

    x, labels = np.random.RandomState(0).rand(40, 6), np.array(["left", "right"]).repeat(20)
    np.savez(tmp_path / "named.npz", x=x, side=labels)
    for name in ("side", "label"):
        source = tmp_path / f"{name}.npz"
        np.savez(source, **{"x": x, name: labels})  # type: ignore[arg-type]  # the names are those of the arrays
        (column,) = read_table(str(source), condition=(name,)).conditions
        assert (column.name, column.levels) == (name, ["left", "right"])
        assert column.codes.tolist() == [0] * 20 + [1] * 20
    for folder in ("cat", "dog"):
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        for number in range(6):
            pixels = np.random.RandomState(number).randint(0, 255, (4, 4), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / folder / f"{number}.png")
    (column,) = read_table(str(tmp_path / "pictures"), condition=("label",)).conditions
    assert column.levels == ["cat", "dog"]


def csv_of(tmp_path: Path, cells: list[str]) -> str:
    x, _, _ = rows_with_conditions(len(cells), seed=3)
    return write_table(tmp_path / "t.csv", x, kind=cells)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([f"level {number}" for number in range(10_000)], "more than 100 different values"),
        (["a"] * 60, "has 1 levels with at least 10 rows to fit"),
        (["a"] * 59 + ["b"], "has 1 levels with at least 10 rows to fit"),
        (["a", "b" * 101] * 30, "expected names of 1 to 100 printable characters"),
        (["a", "b\tc"] * 30, "expected names of 1 to 100 printable characters"),
        ([""] * 60, "has 0 levels with at least 10 rows to fit"),
    ],
)
def test_column_whose_values_cannot_be_levels_is_refused(tmp_path: Path, cells: list[str], message: str) -> None:
    def learn() -> None:
        table = read_table(csv_of(tmp_path, cells), condition=("kind",))
        learn_conditions(table.conditions, np.arange(len(table.x)), table.source)

    with pytest.raises(DataError, match=message):
        learn()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("knid", (), ()), "has no column 'knid' for --condition: did you mean 'kind'"),
        (("kind", ("kind",), ()), "--condition and --drop both name 'kind'"),
        (("kind", (), ("kind",)), "--condition and --keep both name 'kind'"),
    ],
)
def test_options_that_contradict_the_condition_are_refused(
    tmp_path: Path, options: tuple[str, tuple[str, ...], tuple[str, ...]], message: str
) -> None:
    condition, drop, keep = options
    with pytest.raises(DataError, match=message):
        read_table(csv_of(tmp_path, ["a", "b"] * 20), drop=drop, keep=keep, condition=(condition,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "pca"}, "pca does not know the condition"),
        ({"model": "ensemble"}, "ensemble does not know the condition"),
        ({"model": "auto"}, "auto does not know the condition"),
        ({"model": "ae", "time": "t"}, "expected no --time"),
        ({"model": "ae", "condition": ("a", "a")}, "got one twice"),
        ({"model": "ae", "condition": tuple("abcde")}, "at most 4 columns"),
    ],
)
def test_condition_is_refused_with_options_that_do_not_allow_it(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate({"name": "m", "condition": ("kind",), **options})


def test_table_and_options_must_name_the_same_conditions(tmp_path: Path) -> None:
    table = read_table(csv_of(tmp_path, ["a", "b"] * 20), drop=("kind",))
    config = TrainConfig(model="ae", name="m", condition=("kind",))
    with pytest.raises(FitError, match="same columns"):
        train(config, table, tmp_path, RecordingReporter())


def test_level_that_is_rare_or_only_in_held_out_rows_is_not_learnt(tmp_path: Path) -> None:
    cells = ["a", "b"] * 30 + ["rare"] + ["late"] * 12 + [""]
    table = read_table(csv_of(tmp_path, cells), condition=("kind",))
    learnt = learn_conditions(table.conditions, np.arange(61), table.source)  # the rows of `late` are held out
    assert learnt.known.columns[0].levels == ["a", "b"]
    assert learnt.codes[:, 0].tolist() == [0, 1] * 30 + [NO_LEVEL] * 14
    assert learnt.known.shares == [0.5, 0.5]
    assert "'late', 'rare'" in learnt.notes[0]
    assert learnt.notes[1] == "rows without a level of 'kind': 1"


def test_levels_that_are_numbers_are_in_numerical_order_whatever_their_notation(tmp_path: Path) -> None:
    table = read_table(csv_of(tmp_path, ["10", "9", " 9.0 ", "10.0", "-1"] * 8), condition=("kind",))
    assert table.conditions[0].levels == ["-1", "9", "10"]
    assert table.conditions[0].codes[:5].tolist() == [2, 1, 1, 2, 0]


def test_score_reads_the_condition_and_reports_rows_of_unknown_levels(
    conditional_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, kind, shift = rows_with_conditions(30, seed=4)
    names = [KINDS[k] for k in kind]
    columns = {"kind": ["?", *names[1:]], "shift": [SHIFTS[s] for s in shift]}
    root = str(conditional_models / "artifacts")
    found = {}
    for name, cells in {"full": columns, "none": {}}.items():
        source = write_table(tmp_path / f"{name}.csv", x, **cells)
        status, out, err = in_process(capsys, "score", "kinds", source, "--artifacts", root)
        found[name] = [json.loads(line) for line in out.splitlines()]
        assert status == (2 if name == "full" else 0)
        assert ("the data have no column 'shift'" in err) == (name == "none")
    assert "column 'kind' has the value '?': expected one of" in found["full"][0]["detail"]
    assert all(line["parts"]["condition"] == 0 for line in found["full"][1:])
    assert any(line["parts"]["condition"] != 0 for line in found["none"])


def test_evaluate_measures_how_many_samples_have_the_requested_condition(
    conditional_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(conditional_models / "artifacts")
    source = str(conditional_models / "table.csv")
    status, out, err = in_process(capsys, "evaluate", "kinds", source, "--samples", "--json", "--artifacts", root)
    assert status == 0, err
    samples = json.loads(out)["samples"]
    assert samples["condition_accuracy_of_rows"] > 0.97
    assert 0.9 < samples["condition_accuracy"] <= 1.0


def test_calibrate_takes_rows_with_their_conditions(
    conditional_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, kind, shift = rows_with_conditions(200, seed=8)
    source = write_table(tmp_path / "new.csv", x, kind=[KINDS[k] for k in kind], shift=[SHIFTS[s] for s in shift])
    parent = conditional_models / "artifacts" / "kinds" / "1" / "model.pt"
    places = ["--artifacts", str(tmp_path / "a"), "--runs", str(tmp_path / "runs")]
    status, _, err = in_process(capsys, "calibrate", str(parent), source, *places)
    assert status == 0, err
    assert "the model judges the rows without this condition" not in err
    new = load(tmp_path / "a" / "kinds" / "1" / "model.pt")
    assert new.manifest.calibration.rows == 200
    assert new.manifest.conditions == read_manifest(parent).conditions


def test_backtest_refuses_a_model_with_conditions(conditional_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(conditional_models / "artifacts")
    status, _, err = in_process(capsys, "backtest", "kinds", str(conditional_models / "table.csv"), "--artifacts", root)
    assert status == 2
    assert "a backtest does not know the condition of a row" in err


def test_inspect_lists_the_levels(conditional_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = in_process(capsys, "inspect", "kinds", "--artifacts", str(conditional_models / "artifacts"))
    assert "condition  'kind': 'a \"quoted\", kind', 'b', 'überschuss'" in out
    assert FEATURES[0] in out
