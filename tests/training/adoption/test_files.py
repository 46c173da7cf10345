"""Networks, weights, scalers and estimators in files."""

import json
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import nn

from tests.training.adoption.networks import ConvolutionalVae, LstmAutoencoder, perceptron, settle
from training.adoption.arguments import named_as_options
from training.adoption.copying import copy_module
from training.adoption.files import load_weights, read_module, read_scaler, read_weights
from training.adoption.inspection import inspect_module
from training.adoption.tracing import compile_functions
from training.errors import AdoptionError, DataError

BUILDER = """
import torch
from torch import nn
from helper import WIDTH

def build():
    return nn.Sequential(nn.Linear(WIDTH, 2), nn.Tanh(), nn.Linear(2, WIDTH))

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return self.layer(x)

network = build()
number = 3

def with_argument(width):
    return Net(width)

def failing():
    raise ValueError("no data\\nhere")

def nothing():
    return None
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("WIDTH = 4\n")
    (tmp_path / "model.py").write_text(BUILDER)
    return tmp_path


def small() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4)).eval()


@pytest.mark.parametrize("name", ["build", "Net", "network"])
def test_function_class_or_variable_of_a_python_file_gives_the_network(folder: Path, name: str) -> None:
    module = read_module(f"{folder / 'model.py'}:{name}")
    assert module(torch.zeros(3, 4)).shape == (3, 4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("biuld", r"has no function 'biuld': it has .*build.*failing"),
        ("number", "number is a int: expected a torch.nn.Module, or a function that returns one"),
        ("with_argument", "needs the arguments width: name a function without arguments"),
        ("failing", r"failing raises ValueError: no data here"),
        ("nothing", "nothing returns a NoneType: expected a torch.nn.Module"),
    ],
)
def test_function_that_gives_no_network_is_refused_with_the_reason(folder: Path, name: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read_module(f"{folder / 'model.py'}:{name}")
    assert "\n" not in str(caught.value)


def test_python_file_that_fails_or_is_missing_is_refused(folder: Path) -> None:
    (folder / "broken.py").write_text("import no_such_package\n")
    with pytest.raises(DataError, match=r"broken\.py cannot be imported: ModuleNotFoundError: .*no_such_package"):
        read_module(f"{folder / 'broken.py'}:build")
    with pytest.raises(DataError, match=r"other\.py is missing: expected a file"):
        read_module(f"{folder / 'other.py'}:build")
    with pytest.raises(DataError, match=r"name the function that builds the network, as in .*model\.py:build"):
        read_module(str(folder / "model.py"))


def safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file as its specification says."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    names = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.float16: "F16"}
    for name, tensor in tensors.items():
        content = tensor.contiguous().numpy().tobytes()
        places = [len(data), len(data) + len(content)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_weights_of_every_usual_form_are_put_into_the_network(folder: Path) -> None:
    module = small()
    state = module.state_dict()
    torch.save(state, folder / "plain.pt")
    torch.save({"epoch": 3, "model_state_dict": state}, folder / "checkpoint.pth")
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, folder / "lightning.ckpt")
    torch.save({f"module.{name}": value for name, value in state.items()}, folder / "parallel.pt")
    safetensors(folder / "w.safetensors", state)
    x = torch.randn(5, 4)
    for name in ("plain.pt", "checkpoint.pth", "lightning.ckpt", "parallel.pt", "w.safetensors"):
        found = read_module(f"{folder / 'model.py'}:build", folder / name)
        assert torch.equal(found(x), module(x)), name


def test_safetensors_of_other_types_keep_their_numbers(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(2, 3).double(),
        "b": torch.arange(4),
        "c": torch.randn(3).half(),
        "d": torch.tensor(2.5),
    }
    safetensors(tmp_path / "w.safetensors", tensors)
    found = read_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    (tmp_path / "w.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{}x")
    with pytest.raises(DataError, match="is no valid safetensors file"):
        read_weights(tmp_path / "w.safetensors")


def test_weights_that_do_not_fit_are_refused_with_their_names() -> None:
    state = small().state_dict()
    renamed = {("encoder.weight" if name == "0.weight" else name): value for name, value in state.items()}
    with pytest.raises(
        AdoptionError, match=r"w\.pt does not fit the network: it lacks 0\.weight and also has encoder\.weight"
    ):
        load_weights(small(), renamed, Path("w.pt"))
    state["2.weight"] = torch.zeros(5, 2)
    with pytest.raises(AdoptionError, match=r"2\.weight has the shape \[5, 2\], but the network has \[4, 2\]"):
        load_weights(small(), state, Path("w.pt"))


def test_weights_without_counts_of_batches_fit_a_network_with_batch_norm() -> None:
    module = settle(perceptron(), (6,))
    state = {name: value for name, value in module.state_dict().items() if "num_batches" not in name}
    x = torch.randn(3, 6)
    assert torch.equal(load_weights(perceptron(), state, Path("w.pt")).eval()(x), module(x))


class Marker:
    """An object that leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.pt", "model.joblib", "model.pkl"])
def test_pickle_is_not_read_unless_it_is_allowed(tmp_path: Path, name: str) -> None:
    if name == "model.pt":
        torch.save(Marker(tmp_path / "ran"), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    with pytest.raises(
        DataError, match=r"can run any code when it is read.*load it.* give elbo\.adopt the (object|network)"
    ):
        read_module(str(tmp_path / name))
    with named_as_options(), pytest.raises(DataError, match=r"can run any code when it is read.*--allow-pickle"):
        read_module(str(tmp_path / name))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match="can run any code"):
        read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_whole_network_and_estimator_are_read_from_pickles_if_that_is_allowed(tmp_path: Path) -> None:
    module = settle(LstmAutoencoder(), (5, 3))
    torch.save(module, tmp_path / "m.pt")
    x = torch.randn(2, 5, 3)
    assert torch.equal(read_module(str(tmp_path / "m.pt"), allow_pickle=True)(x), module(x))
    joblib.dump(PCA(2).fit(np.random.RandomState(0).randn(20, 4)), tmp_path / "pca.joblib")
    assert isinstance(read_module(str(tmp_path / "pca.joblib"), allow_pickle=True), PCA)


def test_weights_given_as_a_network_are_refused_with_what_to_give(tmp_path: Path) -> None:
    torch.save(small().state_dict(), tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"w\.pt has weights, but no network: build .* load_state_dict"):
        read_module(str(tmp_path / "w.pt"))
    expected = r"w\.pt has weights, but no network: give FILE\.py:FUNCTION .* --weights .*w\.pt"
    with named_as_options(), pytest.raises(DataError, match=expected):
        read_module(str(tmp_path / "w.pt"))
    (tmp_path / "w.pt").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"w\.pt cannot be read|is a pickle"):
        read_module(str(tmp_path / "w.pt"))


def test_torchscript_file_gives_the_network(tmp_path: Path) -> None:
    module = settle(perceptron(), (6,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(tmp_path / "m.pt"))
    x = torch.randn(4, 6)
    assert torch.equal(read_module(str(tmp_path / "m.pt"))(x), module(x))


@pytest.mark.parametrize(("make", "shape"), [(perceptron, (6,)), (LstmAutoencoder, (5, 3))])
def test_program_of_torch_export_gives_the_network_for_any_number_of_rows(
    make: Any, shape: tuple[int, ...], tmp_path: Path
) -> None:
    module = settle(make(), shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = ({0: torch.export.Dim("B")},)
        torch.export.save(
            torch.export.export(module, (torch.randn(3, *shape),), dynamic_shapes=dynamic), tmp_path / "m.pt2"
        )
    found = read_module(str(tmp_path / "m.pt2")).eval()
    for batch in (1, 2, 7):
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(found(x), module(x), rtol=1e-6, atol=1e-6)
    rows = torch.randn(20, math.prod(shape))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # users must not see warnings that torch raises about its own objects
        functions = inspect_module(copy_module(found), found, shape, rows)
    script, _ = compile_functions(functions, rows)
    expected = module(rows.reshape(-1, *shape)).reshape(20, -1)
    torch.testing.assert_close(script.reconstruct(rows), expected, rtol=1e-5, atol=1e-6)


def test_program_of_torch_export_with_a_fixed_number_of_rows_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(small(), (torch.randn(3, 4),)), tmp_path / "m.pt2")
    with pytest.raises(
        AdoptionError, match=r"takes exactly 3 rows: export it for any number of rows, with .*dynamic_shapes"
    ):
        read_module(str(tmp_path / "m.pt2"))


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
def test_damaged_file_of_a_network_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match=r"cannot be (read|loaded) as") as caught:
        read_module(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_weights_for_a_file_that_has_its_own_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").touch()
    with pytest.raises(DataError, match="has its own weights: leave weights out"):
        read_module(str(tmp_path / "m.onnx"), tmp_path / "w.pt")


def test_onnx_file_of_a_vae_gives_the_mean_of_its_draw(tmp_path: Path) -> None:
    module: Any = settle(ConvolutionalVae(), (1, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(2, 1, 8, 8),), str(tmp_path / "m.onnx"), dynamo=False, opset_version=17,
                          input_names=["x"], dynamic_axes={"x": {0: "B"}})  # fmt: skip
    x = torch.randn(5, 1, 8, 8)
    found = read_module(str(tmp_path / "m.onnx"))(x)
    mean = module.mean(module.features(x))
    torch.testing.assert_close(found[1], mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], module.deconv(module.expand(mean).view(-1, 6, 2, 2)), rtol=1e-5, atol=1e-5)


def test_scaler_is_read_from_a_pickle_or_as_mean_and_scale(tmp_path: Path) -> None:
    scaler = StandardScaler().fit(np.random.RandomState(0).randn(20, 3))
    joblib.dump(scaler, tmp_path / "s.joblib")
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(scaler))
    (tmp_path / "s.json").write_text('{"mean": [1, 2], "scale": [3, 4]}')
    np.savez(tmp_path / "s.npz", mean=[1.0, 2.0], scale=[3.0, 4.0])
    for name in ("s.joblib", "s.pkl"):
        assert np.array_equal(read_scaler(tmp_path / name).mean_, scaler.mean_)
    assert read_scaler(tmp_path / "s.json") == ([1, 2], [3, 4])
    assert [part.tolist() for part in read_scaler(tmp_path / "s.npz")] == [[1, 2], [3, 4]]


def test_file_without_a_scaler_is_refused(tmp_path: Path) -> None:
    joblib.dump([1, 2], tmp_path / "list.joblib")
    (tmp_path / "s.json").write_text('{"mean": [1, 2]}')
    (tmp_path / "text.pkl").write_text("no pickle")
    with pytest.raises(DataError, match="has a list: expected a scaler of scikit-learn"):
        read_scaler(tmp_path / "list.joblib")
    with pytest.raises(DataError, match='expected "mean" and "scale"'):
        read_scaler(tmp_path / "s.json")
    with pytest.raises(DataError, match=r"text\.pkl cannot be read as a scaler"):
        read_scaler(tmp_path / "text.pkl")
    with pytest.raises(DataError, match=r"none\.joblib is missing"):
        read_scaler(tmp_path / "none.joblib")
