"""The service on Ray Serve: `serve run service.scaleout:app`. The only module of `service` that imports Ray.

Every replica runs the same application as a worker of `elbo serve`, with its own registry, batcher and admission
control. Ray Serve starts and replaces replicas, passes requests to them, and chooses their number by the wait in their
queues.
"""

import math
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from service.app import create_app
from service.settings import Settings

WAIT = "queue_seconds"  # the statistic that replicas report
MAX_ONGOING_REQUESTS = 1000  # per replica: admission control refuses requests before Ray Serve holds them back


class Options(BaseModel):
    """The options of `serve run service.scaleout:app OPTION=VALUE`. The settings are those of `elbo serve`, ELBO_*."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(1, ge=1, description="smallest number of replicas")
    max_replicas: int = Field(4, ge=1, description="largest number of replicas")
    queue_seconds: float = Field(
        0.1, gt=0, description="replicas are added if requests are expected to wait longer than this in their queues"
    )
    requests_per_replica: float = Field(
        16.0, gt=0, description="replicas are added if there are more unfinished requests than this for each"
    )
    cpus: float = Field(1.0, gt=0, description="cores of a replica")
    upscale_seconds: float = Field(10.0, ge=0, description="time for which replicas must be too few")
    downscale_seconds: float = Field(300.0, ge=0, description="time for which replicas must be too many")


class ReplicaCount:
    """Chooses the number of replicas. Ray Serve applies the limits and the delays.

    Args:
        queue_seconds: the longest mean wait that is accepted.
        requests_per_replica: how many unfinished requests a replica may have.
    """

    def __init__(self, queue_seconds: float, requests_per_replica: float) -> None:
        self._queue_seconds, self._requests_per_replica = queue_seconds, requests_per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas for the state that Ray Serve gives: `ray.serve.config.AutoscalingContext`.

        The wait of a queue is inversely proportional to the number of replicas. The number of unfinished requests
        decides while no queue waits, so that the number falls if there is less to do.
        """
        running = max(1, context.current_num_replicas)
        waits = list((context.aggregated_metrics or {}).get(WAIT, {}).values())
        wait = sum(waits) / len(waits) if waits else 0.0
        by_wait = math.ceil(running * wait / self._queue_seconds) if wait > self._queue_seconds else 0
        by_requests = math.ceil(context.total_num_requests / self._requests_per_replica)
        return max(1, by_wait, by_requests), {}


@serve.ingress()
class Replica:
    """One process with the whole service.

    Args:
        settings: the settings of the service, as the process that deploys it has them.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application. Ray Serve runs its lifespan: it loads all models before the first request."""
        self._app = create_app(self._settings)
        return self._app

    async def check_health(self) -> None:
        """Raise RuntimeError if the replica must be replaced because it is shutting down.

        This runs in the event loop of the requests, so Ray Serve also replaces a replica whose event loop hangs. A
        replica without models is healthy: it serves a model as soon as there is one.
        """
        if self._app.state.service.draining:
            raise RuntimeError("the replica is shutting down")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the seconds that a new request is expected to wait in the queue of this replica."""
        return {WAIT: float(self._app.state.service.batcher.expected_wait)}


def app(options: Options) -> Any:
    """Return the application for `serve run` and for the `import_path` of a Serve config file.

    The ELBO_* variables are read here, in the process that deploys. The artifact folder must have the same path on all
    nodes.
    """
    counting = {"queue_seconds": options.queue_seconds, "requests_per_replica": options.requests_per_replica}
    deployment = serve.deployment(
        name="elbo",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=10,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=60,
        ray_actor_options={"num_cpus": options.cpus},
        logging_config={"enable_access_log": False},  # the service writes its own
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=max(options.min_replicas, options.max_replicas),
            target_ongoing_requests=options.requests_per_replica,
            upscale_delay_s=options.upscale_seconds,
            downscale_delay_s=options.downscale_seconds,
            policy=AutoscalingPolicy(policy_function=ReplicaCount, policy_kwargs=counting),
        ),
    )
    return deployment(Replica).bind(Settings())
