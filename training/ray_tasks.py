"""Run the parts of a scoring job, the trials of a sweep, or the training of groups as tasks of Ray.

This is the only module of `training` that imports Ray.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from models.errors import ElboError
from training import groups, sweep
from training.scoring.job import Job, Part, Report, score_part
from training.scoring.job import Show as ShowRows

MAX_RETRIES = 3  # of a task whose node was lost or whose process died, for example for lack of memory
TASKS_PER_CORE = 2  # submitted tasks per core: one runs and one waits, so that no core waits for the driver


@contextmanager
def connected() -> Iterator[Any]:
    """Yield the module `ray`, connected to a cluster.

    A connection that this process already has is used, and stays open. Otherwise, Ray connects to the cluster of
    RAY_ADDRESS, or else to a cluster that runs on this machine, or else starts one until the end of the block. A
    cluster that is started here has no dashboard and sends no usage statistics.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray counts the processes that its memory monitor ends apart from MAX_RETRIES, and retries them without limit.
    os.environ.setdefault("RAY_task_oom_retries", str(MAX_RETRIES))
    import ray

    if ray.is_initialized():
        yield ray
        return
    new = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    ray.init(log_to_driver=False, logging_level="error", **new)
    try:
        yield ray
    finally:
        ray.shutdown()


class TaskDied(ElboError):
    """The process of a task died each time that Ray ran it."""

    code = "task_died"


def score_on_ray(job: Job, parts: Sequence[Part], workers: int | None, show: ShowRows) -> None:
    """Score the parts as tasks of Ray with one core each. Every process of Ray loads the artifact once.

    If a node is lost, Ray runs its tasks again on another node, each up to MAX_RETRIES times. The artifact, the data
    and the folder of the job must have the same paths on all nodes.

    Args:
        job: the job.
        parts: the parts to score.
        workers: how many tasks are submitted at the same time; by default, TASKS_PER_CORE.
        show: called after each part with the number of its rows.

    Raises:
        ElboError: the first error of a task; see `score_part`.
        TaskDied: the process of a task died each time.
    """
    with connected() as ray:
        calls = ((part, (job, part)) for part in parts)
        for part, reference in _in_turns(ray, _score, calls, workers):
            work = f"scoring the rows of {part.source} from row {part.first_row:,} on"
            show(_result(ray, reference, work, ", or make the parts smaller with --part-rows").rows)


def train_on_ray(job: sweep.Sweep, trials: Sequence[sweep.Trial], show: sweep.Show) -> list[sweep.TrialResult]:
    """Train the models of a sweep as tasks of Ray with one core each. Return the results in the order of `trials`.

    The data and the folder of the sweep must have the same paths on all nodes.
    """
    with connected() as ray:
        task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")(_train)
        running = {task.remote(job, trial): trial for trial in trials}
        results = {}
        while running:
            (reference,), _ = ray.wait(list(running), num_returns=1)
            trial = running.pop(reference)
            try:
                result = _result(ray, reference, f"training {trial.label}")
            except TaskDied as error:  # the other trials are not lost
                result = sweep.TrialResult(trial, error=str(error))
            results[trial.index] = result
            show(result)
    return [results[trial.index] for trial in trials]


def train_groups_on_ray(jobs: Iterator[groups.GroupJob]) -> Iterator[groups.TrainedGroup]:
    """Train the models of groups as tasks of Ray with one core each. Yield each as soon as it is trained.

    Ray carries the rows of a group to the machine that trains it, so the machines share no folder. This process holds
    the rows of as many groups as there are submitted tasks.
    """
    with connected() as ray:
        calls = (((job.group, job.config.name, len(job.table.x)), (job,)) for job in jobs)
        for (group, name, rows), reference in _in_turns(ray, _train_group, calls):
            try:
                yield _result(ray, reference, f"training {name}")
            except TaskDied as error:  # the other groups are not lost
                yield groups.TrainedGroup(group, name, rows, error=str(error))


def _in_turns(
    ray: Any, function: Any, calls: Iterable[tuple[Any, tuple[Any, ...]]], most: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """Run a task with one core for each call of `function`. Yield the key and the reference of each ended task.

    Args:
        ray: the module.
        function: what a task runs.
        calls: a key for the caller, and the arguments of `function`. The next call is read when its task is submitted.
        most: how many tasks are submitted at the same time; by default, TASKS_PER_CORE.
    """
    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")(function)
    waiting = iter(calls)
    running: dict[Any, Any] = {}  # the keys, by reference
    while True:
        limit = most or TASKS_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
        for key, arguments in islice(waiting, max(0, limit - len(running))):
            running[task.remote(*arguments)] = key
        if not running:
            return
        ready, _ = ray.wait(list(running), num_returns=1)
        for reference in ready:
            yield running.pop(reference), reference


def _score(job: Job, part: Part) -> Report:
    return score_part(job, part)


def _train(job: sweep.Sweep, trial: sweep.Trial) -> sweep.TrialResult:
    return sweep.train_trial(job, trial)


def _train_group(job: groups.GroupJob) -> groups.TrainedGroup:
    return groups.train_group(job)


def _result(ray: Any, reference: Any, work: str, remedy: str = "") -> Any:
    """Return the result of a finished task. If it failed, raise its own exception instead of Ray's RayTaskError.

    Args:
        ray: the module.
        reference: the reference to the result.
        work: what the task did, for the error.
        remedy: what helps besides more memory, for the error.

    Raises:
        TaskDied: the process of the task died each time, or its node was lost.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise TaskDied(
            f"{work}: the process died {MAX_RETRIES + 1} times ({type(error).__name__}: {reason}): give its machine "
            f"more memory{remedy}, then repeat the command"
        ) from error
