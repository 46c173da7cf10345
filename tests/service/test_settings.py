"""The settings of the service: values that cannot work are refused with the reason, and lists get one form."""

from typing import Any

import pytest
from pydantic import ValidationError

from service.settings import Settings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ELBO_PLATFORM", "ELBO_ARTIFACTS", "ELBO_BACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("values", "setting", "reason"),
    [
        (
            {"allowed_hosts": "elbo.example.com:8000"},
            "allowed_hosts",
            "elbo.example.com or *.example.com, without a port",
        ),
        ({"cors_origins": "https://app.example.com/page"}, "cors_origins", "https://app.example.com, without a path"),
        ({"cors_origins": "https://me@app.example.com"}, "cors_origins", "https://app.example.com, without a path"),
        ({"alertmanager_url": "alertmanager:9093"}, "alertmanager_url", "a URL such as http://alertmanager:9093"),
        ({"root_path": "/elbo?a=b"}, "root_path", "expected a path such as /elbo"),
        ({"backend": "onnx", "precision": "bfloat16"}, "precision", "set ELBO_BACKEND=torchscript"),
        (
            {"max_body_bytes": 2**20, "held_bytes": 2**20 - 1},
            "held_bytes",
            "at least ELBO_MAX_BODY_BYTES, 1048576 bytes",
        ),
        ({"max_rows": 300, "queue_rows": 299}, "queue_rows", "expected at least ELBO_MAX_ROWS, 300 rows"),
        ({"artifacts": "s3://"}, "artifacts", "s3://"),
    ],
)
def test_value_that_cannot_work_is_refused_with_the_reason(values: dict[str, Any], setting: str, reason: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        Settings(**values)
    (error,) = refusal.value.errors()
    assert error["loc"] == (setting,)
    assert reason in error["msg"]


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("allowed_hosts", " Elbo.example.com, *.Example.org,[::1],", "elbo.example.com,*.example.org,[::1]"),
        (
            "cors_origins",
            "https://app.example.com , http://localhost:3000,",
            "https://app.example.com,http://localhost:3000",
        ),
        ("cors_origins", "*", "*"),
        ("root_path", "/elbo/", "/elbo"),
        ("state", "", None),
        ("held_bytes", 2**30, 2**30),
    ],
)
def test_value_is_brought_to_one_form(setting: str, value: Any, expected: Any) -> None:
    assert getattr(Settings(**{setting: value}), setting) == expected
