"""Prometheus remote write: samples in, rows judged. What is said of them goes to metrics, alerts and the log."""

import asyncio
import logging
from dataclasses import dataclass
from time import monotonic
from typing import Any

from service.anomaly.alignment import AlignedRow, SampleAligner
from service.anomaly.inputs import parse_record_rows
from service.anomaly.series_mapping import SeriesMapping
from service.anomaly.verdicts import Verdicts, results_and_errors
from service.codec import remote_write
from service.codec.feature_names import FeatureSelectors
from service.endpoints.pipeline import ServiceContext, aside, score_rows
from service.errors import ModelNotFound, NotReady, Overloaded, ServiceError
from service.http.request import HttpResponse, RequestContext
from service.inference.registry import ServedModel
from service.monitoring.periodic import Periodic
from service.schemas import AnomalyBody

SECONDS = 1.0  # between two looks for rows that have waited long enough
MOST_READY = 20_000  # rows that wait because the batcher is full: beyond them no samples are taken
COSTLY = 16  # how many times as long as other bytes packed samples take
LOGGED = 5  # abnormal rows of one turn that the log tells
TIME, GROUP = "\0time", "\0group"  # no feature is called so

log = logging.getLogger("elbo.receiver")


@dataclass
class _Aligned:
    """A model, and the rows that come together for it."""

    reference: str | None
    target: SeriesMapping
    served: ServedModel | None = None
    alignment: SampleAligner | None = None


class RemoteWriteEndpoint:
    """The endpoint, and the rows that wait behind it."""

    def __init__(self, service: ServiceContext, targets: dict[str | None, SeriesMapping]) -> None:
        self._service = service
        self._aligned = [_Aligned(reference, target) for reference, target in targets.items()]
        self._turn = asyncio.Lock()
        self._looking = Periodic(self._judge, SECONDS, "rows could not be judged")

    async def write(self, request: RequestContext) -> HttpResponse:
        """Samples of Prometheus by remote write, to rows that are judged."""
        remote_write.require_version_1(request.header(b"content-type"), request.header(b"content-encoding"))
        if self._service.draining:
            raise NotReady("the server is shutting down")
        aligned = self._served()
        try:
            body = await request.body()
        except Overloaded as error:
            raise _later(error.detail) from None
        if sum(alignment.pending_rows for alignment in aligned) > MOST_READY:
            raise _later("the rows that wait to be judged are too many")
        read = await aside(lambda: list(remote_write.loads(body, request.max_body_bytes)), COSTLY * len(body))
        for alignment in aligned:
            alignment.add(read, monotonic())
        await self._judge()
        return HttpResponse(b"", b"", status=204)

    def start(self) -> None:
        """Begin to look for rows that have waited long enough."""
        self._looking.start()

    async def close(self) -> None:
        """Judge what there is. ParsedRequest before the batcher is closed."""
        await self._looking.close()
        await self._judge(everything=True)

    def _served(self) -> list[SampleAligner]:
        """The rows of each model that is served now. Raises NotReady if none is, so that Prometheus sends again."""
        missing: list[str] = []
        for aligned in self._aligned:
            try:
                aligned.served = served = self._service.find(aligned.reference)
            except ModelNotFound as error:
                aligned.served = None
                missing.append(error.detail)
                continue
            if aligned.alignment is None or aligned.alignment.names != served.row_schema.names:
                target = aligned.target
                selectors = FeatureSelectors(
                    {name: target.features.get(name, name) for name in served.row_schema.names}
                )
                aligned.alignment = SampleAligner(served.row_schema.names, selectors, target.group, target.wait_seconds)
        if len(missing) == len(self._aligned):
            raise NotReady(", ".join(missing), hint="publish it with elbo train", headers={"Retry-After": "5"})
        return [aligned.alignment for aligned in self._aligned if aligned.served and aligned.alignment]

    async def _judge(self, everything: bool = False) -> None:
        """Judge the rows that are due, one turn at a time, so that they keep their order."""
        async with self._turn:
            for aligned in self._aligned:
                if aligned.served and aligned.alignment:
                    await self._judge_of(aligned.served, aligned.alignment, aligned.target, everything)
        waiting = sum(aligned.alignment.pending_rows for aligned in self._aligned if aligned.alignment)
        self._service.metrics.judged.waiting(waiting)

    async def _judge_of(
        self, served: ServedModel, alignment: SampleAligner, target: SeriesMapping, everything: bool
    ) -> None:
        judged = self._service.metrics.judged
        judged.count_samples(served, alignment.outcomes)
        alignment.outcomes.clear()
        due = alignment.pop_ready(monotonic(), flush=everything)
        most = self._service.settings.max_rows
        for start in range(0, len(due), most):
            rows = due[start : start + most]
            body = AnomalyBody(alpha=target.alpha, time=TIME, group=GROUP)
            records = [_record(row) for row in rows]
            input_rows = parse_record_rows(served.row_schema, body, records, may_contain_non_floats=True, minimum=0)
            try:
                verdicts = await score_rows(self._service, served, input_rows, body)
            except ServiceError as error:
                log.warning("rows wait: %s", error.detail)
                alignment.requeue(due[start:])
                return
            _log(served, verdicts)


def _record(row: AlignedRow) -> dict[str, Any]:
    return {**row.values, TIME: row.milliseconds, GROUP: row.group}


def _later(detail: str) -> NotReady:
    """503 rather than 429, after which Prometheus would drop what it has sent."""
    return NotReady(detail, hint="Prometheus sends it again", headers={"Retry-After": "1"})


def _log(served: ServedModel, verdicts: Verdicts | None) -> None:
    """Tell of the first abnormal rows: nobody reads an answer."""
    if verdicts is None or True not in verdicts.is_anomaly:
        return
    found, _ = results_and_errors(verdicts, 3, served.row_schema.names, served.manifest.parts)
    for result in [result for result in found if result["is_anomaly"]][:LOGGED]:
        told = {name: float(result[name]) for name in ("time", "severity", "p_value") if name in result}
        causes = [feature["name"] for feature in result["features"]]
        who: dict[str, Any] = {"model": served.name, "version": served.version, "group": result.get("group")}
        log.info("abnormal", extra={"fields": who | told | {"causes": causes}})
