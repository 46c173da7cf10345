"""The OpenAPI document of the service: the requests of its endpoints, and the validation of values."""

from typing import Any

import jsonschema  # type: ignore[import-untyped] # installed with check-jsonschema, has no types

from service.endpoints.inference import ANOMALY, DECODE, ENCODE, IMPUTE, INTERPOLATE, RECONSTRUCT, SAMPLE
from service.endpoints.pipeline import RequestSpec

SPECS: dict[str, RequestSpec[Any, Any]] = {
    "/encode": ENCODE,
    "/decode": DECODE,
    "/reconstruct": RECONSTRUCT,
    "/sample": SAMPLE,
    "/interpolate": INTERPOLATE,
    "/impute": IMPUTE,
    "/anomaly": ANOMALY,
}


def content(document: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the bodies that POST `path` accepts, by media type."""
    found: dict[str, Any] = document["paths"][path]["post"]["requestBody"]["content"]
    return found


def validate(document: dict[str, Any], value: Any, schema: dict[str, Any]) -> None:
    """Raise an error if `value` does not fit `schema`, a schema of the document."""
    jsonschema.validate(value, {**schema, "components": document["components"]}, jsonschema.Draft202012Validator)
