"""POST /feedback: a person says that rows were normal, or an incident, and the calibration of their group changes.

A request locks the groups that it names, as /anomaly does, and writes their records in one uninterrupted step at the
end. A request that fails or whose client disconnects before this step changes nothing. Feedback that is sent a second
time changes nothing more.
"""

import logging
import math
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from service.anomaly.feedback_inputs import ROW_FIELDS, Period, read_feedback
from service.anomaly.group_memory import ModelMemory
from service.anomaly.group_state import Record, Transaction
from service.anomaly.inputs import RECORD_READERS, InputRows
from service.anomaly.online_calibration import OnlineCalibration, count_differences
from service.anomaly.streams import Group, History, JoinedRows, adjust, join_rows
from service.anomaly.verdicts import Scores, parsing_errors, row_errors
from service.codec.long_work import pause_if_due
from service.endpoints import offload
from service.endpoints.context import ServiceContext
from service.endpoints.disconnects import DisconnectWatch
from service.endpoints.group_scoring import (
    JOINED_ROW,
    LOADED_GROUP,
    lock_groups,
    no_verdict,
    run_in_parts,
    run_to_end,
)
from service.endpoints.pipeline import ParsedRequest, RequestSpec, parse_request, render_response, run_operation
from service.endpoints.scoring import prepare_rows, run_for_rows
from service.errors import NoOnlineCalibration, NotRemembered
from service.http.request import HttpResponse, RequestContext
from service.inference import operations
from service.inference.served_model import ServedModel
from service.schemas import FeedbackBody

Array = npt.NDArray[np.float32]
CHANGED_GROUP = 2_000_000  # estimated time to change and write the calibration of a group, in nanoseconds

log = logging.getLogger("elbo.feedback")


class Answer(NamedTuple):
    """The fields of a `FeedbackAnswer`."""

    groups: list[dict[str, Any]]
    unused: int
    errors: list[dict[str, Any]]


Parsed = ParsedRequest[FeedbackBody, InputRows | Period]
Change = Callable[
    [str, OnlineCalibration, str], int
]  # changes the calibration of a group, and returns the number of rows that the feedback is about


FEEDBACK = RequestSpec(FeedbackBody, read_feedback, row_fields=ROW_FIELDS, readers=RECORD_READERS, json_output=True)


class FeedbackEndpoint:
    """The handler of POST /feedback."""

    def __init__(self, service: ServiceContext) -> None:
        self._service = service

    async def feedback(self, request: RequestContext) -> HttpResponse:
        """Say that rows were normal, or an incident: their scores enter or leave the calibration of their group."""
        parsed = await parse_request(self._service, request, FEEDBACK)
        memory = await self._memory(parsed.served)
        answer = await (
            self._on_period(parsed, memory, parsed.inputs)
            if isinstance(parsed.inputs, Period)
            else self._on_rows(parsed, memory, parsed.inputs)
        )
        served, verdict = parsed.served, parsed.body.verdict
        rows = sum(group["rows"] for group in answer.groups)
        self._service.metrics.anomalies.count_feedback(served, verdict, rows)
        fields = {"model": served.name, "version": served.version, "verdict": verdict, "rows": rows}
        fields |= {name: sum(group[name] for group in answer.groups) for name in ("added", "removed")}
        fields |= {"groups": len(answer.groups), "request_id": parsed.record.request_id}
        log.info("feedback has changed calibrations", extra={"fields": fields})
        content = {"verdict": verdict, **answer._asdict()}
        cost = offload.VERDICT * (len(answer.groups) + len(answer.errors))
        return await render_response(parsed, content, np.empty(0, np.float32), write_ns=cost)

    async def _memory(self, served: ServedModel) -> ModelMemory:
        """Return the memory of the groups of a model. Raises NoOnlineCalibration."""
        if not self._service.settings.online_calibration:
            raise NoOnlineCalibration(
                "the server judges all rows by the calibration of the model (ELBO_ONLINE_CALIBRATION=0)",
                hint=f"give the rows to elbo calibrate {served.name}, or set ELBO_ONLINE_CALIBRATION=1",
            )
        memory = await self._service.groups.of(served) if served.has_past else None
        if memory is None or memory.start_set("") is None:
            raise NoOnlineCalibration(
                f"{served.name}@{served.version} was trained without times: all rows are judged by the calibration of "
                "the model",
                hint=f"give the rows to elbo calibrate {served.name}, or train the model with --time",
            )
        return memory

    async def _on_period(self, parsed: Parsed, memory: ModelMemory, period: Period) -> Answer:
        """Change the calibration of one group by feedback about its remembered rows in a period.

        Raises:
            NotRemembered: the group is not remembered, has no row in the period, or has rows there that are forgotten.
        """
        watch = DisconnectWatch(parsed.request)
        transaction = await lock_groups(memory, [period.group], parsed.deadline, watch)
        try:
            if not memory.file.has_slot(period.group):
                raise _not_remembered(
                    f"{parsed.served.name}@{parsed.served.version} remembers no rows of {_named(period.group)}"
                )
            change = partial(_change_by_period, period)
            return Answer(await _commit(parsed, memory, transaction, [period.group], change), 0, [])
        finally:
            transaction.end()

    async def _on_rows(self, parsed: Parsed, memory: ModelMemory, input_rows: InputRows) -> Answer:
        """Score the rows of a request, and change the calibrations of their groups."""
        parsed.record.rows = input_rows.rows_received
        if not input_rows.parsed.rows:
            return Answer([], input_rows.rows_received, parsing_errors(input_rows.parsed))
        served = parsed.served
        input_rows, rows = await prepare_rows(served, input_rows)
        names = sorted({name or "" for name in input_rows.group or ("",)})
        watch = DisconnectWatch(parsed.request)
        transaction = await lock_groups(memory, names, parsed.deadline, watch)
        try:
            join = partial(_join, memory, input_rows, rows, transaction)
            joined = await run_to_end(join, LOADED_GROUP * len(names) + JOINED_ROW * len(rows))
            run = run_for_rows(served, input_rows, partial(run_operation, self._service, parsed))
            score, *explanation = await run_in_parts(memory.rules, joined, operations.SCORE, run)
            scores = Scores(score, *no_verdict(len(score)), *explanation)
            select = partial(_scores_by_group, memory, joined, input_rows, scores)
            by_group = await run_to_end(select, offload.DECISION * scores.contribution.size + JOINED_ROW * len(rows))
            changes = await _commit(parsed, memory, transaction, list(by_group), partial(_change_by_scores, by_group))
        finally:
            transaction.end()
        used = sum(map(len, by_group.values()))
        return Answer(changes, input_rows.rows_received - used, row_errors(input_rows.parsed, scores))


def _join(memory: ModelMemory, input_rows: InputRows, rows: Array, transaction: Transaction) -> JoinedRows:
    """Return the rows, joined to copies of their groups.

    If the first row of a group is older than the history that the server remembers, the rows are joined only with each
    other.
    """
    assert input_rows.time is not None
    first: dict[str, float] = {}
    names = input_rows.group or [None] * len(rows)
    for name, time in zip(names, input_rows.time.tolist(), strict=True):
        first[name or ""] = min(first.get(name or "", math.inf), math.inf if time != time else time)
    groups = {}
    for name, time in first.items():
        pause_if_due()
        groups[name] = Group(memory.rules, transaction.read(name), memory.start_set(name))
        if time < groups[name].history.oldest:
            groups[name].history = History(memory.rules)
    return join_rows(memory.rules, rows, input_rows.time, input_rows.group, groups, input_rows.parsed.missing)


def _scores_by_group(
    memory: ModelMemory, joined: JoinedRows, input_rows: InputRows, scores: Scores
) -> dict[str, Array]:
    """Return for each group the adjusted scores of the rows that its calibration may learn, oldest first."""
    adjusted = adjust(joined, memory.rules, scores.score, input_rows.time)
    is_used = scores.usable & (np.array(joined.window_rows) >= memory.rules.least_rows)
    if input_rows.silenced is not None:
        is_used &= ~input_rows.silenced
    by_group = {name: adjusted[[row for row in rows if is_used[row]]] for name, rows in joined.order.items()}
    return {name: by_group[name] for name in sorted(by_group) if len(by_group[name])}


async def _commit(
    parsed: Parsed, memory: ModelMemory, transaction: Transaction, names: list[str], change: Change
) -> list[dict[str, Any]]:
    """Change the calibrations of locked groups, store them, and return what has changed."""
    await transaction.reserve(names, parsed.deadline)

    def commit() -> list[dict[str, Any]]:
        changes = []
        for name in names:
            pause_if_due()
            group = Group(memory.rules, transaction.read(name), memory.start_set(name))
            calibration = group.calibration
            assert calibration is not None
            before = calibration.scores
            rows = change(name, calibration, parsed.body.verdict)
            transaction.commit(name, Record(group.dump_unchanged(), group.tag))
            added, removed = count_differences(before, calibration.scores)
            numbers = {"rows": rows, "added": added, "removed": removed, "calibration_rows": calibration.set_rows}
            changes.append({"group": name or None, **numbers, "state": calibration.state})
        return changes

    return await run_to_end(commit, CHANGED_GROUP * len(names))


def _change_by_period(period: Period, _name: str, calibration: OnlineCalibration, verdict: str) -> int:
    """Change a calibration by feedback on remembered rows, and return the number of rows. Raises NotRemembered."""
    if period.is_state:
        rows = calibration.held_rows
        calibration.normal() if verdict == "normal" else calibration.incident()
        return rows
    scores = calibration.recent(period.since, period.until)
    if period.since < calibration.remembered_since:
        begin = calibration.remembered_since
        known = f"only rows since {_as_text(begin)} are remembered" if math.isfinite(begin) else "no row is remembered"
        raise _not_remembered(f"not all rows of {_named(period.group)} in this time are remembered: {known}")
    if not len(scores):
        raise _not_remembered(f"{_named(period.group)} has no row in this time")
    return _change_by_scores({period.group: scores}, period.group, calibration, verdict)


def _change_by_scores(scores: dict[str, Array], name: str, calibration: OnlineCalibration, verdict: str) -> int:
    """Change a calibration by feedback on rows with these scores, and return their number."""
    if verdict == "normal":
        calibration.add(scores[name])
    else:
        calibration.remove(scores[name])
    return len(scores[name])


def _not_remembered(detail: str) -> NotRemembered:
    return NotRemembered(
        detail,
        hint="check group_name, since and until, or send the rows themselves in records; with a window, send also the "
        "rows before them",
    )


def _named(group: str) -> str:
    return repr(group) if group else "the group without a name"


def _as_text(seconds: float) -> str:
    """Return a time for an error message."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g}"
