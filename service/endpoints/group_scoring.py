"""Score rows together with the past of their groups, in a transaction that commits only if everything succeeds.

A transaction locks the groups of the request, reads their records, scores the windows, and steps the calibrations. Then
it writes the record of each group at once, and unlocks the groups. A request that fails, times out or loses its client
before the commit changes nothing. Rows that are not live traffic are judged with the same past, and change nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from models.onset import UsualCourse
from service.anomaly.group_memory import ModelMemory
from service.anomaly.group_state import Record, Transaction
from service.anomaly.inputs import InputRows
from service.anomaly.onsets import Onsets
from service.anomaly.streams import Group, JoinedRows, Judgements, Rules, join_rows, judge, remember_newest
from service.anomaly.verdicts import Past, Scores, Verdicts, decide
from service.codec.long_work import pause_if_due
from service.codec.row_windows import count_rows
from service.endpoints import offload
from service.endpoints.context import ServiceContext
from service.endpoints.disconnects import DisconnectWatch
from service.endpoints.offload import run_in_thread_if_long
from service.inference import operations
from service.inference.operations import Operation
from service.inference.served_model import ServedModel
from service.schemas import AnomalyBody

Array = npt.NDArray[np.float32]
T = TypeVar("T")
PART_BYTES = 2**20  # windows are scored in parts of about this size, because a request may have 10,000 of them

# Estimated times in nanoseconds.
LOADED_GROUP = 100_000  # time to read the record of a group
TAKEN_GROUP = 10_000  # time to take a group that is in memory
STORED_GROUP = 50_000  # time to write the record of a group
JOINED_ROW = 8_000
JUDGED_ROW = 20_000


async def score_with_past(
    service: ServiceContext,
    served: ServedModel,
    input_rows: InputRows,
    rows: Array,
    body: AnomalyBody,
    run: Callable[[Operation, Array], Awaitable[tuple[Array, ...]]],
    is_live: bool,
    deadline: float,
    watch: DisconnectWatch | None,
) -> Verdicts:
    """Return the verdicts on rows [G, D] of groups.

    Args:
        service: the service.
        served: the model that scores the rows.
        input_rows: the times and the groups of the rows. There is at least one row.
        rows: the rows, in which a missing value that the model cannot impute is replaced.
        body: alpha and the other options of /anomaly.
        run: runs an operation on the model's inputs.
        is_live: whether the rows are live traffic, and therefore remembered.
        deadline: when to give up waiting for groups that other requests use, on the `perf_counter` clock.
        watch: notices that the client disconnects while the request waits for groups; None if nobody can disconnect.

    Raises:
        ClientGone: the client disconnected while the request waited for groups.
        Overloaded: other requests kept a group locked until the deadline.
        NotReady: the records cannot be read or written.
    """
    memory = await service.groups.of(served)
    if body.inputs is not None:  # rows without times and groups: they are joined with each other only
        joined = await run_to_end(partial(_join, memory, input_rows, rows, None, is_live), JOINED_ROW * len(rows))
        return await _judge_rows(memory, joined, input_rows, body, run, served.course)
    names = list(dict.fromkeys(name or "" for name in input_rows.group or ("",)))
    transaction = await lock_groups(memory, names, deadline, watch)
    try:
        work = partial(_join, memory, input_rows, rows, transaction, is_live)
        loaded = sum(not memory.has(name) for name in names)
        cost = LOADED_GROUP * loaded + TAKEN_GROUP * (len(names) - loaded) + JOINED_ROW * len(rows)
        joined = await run_to_end(work, cost)
        if not is_live:
            transaction.end()
        verdicts = await _judge_rows(memory, joined, input_rows, body, run, served.course)
        if is_live:
            await _commit(memory, transaction, joined, deadline)
            # Report before the groups are unlocked: otherwise, another process could report a later state first.
            service.metrics.anomalies.count_past(served, joined, verdicts, memory.file.take_forgotten())
    finally:
        transaction.end()
    return verdicts


async def lock_groups(
    memory: ModelMemory, names: Sequence[str], deadline: float, watch: DisconnectWatch | None
) -> Transaction:
    """Lock groups, and return the transaction. See `score_with_past` for the arguments and the errors."""
    if watch is None:
        return await memory.file.begin(names, deadline)
    try:
        return await memory.file.begin(names, deadline, on_wait=watch.start)
    except asyncio.CancelledError:
        watch.raise_if_disconnected()
        raise
    finally:
        watch.stop()


def _join(
    memory: ModelMemory, input_rows: InputRows, rows: Array, transaction: Transaction | None, is_live: bool
) -> JoinedRows:
    """Return the rows, joined to the groups that `transaction` has locked; without a transaction, to new groups."""
    groups: dict[str, Group] = {}
    for group in input_rows.group or ("",):
        name = group or ""
        if name not in groups:
            pause_if_due()
            if transaction is None:
                groups[name] = Group(memory.rules, b"", None)
            elif is_live:
                groups[name] = memory.take(name, transaction, input_rows.time is not None)
            else:
                has_times = input_rows.time is not None
                start = memory.start_set(name) if memory.needs_calibration(has_times) else None
                groups[name] = Group(memory.rules, transaction.read(name), start)
    return join_rows(memory.rules, rows, input_rows.time, input_rows.group, groups, input_rows.parsed.missing)


async def _judge_rows(
    memory: ModelMemory,
    joined: JoinedRows,
    input_rows: InputRows,
    body: AnomalyBody,
    run: Callable[[Operation, Array], Awaitable[tuple[Array, ...]]],
    course: UsualCourse | None,
) -> Verdicts:
    """Score the rows, step the calibrations of their groups in memory, and return the verdicts."""
    rules, count = memory.rules, len(joined.outcomes)
    operation = operations.SCORE if joined.has_calibration else operations.anomaly(body.alpha, body.extrapolated)
    outputs = await run_in_parts(rules, joined, operation, run)
    if joined.has_calibration:
        score, *explanation = outputs
        outputs = (score, *no_verdict(count), *explanation)
    cost = JUDGED_ROW * count + offload.DECISION * count * rules.width
    if body.half_life or body.half_life_rows:
        cost += count * offload.SMOOTHED_ROW
    return await run_to_end(partial(_decide, memory, joined, input_rows, body, Scores(*outputs), course), cost)


async def run_in_parts(
    rules: Rules,
    joined: JoinedRows,
    operation: Operation,
    run: Callable[[Operation, Array], Awaitable[tuple[Array, ...]]],
) -> tuple[Array, ...]:
    """Return the outputs of `operation` for joined rows."""
    count = len(joined.outcomes)
    part_rows = count if joined.windows is None else max(1, PART_BYTES // (4 * rules.rows * rules.width))
    starts = range(0, count, part_rows)
    parts = [await run(operation, joined.inputs(slice(start, start + part_rows))) for start in starts]
    return parts[0] if len(parts) == 1 else tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def no_verdict(count: int) -> tuple[Array, Array]:
    """Return p-values [B] and severities [B] that stand for rows without a verdict."""
    return np.ones(count, np.float32), np.zeros(count, np.float32)


def _decide(
    memory: ModelMemory,
    joined: JoinedRows,
    input_rows: InputRows,
    body: AnomalyBody,
    scores: Scores,
    course: UsualCourse | None,
) -> Verdicts:
    rules = memory.rules
    judgements: Judgements | None = None
    if joined.units is not None:
        scores = replace(scores, expected=joined.units.from_pool(scores.expected))
    judged = scores
    if joined.has_calibration:
        judgements = judge(
            joined, rules, scores.score, scores.usable, input_rows.time, (scores.p_value, scores.severity), body.alpha,
            body.extrapolated, silenced=input_rows.silenced,
        )  # fmt: skip
        remember_newest(joined, judgements, scores.contribution, input_rows.time, input_rows.parsed.missing)
        judged = scores.judged(judgements.p_value, judgements.severity)
    past = Past(joined.window_rows if rules.has_window else None, rules.rows)
    if course is not None:
        past = past._replace(onsets=Onsets(course, joined.windows_of, joined.times_of if joined.pool_times else None))
    if judgements is not None:
        past = past._replace(
            has_own_calibration=judgements.has_own_calibration,
            states=judgements.states,
            incidents=judgements.incidents,
            changes=judgements.changes,
        )
    return _decide_with_past(input_rows, judged, body, past, rules.least_rows)


def _decide_with_past(
    input_rows: InputRows, scores: Scores, body: AnomalyBody, past: Past, least_rows: int
) -> Verdicts:
    """Return the verdicts. A row whose window has fewer than `least_rows` rows is never anomalous."""
    is_short = [rows < least_rows for rows in past.window_rows or ()]
    if True not in is_short:
        return decide(input_rows, scores, body)._replace(past=past)
    severity = np.where(is_short, np.minimum(scores.severity, np.float32(1)), scores.severity)
    verdicts = decide(input_rows, replace(scores, severity=severity), body)
    is_anomaly = [flag and not short for flag, short in zip(verdicts.is_anomaly, is_short, strict=True)]
    return verdicts._replace(is_anomaly=is_anomaly, past=past)


async def score_windows(
    served: ServedModel,
    input_rows: InputRows,
    body: AnomalyBody,
    run: Callable[[Operation, Array], Awaitable[tuple[Array, ...]]],
) -> Verdicts:
    """Return the verdicts on windows that the request brings along. Nothing is remembered of them.

    Args:
        served: the model, which has a window.
        input_rows: the windows and their newest rows. There is at least one.
        body: alpha and the other options of /anomaly.
        run: runs an operation on the model's inputs.
    """
    window, windows = served.manifest.window, input_rows.windows
    assert window is not None
    assert windows is not None
    outputs = await run(operations.anomaly(body.alpha, body.extrapolated), windows)

    def decide_windows() -> Verdicts:
        past = Past(count_rows(windows).tolist(), window.rows)
        if served.course is not None:
            past = past._replace(onsets=Onsets(served.course, windows.__getitem__))
        return _decide_with_past(input_rows, Scores(*outputs), body, past, window.least_rows)

    return await run_in_thread_if_long(decide_windows, windows.size * offload.DECISION)


async def _commit(memory: ModelMemory, transaction: Transaction, joined: JoinedRows, deadline: float) -> None:
    """Store the groups that have changed. Raises NotReady, Overloaded."""
    changed = joined.changed_groups()
    await transaction.reserve(changed, deadline)

    def commit() -> None:
        for name in changed:
            pause_if_due()
            group = joined.groups[name]
            stamp = transaction.commit(name, Record(group.dump(joined.pool), group.tag))
            memory.keep(name, stamp, group)

    await run_to_end(commit, STORED_GROUP * len(changed))


async def run_to_end(work: Callable[[], T], estimated_ns: float) -> T:
    """Return the result of `work`, as `run_in_thread_if_long` does.

    If this call is cancelled, it ends when the thread has ended, so that the caller does not unlock groups that the
    thread still writes.
    """
    if estimated_ns <= offload.MAX_LOOP_NS:
        return await run_in_thread_if_long(work, estimated_ns)
    task = asyncio.ensure_future(run_in_thread_if_long(work, estimated_ns))
    try:
        return await asyncio.shield(task)
    finally:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
