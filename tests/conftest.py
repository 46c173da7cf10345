"""What every test may use: the rule for things that a machine may lack."""

import os

import pytest


def require(condition: object, reason: str) -> None:
    """Skip the calling test unless `condition` holds; in CI, where a skip would hide a failure, fail it."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"in CI nothing may be missing: {reason}")
    pytest.skip(reason)
