"""The estimators that the checks of scikit-learn test."""

from typing import Any

from elbo.sklearn import (
    AutoencoderDetector,
    AutoencoderTransformer,
    EnsembleDetector,
    PCADetector,
    PCATransformer,
    VAEDetector,
    VAETransformer,
)

# The checks fit each estimator about a hundred times. Few epochs and one fit each keep them fast, as scikit-learn does
# for its own estimators.
FAST: dict[str, Any] = {"epochs": 2, "hidden": (4,)}
DETECTORS = [
    PCADetector(calibration="split"),
    AutoencoderDetector(calibration="split", **FAST),
    VAEDetector(calibration="split", **FAST),
    EnsembleDetector(calibration="split", **FAST),
]
TRANSFORMERS = [PCATransformer(), AutoencoderTransformer(**FAST), VAETransformer(**FAST)]
NEEDS_FRESH_PROCESS = "check_array_api_input"  # scipy must be imported with SCIPY_ARRAY_API=1


def name_of(check: Any) -> str:
    return str(getattr(check, "func", check).__name__)
