"""Score rows for anomalies, and count the verdicts in the metrics if the rows are live traffic."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter

import numpy as np
import numpy.typing as npt

from service.access.scopes import Scope
from service.anomaly.inputs import InputRows
from service.anomaly.verdicts import Scores, Verdicts, decide, find_silenced_rows
from service.endpoints import offload
from service.endpoints.context import ServiceContext
from service.endpoints.disconnects import DisconnectWatch
from service.endpoints.group_scoring import score_windows, score_with_past
from service.endpoints.offload import run_in_thread_if_long
from service.errors import Overloaded
from service.http.request import RequestContext
from service.inference import operations
from service.inference.operations import Operation
from service.inference.served_model import ServedModel
from service.schemas import AnomalyBody

Array = npt.NDArray[np.float32]
Run = Callable[[Operation, Array], Awaitable[tuple[Array, ...]]]
RETRY_SECONDS = 0.02  # pause between two attempts to queue rows, if the queue is full


async def score_rows(
    service: ServiceContext,
    served: ServedModel,
    input_rows: InputRows,
    body: AnomalyBody,
    run: Callable[[Operation, Array], Awaitable[tuple[Array, ...]]],
    is_live: bool,
    deadline: float | None = None,
    request: RequestContext | None = None,
) -> Verdicts | None:
    """Return the verdicts on `input_rows`, or None if no row could be read.

    Args:
        service: the service, whose metrics count the rows.
        served: the model that scores the rows.
        input_rows: the rows.
        body: alpha and the other options of /anomaly.
        run: runs an operation on rows [B, D] with `served`.
        is_live: whether the rows are live traffic.
        deadline: when the request times out, on the `perf_counter` clock; by default ELBO_REQUEST_TIMEOUT from now.
        request: the request whose client may disconnect while its rows wait for their groups; None if nobody waits for
            the verdicts.
    """
    verdicts = None
    if input_rows.parsed.rows:
        run = run_for_rows(served, input_rows, run)
        input_rows, rows = await prepare_rows(served, input_rows)
        if input_rows.windows is not None:
            verdicts = await score_windows(served, input_rows, body, run)
        elif served.has_past and service.groups.concerns(served, input_rows):
            deadline = deadline or perf_counter() + service.settings.request_timeout
            watch = None if request is None else DisconnectWatch(request)
            verdicts = await score_with_past(service, served, input_rows, rows, body, run, is_live, deadline, watch)
        else:
            if served.conditions is not None:
                join = partial(served.conditions.join, rows, input_rows.conditions)
                rows = await run_in_thread_if_long(join, rows.size * offload.DECISION)
            verdicts = await _score(input_rows, rows, body, run)
    if is_live:
        for _ in service.metrics.anomalies.count_in_steps(served, input_rows, verdicts):
            await asyncio.sleep(0)
    else:
        service.metrics.anomalies.count_unobserved(served, input_rows)
    if input_rows.unknown_metrics:
        service.unknown_metrics.report(served, input_rows.unknown_metrics)
    return verdicts


async def prepare_rows(served: ServedModel, input_rows: InputRows) -> tuple[InputRows, npt.NDArray[np.float32]]:
    """Return the rows with their silences, and their values [B, D].

    Missing values are NaN if the model can score rows with missing values, or if its scaling replaces them. Otherwise,
    they are replaced.
    """
    rows = input_rows.parsed.x
    if input_rows.parsed.missing is not None and not served.scores_gaps:
        impute = partial(served.row_schema.impute, input_rows.parsed)
        rows = await run_in_thread_if_long(impute, rows.size * offload.DECISION)
    if served.silences is not None:
        find = partial(find_silenced_rows, served.silences, input_rows)
        input_rows = await run_in_thread_if_long(find, served.silences.estimate_ns(len(rows)))
    return input_rows, rows


def run_for_rows(served: ServedModel, input_rows: InputRows, run: Run) -> Run:
    """Return the function that scores `input_rows`: `run`, or one that also takes missing values."""
    if input_rows.parsed.missing is None or not served.scores_gaps:
        return run
    return partial(_run_with_gaps, run)


async def _run_with_gaps(
    run: Callable[[Operation, Array], Awaitable[tuple[Array, ...]]], operation: Operation, rows: Array
) -> tuple[Array, ...]:
    """Return the outputs of `operation` for rows [B, D], of which some have missing values."""
    runs = operations.split_by_gaps(operation, rows)
    outputs = [await run(each.operation, rows[each.places]) for each in runs]
    return await run_in_thread_if_long(partial(operations.in_order, runs, outputs), rows.size * offload.DECISION)


async def _score(
    input_rows: InputRows,
    rows: Array,
    body: AnomalyBody,
    run: Callable[[Operation, Array], Awaitable[tuple[Array, ...]]],
) -> Verdicts:
    """Return the verdicts on rows that are judged alone."""
    outputs = await run(operations.anomaly(body.alpha, body.extrapolated), rows)
    if len(rows) <= offload.FEW_ROWS:
        return decide(input_rows, Scores(*outputs), body)
    cost = rows.size * offload.DECISION
    if body.half_life or body.half_life_rows:
        cost += len(rows) * offload.SMOOTHED_ROW
    return await run_in_thread_if_long(partial(_decide, input_rows, outputs, body), cost)


def _decide(input_rows: InputRows, outputs: tuple[Array, ...], body: AnomalyBody) -> Verdicts:
    return decide(input_rows, Scores(*outputs), body)


def is_live_traffic(service: ServiceContext, request: RequestContext, body: AnomalyBody) -> bool:
    """Return whether the rows of a request to /anomaly are live traffic.

    Live traffic changes what the server remembers, so it needs an API key with the scope `write`. Without this scope,
    the rows are live traffic neither by default nor by request.

    Raises:
        Forbidden: the request has `observe=true`, but its key does not have the scope `write`.
    """
    if request.key and Scope.WRITE not in request.key.scopes:
        if body.observe:
            request.key.require(Scope.WRITE)
        return False
    return service.settings.observe if body.observe is None else body.observe


async def run_when_free(
    service: ServiceContext, served: ServedModel, operation: Operation, *inputs: Array
) -> tuple[Array, ...]:
    """Run `operation`. If the queue is full, try again until ELBO_REQUEST_TIMEOUT has passed.

    Raises:
        Overloaded: the queue was still full when ELBO_REQUEST_TIMEOUT had passed.
        DeadlineExceeded: the rows were queued, but the model did not finish within ELBO_REQUEST_TIMEOUT.
    """
    deadline = perf_counter() + service.settings.request_timeout
    while True:
        try:
            service.admission.check(rows=len(inputs[0]), is_queued=True)
            result = await service.batcher.run(served, operation, *inputs, deadline=deadline)
        except Overloaded:
            if perf_counter() > deadline:
                raise
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return result.outputs
