"""Every setting of the service, each listed once: its name, its default, its bounds and its meaning."""

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Read from the environment (prefix ELBO_) when it is instantiated, and never again."""

    model_config = SettingsConfigDict(env_prefix="ELBO_", frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is every one of this machine")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    artifacts: Path = Field(Path("artifacts"), description="folder of artifacts, `<name>/<version>/model.pt`")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where models run; auto is cuda where there is one"
    )
    backend: Literal["auto", "torchscript", "onnx"] = Field(
        "auto",
        description="what computes on a CPU; auto is the ONNX twin where it agrees with TorchScript and is faster",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of matrix products; bfloat16 has three digits, `/models` tells what that costs each model",
    )
    default_model: str = Field(
        "vae", description="who answers without `?model=`; if it is not served, the first by name"
    )
    workers: int = Field(1, ge=1, le=256, description="processes that serve, each with its own models and queue")
    threads: int = Field(1, ge=1, le=256, description="threads for one batch, in each worker")
    poll_seconds: float = Field(2.0, gt=0, le=3600, description="how often the folder is looked at for new versions")
    keep_versions: int = Field(2, ge=1, le=100, description="newest versions of each model that stay loaded")
    max_body_bytes: int = Field(64 * 2**20, ge=1024, description="largest request body")
    max_rows: int = Field(10_000, ge=1, description="most rows in one request; also bounds `n` and `steps`")
    max_batch_rows: int = Field(256, ge=1, description="most rows that run through a model at once")
    max_batch_bytes: int = Field(64 * 2**20, ge=1024, description="most bytes of rows that run through a model at once")
    queue_rows: int = Field(40_000, ge=1, description="most rows that wait or run at once; beyond them: 429")
    queue_seconds: float = Field(
        1.0, gt=0, le=3600, description="longest wait that a request is let in for, as measured; beyond it: 429"
    )
    held_bytes: int = Field(
        256 * 2**20, ge=1024, description="most bytes of bodies that are held at once; beyond them: 429"
    )
    request_timeout: float = Field(
        30.0, gt=0, le=3600, description="seconds for an answer to be ready; the header X-Request-Timeout overrides it"
    )
    drain_seconds: float = Field(0.0, ge=0, le=600, description="after SIGTERM: serve on so long, then finish")
    alertmanager_url: str = Field("", description="Alertmanager to push alerts to, http://host:9093; nothing: none")
    alert_half_life: float = Field(
        3.0, ge=0, le=1e6, description="rows: half-life of the mean severity that raises an alert; 0: each row's own"
    )
    alert_calm_seconds: float = Field(
        120.0, gt=0, le=86400, description="an alert is resolved when its group has been normal for so long"
    )
    remote_write: Path | None = Field(
        None, description="TOML that says which series of remote write are features; without it those called so"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: Literal["json", "text"] = Field("json", description="one JSON object a line, or text for a person")

    @field_validator("alertmanager_url")
    @classmethod
    def _alertmanager_is_an_address(cls, value: str) -> str:
        address = urlsplit(value)
        if value and not (address.scheme in ("http", "https") and address.hostname):
            raise ValueError("expected an address such as http://alertmanager:9093")
        return value

    @field_validator("precision")
    @classmethod
    def _onnx_is_exact(cls, value: str, others: ValidationInfo) -> str:
        if value != "float32" and others.data.get("backend") == "onnx":
            raise ValueError("ONNX twins compute in float32 only: set ELBO_BACKEND=torchscript")
        return value

    @field_validator("held_bytes")
    @classmethod
    def _held_bytes_hold_a_body(cls, value: int, others: ValidationInfo) -> int:
        largest = others.data.get("max_body_bytes", 1)
        if value < largest:
            raise ValueError(f"there must be room for one body of ELBO_MAX_BODY_BYTES, {largest} bytes")
        return value

    @field_validator("queue_rows")
    @classmethod
    def _queue_holds_a_request(cls, value: int, others: ValidationInfo) -> int:
        largest = others.data.get("max_rows", 1)
        if value < largest:
            raise ValueError(f"the queue must hold one request of ELBO_MAX_ROWS, {largest} rows")
        return value
