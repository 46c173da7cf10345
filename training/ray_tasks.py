"""Parts of a scoring job and models of a sweep as tasks of Ray. The only module of `training` that imports Ray."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from training import sweep
from training.scoring.job import Job, Part, Report, score_part
from training.scoring.job import Show as ShowRows

TASKS_PER_CORE = 2  # tasks that are submitted at the same time, so that no core waits for the driver


@contextmanager
def connected() -> Iterator[Any]:
    """Yield the module `ray`, connected to the cluster of RAY_ADDRESS, or else to one that is started on this machine.

    Ray sends no usage statistics and starts no dashboard. A connection that exists is used, and stays.
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
    """Score the parts as tasks of Ray. Every process of Ray loads the artifact once.

    If a node is lost, Ray runs its tasks again on another node. INPUT and OUTPUT must have the same path on all nodes.

    Raises:
        DataError: as `score_part`.
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
    """Train the models of a sweep as tasks of Ray, one core each. The data and the runs must be on a shared disk."""
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
    """Return the result of a finished task. Raise the exception of the task itself, not Ray's wrapper of it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
