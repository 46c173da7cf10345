"""Schemas of the Open Inference Protocol for the OpenAPI document. No request is validated with them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from service.schemas import drop_null_defaults

_LENGTHS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 8}
_SHAPE = {"type": "array", "items": {"type": "integer"}}
_DATA = {
    "type": "array",
    "items": {"anyOf": [{"type": ["number", "boolean", "string", "null"]}, {"type": "array", "items": {}}]},
}
Lengths = Annotated[Any, WithJsonSchema(_LENGTHS)]
Shape = Annotated[Any, WithJsonSchema(_SHAPE)]
Data = Annotated[Any, WithJsonSchema(_DATA)]
Parameters = Annotated[Any, WithJsonSchema({"type": ["object", "null"]})]
Datatype = Literal[
    "FP16", "FP32", "FP64", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "BF16", "BYTES"
]  # fmt: skip


class ProtocolBody(BaseModel):
    """Base class of the objects of the protocol. They are built when the OpenAPI document is first asked for."""

    model_config = ConfigDict(defer_build=True, protected_namespaces=(), json_schema_extra=drop_null_defaults)


class InferenceError(ProtocolBody):
    """An error in the form of the protocol."""

    error: str = Field(description="what happened, where in the request, and what to do")


class ServerLive(ProtocolBody):
    """The server runs."""

    live: bool


class ServerReady(ProtocolBody):
    """The server accepts requests."""

    ready: bool


class ModelReady(ProtocolBody):
    """The model accepts requests."""

    name: str
    ready: bool


class ServerMetadata(ProtocolBody):
    """The server and the extensions of the protocol that it supports."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(ProtocolBody):
    """An input or an output of a model."""

    name: str
    datatype: str
    shape: Shape = Field(description="lengths; -1 for the number of rows")


class ModelMetadata(ProtocolBody):
    """The inputs and the outputs of a model."""

    name: str
    versions: list[str]
    platform: str = Field(description="`elbo_` and the kind of the model")
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class InferenceInput(ProtocolBody):
    """An input tensor."""

    name: str = Field(description="`x`, or `z` for decoding; or a column of conditions, of the datatype BYTES")
    shape: Lengths
    datatype: Datatype = Field(description="numbers are converted to FP32")
    parameters: Parameters = Field(
        None, description="`binary_data_size`: number of bytes of the input after the JSON object, in place of `data`"
    )
    data: Data = Field(
        None, description="the numbers or texts in row-major order, flat or nested; null for a missing number"
    )


class RequestedOutput(ProtocolBody):
    """An output that the request asks for."""

    name: str
    parameters: Parameters = Field(
        None, description="`binary_data`: whether the numbers follow the JSON object of the response in binary form"
    )


class InferenceBody(ProtocolBody):
    """A request for inference. Other fields are ignored."""

    id: str | None = Field(None, description="repeated in the response")
    parameters: Parameters = Field(
        None,
        description="`binary_data_output`: whether outputs are binary by default; `timeout` in microseconds; and the "
        "options of the model: `alpha`, `extrapolated`, `observe` and `condition`, or `n`, `seed`, `temperature`, "
        "`prior`, `noise` and `condition` for drawing",
    )
    inputs: list[InferenceInput] = Field(max_length=100)
    outputs: list[RequestedOutput] | None = Field(None, max_length=100, description="by default all outputs")


class InferenceOutput(ProtocolBody):
    """An output tensor."""

    name: str
    shape: Shape
    datatype: str
    parameters: Parameters = Field(None, description="`binary_data_size`, if the numbers are binary")
    data: Data = Field(None, description="the numbers in row-major order, flat")


class InferenceAnswer(ProtocolBody):
    """The outputs that the request asks for, in the same order."""

    model_name: str
    model_version: str
    id: str | None = Field(None, description="the id of the request")
    parameters: Parameters = Field(None, description="for `NAME:sample`: the `seed` of the samples")
    outputs: list[InferenceOutput]
