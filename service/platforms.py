"""The settings that Amazon SageMaker and Google Vertex AI make in the environment of a container.

Sources: "Custom Inference Code with Hosting Services" of SageMaker, "Custom container requirements for inference" of
Vertex AI.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMAGE_ARTIFACTS = "/artifacts"  # ELBO_ARTIFACTS in the Dockerfile; any other value is the user's choice
SAGEMAKER_MODELS = Path("/opt/ml/model")  # where SageMaker unpacks model.tar.gz
SAGEMAKER_PORT = "8080"
SAGEMAKER_BIND_TO_PORT = "SAGEMAKER_BIND_TO_PORT"  # set for the containers of an inference pipeline
VERTEX_PORT = "AIP_HTTP_PORT"
PLATFORM_NAMES = {"sagemaker": "Amazon SageMaker", "vertex": "Google Vertex AI"}


def settings_of(environment: Mapping[str, str], platform: str | None = None) -> dict[str, Any]:
    """Return the settings that the platform makes, by name; none if the server does not run on a platform.

    The platform decides who can reach the port of the container. Unless ELBO_INSECURE says otherwise, the server
    therefore needs no API keys.

    Args:
        environment: the environment variables of the process.
        platform: `sagemaker`, `vertex`, `none` or `auto`; by default, the value of ELBO_PLATFORM, or `auto`.
    """
    platform = platform or environment.get("ELBO_PLATFORM") or "auto"
    if platform == "auto":
        platform = _detect(environment)
    if platform not in ("sagemaker", "vertex"):
        return {}
    found = _sagemaker(environment) if platform == "sagemaker" else _vertex(environment)
    if environment.get("ELBO_ARTIFACTS", IMAGE_ARTIFACTS) != IMAGE_ARTIFACTS:
        found.pop("artifacts", None)
    if not environment.get("ELBO_INSECURE"):
        found["insecure"] = True
    return {"platform": platform, **found}


def _detect(environment: Mapping[str, str]) -> str:
    if VERTEX_PORT in environment:
        return "vertex"
    # Another program may have made the folder on a host without a platform, where the server needs API keys.
    has_models = environment.get("ELBO_ARTIFACTS") == IMAGE_ARTIFACTS and SAGEMAKER_MODELS.is_dir()
    return "sagemaker" if SAGEMAKER_BIND_TO_PORT in environment or has_models else "none"


def _sagemaker(environment: Mapping[str, str]) -> dict[str, Any]:
    return {
        "port": environment.get(SAGEMAKER_BIND_TO_PORT) or SAGEMAKER_PORT,
        "health_route": "/ping",
        "predict_route": "/invocations",
        "artifacts": SAGEMAKER_MODELS,
    }


def _vertex(environment: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "port": environment.get(VERTEX_PORT) or "8080",
        "health_route": environment.get("AIP_HEALTH_ROUTE") or "/health",
        "predict_route": environment.get("AIP_PREDICT_ROUTE") or "/predict",
    }
    if storage := environment.get("AIP_STORAGE_URI"):
        found["artifacts"] = storage.removeprefix("file://")
    return found
