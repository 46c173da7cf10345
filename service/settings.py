"""The table of all settings of the service: the default, the bounds and the meaning of each setting."""

import os
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from service.platforms import settings_of
from service.repository.location import Location, RepositoryInvalid, is_url, parse_location

# In a namespace with a Service named `elbo`, Kubernetes gives every container the variable ELBO_PORT with such a value,
# and also ELBO_SERVICE_HOST, ELBO_SERVICE_PORT and ELBO_PORT_80_TCP, which are no settings.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)


class _EnvironmentWithoutServiceLinks(EnvSettingsSource):
    """The environment variables ELBO_*, without those that Kubernetes sets for a Service named `elbo`."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the value of the variable of `field_name`, the key of the value, and whether the value is JSON."""
        value, key, is_complex = super().get_field_value(field, field_name)
        return (None if _is_service_link(field_name, value) else value), key, is_complex


class _PlatformValues(PydanticBaseSettingsSource):
    """The settings that SageMaker or Vertex AI makes.

    They take precedence over ELBO_*, because the image sets ELBO_PORT, which is for hosts without a platform.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        """Return no value: `__call__` returns all of them."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the values by name."""
        return settings_of(os.environ, self.current_state.get("platform"))


def _is_service_link(field_name: str, value: str | None) -> bool:
    return value is not None and field_name.endswith("port") and _SERVICE_LINK.match(value) is not None


class Settings(BaseSettings):
    """The settings. They are read from the environment variables ELBO_* when the object is created."""

    model_config = SettingsConfigDict(env_prefix="ELBO_", frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 listens on every interface")
    port: int = Field(
        8000,
        ge=0,
        le=65535,
        description="port to listen on; 0 picks a free port. A value such as tcp://10.0.0.1:80, which Kubernetes sets "
        "for a Service named elbo, is ignored",
    )
    tls_certificate: Path | None = Field(
        None,
        description="PEM file with the certificate of the server and the intermediate certificates; the server then "
        "speaks HTTPS only. A renewed file is loaded without a restart",
    )
    tls_key: Path | None = Field(
        None,
        description="PEM file with the private key of ELBO_TLS_CERTIFICATE, without a password; by default, the key is "
        "in the file of the certificate",
    )
    artifacts: Path | str = Field(
        Path("artifacts"),
        description="artifact folder: `<name>/<version>/model.pt`, or the URL of a remote repository: "
        "s3://bucket/path, gs://bucket/path, https://host/path or file:///path",
    )
    cache: Path | None = Field(
        None,
        description="folder in which the server keeps what it has downloaded from a remote repository; by default "
        "$XDG_CACHE_HOME/elbo or ~/.cache/elbo",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device that models run on; auto uses CUDA if it is available"
    )
    backend: Literal["auto", "torchscript", "onnx"] = Field(
        "auto",
        description="backend that runs models on a CPU; auto uses a model's ONNX twin if it agrees with TorchScript "
        "and is faster",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="number format of matrix products; bfloat16 keeps three significant digits, and GET /models "
        "reports the resulting error per model",
    )
    default_model: str = Field(
        "vae",
        description="model for requests without `?model=`; if it is not served, the first name in alphabetical order",
    )
    workers: int = Field(1, ge=1, le=256, description="worker processes, each with its own models and queue")
    threads: int = Field(1, ge=1, le=256, description="threads per batch in each worker")
    poll_seconds: float = Field(
        2.0, gt=0, le=3600, description="seconds between two scans of the artifact folder for new versions"
    )
    keep_versions: int = Field(2, ge=1, le=100, description="how many of the newest versions per model stay loaded")
    trusted_keys: str = Field(
        "",
        description="file with one public key per line (elbo keygen), read again when it changes, or the keys "
        "themselves, separated by commas; only artifacts that one of these keys has signed (elbo sign) are then loaded",
    )
    trial_seconds: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="seconds that a new artifact may take in the process that tries it out before it is loaded",
    )
    trial_bytes: int = Field(
        4 * 2**30,
        ge=64 * 2**20,
        description="bytes of memory that a new artifact may take in the process that tries it out",
    )
    max_body_bytes: int = Field(64 * 2**20, ge=1024, description="largest request body, in bytes")
    max_rows: int = Field(10_000, ge=1, description="most rows per request; also limits `n` and `steps`")
    max_batch_rows: int = Field(256, ge=1, description="most rows per batch")
    max_batch_bytes: int = Field(64 * 2**20, ge=1024, description="most bytes of rows per batch")
    queue_rows: int = Field(
        40_000, ge=1, description="most rows that are queued or being computed; further requests get status 429"
    )
    queue_seconds: float = Field(
        1.0,
        gt=0,
        le=3600,
        description="longest expected wait in the queue, in seconds; requests that would wait longer get status 429",
    )
    held_bytes: int = Field(
        256 * 2**20,
        ge=1024,
        description="most bytes of request bodies held in memory at once; further requests get status 429. Responses "
        "that clients have not read take up to a quarter of these bytes",
    )
    max_connections: int | None = Field(
        None,
        ge=1,
        description="most open connections per worker. At the limit, the server closes connections that wait for their "
        "clients. By default 10,000, or 100 less than the limit on open files if that is less",
    )
    request_timeout: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="seconds until a request fails with status 504; the header X-Request-Timeout overrides it",
    )
    keep_alive_seconds: float = Field(
        130.0,
        gt=0,
        le=86400,
        description="seconds for which an idle connection stays open; a proxy must close its idle connections earlier",
    )
    drain_seconds: float = Field(
        0.0, ge=0, le=600, description="seconds to keep serving after SIGTERM before the shutdown begins"
    )
    root_path: str = Field(
        "",
        description="path under which a proxy publishes the server, such as /elbo; the proxy may remove or keep this "
        "path when it forwards a request",
    )
    cors_origins: str = Field(
        "",
        description="origins whose web pages may call the server, separated by commas, such as "
        "https://app.example.com; * stands for every origin",
    )
    allowed_hosts: str = Field(
        "",
        description="host names in the Host header of requests, separated by commas, such as elbo.example.com; "
        "*.example.com stands for every name below example.com. Requests for other hosts get status 400, except those "
        "for /livez and /readyz. Empty allows every host",
    )
    alertmanager_url: str = Field(
        "", description="Alertmanager to push alerts to, such as http://host:9093; empty pushes none"
    )
    alert_severity: str = Field(
        "page", min_length=1, description="value of the label `severity` of the alerts that are pushed to Alertmanager"
    )
    alert_half_life: float = Field(
        3.0,
        ge=0,
        le=1e6,
        description="half-life, in rows, of the mean severity that raises an alert; 0 uses each row's own severity",
    )
    alert_calm_seconds: float = Field(
        120.0, gt=0, le=86400, description="seconds that a group must be normal before its alert is resolved"
    )
    alert_max_age_seconds: float = Field(
        3600.0,
        gt=0,
        le=1e9,
        description="largest age of a row that can raise an alert and be evidence of drift, in seconds since the row's "
        "timestamp; older rows are history",
    )
    observe: bool = Field(
        True,
        description="whether rows sent to /anomaly are live traffic if the request does not have the option `observe`; "
        "other rows raise no alerts and are no evidence of drift. Remote write is always live traffic",
    )
    state: Path | None = Field(
        None,
        description="folder of the memory of groups (hosts), for models that were trained with times: their last rows "
        "and their calibration. All workers share it, and it survives a restart. By default a temporary folder, which "
        "is removed when the server stops",
    )
    max_groups: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="most groups that are remembered per model version; beyond it, the group that was not seen for "
        "longest is forgotten",
    )
    online_calibration: bool = Field(
        True,
        description="whether rows with a time are judged by a calibration that follows their group, for models that "
        "were trained with times; if false, by the fixed calibration of the model",
    )
    api_keys_file: Path | None = Field(
        None,
        description="file of API keys, as `elbo key add` writes it; without it, requests need no key. The server reads "
        "the file again when it changes",
    )
    insecure: bool = Field(
        False, description="whether the server may listen on an address that other machines can reach without API keys"
    )
    remote_write: Path | None = Field(
        None,
        description="TOML file that maps remote-write series to features; without it, each series is read as the "
        "feature of the same name",
    )
    platform: Literal["auto", "none", "sagemaker", "vertex"] = Field(
        "auto",
        description="cloud platform that runs the container. auto recognises Vertex AI by AIP_HTTP_PORT, and SageMaker "
        "by SAGEMAKER_BIND_TO_PORT, or in the image by /opt/ml/model. The platform sets the port and the next two "
        "settings, and, unless ELBO_ARTIFACTS is set, the artifact folder. Unless ELBO_INSECURE is set, no API keys "
        "are needed, because the platform decides who can reach the container",
    )
    health_route: str = Field("", description="another path of /readyz; the platform sets it")
    predict_route: str = Field(
        "", description="path to which the platform sends requests for inference; the platform sets it"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto",
        description="json writes one object per line, text is for people; auto writes text if standard output is a "
        "terminal, otherwise json",
    )

    @classmethod
    def settings_customise_sources(  # type: ignore[override] # the other sources are passed by name
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        **_: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of values: first the arguments, then the environment."""
        return init_settings, _PlatformValues(settings_cls), _EnvironmentWithoutServiceLinks(settings_cls)

    def ignored_variables(self) -> dict[str, str]:
        """Return the environment variables that were ignored because Kubernetes has set them, by name."""
        variables = {f"ELBO_{name.upper()}": name for name in type(self).model_fields.keys() - self.model_fields_set}
        return {
            variable: value
            for variable, value in os.environ.items()
            if _is_service_link(variables.get(variable.upper(), ""), value)
        }

    @property
    def repository(self) -> Location | None:
        """The remote repository that ELBO_ARTIFACTS names; None if it names a folder."""
        return parse_location(self.artifacts) if isinstance(self.artifacts, str) else None

    @property
    def artifact_folder(self) -> Path:
        """The folder from which the server loads artifacts: ELBO_ARTIFACTS, or the cache of the remote repository."""
        if isinstance(self.artifacts, Path):
            return self.artifacts
        return parse_location(self.artifacts).cache_folder(self.cache)

    @field_validator("artifacts", mode="before")
    @classmethod
    def _check_artifacts(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if not is_url(value):
            return Path(value)
        try:
            return parse_location(value).url
        except RepositoryInvalid as error:
            raise ValueError(str(error)) from error

    @field_validator("api_keys_file", "cache", "state", mode="before")
    @classmethod
    def _check_path(cls, value: object) -> object:
        return None if value == "" else value  # a compose file passes a variable that is not set as an empty one

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, value: str) -> str:
        path = value.rstrip("/")
        if path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", path):
            raise ValueError("expected a path such as /elbo, of letters, digits and the characters / . _ ~ -")
        return path

    @field_validator("health_route", "predict_route")
    @classmethod
    def _check_route(cls, value: str) -> str:
        if value and not re.fullmatch(r"/[^\s?#%]*", value):
            raise ValueError("expected a path such as /predict")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_cors_origins(cls, value: str) -> str:
        origins = [origin.strip() for origin in value.split(",") if origin.strip()]
        for origin in origins:
            url = urlsplit(origin)
            if origin != "*" and (not url.hostname or origin != f"{url.scheme}://{url.netloc}" or "@" in url.netloc):
                raise ValueError("expected * or origins such as https://app.example.com, without a path")
        return ",".join(origins)

    @field_validator("tls_key")
    @classmethod
    def _check_tls_key(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value and not info.data.get("tls_certificate"):
            raise ValueError("expected ELBO_TLS_CERTIFICATE too")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_allowed_hosts(cls, value: str) -> str:
        hosts = [host.strip().lower() for host in value.split(",") if host.strip()]
        for host in hosts:
            if not re.fullmatch(r"(\*\.)?[a-z0-9_.-]+|\[[0-9a-f:.]+\]", host):
                raise ValueError("expected host names such as elbo.example.com or *.example.com, without a port")
        return ",".join(hosts)

    @field_validator("alertmanager_url")
    @classmethod
    def _check_alertmanager_url(cls, value: str) -> str:
        url = urlsplit(value)
        if value and not (url.scheme in ("http", "https") and url.hostname):
            raise ValueError("expected a URL such as http://alertmanager:9093")
        return value

    @field_validator("precision")
    @classmethod
    def _check_precision(cls, value: str, info: ValidationInfo) -> str:
        if value != "float32" and info.data.get("backend") == "onnx":
            raise ValueError("ONNX twins compute in float32 only: set ELBO_BACKEND=torchscript")
        return value

    @field_validator("held_bytes")
    @classmethod
    def _check_held_bytes(cls, value: int, info: ValidationInfo) -> int:
        largest = info.data.get("max_body_bytes", 1)
        if value < largest:
            raise ValueError(f"expected at least ELBO_MAX_BODY_BYTES, {largest} bytes")
        return value

    @field_validator("queue_rows")
    @classmethod
    def _check_queue_rows(cls, value: int, info: ValidationInfo) -> int:
        largest = info.data.get("max_rows", 1)
        if value < largest:
            raise ValueError(f"expected at least ELBO_MAX_ROWS, {largest} rows")
        return value
