"""The command `elbo adopt`: what it publishes, and how it refuses what it cannot adopt."""

import warnings
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PowerTransformer, StandardScaler
from torch import nn

from models.artifact import load
from tests.commands import HEADER, in_process, two_factor_rows, write

pytestmark = pytest.mark.slow

MODEL = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x):
        return self.decoder(self.encoder(x))
"""
FIT, NORMAL = two_factor_rows(300, seed=0), two_factor_rows(300, seed=1)


class Files:
    """The files of a trained network in a folder, and the same network in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "model.py").write_text(MODEL)
        self.normal, self.fit = write(folder / "normal.csv", NORMAL), write(folder / "fit.csv", FIT)
        self.scaler, self.power = StandardScaler().fit(FIT), PowerTransformer().fit(FIT)
        joblib.dump(self.scaler, folder / "scaler.joblib")
        joblib.dump(self.power, folder / "power.joblib")
        self.pca = make_pipeline(StandardScaler(), PCA(2)).fit(FIT)
        joblib.dump(self.pca, folder / "pca.joblib")
        namespace: dict[str, Any] = {}
        exec(MODEL, namespace)
        torch.manual_seed(0)
        self.module: Any = namespace["Net"]()
        x = torch.tensor(self.scaler.transform(FIT)).float()
        optimiser = torch.optim.Adam(self.module.parameters(), 0.01)
        for _ in range(200):
            loss = (self.module(x) - x).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        self.module.eval().requires_grad_(False)
        torch.save(self.module.state_dict(), folder / "w.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(self.module, (x[:2],), str(folder / "model.onnx"), dynamo=False,
                              input_names=["x"], dynamic_axes={"x": {0: "B"}})  # fmt: skip

    def reconstruct(self, rows: Any) -> Any:
        """Return the reconstruction of rows in raw units, as the user computes it."""
        with torch.no_grad():
            units = self.module(torch.tensor(self.scaler.transform(rows)).float())
        return self.scaler.inverse_transform(units.numpy())

    def adopt(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
        return in_process(capsys, "adopt", *arguments, "--artifacts", str(self.folder / "artifacts"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("adopt"))


def artifact_of(files: Files, name: str) -> Any:
    return load(files.folder / "artifacts" / name / "1" / "model.pt")


ROWS = torch.tensor(two_factor_rows(20, seed=2)).float()


def test_network_with_weights_and_scaler_is_published_and_reconstructs_as_before(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = files.adopt(
        capsys, f"{files.folder / 'model.py'}:Net", "--weights", str(files.folder / "w.pt"),
        "--scaler", str(files.folder / "scaler.joblib"), "--calibrate", files.normal, "--fit-rows", files.fit,
        "--name", "web",
    )  # fmt: skip
    assert code == 0, err
    assert "published web@1" in out
    assert "next: elbo inspect web" in out
    artifact = artifact_of(files, "web")
    expected = files.reconstruct(ROWS.double().numpy())
    np.testing.assert_allclose(artifact.module(ROWS).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert [feature.name for feature in artifact.manifest.features] == ["cpu", "memory", "disk", "network", "errors"]
    assert artifact.manifest.latents == 2


def test_alarms_of_an_adopted_network_on_new_normal_rows_keep_alpha(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = files.adopt(
        capsys, str(files.folder / "model.onnx"), "--scaler", str(files.folder / "scaler.joblib"),
        "--calibrate", files.normal, "--name", "onnx",
    )  # fmt: skip
    assert code == 0, err
    module = artifact_of(files, "onnx").module
    rows = torch.tensor(two_factor_rows(2000, seed=3)).float()
    share = float((module.p_value(module.score(rows)[0]) <= 0.05).float().mean())
    assert 0.005 < share < 0.12  # 5 %, with a calibration set of 150 rows: standard deviation 1.8 %
    anomalous = rows.clone()
    anomalous[:, 4] -= 4.0  # the fifth metric no longer agrees with the others
    assert float((module.p_value(module.score(anomalous)[0]) <= 0.05).float().mean()) > 0.9


def test_power_scaler_and_pipeline_of_pca_are_adopted_exactly(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = files.adopt(
        capsys, f"{files.folder / 'model.py'}:Net", "--weights", str(files.folder / "w.pt"),
        "--scaler", str(files.folder / "power.joblib"), "--calibrate", files.normal, "--name", "power",
    )  # fmt: skip
    assert code == 0, err
    rows = ROWS.double().numpy()
    units = files.module(torch.tensor(files.power.transform(rows)).float())
    found = artifact_of(files, "power").module(ROWS).numpy()
    np.testing.assert_allclose(found, files.power.inverse_transform(units.double().numpy()), rtol=1e-5, atol=1e-4)
    code, _, err = files.adopt(
        capsys, str(files.folder / "pca.joblib"), "--allow-pickle", "--calibrate", files.normal, "--name", "pca"
    )
    assert code == 0, err
    module = artifact_of(files, "pca").module
    np.testing.assert_allclose(module.encode(ROWS)[0].numpy(), files.pca.transform(rows), rtol=1e-5, atol=1e-5)
    expected = files.pca.inverse_transform(files.pca.transform(rows))
    np.testing.assert_allclose(module(ROWS).numpy(), expected, rtol=1e-5, atol=1e-5)


def _network(files: Files) -> list[str]:
    return [f"{files.folder / 'model.py'}:Net", "--calibrate", files.normal, "--name", "refused"]


def _with_table(files: Files, rows: Any, header: str = HEADER) -> list[str]:
    other = write(files.folder / f"table{len(rows)}x{rows.shape[1]}.csv", rows, header)
    return [f"{files.folder / 'model.py'}:Net", "--calibrate", other, "--name", "refused"]


REFUSED: dict[str, tuple[Any, str]] = {
    "missing network": (lambda files: [str(files.folder / "no.onnx"), *_network(files)[1:]], "no.onnx is missing"),
    "missing function": (
        lambda files: [f"{files.folder / 'model.py'}:Nett", *_network(files)[1:]], "has no function 'Nett': it has Net"
    ),
    "missing rows": (
        lambda files: [*_network(files)[:1], "--calibrate", "nowhere.csv", "--name", "refused"], "nowhere.csv"
    ),
    "missing weights": (lambda files: [*_network(files), "--weights", "no.pt"], "no.pt is missing"),
    "missing scaler": (lambda files: [*_network(files), "--scaler", "no.joblib"], "no.joblib is missing"),
    "two scalers": (
        lambda files: [str(files.folder / "pca.joblib"), "--allow-pickle", "--scaler",
                       str(files.folder / "scaler.joblib"), *_network(files)[1:]], "has a scaler of its own"
    ),
    "pickle": (lambda files: [str(files.folder / "pca.joblib"), *_network(files)[1:]], "--allow-pickle"),
    "scaler of another width": (
        lambda files: [*_with_table(files, NORMAL[:, :4], "a,b,c,d"), "--scaler", str(files.folder / "scaler.joblib")],
        "has 5 features, but the rows have 4",
    ),
    "network of another width": (lambda files: _with_table(files, NORMAL[:, :4], "a,b,c,d"), "4"),
    "too few rows": (lambda files: _with_table(files, NORMAL[:12]), "row"),
    "fit rows with other columns": (
        lambda files: [*_network(files), "--fit-rows", write(files.folder / "o.csv", FIT, "cpu,disk,memory,network,x")],
        "column 2 is 'disk' and 'memory'",
    ),
    "wrong shape": (lambda files: [*_network(files), "--shape", "5xa"], "--shape: expected whole numbers above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adopted_is_refused_in_one_line_and_nothing_is_published(
    files: Files, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, reason = REFUSED[case]
    code, out, err = files.adopt(capsys, *arguments(files))
    assert code in (1, 2)
    assert err.startswith("elbo: error: ")
    assert reason in err
    assert len(err.splitlines()) == 1
    assert out == ""
    assert not list((files.folder / "artifacts").glob("refused/*/model.pt"))


def test_weights_that_lack_a_layer_are_refused_with_its_name(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Sequential(nn.Linear(5, 8)).state_dict(), files.folder / "other.pt")
    _, _, err = files.adopt(capsys, *_network(files), "--weights", str(files.folder / "other.pt"))
    assert "other.pt does not fit the network: it lacks decoder.0.bias" in err
    assert "and also has 0.bias, 0.weight" in err


def test_scaler_of_a_frame_whose_columns_are_in_another_order_is_refused(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    scaler = StandardScaler().fit(FIT)
    scaler.feature_names_in_ = np.array(["memory", "cpu", "disk", "network", "errors"], object)
    joblib.dump(scaler, files.folder / "frame.joblib")
    code, _, err = files.adopt(capsys, *_network(files), "--scaler", str(files.folder / "frame.joblib"))
    assert code == 1
    assert "column 1 is 'memory' and 'cpu'" in err


def test_rows_labelled_as_anomalous_are_left_out_of_the_calibration(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.column_stack([np.vstack([NORMAL, NORMAL[:30] + 50.0]), np.repeat([0.0, 1.0], [300, 30])])
    table = write(files.folder / "labelled.csv", rows, f"{HEADER},label")
    code, _, err = files.adopt(
        capsys, f"{files.folder / 'model.py'}:Net", "--weights", str(files.folder / "w.pt"), "--scaler",
        str(files.folder / "scaler.joblib"), "--calibrate", table, "--name", "labelled",
    )  # fmt: skip
    assert code == 0, err
    assert "30 rows of" in err
    assert artifact_of(files, "labelled").manifest.data.rows == 300
