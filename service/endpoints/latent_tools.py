"""POST /edit moves a row towards a label; POST /neighbours finds the held-out rows that are nearest to a row."""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from models.errors import join_names
from service.access.scopes import Scope
from service.codec.budget import Budget
from service.endpoints import offload
from service.endpoints.conditions import features_of, read_condition, without_conditions
from service.endpoints.context import ServiceContext
from service.endpoints.inference import (
    MAX_STRIP_STEPS,
    Point,
    decode_latents,
    imputed_fields,
    latents_of,
    read_inputs,
    read_latents,
    read_point,
)
from service.endpoints.offload import run_in_thread_if_long
from service.endpoints.pipeline import RequestSpec, parse_request, render_response, run_operation
from service.endpoints.pixel_warning import pixel_fields
from service.errors import InvalidField, NotSupported, TooManyRows
from service.http.request import HttpResponse, RequestContext
from service.inference import operations
from service.inference.latent_space import MIN_LABEL_ROWS, BadExhibitError, HeldOutRows, LabelMean
from service.inference.served_model import ServedModel
from service.schemas import EditBody, NeighboursBody

Array = npt.NDArray[np.float32]
T = TypeVar("T")
READ_EXHIBIT = 60_000_000  # estimated time to read the exhibits about latents for the first time, in nanoseconds
DIFFERENCE = 2  # estimated time to subtract two numbers, square the result and add it up, in nanoseconds
MAX_LISTED = 20  # labels that an error message lists
TRAIN_AGAIN = "train the model again with this version of Elbo and without --private"


class Inputs(NamedTuple):
    """The input of /neighbours: rows [B, D], windows [B, N, D] or latents [B, K]."""

    values: Array
    are_latents: bool


class LatentEndpoints:
    """The handlers of POST /edit and POST /neighbours."""

    def __init__(self, service: ServiceContext) -> None:
        self._service = service

    async def edit(self, request: RequestContext) -> HttpResponse:
        """Move a row towards a label in the latent space, and decode it."""
        parsed = await parse_request(self._service, request, EDIT)
        means = await _read(parsed.served, "label_means", lambda: parsed.served.label_means)
        direction = _direction(parsed.served, means, parsed.body)
        (start,) = await latents_of(self._service, parsed, [parsed.inputs])

        def move() -> Array:
            steps = parsed.body.steps
            amounts = np.linspace(0.0, parsed.body.amount, steps) if steps > 1 else np.array([parsed.body.amount])
            return (start + amounts[:, None] * direction).astype(np.float32)

        latents = await run_in_thread_if_long(move, parsed.body.steps * len(start) * offload.NUMBER)
        outputs = await decode_latents(self._service, parsed, latents)
        rows = [] if parsed.inputs.is_latent else [parsed.inputs.values]
        notes = imputed_fields(parsed.served, *rows) | await pixel_fields(parsed.served, *rows)
        columns = len(outputs) if len(outputs) <= MAX_STRIP_STEPS else None
        return await render_response(parsed, {"latents": latents, "outputs": outputs, **notes}, outputs, columns)

    async def neighbours(self, request: RequestContext) -> HttpResponse:
        """Find the held-out rows whose latents are nearest to those of each row."""
        parsed = await parse_request(self._service, request, NEIGHBOURS)
        served, count = parsed.served, parsed.body.n
        if parsed.body.values and request.key:
            request.key.require(Scope.ADMIN)
        rows, are_latents = parsed.inputs
        limit = self._service.settings.max_rows
        if len(rows) * count > limit:
            raise TooManyRows(
                f"a response may have at most {limit} neighbours (ELBO_MAX_ROWS), got {len(rows)} rows with {count} "
                "each",
                pointer="/n",
                expected=f"at most {limit} rows times n",
                got=str(len(rows) * count),
                hint="split the rows over several requests, or lower n",
            )
        held_out = await _read(served, "held_out", lambda: served.held_out)
        if held_out is None:
            raise NotSupported(f"{served.name}@{served.version} has no held-out rows in its artifact", hint=TRAIN_AGAIN)
        latents = rows
        notes: dict[str, Any] = {}
        if not are_latents:
            latents, _ = await run_operation(self._service, parsed, operations.ENCODE, rows)
            latents, rows = without_conditions(served, latents), features_of(served, rows)
            notes = imputed_fields(served, rows) | await pixel_fields(served, rows)
        parsed.record.rows = len(rows)
        find = partial(_neighbours, held_out, latents, count, parsed.body.values)
        fields = await run_in_thread_if_long(find, len(rows) * held_out.latents.size * DIFFERENCE)
        width = served.manifest.width if parsed.body.values else 1
        cost = len(rows) * count * width * offload.NUMBER
        return await render_response(parsed, fields | notes, latents, write_ns=cost)


async def _read(served: ServedModel, name: str, read: Callable[[], T]) -> T:
    """Return the cached property `name` of `served`, which `read` computes from an exhibit of the artifact.

    Raises:
        NotSupported: the exhibit is damaged, or latents of different groups cannot be compared.
    """
    if served.baseline is not None and served.baseline.features is not None:
        raise NotSupported(
            f"{served.name}@{served.version} scales the features of each group separately, so the latents of "
            "rows of different groups cannot be compared",
            hint="train the model without --scale-by-group",
        )
    try:
        return await run_in_thread_if_long(read, 0 if name in served.__dict__ else READ_EXHIBIT)
    except BadExhibitError as error:
        raise NotSupported(f"{served.name}@{served.version}: {error}", hint="publish the model again") from error


def _direction(served: ServedModel, means: dict[str, LabelMean], body: EditBody) -> Array:
    """Return the difference [K] between the mean latents at the two ends of the direction.

    Directions of attributes in latent spaces are from Larsen et al., "Autoencoding beyond pixels using a learned
    similarity metric", 2016, section 4.2.

    Raises:
        NotSupported: the artifact knows no labels.
        InvalidField: the artifact does not know a label that the request names.
    """
    if not means:
        raise NotSupported(
            f"{served.name}@{served.version} knows no labels: there is no label with {MIN_LABEL_ROWS} rows among "
            "the held-out rows in its artifact, and elbo directions has not added any",
            hint=f"run elbo directions {served.name} with labelled data",
        )
    target = _find(served, means, body.direction, "direction")
    if body.away_from is None:
        return target.mean - target.others
    return target.mean - _find(served, means, body.away_from, "away_from").mean


def _find(served: ServedModel, means: dict[str, LabelMean], name: str, field: str) -> LabelMean:
    if name in means:
        return means[name]
    known = [repr(label) for label in list(means)[:MAX_LISTED]]
    listed = join_names(known) if len(means) <= MAX_LISTED else f"{', '.join(known)} and {len(means) - MAX_LISTED} more"
    near = difflib.get_close_matches(name[:100], list(means)[:1000], 1)
    raise InvalidField(
        f"{served.name}@{served.version} does not know the label {name[:100]!r}: it knows {listed}",
        pointer=f"/{field}",
        expected="a known label",
        got=name[:100],
        hint=f"did you mean {near[0]!r}?" if near else None,
    )


def _neighbours(held_out: HeldOutRows, latents: Array, count: int, has_values: bool) -> dict[str, Any]:
    """Return the fields of a `NeighboursAnswer`."""
    indices, distances = held_out.nearest(latents, count)
    fields = {"indices": indices, "distances": distances, "usual_distance": held_out.usual_distance}
    labels, inputs = held_out.labels, held_out.inputs
    if labels is not None:
        fields["labels"] = [[labels[index] for index in row] for row in indices.tolist()]
    if has_values:
        fields["values"] = [
            [inputs[index] if index < len(inputs) else None for index in row] for row in indices.tolist()
        ]
    return fields


def _read_point(served: ServedModel, body: EditBody, may_contain_non_floats: bool, _budget: Budget) -> Point:
    read_condition(served, body.condition)
    return read_point(served, body, "", may_contain_non_floats)


def _read_neighbours(served: ServedModel, body: NeighboursBody, may_contain_non_floats: bool, budget: Budget) -> Inputs:
    """Return the rows or latents of a request. Raises InvalidField, InvalidRows."""
    given = [name for name in ("inputs", "latents") if getattr(body, name) is not None]
    if len(given) != 1:
        got = " and ".join(given) or "neither"
        raise InvalidField(
            f"expected one of the fields inputs and latents, got {got}", expected="inputs or latents", got=got
        )
    are_latents = given == ["latents"]
    if are_latents:
        read_condition(served, body.condition)
    read = read_latents if are_latents else read_inputs
    return Inputs(read(served, body, may_contain_non_floats, budget), are_latents)


EDIT = RequestSpec(EditBody, _read_point, count_field="steps", png_output=True, needs_latents=True)
NEIGHBOURS = RequestSpec(
    NeighboursBody,
    _read_neighbours,
    row_fields=("inputs", "latents"),
    array_field="inputs",
    pictures=True,
    json_output=True,
    needs_latents=True,
)
