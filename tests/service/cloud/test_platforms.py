"""The settings that SageMaker and Vertex AI make in the environment of a container."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service import platforms
from service.settings import Settings

VERTEX = {
    "AIP_HTTP_PORT": "9090",
    "AIP_HEALTH_ROUTE": "/v1/endpoints/7/deployedModels/8",
    "AIP_PREDICT_ROUTE": "/v1/endpoints/7/deployedModels/8:predict",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(platforms, "SAGEMAKER_MODELS", tmp_path / "none")
    monkeypatch.setenv("ELBO_PORT", "8000")  # as in the Dockerfile
    monkeypatch.setenv("ELBO_ARTIFACTS", "/artifacts")


def test_settings_without_a_platform_have_no_routes_and_need_keys() -> None:
    settings = Settings()
    assert (settings.port, settings.health_route, settings.predict_route, settings.insecure) == (8000, "", "", False)


def test_settings_on_vertex_have_its_port_and_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VERTEX.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.platform, settings.port, settings.insecure) == ("vertex", 9090, True)
    assert settings.health_route == VERTEX["AIP_HEALTH_ROUTE"]
    assert settings.predict_route == VERTEX["AIP_PREDICT_ROUTE"]
    assert str(settings.artifacts) == "/artifacts"


def test_settings_on_sagemaker_are_found_by_the_folder_of_its_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(platforms, "SAGEMAKER_MODELS", tmp_path)
    settings = Settings()
    assert (settings.platform, settings.port, settings.artifacts) == ("sagemaker", 8080, tmp_path)
    assert (settings.health_route, settings.predict_route) == ("/ping", "/invocations")


@pytest.mark.parametrize("artifacts", ["artifacts", None])
def test_folder_of_sagemakers_models_outside_of_the_image_leaves_the_server_needing_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifacts: str | None
) -> None:
    monkeypatch.setattr(platforms, "SAGEMAKER_MODELS", tmp_path)
    monkeypatch.delenv("ELBO_ARTIFACTS")
    if artifacts:
        monkeypatch.setenv("ELBO_ARTIFACTS", artifacts)
    settings = Settings()
    assert (settings.port, settings.predict_route, settings.insecure) == (8000, "", False)


def test_settings_on_sagemaker_use_the_port_of_an_inference_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", "8123")
    assert Settings().port == 8123


def test_artifact_folder_of_the_user_and_options_come_before_those_of_the_platform(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", "8123")
    monkeypatch.setenv("ELBO_ARTIFACTS", str(tmp_path))
    settings = Settings(port=9000)
    assert (settings.artifacts, settings.port) == (tmp_path, 9000)


def test_setting_that_demands_keys_comes_before_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_HTTP_PORT", "9090")
    monkeypatch.setenv("ELBO_INSECURE", "0")
    assert Settings().insecure is False


@pytest.mark.parametrize("switch", ["environment", "argument"])
def test_platform_none_ignores_the_environment_of_a_platform(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", "8123")
    if switch == "environment":
        monkeypatch.setenv("ELBO_PLATFORM", "none")
    settings = Settings() if switch == "environment" else Settings(platform="none")
    assert (settings.port, settings.predict_route, settings.insecure) == (8000, "", False)


@pytest.mark.parametrize("route", ["predict", "/a b", "/a?b", "/a%2Fb"])
def test_route_that_is_no_path_is_refused(monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    monkeypatch.setenv("AIP_HTTP_PORT", "8080")
    monkeypatch.setenv("AIP_PREDICT_ROUTE", route)
    with pytest.raises(ValidationError, match="expected a path such as /predict"):
        Settings()
