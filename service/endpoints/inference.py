"""The POST endpoints: encode, decode, reconstruct, sample, interpolate, anomaly."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from service.anomaly.inputs import RECORD_READERS, InputRows, parse_input_rows, with_default_alpha
from service.anomaly.inputs import ROW_FIELDS as ANOMALY_FIELDS
from service.anomaly.verdicts import (
    PART_ROWS,
    Verdicts,
    all_errors,
    parsing_errors,
    results_and_errors,
    results_in_parts,
    score_array,
)
from service.codec.budget import Budget
from service.codec.conditions import Code, Codes
from service.codec.partial_rows import parse_all_records
from service.codec.request_body import JSON
from service.codec.row_arrays import parse_array
from service.codec.row_lists import parse_row, parse_rows
from service.codec.row_schema import RowSchema
from service.codec.row_windows import count_missing, parse_window, parse_windows
from service.endpoints import anomaly_stream, offload
from service.endpoints.completion import (
    ROW_FIELDS,
    Given,
    read_given,
    read_partial_rows,
    require_one_field,
)
from service.endpoints.conditions import (
    features_of,
    read_codes,
    read_condition,
    with_code,
    with_conditions,
    without_conditions,
)
from service.endpoints.context import ServiceContext
from service.endpoints.offload import run_in_thread_if_long
from service.endpoints.pipeline import (
    ParsedRequest,
    RequestSpec,
    parse_request,
    render_response,
    run_operation,
    take_turn,
)
from service.endpoints.pixel_warning import may_be_out_of_range, pixel_fields, pixel_warning
from service.endpoints.scoring import is_live_traffic, score_rows
from service.errors import InvalidField
from service.http.request import HttpResponse, RequestContext
from service.inference import operations
from service.inference.batch import concatenate
from service.inference.sampling import NoiseSource, fresh_seed, interpolate
from service.inference.served_model import ServedModel
from service.schemas import (
    AnomalyBody,
    DecodeBody,
    EditBody,
    EncodeBody,
    End,
    ImputeBody,
    InterpolateBody,
    NeighboursBody,
    ReconstructBody,
    SampleBody,
)

Array = npt.NDArray[np.float32]
Spec = RequestSpec[Any, Any]  # the request that a handler accepts instead of its own, from a platform's endpoint
LATENT_DRAWS = 1024  # number of draws from the prior that the standard deviations of the latents are estimated from
MAX_DEVIATIONS = 1024  # the standard deviations are kept for at most this many conditions of a model
MAX_STRIP_STEPS = 32  # for up to this many interpolation steps, the image is a single row of tiles


class InferenceEndpoints:
    """The handlers of the POST endpoints that run a model."""

    def __init__(self, service: ServiceContext) -> None:
        self._service = service
        self._noise = NoiseSource()
        # For each model and condition, the standard deviations [K] of latents that are drawn from its prior.
        self._deviations: WeakKeyDictionary[ServedModel, dict[Code, Array]] = WeakKeyDictionary()

    async def encode(self, request: RequestContext, spec: Spec | None = None) -> HttpResponse:
        """Encode rows: return the posterior mean or a posterior sample, and the posterior standard deviation."""
        parsed = await parse_request(self._service, request, spec or ENCODE)
        mean, std = await run_operation(self._service, parsed, operations.ENCODE, parsed.inputs)
        rows = features_of(parsed.served, parsed.inputs)
        imputed = imputed_fields(parsed.served, rows) | await pixel_fields(parsed.served, rows)
        mean, std = without_conditions(parsed.served, mean), without_conditions(parsed.served, std)
        if not parsed.body.sample:
            return await render_response(parsed, {"latents": mean, "std": std, **imputed}, mean)
        seed = _seed(parsed.body.seed)

        def draw() -> Array:
            noise, _ = self._noise.draw(seed, *mean.shape)
            return mean + std * noise

        latents = await run_in_thread_if_long(draw, mean.size * offload.NORMAL, frees_lock=True)
        return await render_response(parsed, {"latents": latents, "std": std, "seed": seed, **imputed}, latents)

    async def decode(self, request: RequestContext, spec: Spec | None = None) -> HttpResponse:
        """Decode latents to rows."""
        parsed = await parse_request(self._service, request, spec or DECODE)
        (outputs,) = await run_operation(self._service, parsed, operations.DECODE, parsed.inputs)
        return await render_response(parsed, {"outputs": outputs, **await _record_fields(parsed, outputs)}, outputs)

    async def reconstruct(self, request: RequestContext, spec: Spec | None = None) -> HttpResponse:
        """Encode and decode rows; return the reconstructions, and the mean squared error per row."""
        parsed = await parse_request(self._service, request, spec or RECONSTRUCT)
        operation = operations.reconstruct(parsed.served.row_schema.allows_missing)
        outputs, errors = await run_operation(self._service, parsed, operation, parsed.inputs)
        rows = features_of(parsed.served, parsed.inputs)
        fields = {"outputs": outputs, "errors": errors, **imputed_fields(parsed.served, rows)}
        if may_be_out_of_range(parsed.served, rows, errors):
            fields |= await pixel_fields(parsed.served, rows)
        return await render_response(parsed, fields | await _record_fields(parsed, outputs), outputs)

    async def sample(self, request: RequestContext) -> HttpResponse:
        """Sample new rows from the prior. The same seed always gives the same bytes."""
        parsed = await parse_request(self._service, request, SAMPLE)
        start = parsed.inputs
        if isinstance(start, Point):
            return await self._sample_near(parsed, start)
        if isinstance(start, Given):
            return await self._complete(parsed, start)
        samples = await self.draw_samples(parsed, start)
        fields = {"latents": samples.latents, "outputs": samples.outputs, "seed": samples.seed}
        cost = 0.0
        if known := parsed.served.conditions:
            cost = len(samples.outputs) * offload.NORMAL
            describe = partial(known.describe, known.codes_of(samples.noise[:, -known.width :]))
            fields["conditions"] = await run_in_thread_if_long(describe, cost)
        fields |= await _record_fields(parsed, samples.outputs)
        return await render_response(parsed, fields, samples.outputs, write_ns=cost)

    async def draw_samples(self, parsed: "ParsedRequest[SampleBody, Any]", codes: Codes | None) -> "Samples":
        """Return rows that are drawn from the prior of the model; `codes` [B, J] are their conditions."""
        seed = _seed(parsed.body.seed)
        is_standard = _is_standard(parsed)
        noise = await self._draw(parsed, seed, parsed.served.manifest.width if _with_noise(parsed) else 0, codes)
        if is_standard:
            operation = operations.SAMPLE_STANDARD_ROWS if len(noise) == 3 else operations.SAMPLE_STANDARD
        else:
            operation = operations.SAMPLE_ROWS if len(noise) == 3 else operations.SAMPLE
        latents, outputs = await run_operation(self._service, parsed, operation, *noise)
        return Samples(without_conditions(parsed.served, latents), outputs, seed, noise[0])

    async def _draw(
        self, parsed: "ParsedRequest[SampleBody, Start]", seed: int, row_width: int, codes: Codes | None = None
    ) -> tuple[Array, ...]:
        """Return the random numbers of B samples.

        They are the noise of the latents [B, K], or with `codes` [B, K + C], the choices of components [B], and, unless
        `row_width` is 0, the noise of the rows [B, row_width].

        Long draws run one at a time, because they need the turn. If many large requests arrive at once, most are
        refused before they cost time and memory.

        Raises:
            Overloaded: admission control refuses the rows.
        """
        rows, manifest = parsed.body.n, parsed.served.manifest
        temperature = np.float32(parsed.body.temperature)
        known = parsed.served.conditions

        def draw() -> tuple[Array, ...]:
            normal, uniform = self._noise.draw(seed, rows, manifest.latents)
            normal *= temperature
            if known is not None and codes is not None:
                normal = known.join(normal, known.draw_missing(codes, self._noise.draw_levels(seed, rows)))
            if not row_width:
                return normal, uniform
            row_noise = self._noise.draw_rows(seed, rows, row_width)
            row_noise *= temperature
            return normal, uniform, row_noise

        values = manifest.latents + manifest.condition_width + 1 + row_width
        cost = rows * values * offload.NORMAL
        if cost <= offload.MAX_LOOP_NS:
            return await run_in_thread_if_long(draw, cost)
        await take_turn(parsed, rows)
        return await run_in_thread_if_long(draw, cost, frees_lock=True)

    async def _sample_near(self, parsed: "ParsedRequest[SampleBody, Start]", point: "Point") -> HttpResponse:
        """Sample rows whose latents are near those of `point`."""
        seed, served = _seed(parsed.body.seed), parsed.served
        code = read_condition(served, parsed.body.condition)
        if parsed.body.n > self._service.admission.max_small_rows:
            # Before `_deviation`, which takes the turn for LATENT_DRAWS rows: a second call of `take_turn` does nothing
            await take_turn(parsed, parsed.body.n)
        deviation = await self._deviation(parsed, code)
        (centre,) = await latents_of(self._service, parsed, [point])
        noise, choice, *row_noise = await self._draw(parsed, seed, served.manifest.width if _with_noise(parsed) else 0)
        latents = centre + np.float32(parsed.body.spread) * deviation * noise
        joined = with_code(served, code, latents)
        operation = operations.SAMPLE_STANDARD_ROWS if row_noise else operations.SAMPLE_STANDARD
        _, outputs = await run_operation(self._service, parsed, operation, joined, choice, *row_noise)
        fields = {"latents": latents, "outputs": outputs, "seed": seed, **await _record_fields(parsed, outputs)}
        if served.conditions is not None:
            fields["conditions"] = served.conditions.describe(np.array([code])) * len(outputs)
        return await render_response(parsed, fields, outputs)

    async def _deviation(self, parsed: "ParsedRequest[SampleBody, Start]", code: Code) -> Array:
        """Return the standard deviations [K] of latents that are drawn from the prior for the condition `code`."""
        served = parsed.served
        known = self._deviations.setdefault(served, {})
        deviation = known.get(code)
        if deviation is None:
            noise, choice = self._noise.draw(0, LATENT_DRAWS, served.manifest.latents)
            (latents,) = await run_operation(
                self._service, parsed, operations.DRAW, with_code(served, code, noise), choice
            )
            deviation = without_conditions(served, latents).std(axis=0)
            if len(known) < MAX_DEVIATIONS:
                known[code] = deviation
        return deviation

    async def _complete(self, parsed: "ParsedRequest[SampleBody, Start]", given: Given) -> HttpResponse:
        """Sample rows that have the given values."""
        seed = _seed(parsed.body.seed)
        with_row_noise = _with_noise(parsed)
        noise = await self._draw(parsed, seed, 2 * parsed.served.manifest.width)
        x = np.broadcast_to(given.row, (parsed.body.n, given.row.shape[1]))
        latents, x_hat, rows = await run_operation(self._service, parsed, operations.COMPLETE, *noise, x)
        outputs = rows if with_row_noise else x_hat
        fields = {"latents": latents, "outputs": outputs, "seed": seed, **await _record_fields(parsed, outputs)}
        return await render_response(parsed, fields, outputs)

    async def impute(self, request: RequestContext, spec: Spec | None = None) -> HttpResponse:
        """Estimate the missing values of rows from the known ones, each with its uncertainty."""
        parsed = await parse_request(self._service, request, spec or IMPUTE)
        x, most = parsed.inputs, operations.imputed_rows(parsed.served.manifest.width)
        if len(x) > self._service.admission.max_small_rows:
            await take_turn(parsed, len(x), arrays=4)
        parts = [
            await run_operation(self._service, parsed, operations.IMPUTE, x[start : start + most])
            for start in range(0, len(x), most)
        ]
        parsed.record.rows = len(x)
        outputs, std, low, high = await run_in_thread_if_long(partial(concatenate, parts), x.size * offload.DECISION)
        fields = {"outputs": outputs, "std": std, "low": low, "high": high, "imputed": int(np.isnan(x).sum())}
        fields |= await _record_fields(parsed, outputs, np.isnan(x))
        return await render_response(parsed, fields | await pixel_fields(parsed.served, x), outputs)

    async def interpolate(self, request: RequestContext) -> HttpResponse:
        """Decode points on the path from one row or latent vector to another, both ends included."""
        parsed = await parse_request(self._service, request, INTERPOLATE)
        start, end = await latents_of(self._service, parsed, parsed.inputs)
        path = partial(interpolate, start, end, parsed.body.steps, parsed.body.method)
        latents = await run_in_thread_if_long(path, parsed.body.steps * len(start) * offload.NORMAL)
        outputs = await decode_latents(self._service, parsed, latents)
        rows = [point.values for point in parsed.inputs if not point.is_latent]
        imputed = imputed_fields(parsed.served, *rows) | await pixel_fields(parsed.served, *rows)
        columns = len(outputs) if len(outputs) <= MAX_STRIP_STEPS else None
        fields = {"latents": latents, "outputs": outputs, **imputed, **await _record_fields(parsed, outputs)}
        return await render_response(parsed, fields, outputs, columns)

    async def anomaly(self, request: RequestContext, spec: Spec | None = None) -> HttpResponse:
        """Score rows: return per row the score, the p-value, the verdict and the features that contribute most."""
        media_type = anomaly_stream.media_type(request)
        if media_type:
            return anomaly_stream.AnomalyStream(self._service, request, media_type).response()
        parsed = await parse_request(self._service, request, spec or ANOMALY)
        verdicts = await self.judge(parsed)
        if parsed.media_type != JSON:
            numbers = score_array(parsed.inputs, verdicts)
            fields = dict(zip(("score", "p_value", "severity"), numbers.T, strict=True))
            fields |= await pixel_fields(parsed.served, parsed.inputs.parsed.x)
            return await render_response(parsed, fields, numbers, allow_nan=True)
        cost = offload.VERDICT * parsed.inputs.rows_received if parsed.body.detail == "full" else 0
        if cost and verdicts:
            cost += offload.ONSET * verdicts.explained_rows
        started = perf_counter()
        fields = await run_in_thread_if_long(
            partial(anomaly_fields, parsed.served, parsed.body, parsed.inputs, verdicts), cost
        )
        parsed.record.write += perf_counter() - started
        return await render_response(parsed, fields, parsed.inputs.parsed.x, write_ns=cost)

    async def judge(self, parsed: "ParsedRequest[AnomalyBody, InputRows]") -> Verdicts | None:
        """Return the verdicts on the rows of a request; None if no row could be read."""
        if parsed.served.default_alpha is not None:
            parsed.body = with_default_alpha(parsed.served, parsed.body)
        run = partial(run_operation, self._service, parsed)
        is_live = is_live_traffic(self._service, parsed.request, parsed.body)
        verdicts = await score_rows(
            self._service, parsed.served, parsed.inputs, parsed.body, run, is_live, parsed.deadline, parsed.request
        )
        parsed.record.rows = parsed.inputs.rows_received
        return verdicts


# The requests that each endpoint accepts


def _row_reader(
    field: str, schema_of: Callable[[ServedModel], RowSchema]
) -> Callable[[ServedModel, Any, bool, Budget], Array]:
    """Return a function that reads the rows in `field` as float32 [B, ...] and raises an error if a row is invalid."""
    pointer = f"/{field}"

    def read(served: ServedModel, body: Any, may_contain_non_floats: bool, budget: Budget) -> Array:
        rows = getattr(body, field)
        if isinstance(rows, np.ndarray):
            return parse_array(schema_of(served), rows, pointer)
        return parse_rows(schema_of(served), rows, pointer, may_contain_non_floats, budget)

    return read


_read_rows = _row_reader("inputs", lambda served: served.row_schema)
read_latents = _row_reader("latents", lambda served: served.latent_schema)


def read_inputs(
    served: ServedModel,
    body: EncodeBody | ReconstructBody | NeighboursBody,
    may_contain_non_floats: bool,
    budget: Budget,
) -> Array:
    """Return the rows in `inputs` as float32 [B, D], or the windows [B, N, D] if the model has a window.

    If the model knows conditions, the rows are followed by their conditions, [B, D + C].
    """
    records = getattr(body, "records", None)
    if not isinstance(body, NeighboursBody):
        require_one_field(body)
    if records is not None and served.window_schema is not None:
        raise InvalidField(
            f"{served.name} takes windows of rows, and records have no windows",
            pointer="/records",
            expected="inputs",
            got="records",
        )
    if records is not None:
        rows = parse_all_records(served.row_schema, records, "/records", may_contain_non_floats, budget)
        return with_conditions(served, body.condition, rows, budget)
    if served.window_schema is None:
        rows = _read_rows(served, body, may_contain_non_floats, budget)
        return with_conditions(served, body.condition, rows, budget)
    read_condition(served, body.condition)
    return parse_windows(served.window_schema, body.inputs, "/inputs", may_contain_non_floats, budget)


def _read_latents(served: ServedModel, body: DecodeBody, may_contain_non_floats: bool, budget: Budget) -> Array:
    """Return the latents as float32 [B, K]. If the model knows conditions, they follow the latents, [B, K + C]."""
    return with_conditions(served, body.condition, read_latents(served, body, may_contain_non_floats, budget), budget)


@dataclass(frozen=True)
class Point:
    """A point of the latent space: a row [1, D], a window [1, N, D] or a latent vector [1, K]."""

    values: Array
    is_latent: bool


def _read_ends(
    served: ServedModel, body: InterpolateBody, may_contain_non_floats: bool, _budget: Budget
) -> list[Point]:
    read_condition(served, body.condition)
    return [
        read_point(served, body.start, "/start", may_contain_non_floats),
        read_point(served, body.end, "/end", may_contain_non_floats),
    ]


def read_point(served: ServedModel, point: End | EditBody, pointer: str, may_contain_non_floats: bool) -> Point:
    """Return the row or the latent vector of `point`, an object at the JSON pointer `pointer`.

    Raises:
        InvalidField: there is no row and no latent vector, or both.
        InvalidRows: the row or the latent vector is not valid.
    """
    if (point.input is None) == (point.latent is None):
        got = "neither" if point.input is None else "both"
        raise InvalidField(
            f"{pointer[1:] or 'the request'} needs either input or latent, got {got}",
            pointer=pointer or None,
            expected="input or latent",
            got=got,
        )
    if point.latent is not None:
        latents = parse_row(served.latent_schema, point.latent, f"{pointer}/latent", may_contain_non_floats)
        return Point(latents, is_latent=True)
    pointer = f"{pointer}/input"
    if served.window_schema is not None:
        window = parse_window(served.window_schema, point.input, pointer, may_contain_non_floats)
        return Point(window, is_latent=False)
    return Point(parse_row(served.row_schema, point.input, pointer, may_contain_non_floats), is_latent=False)


class Samples(NamedTuple):
    """Rows that are drawn from the prior of a model.

    Args:
        latents: the latents of the rows, [B, K].
        outputs: the rows, [B, D].
        seed: the seed of the noise.
        noise: the noise of the latents, followed by the conditions of the rows, [B, K + C].
    """

    latents: Array
    outputs: Array
    seed: int
    noise: Array


# What samples start from: given values, a point of the latent space, the codes of conditions, or the prior alone.
Start = Given | Point | Codes | None


def _read_start(served: ServedModel, body: SampleBody, may_contain_non_floats: bool, budget: Budget) -> Start:
    """Return what the samples start from.

    Raises:
        NotSupported: the model knows conditions, and the samples start from given values.
        InvalidField: two fields of the body conflict. See also `read_given` and `read_point`.
    """
    if body.near is None:
        if "spread" in body.model_fields_set:
            raise InvalidField(
                "spread says how far samples are from the point in near, but near is missing",
                pointer="/spread",
                expected="near",
                got="spread alone",
            )
        given = read_given(served, body, may_contain_non_floats)
        return read_codes(served, body.condition, body.n, budget) if given is None else given
    read_condition(served, body.condition)
    for name, is_there in (
        ("given", body.given is not None),
        ("prior", body.prior == "standard"),
    ):
        if is_there:
            raise InvalidField(
                f"samples near a point have no given values and no prior, got near and {name}",
                pointer=f"/{name}",
                expected="near without given and prior",
                got=f"near and {name}",
                hint=f"leave out {name} or near",
            )
    return read_point(served, body.near, "/near", may_contain_non_floats)


async def latents_of(service: ServiceContext, parsed: ParsedRequest[Any, Any], points: Sequence[Point]) -> list[Array]:
    """Return the latents [K] of each point. One run of the model encodes all rows, with the request's condition."""
    rows = [point.values for point in points if not point.is_latent]
    encoded = iter(())
    if rows:
        inputs = with_conditions(parsed.served, parsed.body.condition, np.concatenate(rows))
        mean, _ = await run_operation(service, parsed, operations.ENCODE, inputs)
        encoded = iter(without_conditions(parsed.served, mean))
    return [point.values[0] if point.is_latent else next(encoded) for point in points]


async def decode_latents(service: ServiceContext, parsed: ParsedRequest[Any, Any], latents: Array) -> Array:
    """Return the rows [B, D] that latents [B, K] decode to, with the condition of the request."""
    join = partial(with_conditions, parsed.served, parsed.body.condition, latents)
    inputs = await run_in_thread_if_long(join, latents.size * offload.NUMBER)
    (outputs,) = await run_operation(service, parsed, operations.DECODE, inputs)
    return outputs


ENCODE = RequestSpec(
    EncodeBody, read_inputs, row_fields=ROW_FIELDS, array_field="inputs", pictures=True, needs_latents=True
)
DECODE = RequestSpec(
    DecodeBody, _read_latents, row_fields=("latents",), array_field="latents", png_output=True, needs_latents=True
)
RECONSTRUCT = RequestSpec(
    ReconstructBody, read_inputs, row_fields=ROW_FIELDS, array_field="inputs", pictures=True, png_output=True
)
SAMPLE = RequestSpec(SampleBody, _read_start, count_field="n", png_output=True, needs_latents=True)
IMPUTE = RequestSpec(ImputeBody, read_partial_rows, row_fields=ROW_FIELDS, array_field="inputs", png_output=True)
INTERPOLATE = RequestSpec(InterpolateBody, _read_ends, count_field="steps", png_output=True, needs_latents=True)
ANOMALY = RequestSpec(
    AnomalyBody,
    parse_input_rows,
    row_fields=ANOMALY_FIELDS,
    array_field="inputs",
    pictures=True,
    readers=RECORD_READERS,
)


# The fields of the responses


async def _record_fields(
    parsed: ParsedRequest[Any, Any], outputs: Array, missing: npt.NDArray[np.bool_] | None = None
) -> dict[str, Any]:
    """Return the fields that a JSON response of a model with categories has besides `outputs` [B, D].

    Args:
        missing: which features of completed rows were missing, [B, D].
    """
    columns = parsed.served.columns
    if columns is None or parsed.media_type != JSON:
        return {}

    def describe() -> dict[str, Any]:
        fields: dict[str, Any] = {"records": columns.records(outputs)}
        if missing is not None:
            fields["imputed"] = int(columns.missing(missing).sum())
            fields["probabilities"] = columns.probabilities(outputs, missing)
        return fields

    return await run_in_thread_if_long(describe, outputs.size * offload.RECORD_VALUE)


def anomaly_fields(
    served: ServedModel, body: AnomalyBody, input_rows: InputRows, verdicts: Verdicts | None
) -> dict[str, Any]:
    """Return the fields of an `AnomalyAnswer`, or only the counts if `detail` is "none".

    `verdicts` is None if no row could be read. The results of many rows are an iterator over parts, which makes them
    while they are written.
    """
    counts: dict[str, Any] = {
        "rows": input_rows.rows_received,
        "anomalies": sum(verdicts.is_anomaly) if verdicts else 0,
        "failed": input_rows.rows_received - (verdicts.scores.usable_count if verdicts else 0),
        "unknown_fields": input_rows.unknown_fields,
    }
    if warning := pixel_warning(served, input_rows.parsed.x):
        counts["warning"] = warning
    if body.detail == "none":
        return counts
    calibration = served.manifest.calibration
    reached = calibration.reaches(body.alpha)
    names, parts = served.row_schema.names, served.manifest.parts
    scored: list[dict[str, Any]] | Iterator[list[dict[str, Any]]] = []
    if not verdicts:
        errors = parsing_errors(input_rows.parsed)
    elif len(verdicts.is_anomaly) <= PART_ROWS:
        scored, errors = results_and_errors(verdicts, body.explain, names, parts)
    else:
        scored, errors = results_in_parts(verdicts, body.explain, names, parts), all_errors(verdicts)
    return {
        **counts,
        "alpha": body.alpha,
        "fdr": body.fdr,
        "threshold": _threshold(served, body, verdicts),
        "calibration": {"rows": calibration.rows, "floor": calibration.floor},
        "extrapolated": body.extrapolated and not reached,
        "results": scored,
        "errors": errors,
    }


def _threshold(served: ServedModel, body: AnomalyBody, verdicts: Verdicts | None) -> np.float32 | None:
    """Return the score above which a row is anomalous; None if there is no such score, or no single one."""
    if not (served.manifest.calibration.reaches(body.alpha) or body.extrapolated):
        return None
    if verdicts is not None and verdicts.past is not None and verdicts.past.states is not None:
        return None  # each group has its own threshold, which moves
    return served.backend.calibration.threshold(body.alpha)


def imputed_fields(served: ServedModel, *rows: Array) -> dict[str, Any]:
    """Return the field "imputed", which is the number of missing values in all `rows`, each [B, D] or [B, N, D].

    If no value is missing, the result is empty. In windows, rows that are not there do not count.
    """
    if not served.row_schema.allows_missing:
        return {}
    count = sum(int(np.isnan(x).sum()) if x.ndim == 2 else count_missing(x) for x in rows)
    return {"imputed": count} if count else {}


def _with_noise(parsed: ParsedRequest[SampleBody, Start]) -> bool:
    """Return whether samples include observation noise. Raise InvalidField if they cannot."""
    served, requested = parsed.served, parsed.body.noise
    if requested is None:
        return served.has_observation_noise and not served.manifest.is_image
    if requested and not served.has_observation_noise:
        raise InvalidField(
            f"{served.name}@{served.version} comes from a release of Elbo whose samples have no observation noise",
            pointer="/noise",
            expected="false",
            got="true",
            hint="train the model again, or send noise=false",
        )
    return requested


def _is_standard(parsed: ParsedRequest[SampleBody, Start]) -> bool:
    """Return whether the latents come from N(0, I). Raise InvalidField if this is not a prior of the model."""
    served = parsed.served
    if parsed.body.prior == "fitted":
        return False
    adoption = served.manifest.adoption
    is_adopted_vae = adoption is not None and (adoption.prior == "standard" or adoption.spread is not None)
    if served.manifest.kind != "vae" and not is_adopted_vae:
        raise InvalidField(
            f"{served.name}@{served.version} is of the kind {served.manifest.kind}, and only a VAE has the prior "
            "N(0, I)",
            pointer="/prior",
            expected="fitted",
            got="standard",
            hint="leave out prior, or ask a VAE",
        )
    return True


def _seed(requested: int | None) -> int:
    return fresh_seed() if requested is None else requested
