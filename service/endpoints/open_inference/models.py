"""The models of the Open Inference Protocol: which inputs they take, and which outputs they give.

Each served model is up to three models of the protocol:

- `NAME` takes rows. Its outputs are those of /reconstruct, /encode and /anomaly.
- `NAME:decode` takes latents, and gives rows.
- `NAME:sample` takes nothing, and gives new rows and their latents.

If a model knows conditions, `NAME` and `NAME:decode` also take optional inputs of texts, one for each column of
conditions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from service.endpoints.context import ServiceContext
from service.endpoints.pipeline import require_latents
from service.errors import InvalidField, ModelNotFound
from service.inference.served_model import ServedModel

DECODE, SAMPLE = "decode", "sample"
ROWS, LATENTS = "x", "z"  # names of the inputs
OPTIONS_OF_ROWS = ("alpha", "extrapolated", "observe", "condition")
OPTIONS_OF_LATENTS = ("condition",)
OPTIONS_OF_SAMPLES = ("n", "seed", "temperature", "prior", "noise", "condition")
IGNORED_OPTIONS = ("priority",)  # a hint to servers that have priorities
Shape = Callable[[ServedModel], list[int]]


class Output(NamedTuple):
    """An output of a model of the protocol.

    Args:
        shape: returns the lengths after the number of rows.
        task: which operation of the model computes it.
        datatype: the protocol's name of its dtype.
    """

    shape: Shape
    task: str
    datatype: str = "FP32"

    @property
    def is_row(self) -> bool:
        """Whether the output has as many numbers as the rows."""
        return self.shape is _row


def _number(_: ServedModel) -> list[int]:
    return []


def _row(served: ServedModel) -> list[int]:
    return [served.manifest.width]


def _latents(served: ServedModel) -> list[int]:
    return [served.manifest.latents]


def _parts(served: ServedModel) -> list[int]:
    return [len(served.manifest.parts)]


RECONSTRUCT_TASK, ENCODE_TASK, SCORE_TASK = "reconstruct", "encode", "score"
OUTPUTS_OF_ROWS = {
    "x_hat": Output(_row, RECONSTRUCT_TASK),
    "error": Output(_number, RECONSTRUCT_TASK),
    "mean": Output(_latents, ENCODE_TASK),
    "std": Output(_latents, ENCODE_TASK),
    "score": Output(_number, SCORE_TASK),
    "p_value": Output(_number, SCORE_TASK),
    "severity": Output(_number, SCORE_TASK),
    "is_anomaly": Output(_number, SCORE_TASK, "BOOL"),
    "parts": Output(_parts, SCORE_TASK),
    "contribution": Output(_row, SCORE_TASK),
    "expected": Output(_row, SCORE_TASK),
}
OUTPUTS_OF_DECODE = {"x_hat": Output(_row, DECODE)}
OUTPUTS_OF_SAMPLE = {"x": Output(_row, SAMPLE), "z": Output(_latents, SAMPLE)}


class ProtocolModel(NamedTuple):
    """A model of the protocol.

    Args:
        served: the model that computes the outputs.
        method: "", DECODE or SAMPLE.
    """

    served: ServedModel
    method: str

    @property
    def name(self) -> str:
        """The name in paths and responses."""
        return f"{self.served.name}:{self.method}" if self.method else self.served.name

    @property
    def input(self) -> str | None:
        """The name of the input; None if there is none."""
        return {DECODE: LATENTS, SAMPLE: None}.get(self.method, ROWS)

    @property
    def condition_inputs(self) -> tuple[str, ...]:
        """The names of the optional inputs that give the conditions of rows or latents, as texts."""
        known = self.served.conditions
        if known is None or self.method == SAMPLE:
            return ()
        return tuple(name for name in known.names if name != self.input)

    @property
    def input_shape(self) -> list[int]:
        """The lengths of the input, after the number of rows."""
        if self.method == DECODE:
            return _latents(self.served)
        windows = self.served.manifest.window
        return _row(self.served) if windows is None else [windows.rows, *_row(self.served)]

    @property
    def outputs(self) -> dict[str, Output]:
        """The outputs by name."""
        found = {DECODE: OUTPUTS_OF_DECODE, SAMPLE: OUTPUTS_OF_SAMPLE}.get(self.method, OUTPUTS_OF_ROWS)
        if self.served.manifest.only_reconstructs:
            return {name: output for name, output in found.items() if output.task != ENCODE_TASK}
        return found

    @property
    def options(self) -> tuple[str, ...]:
        """The parameters of a request that are options of the model."""
        return {DECODE: OPTIONS_OF_LATENTS, SAMPLE: OPTIONS_OF_SAMPLES}.get(self.method, OPTIONS_OF_ROWS)


def find_model(service: ServiceContext, name: str, version: str | None) -> ProtocolModel:
    """Return the model `name`, in its newest version if `version` is None.

    Raises:
        NotReady: no model is served.
        ModelNotFound: there is no such model.
        NotSupported: the model cannot decode latents.
    """
    plain, colon, method = name.partition(":")
    served = service.find(plain if version is None else f"{plain}@{version}")
    if colon and method not in (DECODE, SAMPLE):
        raise ModelNotFound(
            f"model {name!r} is not served",
            expected=f"{plain}, {plain}:{DECODE} or {plain}:{SAMPLE}",
            got=name,
            hint=f"ask for {plain}, {plain}:{DECODE} or {plain}:{SAMPLE}",
        )
    if method:
        require_latents(served)
    return ProtocolModel(served, method)


def describe(service: ServiceContext, model: ProtocolModel) -> dict[str, Any]:
    """Return the metadata of `model`, as in `ModelMetadata`."""
    versions = service.registry.catalogue.models.get(model.served.name, {model.served.version: model.served})
    inputs = [{"name": model.input, "datatype": "FP32", "shape": [-1, *model.input_shape]}] if model.input else []
    inputs += [{"name": name, "datatype": "BYTES", "shape": [-1, 1]} for name in model.condition_inputs]
    return {
        "name": model.name,
        "versions": [str(version) for version in sorted(versions)],
        "platform": f"elbo_{model.served.manifest.kind}",
        "inputs": inputs,
        "outputs": [
            {"name": name, "datatype": output.datatype, "shape": [-1, *output.shape(model.served)]}
            for name, output in model.outputs.items()
        ],
    }


def require_outputs(model: ProtocolModel, names: list[str]) -> None:
    """Raise InvalidField if `model` has no output of one of the `names`."""
    for index, name in enumerate(names):
        if name not in model.outputs:
            known = ", ".join(model.outputs)
            raise InvalidField(
                f"{model.name} has no output {name[:100]!r}",
                pointer=f"/outputs/{index}/name",
                expected=known,
                got=name[:100],
                hint=f"the outputs are {known}",
            )
