"""The service on Ray Serve: `serve run service.scaleout:app`. The only module of `service` that imports Ray.

Every replica runs the same application as a worker of `elbo serve`, with its own registry, batcher and admission
control. Ray Serve starts and replaces replicas, passes requests to them, and calls `ReplicaCount` for their number. It
also takes the place of the server: TLS, limits on connections, and the process that tries artifacts out are missing.
"""

import math
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from models.errors import ElboError
from service.app import create_app
from service.monitoring import logs
from service.server.run import forbid_core_dumps
from service.settings import Settings

WAIT = "queue_seconds"  # the statistic that replicas report
MAX_ONGOING_REQUESTS = 1000  # per replica; so many that admission control refuses requests before Ray Serve queues them


class ScaleoutError(ElboError):
    """A setting cannot work in replicas on Ray Serve."""

    code = "scaleout_error"


class Options(BaseModel):
    """The options of `serve run service.scaleout:app OPTION=VALUE`. The ELBO_* variables set everything else."""

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
    upscale_seconds: float = Field(10.0, ge=0, description="seconds of too few replicas before more are added")
    downscale_seconds: float = Field(300.0, ge=0, description="seconds of too many replicas before some are removed")


class ReplicaCount:
    """Chooses the number of replicas. Ray Serve applies the limits and the delays.

    Args:
        queue_seconds: the longest wait in the queue, in seconds, as the mean of the replicas.
        requests_per_replica: the largest number of unfinished requests, as the mean of the replicas.
    """

    def __init__(self, queue_seconds: float, requests_per_replica: float) -> None:
        self._queue_seconds, self._requests_per_replica = queue_seconds, requests_per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas for the state that Ray Serve gives: `ray.serve.config.AutoscalingContext`.

        The wait in a queue is taken to be inversely proportional to the number of replicas. Below `queue_seconds`, the
        number of unfinished requests decides alone, so that the number of replicas falls when the load falls.
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
        settings: the settings of the service, which `app` has read.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        logs.configure(settings.log_level, settings.log_format)
        forbid_core_dumps(settings)

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


def settings_of_replicas() -> Settings:
    """Return the settings in the ELBO_* variables.

    Raises:
        ScaleoutError: a setting cannot work in replicas on several machines.
    """
    settings = Settings()
    if settings.repository is None and not settings.artifact_folder.is_absolute():
        raise ScaleoutError(
            f"ELBO_ARTIFACTS is the relative path {settings.artifact_folder}, and replicas run in another folder: set "
            "it to an absolute path, which all machines mount, or to the URL of a remote repository"
        )
    if settings.state is not None:
        raise ScaleoutError(
            "ELBO_STATE is set, and replicas on several machines cannot share one memory of groups: unset it, or use "
            "elbo serve for models that remember groups"
        )
    return settings


def app(options: Options) -> Any:
    """Return the application for `serve run` and for the `import_path` of a Serve config file.

    The ELBO_* variables are read here. `serve run` calls this function in its own process, and `serve deploy` in a task
    on the cluster. The artifact folder must have the same path on all nodes.

    Raises:
        ScaleoutError: a setting cannot work in replicas.
    """
    settings = settings_of_replicas()
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
    return deployment(Replica).bind(settings)
