"""Prometheus remote write: assemble samples into rows, score them, and report verdicts in metrics and the log."""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

from service.anomaly.alignment import MAX_INCOMPLETE_ROWS, AlignedRow, SampleAligner
from service.anomaly.inputs import parse_record_rows
from service.anomaly.series_mapping import SeriesMapping
from service.anomaly.verdicts import Verdicts, results_and_errors
from service.codec import remote_write
from service.codec.feature_names import FeatureSelectors, closest
from service.codec.remote_write import Series
from service.endpoints import offload
from service.endpoints.context import ServiceContext
from service.endpoints.offload import read_within_budget
from service.endpoints.scoring import run_when_free, score_rows
from service.errors import InvalidRows, ModelNotFound, NotReady, Overloaded, ServiceError, TooManyRows
from service.http.request import HttpResponse, RequestContext
from service.inference.served_model import ServedModel
from service.monitoring.periodic import PeriodicTask
from service.schemas import AnomalyBody

POLL_SECONDS = 1.0  # interval between two checks for rows that have waited long enough for missing samples
MAX_WAITING_ROWS = 20_000  # maximum number of rows that wait to be scored; above it, requests are refused
PART_SAMPLES = 500  # number of samples that are added in one pass of the event loop
SCORED_ROWS = 100  # number of rows that are scored in one pass of the event loop
MAX_LOGGED_ROWS = 5  # maximum number of anomalous rows to log each time that rows are scored
LOGGED_FEATURES = 3  # number of features to log per anomalous row
TIME, GROUP = "\0time", "\0group"  # keys of the time and the group in a record; no feature can have such a name

log = logging.getLogger("elbo.receiver")


@dataclass
class _MappedModel:
    """A model with a series mapping, and the rows that are being assembled for it.

    Args:
        reference: the name of the model; None for the default model.
        mapping: the series mapping of the model.
        served: the model, or None while it is not served.
        aligner: assembles samples into rows; None until the model has been served once.
    """

    reference: str | None
    mapping: SeriesMapping
    served: ServedModel | None = None
    aligner: SampleAligner | None = None


class RemoteWriteEndpoint:
    """The remote-write endpoint: assembles samples into rows, and scores the rows.

    A row is scored when all its samples have arrived, or when it has waited long enough for the missing samples.
    """

    def __init__(self, service: ServiceContext, mappings: dict[str | None, SeriesMapping]) -> None:
        self._service = service
        self._models = [_MappedModel(reference, mapping) for reference, mapping in mappings.items()]
        self._lock = asyncio.Lock()
        self._polling = PeriodicTask(
            self._score_due,
            POLL_SECONDS,
            "failed to score rows from remote write",
            final=partial(self._score_due, everything=True),
        )

    async def write(self, request: RequestContext) -> HttpResponse:
        """Receive samples from Prometheus remote write and score the rows that they form."""
        remote_write.require_version_1(request.header(b"content-type"), request.header(b"content-encoding"))
        if self._service.draining:
            raise NotReady("the server is shutting down")
        aligners = self._aligners_of_served_models()
        try:
            body = await request.body()
        except Overloaded as error:
            raise _retry_later(error.detail) from None
        self._require_room(aligners)
        budget = request.budget(
            max_rows=self._service.settings.max_rows,
            deadline=request.record.started + self._service.settings.request_timeout,
        )
        rows = 0  # how many rows the samples of this request have begun; the largest number of all models
        reader = remote_write.SeriesReader(body, request.max_body_bytes, budget)
        while reader.has_more:
            try:
                series = await read_within_budget(
                    self._service.readers, reader.read, budget, offload.SNAPPY_BYTE * len(body)
                )
            except Overloaded as error:
                raise _retry_later(error.detail) from None
            rows += await self._add(aligners, series, limit=self._service.settings.max_rows - rows)
        await self._score_due()
        return HttpResponse(b"", b"", status=204)

    async def _add(self, aligners: list[SampleAligner], series: list[Series], limit: int) -> int:
        """Add the samples of a request to all aligners, and let the event loop run between parts of the samples.

        Return how many rows the samples begin. The number can differ between models: return the largest.

        Raises:
            TooManyRows: the samples begin more than `limit` rows.
            NotReady: the rows cannot be scored as fast as the samples arrive. Prometheus sends the samples again, and
                those that are already added are then duplicates.
        """
        rows = 0
        for number, part in enumerate(_parts_of(series)):
            if number:
                await asyncio.sleep(0)
            rows += max(aligner.add(part, monotonic()) for aligner in aligners)
            if rows > limit:
                raise TooManyRows(
                    f"the samples of a request may form at most {self._service.settings.max_rows} rows "
                    "(ELBO_MAX_ROWS), got more: each time of each group is a row",
                    expected=f"at most {self._service.settings.max_rows} rows",
                    got="more",
                    hint="lower max_samples_per_send of remote_write in Prometheus",
                )
            if sum(aligner.pending_rows for aligner in aligners) > MAX_INCOMPLETE_ROWS:
                await self._score_due()
                self._require_room(aligners)
        return rows

    def _require_room(self, aligners: list[SampleAligner]) -> None:
        """Raise NotReady if too many rows wait to be scored."""
        waiting = sum(aligner.pending_rows for aligner in aligners)
        if waiting > MAX_WAITING_ROWS:
            raise _retry_later(f"{waiting} rows wait to be scored: expected at most {MAX_WAITING_ROWS}")

    def start(self) -> None:
        """Start to check regularly for rows that have waited long enough, and to score them."""
        self._polling.start()

    async def close(self) -> None:
        """Score all remaining rows. The batcher must still be open."""
        await self._polling.close()

    def _aligners_of_served_models(self) -> list[SampleAligner]:
        """Return the aligners of the mapped models that are served.

        Raises:
            NotReady: if no mapped model is served. Prometheus then retries.
        """
        not_served: list[str] = []
        for model in self._models:
            served_before = model.served
            try:
                model.served = served = self._service.find(model.reference)
            except ModelNotFound as error:
                model.served = None
                not_served.append(error.detail)
                continue
            if served is not served_before:
                _warn_if_no_row_can_be_anomalous(served, model.mapping)
            if model.aligner is None or model.aligner.names != served.row_schema.names:
                mapping, names = model.mapping, served.row_schema.names
                selectors = _selectors(served, mapping)
                model.aligner = SampleAligner(names, selectors, mapping.group, mapping.wait_seconds)
        if len(not_served) == len(self._models):
            raise NotReady(
                ", ".join(not_served), hint="publish the model with elbo train", headers={"Retry-After": "5"}
            )
        return [model.aligner for model in self._models if model.served and model.aligner]

    async def _score_due(self, everything: bool = False) -> None:
        """Score the rows that are due, or all waiting rows if `everything` is true.

        The lock keeps the rows of each group in time order.
        """
        async with self._lock:
            for model in self._models:
                if model.served and model.aligner:
                    await self._score_model(model.served, model.aligner, model.mapping, everything)
        waiting = sum(model.aligner.pending_rows for model in self._models if model.aligner)
        self._service.metrics.anomalies.set_waiting_rows(waiting)

    async def _score_model(
        self, served: ServedModel, aligner: SampleAligner, mapping: SeriesMapping, everything: bool
    ) -> None:
        self._service.metrics.anomalies.count_samples(served, aligner.outcomes)
        aligner.outcomes.clear()
        if aligner.unknown_metrics:
            self._service.unknown_metrics.report(served, aligner.unknown_metrics)
            aligner.unknown_metrics.clear()
        alpha = _alpha(served, mapping)
        body = AnomalyBody(alpha=alpha, extrapolated=mapping.extrapolated, time=TIME, group=GROUP, observe=True)
        run = partial(run_when_free, self._service, served)
        limit = min(SCORED_ROWS, self._service.settings.max_rows)
        while due := aligner.pop_ready(monotonic(), flush=everything, limit=limit):
            records = [_record(row) for row in due]
            input_rows = parse_record_rows(served.row_schema, body, records, may_contain_non_floats=True, minimum=0)
            try:
                verdicts = await score_rows(self._service, served, input_rows, body, run, is_live=True)
            except ServiceError as error:
                log.warning("cannot score rows from remote write, will retry: %s", error.detail)
                aligner.requeue(due)
                return
            _log_anomalies(served, verdicts)
            await asyncio.sleep(0)


def _selectors(served: ServedModel, mapping: SeriesMapping) -> FeatureSelectors:
    """Return the selector of each feature. Log the names in `mapping` that are not features of the model."""
    selectors = {name: name for name in served.row_schema.names}
    for title, selector in mapping.features.items():
        try:
            feature = served.row_schema.titles.find(title)
            problem = None if feature else "no such feature"
        except InvalidRows as error:
            feature, problem = None, error.detail
        if feature:
            selectors[feature] = selector
        else:
            similar = closest(title, served.row_schema.names)
            fields = {"model": served.name, "name": title, "problem": problem, "similar_feature": similar}
            log.warning("a name in the series mapping (ELBO_REMOTE_WRITE) is ignored", extra={"fields": fields})
    return FeatureSelectors(selectors)


def _alpha(served: ServedModel, mapping: SeriesMapping) -> float:
    """Return the alpha of the mapping; if it has none, the alpha that keeps the budget of the model's policy."""
    if served.default_alpha is None or "alpha" in mapping.model_fields_set:
        return mapping.alpha
    return served.default_alpha


def _warn_if_no_row_can_be_anomalous(served: ServedModel, mapping: SeriesMapping) -> None:
    """Warn if alpha is below the smallest p-value of a model that has just been loaded: no alert would ever begin."""
    calibration = served.manifest.calibration
    if calibration.reaches(_alpha(served, mapping)) or mapping.extrapolated:
        return
    log.warning(
        "remote write can raise no alert for %s@%d: alpha is %g, but the smallest p-value of its %d calibration rows "
        "is %.3g; raise alpha in the file of ELBO_REMOTE_WRITE, calibrate the model on more rows (elbo calibrate), or "
        "set extrapolated = true, which gives no guarantee",
        served.name, served.version, _alpha(served, mapping), calibration.rows, calibration.floor,
    )  # fmt: skip


def _parts_of(series: list[Series]) -> Iterator[list[Series]]:
    """Yield the series in parts of at most PART_SAMPLES samples."""
    part: list[Series] = []
    room = PART_SAMPLES
    for labels, samples in series:
        for start in range(0, len(samples), PART_SAMPLES):
            piece = samples[start : start + PART_SAMPLES]
            if len(piece) > room:
                yield part
                part, room = [], PART_SAMPLES
            part.append((labels, piece))
            room -= len(piece)
    if part:
        yield part


def _record(row: AlignedRow) -> dict[str, Any]:
    return {**row.values, TIME: row.milliseconds, GROUP: row.group}


def _retry_later(detail: str) -> NotReady:
    """Return an error with status 503. Prometheus retries after status 503, but drops the samples after status 429."""
    return NotReady(detail, hint="Prometheus retries by itself", headers={"Retry-After": "1"})


def _log_anomalies(served: ServedModel, verdicts: Verdicts | None) -> None:
    """Log the first few anomalous rows, because a remote-write response cannot contain verdicts."""
    if verdicts is None or True not in verdicts.is_anomaly:
        return
    scored, _ = results_and_errors(verdicts, LOGGED_FEATURES, served.row_schema.names, served.manifest.parts)
    anomalous = [result for result in scored if result["is_anomaly"]]
    for result in anomalous[:MAX_LOGGED_ROWS]:
        fields: dict[str, Any] = {"model": served.name, "version": served.version, "group": result.get("group")}
        fields |= {name: float(result[name]) for name in ("time", "severity", "p_value") if name in result}
        fields["causes"] = [feature["name"] for feature in result["features"]]
        log.info("anomalous row", extra={"fields": fields})
