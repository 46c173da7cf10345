"""The six endpoints: encode, decode, reconstruct, sample, interpolate, anomaly."""

from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from service.anomaly.inputs import FORMATS, WAYS, Intake, take
from service.anomaly.verdicts import Scores, Verdicts, decide, results, table
from service.codec.request_body import JSON
from service.codec.response_body import ARRAY, PICTURE
from service.endpoints import anomaly_stream
from service.endpoints.pipeline import Call, Offer, Service, answer, aside, read, require_count, require_rows, run
from service.errors import InvalidField
from service.http.request import Answer, Exchange
from service.inference import operations
from service.inference.registry import Served
from service.inference.sampling import Noise, fresh_seed, interpolate
from service.schemas import AnomalyBody, Body, DecodeBody, EncodeBody, End, InterpolateBody, ReconstructBody, SampleBody

Array = npt.NDArray[np.float32]
WIDEST_STRIP = 32  # steps: an interpolation's picture is one row of tiles up to here
ROUNDING = 1e-6  # relative: what alpha = 1 / 200 may lack of it as a decimal fraction
ROW_BYTES = 400  # of a verdict, roughly
B = TypeVar("B", bound=Body)


class Inference:
    """The endpoints of one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._noise = Noise()

    async def encode(self, exchange: Exchange) -> Answer:
        """Rows to codes: the posterior mean, or a draw."""
        call = await self._read_rows(exchange, EncodeBody, _arrays, "inputs")
        mean, std = await run(self.service, call, operations.ENCODE, call.x)
        imputed = _imputed(call.served, call.x)
        if not call.body.sample:
            return await answer(call, {"latents": mean, "std": std, **imputed}, mean)
        seed = _seed(call.body.seed)
        latents = mean + std * self._noise.draw(seed, *mean.shape)[0]
        return await answer(call, {"latents": latents, "std": std, "seed": seed, **imputed}, latents)

    async def decode(self, exchange: Exchange) -> Answer:
        """Codes to rows."""
        call = await self._read_rows(exchange, DecodeBody, _pictures, "latents")
        (outputs,) = await run(self.service, call, operations.DECODE, call.x)
        return await answer(call, {"outputs": outputs}, outputs)

    async def reconstruct(self, exchange: Exchange) -> Answer:
        """Rows through the code and back, and how much that changed them."""
        call = await self._read_rows(exchange, ReconstructBody, _pictures, "inputs")
        outputs, errors = await run(self.service, call, operations.reconstruct(call.served.rows.gaps), call.x)
        fields = {"outputs": outputs, "errors": errors, **_imputed(call.served, call.x)}
        return await answer(call, fields, outputs)

    async def sample(self, exchange: Exchange) -> Answer:
        """New rows from the prior. The same seed gives the same bytes, alone or in company."""
        call = await read(self.service, exchange, SampleBody, _pictures, None, self._prior_noise)
        seed, normal, uniform = call.x
        latents, outputs = await run(self.service, call, operations.SAMPLE, normal, uniform)
        return await answer(call, {"latents": latents, "outputs": outputs, "seed": seed}, outputs)

    async def interpolate(self, exchange: Exchange) -> Answer:
        """Rows along the way between two."""
        call = await read(self.service, exchange, InterpolateBody, _pictures, None, self._ends)
        start, end = await self._codes(call)
        latents = interpolate(start, end, call.body.steps, call.body.method)
        (outputs,) = await run(self.service, call, operations.DECODE, latents)
        columns = len(outputs) if len(outputs) <= WIDEST_STRIP else None
        imputed = _imputed(call.served, *(point.values for point in call.x if not point.is_code))
        return await answer(call, {"latents": latents, "outputs": outputs, **imputed}, outputs, columns)

    async def anomaly(self, exchange: Exchange) -> Answer:
        """Which rows are abnormal, how sure that is, and why."""
        if anomaly_stream.asked_for(exchange):
            return anomaly_stream.Stream(self.service, exchange).answer()
        call = await read(self.service, exchange, AnomalyBody, _arrays, "inputs", self._judgeable, FORMATS)
        intake, body = call.x, call.body
        verdicts = await judge(self.service, call, intake)
        if call.media_type != JSON:
            numbers = table(verdicts)
            columns = dict(zip(("score", "p_value", "severity"), numbers.T, strict=True))
            return await answer(call, {**columns}, numbers, holes=True)
        started = perf_counter()
        size = ROW_BYTES * intake.sent if body.detail == "full" else 0
        fields = await aside(partial(_told, call, verdicts), size)
        call.trace.write += perf_counter() - started
        return await answer(call, fields, verdicts.scores.expected)

    async def _read_rows(self, exchange: Exchange, schema: type[B], offered: Offer, field: str) -> Call[B]:
        """A request whose `field`, "inputs" or "latents", holds rows, every one of which must be right."""

        def extract(served: Served, body: B, careful: bool) -> Array:
            rows, pointer = getattr(body, field), f"/{field}"
            form = served.latents if field == "latents" else served.rows
            require_rows(self.service, rows, pointer)
            if isinstance(rows, np.ndarray):
                return form.read_array(rows, pointer)
            return form.read(rows, pointer, careful)

        return await read(self.service, exchange, schema, offered, field, extract)

    def _prior_noise(self, served: Served, body: SampleBody, _: bool) -> tuple[int, Array, Array]:
        require_count(self.service, "n", body.n)
        seed = _seed(body.seed)
        normal, uniform = self._noise.draw(seed, body.n, served.manifest.latents)
        return seed, normal * np.float32(body.temperature), uniform

    def _ends(self, served: Served, body: InterpolateBody, careful: bool) -> tuple["_Point", "_Point"]:
        require_count(self.service, "steps", body.steps)
        return _point(served, body.start, "/start", careful), _point(served, body.end, "/end", careful)

    async def _codes(self, call: Call[InterpolateBody]) -> list[Array]:
        """The codes [K] of both ends; those given as rows are encoded together."""
        points: tuple[_Point, _Point] = call.x
        rows = [point.values for point in points if not point.is_code]
        codes = iter(())
        if rows:
            mean, _ = await run(self.service, call, operations.ENCODE, np.concatenate(rows))
            codes = iter(mean)
        return [point.values[0] if point.is_code else next(codes) for point in points]

    def _judgeable(self, served: Served, body: AnomalyBody, careful: bool) -> Intake:
        for name in WAYS:
            if (rows := getattr(body, name)) is not None:
                require_rows(self.service, rows, f"/{name}")
        return take(served, body, careful)


async def judge(service: Service, call: Call[AnomalyBody], intake: Intake) -> Verdicts:
    """What the model of `call` says of the rows of `intake`."""
    x = call.served.rows.filled(intake.reading)
    scores = Scores(*await run(service, call, operations.anomaly(call.body.alpha), x))
    call.trace.rows = intake.sent
    verdicts = decide(intake, scores, call.body)
    service.telemetry.judged.count(call.served, intake, verdicts)
    return verdicts


def _told(call: Call[AnomalyBody], verdicts: Verdicts) -> dict[str, Any]:
    """The fields of the answer."""
    body, manifest, intake, scores = call.body, call.served.manifest, verdicts.intake, verdicts.scores
    counts = {
        "rows": intake.sent,
        "anomalies": sum(verdicts.flags),
        "failed": intake.sent - scores.count,
        "unknown_fields": intake.unknown,
    }
    if body.detail == "none":
        return counts
    found, errors = results(verdicts, body.explain, call.served.rows.names, manifest.parts)
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


def _point(served: Served, end: End, pointer: str, careful: bool) -> _Point:
    if (end.input is None) == (end.latent is None):
        got = "neither" if end.input is None else "both"
        raise InvalidField(
            f"{pointer[1:]} needs either input or latent, got {got}",
            pointer=pointer,
            expected="input or latent",
            got=got,
        )
    if end.latent is not None:
        return _Point(served.latents.read_one(end.latent, f"{pointer}/latent", careful), True)
    return _Point(served.rows.read_one(end.input, f"{pointer}/input", careful), False)


def _imputed(served: Served, *rows: Array) -> dict[str, int]:
    """The field that says how many values of `rows`, each [N, D], were missing, where any was."""
    count = sum(int(np.isnan(x).sum()) for x in rows) if served.rows.gaps else 0
    return {"imputed": count} if count else {}


def _seed(asked: int | None) -> int:
    return fresh_seed() if asked is None else asked


def _arrays(_: Served) -> tuple[str, ...]:
    return ARRAY


def _pictures(served: Served) -> tuple[str, ...]:
    return PICTURE if served.pictures else ARRAY
