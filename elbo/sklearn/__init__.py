"""Detectors and transformers for scikit-learn. They train the models of `elbo train`, and publish them.

They pass scikit-learn's `check_estimator`, and work in pipelines, in grid searches and with `clone`. They need the
extra `train`. torch is imported when an estimator is fitted, not with this module.
"""

from elbo.sklearn.detectors import AutoencoderDetector, EnsembleDetector, PCADetector, VAEDetector
from elbo.sklearn.transformers import AutoencoderTransformer, PCATransformer, VAETransformer

__all__ = [
    "AutoencoderDetector",
    "AutoencoderTransformer",
    "EnsembleDetector",
    "PCADetector",
    "PCATransformer",
    "VAEDetector",
    "VAETransformer",
]
