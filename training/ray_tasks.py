"""Run the parts of a scoring job, or the trials of a sweep, as tasks of Ray.

This is the only module of `training` that imports Ray.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from training import sweep
from training.scoring.job import Job, Part, Report, score_part
from training.scoring.job import Show as ShowRows

TASKS_PER_CORE = 2  # submitted tasks per core: one runs and one waits, so that no core waits for the driver


@contextmanager
def connected() -> Iterator[Any]:
    """Yield the module `ray`, connected to a cluster.

    A connection that this process already has is used, and stays open. Otherwise, Ray connects to the cluster of
    RAY_ADDRESS, or else to a cluster that runs on this machine, or else starts one until the end of the block. A
    cluster that is started here has no dashboard and sends no usage statistics.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
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


def score_on_ray(job: Job, parts: Sequence[Part], workers: int | None, show: ShowRows) -> None:
    """Score the parts as tasks of Ray with one core each. Every process of Ray loads the artifact once.

    If a node is lost, Ray runs its tasks again on another node. The artifact, the data and the folder of the job must
    have the same paths on all nodes.

    Args:
        job: the job.
        parts: the parts to score.
        workers: how many tasks are submitted at the same time; by default, TASKS_PER_CORE.
        show: called after each part with the number of its rows.

    Raises:
        ElboError: the first error of a task; see `score_part`.
    """
    with connected() as ray:
        task = ray.remote(num_cpus=1, max_retries=-1, scheduling_strategy="SPREAD")(_score)
        waiting = list(reversed(parts))
        running: dict[Any, Part] = {}
        while waiting or running:
            most = workers or TASKS_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
            while waiting and len(running) < most:
                part = waiting.pop()
                running[task.remote(job, part)] = part
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                running.pop(reference)
                show(_result(ray, reference).rows)


def train_on_ray(job: sweep.Sweep, trials: Sequence[sweep.Trial], show: sweep.Show) -> list[sweep.TrialResult]:
    """Train the models of a sweep as tasks of Ray with one core each. Return the results in the order of `trials`.

    The data and the folder of the sweep must have the same paths on all nodes.
    """
    with connected() as ray:
        task = ray.remote(num_cpus=1, max_retries=-1, scheduling_strategy="SPREAD")(_train)
        running = {task.remote(job, trial): trial for trial in trials}
        results = {}
        while running:
            (reference,), _ = ray.wait(list(running), num_returns=1)
            results[running.pop(reference).index] = result = _result(ray, reference)
            show(result)
    return [results[trial.index] for trial in trials]


def _score(job: Job, part: Part) -> Report:
    return score_part(job, part)


def _train(job: sweep.Sweep, trial: sweep.Trial) -> sweep.TrialResult:
    return sweep.train_trial(job, trial)


def _result(ray: Any, reference: Any) -> Any:
    """Return the result of a finished task. If it failed, raise its own exception instead of Ray's RayTaskError."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
