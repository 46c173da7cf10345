"""The check of ONNX twins reads graphs as protobuf defines them, and refuses those that no twin can have."""

import json
from pathlib import Path

import onnx
import pytest
from onnx import helper

from models.errors import ArtifactUnsafe
from models.onnx_check import INPUT, MAX_NODES, PLACEHOLDER, check_twin

FLOAT = onnx.TensorProto.FLOAT


def twin(rows: str = INPUT, domain: str = "", copies: int = 1) -> bytes:
    """Return a graph with `copies` nodes. Each multiplies `rows` by the weight `w` of the shape [2, 3].

    Args:
        rows: the name of the input.
        domain: the domain of the operators.
        copies: the number of nodes.
    """
    weight = onnx.TensorProto(name="w", data_type=FLOAT, data_location="EXTERNAL", dims=[2, 3])
    weight.external_data.add(key="location", value=PLACEHOLDER)
    nodes = [helper.make_node("MatMul", [rows, "w"], [f"y{index}"]) for index in range(copies)]
    graph = helper.make_graph(
        nodes,
        "encode",
        [helper.make_tensor_value_info(rows, FLOAT, ["B", 2])],
        [helper.make_tensor_value_info("y0", FLOAT, ["B", 3])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, 18)])
    content: bytes = model.SerializeToString()
    return content


def reason_of_refusal(graph: bytes, weights: object = ("w",)) -> str:
    with pytest.raises(ArtifactUnsafe) as refusal:
        check_twin(graph, json.dumps(weights).encode(), "encode.onnx", Path("model.pt"))
    return str(refusal.value)


@pytest.mark.parametrize("dims", [b"\x08\x02\x08\x03", b"\x0a\x02\x02\x03"], ids=["one by one", "packed"])
def test_shape_in_each_form_of_protobuf_is_the_shape_of_the_weight(dims: bytes) -> None:
    before, after = twin().split(b"\x08\x02\x08\x03")  # as the package onnx writes the shape
    assert check_twin(before + dims + after, b'["w"]', "encode.onnx", Path("model.pt")) == {"w": (FLOAT, (2, 3))}


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (twin(rows="images"), "has the inputs ['images'], expected ['rows']"),
        (twin(domain="ai.onnx.ml"), "uses operators of another domain than ONNX's own"),
        (twin(copies=MAX_NODES + 1), f"has {MAX_NODES + 1:,} nodes, at most {MAX_NODES:,} are allowed"),
        (twin() + b"\x0a\x011", "has the field ir_version of model in the wrong form"),
        (twin() + b"\x08" + 10 * b"\xff" + b"\x01", "has a number of more than 64 bits"),
        (twin() + b"\x3a\x7f", "is truncated"),
        (twin() + b"\x08\xff", "is damaged (IndexError)"),
    ],
    ids=["another input", "another domain", "too many nodes", "text for a number", "long number", "truncated", "cut"],
)
def test_graph_that_no_twin_has_is_refused_with_the_reason(graph: bytes, reason: str) -> None:
    assert reason_of_refusal(graph) == f"model.pt: the graph encode.onnx {reason}; no artifact of Elbo does"


@pytest.mark.parametrize("weights", [{"w": 1}, ["w", 1]], ids=["object", "number"])
def test_list_of_weights_that_is_no_list_of_names_is_refused(weights: object) -> None:
    assert "has a list of weights that is no list of names" in reason_of_refusal(twin(), weights)
