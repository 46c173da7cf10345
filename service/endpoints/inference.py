"""The six endpoints: encode, decode, reconstruct, sample, interpolate, anomaly."""

from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from service.anomaly.inputs import RECORD_READERS, ROW_FIELDS, InputRows, parse_input_rows
from service.anomaly.verdicts import Scores, Verdicts, decide, results_and_errors, score_array
from service.codec.request_body import JSON
from service.codec.response_body import ARRAY_FORMATS, PICTURE_FORMATS
from service.codec.row_arrays import parse_array
from service.codec.row_lists import parse_row, parse_rows
from service.endpoints import anomaly_stream
from service.endpoints.pipeline import (
    Offer,
    ParsedRequest,
    ServiceContext,
    answer,
    aside,
    read,
    require_count,
    require_rows,
    run,
)
from service.errors import InvalidField
from service.http.request import HttpResponse, RequestContext
from service.inference import operations
from service.inference.registry import ServedModel
from service.inference.sampling import NoiseSource, fresh_seed, interpolate
from service.schemas import AnomalyBody, Body, DecodeBody, EncodeBody, End, InterpolateBody, ReconstructBody, SampleBody

Array = npt.NDArray[np.float32]
WIDEST_STRIP = 32  # steps: an interpolation's picture is one row of tiles up to here
ROUNDING = 1e-6  # relative: what alpha = 1 / 200 may lack of it as a decimal fraction
ROW_BYTES = 400  # of a verdict, roughly
B = TypeVar("B", bound=Body)


class InferenceEndpoints:
    """The endpoints of one service."""

    def __init__(self, service: ServiceContext) -> None:
        self.service = service
        self._noise = NoiseSource()

    async def encode(self, request: RequestContext) -> HttpResponse:
        """Rows to codes: the posterior mean, or a draw."""
        call = await self._read_rows(request, EncodeBody, _arrays, "inputs")
        mean, std = await run(self.service, call, operations.ENCODE, call.x)
        imputed = _imputed(call.served, call.x)
        if not call.body.sample:
            return await answer(call, {"latents": mean, "std": std, **imputed}, mean)
        seed = _seed(call.body.seed)
        latents = mean + std * self._noise.draw(seed, *mean.shape)[0]
        return await answer(call, {"latents": latents, "std": std, "seed": seed, **imputed}, latents)

    async def decode(self, request: RequestContext) -> HttpResponse:
        """Codes to rows."""
        call = await self._read_rows(request, DecodeBody, _pictures, "latents")
        (outputs,) = await run(self.service, call, operations.DECODE, call.x)
        return await answer(call, {"outputs": outputs}, outputs)

    async def reconstruct(self, request: RequestContext) -> HttpResponse:
        """Rows through the code and back, and how much that changed them."""
        call = await self._read_rows(request, ReconstructBody, _pictures, "inputs")
        outputs, errors = await run(
            self.service, call, operations.reconstruct(call.served.row_schema.allows_missing), call.x
        )
        fields = {"outputs": outputs, "errors": errors, **_imputed(call.served, call.x)}
        return await answer(call, fields, outputs)

    async def sample(self, request: RequestContext) -> HttpResponse:
        """New rows from the prior. The same seed gives the same bytes, alone or in company."""
        call = await read(self.service, request, SampleBody, _pictures, None, self._prior_noise)
        seed, normal, uniform = call.x
        latents, outputs = await run(self.service, call, operations.SAMPLE, normal, uniform)
        return await answer(call, {"latents": latents, "outputs": outputs, "seed": seed}, outputs)

    async def interpolate(self, request: RequestContext) -> HttpResponse:
        """Rows along the way between two."""
        call = await read(self.service, request, InterpolateBody, _pictures, None, self._ends)
        start, end = await self._codes(call)
        latents = interpolate(start, end, call.body.steps, call.body.method)
        (outputs,) = await run(self.service, call, operations.DECODE, latents)
        columns = len(outputs) if len(outputs) <= WIDEST_STRIP else None
        imputed = _imputed(call.served, *(point.values for point in call.x if not point.is_code))
        return await answer(call, {"latents": latents, "outputs": outputs, **imputed}, outputs, columns)

    async def anomaly(self, request: RequestContext) -> HttpResponse:
        """Which rows are abnormal, how sure that is, and why."""
        if anomaly_stream.asked_for(request):
            return anomaly_stream.Stream(self.service, request).answer()
        call = await read(self.service, request, AnomalyBody, _arrays, "inputs", self._judgeable, RECORD_READERS)
        input_rows, body = call.x, call.body
        verdicts = await judge(self.service, call, input_rows)
        if call.media_type != JSON:
            numbers = score_array(verdicts)
            columns = dict(zip(("score", "p_value", "severity"), numbers.T, strict=True))
            return await answer(call, {**columns}, numbers, holes=True)
        started = perf_counter()
        size = ROW_BYTES * input_rows.rows_received if body.detail == "full" else 0
        fields = await aside(partial(_told, call, verdicts), size)
        call.record.write += perf_counter() - started
        return await answer(call, fields, verdicts.scores.expected)

    async def _read_rows(
        self, request: RequestContext, schema: type[B], offered: Offer, field: str
    ) -> ParsedRequest[B]:
        """A request whose `field`, "inputs" or "latents", holds rows, every one of which must be right."""

        def extract(served: ServedModel, body: B, may_contain_non_floats: bool) -> Array:
            rows, pointer = getattr(body, field), f"/{field}"
            schema = served.latent_schema if field == "latents" else served.row_schema
            require_rows(self.service, rows, pointer)
            if isinstance(rows, np.ndarray):
                return parse_array(schema, rows, pointer)
            return parse_rows(schema, rows, pointer, may_contain_non_floats)

        return await read(self.service, request, schema, offered, field, extract)

    def _prior_noise(self, served: ServedModel, body: SampleBody, _: bool) -> tuple[int, Array, Array]:
        require_count(self.service, "n", body.n)
        seed = _seed(body.seed)
        normal, uniform = self._noise.draw(seed, body.n, served.manifest.latents)
        return seed, normal * np.float32(body.temperature), uniform

    def _ends(
        self, served: ServedModel, body: InterpolateBody, may_contain_non_floats: bool
    ) -> tuple["_Point", "_Point"]:
        require_count(self.service, "steps", body.steps)
        return _point(served, body.start, "/start", may_contain_non_floats), _point(
            served, body.end, "/end", may_contain_non_floats
        )

    async def _codes(self, call: ParsedRequest[InterpolateBody]) -> list[Array]:
        """The codes [K] of both ends; those given as rows are encoded together."""
        points: tuple[_Point, _Point] = call.x
        rows = [point.values for point in points if not point.is_code]
        codes = iter(())
        if rows:
            mean, _ = await run(self.service, call, operations.ENCODE, np.concatenate(rows))
            codes = iter(mean)
        return [point.values[0] if point.is_code else next(codes) for point in points]

    def _judgeable(self, served: ServedModel, body: AnomalyBody, may_contain_non_floats: bool) -> InputRows:
        for name in ROW_FIELDS:
            if (rows := getattr(body, name)) is not None:
                require_rows(self.service, rows, f"/{name}")
        return parse_input_rows(served, body, may_contain_non_floats)


async def judge(service: ServiceContext, call: ParsedRequest[AnomalyBody], input_rows: InputRows) -> Verdicts:
    """What the model of `call` says of the rows of `input_rows`."""
    x = call.served.row_schema.impute(input_rows.parsed)
    scores = Scores(*await run(service, call, operations.anomaly(call.body.alpha), x))
    call.record.rows = input_rows.rows_received
    verdicts = decide(input_rows, scores, call.body)
    service.metrics.judged.count(call.served, input_rows, verdicts)
    return verdicts


def _told(call: ParsedRequest[AnomalyBody], verdicts: Verdicts) -> dict[str, Any]:
    """The fields of the answer."""
    body, manifest, input_rows, scores = call.body, call.served.manifest, verdicts.input_rows, verdicts.scores
    counts = {
        "rows": input_rows.rows_received,
        "anomalies": sum(verdicts.is_anomaly),
        "failed": input_rows.rows_received - scores.usable_count,
        "unknown_fields": input_rows.unknown_fields,
    }
    if body.detail == "none":
        return counts
    found, errors = results_and_errors(verdicts, body.explain, call.served.row_schema.names, manifest.parts)
    return {
        **counts,
        "alpha": body.alpha,
        "fdr": body.fdr,
        "threshold": call.served.backend.calibration.threshold(body.alpha),
        "calibration": {"rows": manifest.calibration.rows, "floor": manifest.calibration.floor},
        "extrapolated": body.alpha < manifest.calibration.floor * (1 - ROUNDING),
        "results": found,
        "errors": errors,
    }


@dataclass(frozen=True)
class _Point:
    """One end of an interpolation: a row [1, D] or a code [1, K]."""

    values: Array
    is_code: bool


def _point(served: ServedModel, end: End, pointer: str, may_contain_non_floats: bool) -> _Point:
    if (end.input is None) == (end.latent is None):
        got = "neither" if end.input is None else "both"
        raise InvalidField(
            f"{pointer[1:]} needs either input or latent, got {got}",
            pointer=pointer,
            expected="input or latent",
            got=got,
        )
    if end.latent is not None:
        return _Point(parse_row(served.latent_schema, end.latent, f"{pointer}/latent", may_contain_non_floats), True)
    return _Point(parse_row(served.row_schema, end.input, f"{pointer}/input", may_contain_non_floats), False)


def _imputed(served: ServedModel, *rows: Array) -> dict[str, int]:
    """The field that says how many values of `rows`, each [N, D], were missing, where any was."""
    count = sum(int(np.isnan(x).sum()) for x in rows) if served.row_schema.allows_missing else 0
    return {"imputed": count} if count else {}


def _seed(asked: int | None) -> int:
    return fresh_seed() if asked is None else asked


def _arrays(_: ServedModel) -> tuple[str, ...]:
    return ARRAY_FORMATS


def _pictures(served: ServedModel) -> tuple[str, ...]:
    return PICTURE_FORMATS if served.pictures else ARRAY_FORMATS
