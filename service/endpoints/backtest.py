"""The endpoint /backtest: judge a history as the server would have judged it, and report the alerts."""

from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from service.anomaly.feedback_inputs import read_time
from service.anomaly.inputs import RECORD_READERS, InputRows, parse_input_rows, with_timeline_keys
from service.anomaly.verdicts import parsing_errors
from service.backtest.history import History, sort_history
from service.backtest.incidents import Incident
from service.backtest.page import draw
from service.backtest.replay import DEFAULT_ALPHAS, Options, Replayer
from service.backtest.report import make_report
from service.codec.budget import Budget
from service.codec.request_body import JSON
from service.codec.response_body import to_json
from service.endpoints import offload
from service.endpoints.context import ServiceContext
from service.endpoints.group_scoring import JOINED_ROW, JUDGED_ROW
from service.endpoints.offload import run_in_thread_if_long
from service.endpoints.pipeline import ParsedRequest, RequestSpec, parse_request, run_while_connected, take_turn
from service.errors import DeadlineExceeded, InvalidField
from service.http.request import HttpResponse, RequestContext
from service.inference.operations import in_order
from service.inference.served_model import ServedModel
from service.schemas import AnomalyBody, BacktestBody

MAX_ERRORS = 20  # rows that cannot be judged and are listed
REPORTED_ROW = 20_000  # estimated time to report one row, in nanoseconds
INCIDENTS_PER_ROW = 1000  # with this many incidents, finding their rows takes as long as reporting all rows
OWN_FIELDS = ("alphas", "drawings", "incidents")  # fields that /anomaly does not have

ParsedBacktest = ParsedRequest[BacktestBody, InputRows]


class BacktestEndpoint:
    """The handler of /backtest.

    The rows are never live traffic. The work runs in threads and in the batcher, one part of the rows after the
    other. If the client disconnects or the request times out, no further part begins.
    """

    def __init__(self, service: ServiceContext) -> None:
        self._service = service

    async def backtest(self, request: RequestContext) -> HttpResponse:
        """Rehearse alerts: judge a history in order of time, and return the alerts that it would have raised."""
        parsed = await parse_request(self._service, request, BACKTEST)
        incidents = _read_incidents(parsed.body)
        rows = parsed.inputs.rows_received
        if rows > self._service.admission.max_small_rows:
            await take_turn(parsed, rows)
        content = await run_while_connected(parsed, self._replay(parsed, incidents))
        parsed.record.rows = rows
        self._service.metrics.anomalies.count_unobserved(parsed.served, parsed.inputs)
        return HttpResponse(content, JSON.encode(), parsed.served.headers)

    async def _replay(self, parsed: ParsedBacktest, incidents: list[Incident] | None) -> bytes | memoryview:
        """Return the response: the report of the rows, with drawings if the request wants them."""
        service, served, inputs = self._service, parsed.served, parsed.inputs
        if served.conditions is not None:
            raise InvalidField(
                f"{served.name}@{served.version} knows conditions of rows, and a backtest does not",
                expected="a model that was trained without --condition",
                got=served.name,
                hint="train a model without --condition",
            )
        count, width = inputs.rows_received, served.row_schema.width
        options = _options(service, served, parsed.body)

        def begin() -> Replayer:
            return Replayer(served, _history(served, inputs, parsed.body), options)

        replayer = await run_in_thread_if_long(begin, JOINED_ROW * count)
        for part in replayer.parts():
            rows = part.stop - part.start
            joined = await run_in_thread_if_long(partial(replayer.join, part), JOINED_ROW * rows)
            outputs = []
            for inputs_of_part in replayer.inputs(joined):
                of_part = []
                for operation, places in (runs := replayer.runs(inputs_of_part)):
                    parsed.request.ticket.check(len(places))
                    result = await service.batcher.run(
                        served, operation, inputs_of_part[places], deadline=parsed.deadline
                    )
                    parsed.record.computed_at = perf_counter()
                    parsed.record.queue += result.queued
                    parsed.record.compute += result.computed
                    of_part.append(result.outputs)
                outputs.append(in_order(runs, of_part))
            cost = rows * (JUDGED_ROW * len(options.alphas) + offload.DECISION * width)
            await run_in_thread_if_long(partial(replayer.judge, part, joined, outputs), cost)
            if perf_counter() > parsed.deadline:
                raise DeadlineExceeded(
                    f"the request timed out after {part.stop:,} rows of its history",
                    hint="send fewer rows, allow more time, or use the command elbo backtest",
                )
        cost = REPORTED_ROW * count * (1 + len(incidents or ()) / INCIDENTS_PER_ROW)
        return await run_in_thread_if_long(partial(_answer, parsed, replayer, incidents), cost)


def _options(service: ServiceContext, served: ServedModel, body: BacktestBody) -> Options:
    settings = service.settings
    alphas = body.alphas or [alpha for alpha in (served.default_alpha, *DEFAULT_ALPHAS) if alpha is not None]
    return Options(
        alphas=tuple(dict.fromkeys(alphas)),
        extrapolated=body.extrapolated,
        online=settings.online_calibration,
        alert_half_life=settings.alert_half_life,
        calm_seconds=settings.alert_calm_seconds,
        incident_seconds=settings.alert_max_age_seconds,
    )


def _read_incidents(body: BacktestBody) -> list[Incident] | None:
    """Return the known incidents in a request; None if it names none. Raises InvalidField."""
    if body.incidents is None:
        return None
    found = []
    for index, incident in enumerate(body.incidents):
        name = f"incidents/{index}"
        start, end = read_time(incident.start, f"{name}/start"), read_time(incident.end, f"{name}/end")
        if end < start:
            raise InvalidField(
                f"{name} ends ({incident.end}) before it starts ({incident.start})",
                pointer=f"/{name}/end",
                expected="a time that is not before start",
                got=str(incident.end),
            )
        found.append(Incident(start, end, incident.group or None))
    return found


def _history(served: ServedModel, inputs: InputRows, body: BacktestBody) -> History:
    """Return the rows with times, in order of group and time. Raises InvalidField if no row has a time."""
    has_time = _has_time(inputs)
    if not has_time.any():
        key = with_timeline_keys(served, _scoring_body(body)).time
        raise InvalidField(
            f"no row has a time: a backtest replays rows in order of time, and looked for the times under {key!r}",
            pointer="/time",
            expected="the name of the column of times",
            got=key,
            hint="name the column in the option time",
        )
    assert inputs.time is not None
    kept = np.flatnonzero(has_time)
    group = None if inputs.group is None else [inputs.group[row] for row in kept.tolist()]
    x = inputs.parsed.x if served.scores_gaps else served.row_schema.impute(inputs.parsed)
    return sort_history(x[kept], inputs.time[kept], group, np.array(inputs.parsed.rows, np.int64)[kept])


def _has_time(inputs: InputRows) -> npt.NDArray[np.bool_]:
    """Return which of the valid rows have a time, [G]."""
    return np.zeros(len(inputs.parsed.rows), bool) if inputs.time is None else np.isfinite(inputs.time)


def _answer(parsed: ParsedBacktest, replayer: Replayer, incidents: list[Incident] | None) -> bytes | memoryview:
    inputs, served, replay = parsed.inputs, parsed.served, replayer.finish()
    faulty = inputs.rows_received - len(replay.history)
    report = make_report(replay, incidents, f"{served.name}@{served.version}", "request", faulty)
    drawings = draw(report, replay, incidents or [])._asdict() if parsed.body.drawings else None
    errors: list[dict[str, Any]] = parsing_errors(inputs.parsed)[:MAX_ERRORS]
    errors += [
        {"row": inputs.parsed.rows[place], "detail": "the row has no time", "pointer": None}
        for place in np.flatnonzero(~_has_time(inputs))[: MAX_ERRORS - len(errors)].tolist()
    ]
    errors.sort(key=lambda error: int(error["row"]))
    answer = {"model": served.name, "version": served.version, "report": asdict(report), "drawings": drawings}
    return to_json({**answer, "errors": errors})


def _scoring_body(body: BacktestBody) -> AnomalyBody:
    """Return the fields that /anomaly has, too."""
    given = body.model_fields_set.difference(OWN_FIELDS)
    return AnomalyBody.model_construct(_fields_set=given, **{name: getattr(body, name) for name in given})


def _read_rows(served: ServedModel, body: BacktestBody, may_contain_non_floats: bool, budget: Budget) -> InputRows:
    return parse_input_rows(served, _scoring_body(body), may_contain_non_floats, budget)


BACKTEST = RequestSpec(
    BacktestBody, _read_rows, row_fields=("records", "metrics"), readers=RECORD_READERS, json_output=True
)
