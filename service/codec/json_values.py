"""Describe JSON values in error messages."""

import json
from typing import Any

from service.codec.json_rows import JsonRows


def describe_value(value: Any) -> str:
    """Return a short description of a JSON value for an error message."""
    if isinstance(value, list | JsonRows):
        return f"a list of {len(value)}" if len(value) else "an empty list"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:36] + "..."
