"""Score a file on a cluster of two nodes, kill one of them meanwhile, and train models on the other. Print JSON.

    .venv-ray/bin/python -m tests.ray_programs.lose_a_node ARTIFACT DATA OUTPUT TABLE FOLDER HOSTS

TABLE is the training data of a sweep, and FOLDER is where its trials write their artifacts. HOSTS has rows of several
groups, whose models are published in FOLDER/groups. The first process that trains a group is killed meanwhile.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from models.artifact import load
from tests.ray_programs.cluster import two_nodes
from tests.ray_programs.trials import GROUPS, TRIALS
from tests.waiting import wait_until
from training.groups import GroupJob, TrainedGroup, run_groups
from training.ray_tasks import TaskDied, score_on_ray, train_groups_on_ray, train_on_ray
from training.scoring.job import Part
from training.scoring.run import make_job, run_job
from training.sweep import Sweep
from training.train import read


class Poison(Part):
    """A part that kills the process of Ray that receives it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


class KilledOnce(GroupJob):
    """A group that kills the first process of Ray that receives it."""

    marker: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return receive, (self.marker, self.group, self.config, self.table, self.served)


def receive(marker: Path, *fields: Any) -> GroupJob:
    """Return the group, or kill this process if `marker` does not exist yet."""
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return GroupJob(*fields)


def train_groups(hosts: str, folder: Path) -> list[list[Any]]:
    """Train the groups on Ray. Return name, state and measures of each."""

    def on_ray(jobs: Iterator[GroupJob]) -> Iterator[TrainedGroup]:
        first = next(jobs)
        killed = KilledOnce(first.group, first.config, first.table, first.served)
        object.__setattr__(killed, "marker", folder / "killed")  # the class is frozen
        return train_groups_on_ray(chain([killed], jobs))

    found = run_groups(GROUPS, read(hosts, GROUPS), folder / "groups", on_ray)
    return [[each.trained.name, each.state, each.trained.means] for each in found]


def count_workers() -> int:
    """Return how many nodes of the cluster that can run tasks are alive."""
    import ray

    return sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))


def main(artifact_path: Path, data: str, output: Path, table: str, folder: Path, hosts: str) -> None:
    """Score `data`, and kill one of the two nodes as soon as four parts are finished. Then train the models."""
    artifact = load(artifact_path)
    job = make_job(artifact, "parquet", 0.05, 3, part_rows=2_000)
    partial = output.with_name(f".{output.name}.partial")
    finished_at_kill = []
    with two_nodes() as (cluster, nodes):

        def kill() -> None:
            while len(list(partial.glob("*/reports/*.json"))) < 4:
                time.sleep(0.005)
            cluster.remove_node(nodes[1], allow_graceful=False)
            finished_at_kill.append(len(list(partial.glob("*/reports/*.json"))))

        killer = threading.Thread(target=kill, daemon=True)  # ends with this process if the job fails first
        killer.start()
        outcome = run_job(job, artifact, data, output, single=False, engine=score_on_ray)
        killer.join()
        trained = train_on_ray(Sweep(table, 0, folder), TRIALS, lambda result: None)  # noqa: ARG005
        groups = train_groups(hosts, folder)
        wait_until(lambda: count_workers() == 1, 60)  # Ray asks its nodes for a sign of life every few seconds
        workers = count_workers()
        try:
            score_on_ray(job, [Poison(0, data)], None, lambda rows: None)  # noqa: ARG005
        except TaskDied as error:
            poison = str(error)
    print(
        json.dumps(
            {
                "parts": outcome.parts,
                "rows": outcome.report.rows,
                "faulty": outcome.report.faulty,
                "finished_at_kill": finished_at_kill[0],
                "nodes": workers,
                "sweep": [{name: each.tolist() for name, each in result.measures.items()} for result in trained],
                "groups": groups,
                "killed": (folder / "killed").exists(),
                "poison": poison,
                "usage_statistics": os.environ["RAY_USAGE_STATS_ENABLED"],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4], Path(sys.argv[5]), sys.argv[6])
