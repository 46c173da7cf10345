"""Networks of ONNX files: compared with the network that was exported, and with ONNX Runtime."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.neural_network import MLPRegressor
from sklearn.preprocessing import StandardScaler
from torch import nn

from tests.training.adoption.networks import (
    AttentionAutoencoder,
    ConvolutionalVae,
    LstmAutoencoder,
    Upsampling,
    perceptron,
    settle,
)
from training.adoption.files import read_onnx
from training.adoption.onnx_network import read_network
from training.errors import AdoptionError

NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "perceptron": (perceptron, (6,)),
    "lstm": (LstmAutoencoder, (5, 3)),
    "bidirectional lstm": (lambda: LstmAutoencoder(bidirectional=True), (5, 3)),
    "gru": (lambda: LstmAutoencoder(kind=nn.GRU), (5, 3)),
    "bidirectional gru": (lambda: LstmAutoencoder(kind=nn.GRU, bidirectional=True), (5, 3)),
    "attention": (AttentionAutoencoder, (5, 4)),
    "upsampling": (Upsampling, (2, 8, 8)),
    "convolutional vae": (ConvolutionalVae, (1, 8, 8)),
}


def test_scaler_and_layers_as_skl2onnx_writes_them_give_the_numbers_of_the_estimator(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    x = (random.standard_normal((200, 6)) * 3 + 5).astype(np.float32)
    scaler = StandardScaler().fit(x)
    network = MLPRegressor(hidden_layer_sizes=(3,), activation="relu", max_iter=5, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network.fit(scaler.transform(x), scaler.transform(x))
    weights = {
        "W1": network.coefs_[0], "B1": network.intercepts_[0][None], "W2": network.coefs_[1],
        "B2": network.intercepts_[1][None],
    }  # fmt: skip
    constants = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()]
    constants.append(numpy_helper.from_array(np.array([-1, 6]), "shape"))
    nodes = [
        helper.make_node(
            "Scaler", ["X"], ["scaled"], domain="ai.onnx.ml", offset=scaler.mean_.tolist(),
            scale=(1 / scaler.scale_).tolist(),
        ),
        helper.make_node("Cast", ["scaled"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["cast", "W1"], ["product1"]),
        helper.make_node("Add", ["product1", "B1"], ["sum1"]),
        helper.make_node("Relu", ["sum1"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "W2"], ["product2"]),
        helper.make_node("Add", ["product2", "B2"], ["sum2"]),
        helper.make_node("Reshape", ["sum2", "shape"], ["variable"]),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 6]) for name in ("X", "variable")]
    graph = helper.make_graph(nodes, "pipeline", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    found = read_onnx(tmp_path / "m.onnx")(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, network.predict(scaler.transform(x)), rtol=1e-4, atol=1e-5)


def export(module: nn.Module, shape: tuple[int, ...], path: Path, dynamic: bool = True, opset: int = 17) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.randn(2, *shape),), str(path), dynamo=False, opset_version=opset, input_names=["rows"],
            dynamic_axes={"rows": {0: "B"}} if dynamic else None,
        )  # fmt: skip


def expected_of(module: nn.Module, x: torch.Tensor) -> Any:
    """Return the outputs of `module`. The code of the VAE is not drawn."""
    if isinstance(module, ConvolutionalVae):
        hidden = module.features(x)
        mean = module.mean(hidden)
        return module.deconv(module.expand(mean).view(-1, 6, 2, 2)), mean, module.log_variance(hidden)
    return module(x)


def pairs_of(found: Any, expected: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    one = isinstance(found, torch.Tensor)
    yield from zip([found] if one else found, [expected] if one else expected, strict=True)


@pytest.mark.parametrize(
    ("name", "opset"), [*((name, 17) for name in NETWORKS), ("lstm", 11), ("attention", 11), ("convolutional vae", 11)]
)
def test_network_of_an_onnx_file_gives_the_outputs_of_the_exported_network_for_any_number_of_rows(
    name: str, opset: int, tmp_path: Path
) -> None:
    make, shape = NETWORKS[name]
    module = settle(make(), shape)
    export(module, shape, tmp_path / "m.onnx", opset=opset)
    network = read_onnx(tmp_path / "m.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        traced = torch.jit.trace(network, (torch.randn(3, *shape),), check_trace=False)
    for batch in (1, 2, 7):
        x = torch.randn(batch, *shape)
        found = network(x)
        for one, other in pairs_of(found, expected_of(module, x)):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        for one, other in pairs_of(traced(x), found):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_network_exported_for_one_row_takes_any_number_of_rows(tmp_path: Path) -> None:
    module = settle(
        nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8), nn.Unflatten(1, (2, 4))), (2, 4)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(1, 2, 4),), str(tmp_path / "m.onnx"), dynamo=False, opset_version=17)
    network = read_onnx(tmp_path / "m.onnx")
    x = torch.randn(6, 2, 4)
    torch.testing.assert_close(network(x), module(x), rtol=1e-5, atol=1e-6)
    assert network.input_shape == (2, 4)
    torch.testing.assert_close(network(x.flatten(1)), module(x), rtol=1e-5, atol=1e-6)


def test_value_named_as_the_code_divides_the_graph_into_encoder_and_decoder(tmp_path: Path) -> None:
    module: Any = settle(perceptron(), (6,))
    export(module, (6,), tmp_path / "m.onnx")
    model = onnx.load(str(tmp_path / "m.onnx"))
    code = next(node.output[0] for node in model.graph.node if node.op_type == "Tanh")
    network: Any = read_onnx(tmp_path / "m.onnx", code)
    x = torch.randn(5, 6)
    torch.testing.assert_close(network.encode(x), module[:6](x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network.decode(module[:6](x)), module(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(AdoptionError, match="no value 'nowhere' for the code: its values are"):
        read_onnx(tmp_path / "m.onnx", "nowhere")


def graph_of(operator: str, shape: list[int], *others: np.ndarray[Any, Any], opset: int = 18, outputs: int = 1,
             **attributes: Any) -> Any:  # fmt: skip
    """Return a model with one node, whose first input is the rows and whose other inputs are constants."""
    names = ["x", *(f"c{number}" if other.size else "" for number, other in enumerate(others))]
    constants = [
        numpy_helper.from_array(other, name) for name, other in zip(names[1:], others, strict=True) if other.size
    ]
    results = [f"y{number}" for number in range(outputs)]
    node = helper.make_node(operator, names, results, **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", *shape[1:]])],
        [helper.make_empty_tensor_value_info(name) for name in results], constants,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.RandomState(1).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


NONE = np.zeros(0, np.float32)
GRAPHS = {
    "add": graph_of("Add", [2, 3], floats(3)),
    "div": graph_of("Div", [2, 3], floats(1)),
    "pow": graph_of("Pow", [2, 3], np.array(2.0, np.float32)),
    "clip": graph_of("Clip", [2, 3], np.array(-0.3, np.float32), np.array(0.4, np.float32)),
    "clip above": graph_of("Clip", [2, 3], NONE, np.array(0.4, np.float32)),
    "clip of opset 6": graph_of("Clip", [2, 3], opset=9, min=-0.5, max=0.5),
    "gemm": graph_of("Gemm", [2, 3], floats(4, 3), floats(4), transB=1),
    "gemm with factors": graph_of("Gemm", [2, 3], floats(3, 4), floats(2, 4), alpha=0.5, beta=-2.0),
    "hard sigmoid": graph_of("HardSigmoid", [2, 3], alpha=0.3, beta=0.4),
    "leaky relu": graph_of("LeakyRelu", [2, 3], alpha=0.3),
    "erf": graph_of("Erf", [2, 3]),
    "softsign": graph_of("Softsign", [2, 3]),
    "celu": graph_of("Celu", [2, 3], alpha=2.0),
    "mish": graph_of("Mish", [2, 3]),
    "log softmax": graph_of("LogSoftmax", [2, 3], axis=-1),
    "conv with automatic padding": graph_of(
        "Conv", [2, 2, 7, 8], floats(4, 2, 3, 4), floats(4), auto_pad="SAME_UPPER",
        strides=[2, 2],
    ),
    "conv with lower padding": graph_of("Conv", [2, 2, 7, 8], floats(4, 2, 3, 4), auto_pad="SAME_LOWER"),
    "conv with uneven padding": graph_of("Conv", [2, 2, 7], floats(4, 2, 3), pads=[2, 1], dilations=[2]),
    "conv with groups": graph_of("Conv", [2, 4, 7], floats(4, 2, 3), group=2),
    "conv of volumes": graph_of("Conv", [2, 1, 4, 5, 6], floats(2, 1, 3, 3, 3), pads=[1, 1, 1, 1, 1, 1]),
    "transposed conv": graph_of(
        "ConvTranspose", [2, 2, 4, 5], floats(2, 3, 3, 3), floats(3), strides=[2, 2], pads=[1, 1, 1, 1],
        output_padding=[1, 1],
    ),
    "transposed conv with uneven padding": graph_of(
        "ConvTranspose", [2, 2, 4], floats(2, 3, 3), strides=[2],
        pads=[0, 1],
    ),
    "max pool with uneven padding": graph_of(
        "MaxPool", [2, 2, 7, 7], kernel_shape=[3, 2], strides=[2, 2],
        pads=[1, 0, 0, 1],
    ),
    "max pool with ceiling": graph_of("MaxPool", [2, 2, 6], kernel_shape=[3], strides=[2], ceil_mode=1),
    "average pool": graph_of("AveragePool", [2, 2, 6, 6], kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 1, 1]),
    "average pool with padding": graph_of(
        "AveragePool", [2, 2, 6, 6], kernel_shape=[2, 2], pads=[1, 1, 1, 1],
        count_include_pad=1,
    ),
    "global average pool": graph_of("GlobalAveragePool", [2, 2, 6, 6]),
    "global max pool": graph_of("GlobalMaxPool", [2, 2, 6, 6]),
    "batch norm": graph_of(
        "BatchNormalization", [2, 3, 4], floats(3), floats(3), floats(3), np.abs(floats(3)) + 1,
        epsilon=1e-3,
    ),
    "instance norm": graph_of("InstanceNormalization", [2, 3, 4], floats(3), floats(3)),
    "layer norm": graph_of("LayerNormalization", [2, 3, 4], floats(3, 4), floats(3, 4), axis=1),
    "pad": graph_of("Pad", [2, 3, 4], ints(0, 0, 1, 0, 0, 2), np.array(0.5, np.float32)),
    "pad by reflection": graph_of("Pad", [2, 3, 4, 4], ints(0, 0, 1, 1, 0, 0, 2, 2), mode="reflect"),
    "pad of opset 9": graph_of("Pad", [2, 3, 4], opset=9, pads=[0, 0, 1, 0, 0, 2], value=1.5),
    "reshape with a kept size": graph_of("Reshape", [2, 3, 4], ints(0, -1)),
    "reshape": graph_of("Reshape", [2, 3, 4], ints(-1, 4, 3)),
    "flatten": graph_of("Flatten", [2, 3, 4], axis=2),
    "transpose": graph_of("Transpose", [2, 3, 4], perm=[0, 2, 1]),
    "squeeze": graph_of("Squeeze", [2, 1, 4], ints(1)),
    "squeeze of opset 11": graph_of("Squeeze", [2, 1, 4], opset=11, axes=[1]),
    "unsqueeze": graph_of("Unsqueeze", [2, 4], ints(1, 3)),
    "slice": graph_of("Slice", [2, 6, 4], ints(1, -3), ints(5, 100), ints(1, 2), ints(2, 1)),
    "slice backwards": graph_of("Slice", [2, 6], ints(-1), ints(-(2**62)), ints(1), ints(-1)),
    "slice of opset 9": graph_of("Slice", [2, 6], opset=9, starts=[1], ends=[4], axes=[1]),
    "split": graph_of("Split", [2, 6], ints(2, 4), outputs=2, axis=1),
    "split of opset 11": graph_of("Split", [2, 6], opset=11, outputs=2, axis=1),
    "gather": graph_of("Gather", [2, 6, 3], np.array([[0, 2], [1, -1]], np.int64), axis=1),
    "gather of one": graph_of("Gather", [2, 6, 3], np.array(4, np.int64), axis=1),
    "tile": graph_of("Tile", [2, 3], ints(1, 3)),
    "expand": graph_of("Expand", [2, 1, 3], ints(1, 4, 1)),
    "reduce mean": graph_of("ReduceMean", [2, 3, 4], ints(1), keepdims=0),
    "reduce mean of opset 13": graph_of("ReduceMean", [2, 3, 4], opset=13, axes=[-1]),
    "reduce l2": graph_of("ReduceL2", [2, 3, 4], ints(1)),
    "reduce max": graph_of("ReduceMax", [2, 3, 4], ints(1, 2)),
    "nearest resize": graph_of(
        "Resize", [2, 2, 3, 4], NONE, np.array([1, 1, 2, 2], np.float32), mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    ),
    "linear resize": graph_of("Resize", [2, 2, 3, 4], NONE, np.array([1, 1, 2, 2], np.float32), mode="linear"),
    "resize with aligned corners": graph_of(
        "Resize", [2, 2, 3, 4], NONE, NONE, ints(2, 2, 5, 9), mode="linear",
        coordinate_transformation_mode="align_corners",
    ),
    "reverse lstm": graph_of(
        "LSTM", [5, 2, 3], floats(1, 16, 3), floats(1, 16, 4), floats(1, 32), outputs=3, hidden_size=4,
        direction="reverse",
    ),
    "gru without bias": graph_of(
        "GRU", [5, 2, 3], floats(1, 12, 3), floats(1, 12, 4), outputs=2, hidden_size=4,
        linear_before_reset=1,
    ),
    "lstm with a first state": graph_of(
        "LSTM", [5, 2, 3], floats(1, 16, 3), floats(1, 16, 4), NONE, NONE, floats(1, 2, 4),
        floats(1, 2, 4), hidden_size=4,
    ),
}  # fmt: skip


def shape_of(model: Any) -> list[int]:
    return [size.dim_value or 2 for size in model.graph.input[0].type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", GRAPHS)
def test_operator_gives_the_result_of_onnx_runtime(name: str) -> None:
    model = GRAPHS[name]
    x = np.random.RandomState(2).standard_normal(shape_of(model)).astype(np.float32)
    if "lstm" in name or "gru" in name:  # their first axis is the step
        x = np.random.RandomState(2).standard_normal((5, 2, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x})
    found = read_network(model)(torch.from_numpy(x))
    for one, other in zip([found] if isinstance(found, torch.Tensor) else found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-5, atol=1e-5)


REFUSED = {
    "unknown": (graph_of("NonZero", [2, 3]), "operators NonZero, which Elbo cannot convert"),
    "training batch norm": (
        graph_of("BatchNormalization", [2, 3], *[np.ones(3, np.float32)] * 4, training_mode=1),
        "BatchNormalization in training mode",
    ),
    "gru of keras": (
        graph_of("GRU", [5, 2, 3], floats(1, 12, 3), floats(1, 12, 4), hidden_size=4), "reset_after=True"
    ),
    "other activations": (
        graph_of("LSTM", [5, 2, 3], floats(1, 16, 3), floats(1, 16, 4), hidden_size=4, activations=["Relu"] * 3),
        "LSTM with the activations relu",
    ),
    "softmax over several axes": (graph_of("Softmax", [2, 3, 4], opset=11), "opset 13 or later"),
    "slice with steps back": (graph_of("Slice", [2, 6], ints(4), ints(0), ints(1), ints(-2)), "negative step"),
    "cubic resize": (
        graph_of("Resize", [2, 2, 3, 4], NONE, np.array([1, 1, 2, 2], np.float32), mode="cubic"), "mode cubic"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_graph_that_cannot_be_converted_is_refused_with_the_operator(name: str) -> None:
    model, reason = REFUSED[name]
    with pytest.raises(AdoptionError, match=reason):
        read_network(model)(torch.randn(shape_of(model)))


def test_graph_with_several_inputs_or_another_domain_is_refused() -> None:
    several = graph_of("Add", [2, 3], floats(3))
    del several.graph.initializer[:]
    several.graph.input.append(helper.make_tensor_value_info("c0", TensorProto.FLOAT, [3]))
    with pytest.raises(AdoptionError, match=r"has 2 inputs \(x, c0\): expected one"):
        read_network(several)
    foreign = graph_of("Relu", [2, 3])
    foreign.graph.node[0].domain = "com.example"
    with pytest.raises(AdoptionError, match=r"Relu of the domain com\.example"):
        read_network(foreign)


def test_file_whose_converted_network_differs_from_onnx_runtime_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.adoption import onnx_network

    onnx.save(GRAPHS["leaky relu"], str(tmp_path / "m.onnx"))
    monkeypatch.setitem(onnx_network.OPERATORS, "LeakyRelu", lambda node, x: torch.relu(x))  # noqa: ARG005
    with pytest.raises(AdoptionError, match=r"differs from ONNX Runtime by 0\.\d+ of the largest output"):
        read_onnx(tmp_path / "m.onnx")


def test_external_weights_beside_an_onnx_file_are_read(tmp_path: Path) -> None:
    module = settle(perceptron(), (6,))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(2, 6),), buffer, dynamo=False, opset_version=17)  # type: ignore[arg-type]
    onnx.save(
        onnx.load_from_string(buffer.getvalue()), str(tmp_path / "m.onnx"), save_as_external_data=True,
        location="weights.bin", size_threshold=0,
    )  # fmt: skip
    x = torch.randn(3, 6)
    torch.testing.assert_close(read_onnx(tmp_path / "m.onnx")(x), module(x), rtol=1e-5, atol=1e-5)
