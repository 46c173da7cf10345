"""The estimators pass scikit-learn's own checks, those of `check_estimator` and those for frames and names."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

from tests.data import ROOT
from tests.elbo.estimators import DETECTORS, NEEDS_FRESH_PROCESS, TRANSFORMERS, name_of

pytestmark = [
    pytest.mark.slow,
    # The checks fit tables of 10 to 20 rows, of which `fit` warns.
    pytest.mark.filterwarnings("ignore::elbo.errors.ElboWarning"),
    # Some checks fit a frame and transform an array, or the reverse.
    pytest.mark.filterwarnings("ignore:X (has|does not have valid) feature names:UserWarning"),
]

# Public checks that scikit-learn applies to its own estimators, and that `check_estimator` leaves out.
FOR_ALL = ["check_dataframe_column_names_consistency", "check_n_features_in"]
FOR_TRANSFORMERS = [
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
    "check_set_output_transform",
    "check_set_output_transform_pandas",
    "check_set_output_transform_polars",
    "check_global_output_transform_pandas",
    "check_global_set_output_transform_polars",
]


@parametrize_with_checks([*DETECTORS, *TRANSFORMERS])  # type: ignore[untyped-decorator]
def test_estimator_passes_the_checks_of_scikit_learn(estimator: Any, check: Callable[[Any], None]) -> None:
    if name_of(check) == NEEDS_FRESH_PROCESS:
        return  # test_estimators_pass_the_check_of_the_array_api runs it
    check(estimator)


def test_estimators_pass_the_check_of_the_array_api() -> None:
    program = """
import warnings
from elbo.errors import ElboWarning
from sklearn.utils.estimator_checks import estimator_checks_generator
from tests.elbo.estimators import DETECTORS, NEEDS_FRESH_PROCESS, TRANSFORMERS, name_of
warnings.simplefilter("ignore", ElboWarning)
for estimator in [*DETECTORS, *TRANSFORMERS]:
    for each, check in estimator_checks_generator(estimator):
        if name_of(check) == NEEDS_FRESH_PROCESS:
            check(each)
            print("passed")
"""
    environment = os.environ | {"SCIPY_ARRAY_API": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["passed"] * 7, done.stderr


@pytest.mark.parametrize("estimator", [*DETECTORS, *TRANSFORMERS], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("check", FOR_ALL)
def test_estimator_passes_the_checks_of_frames(estimator: Any, check: str) -> None:
    """The checks of scikit-learn raise AssertionError."""
    getattr(estimator_checks, check)(type(estimator).__name__, estimator)


@pytest.mark.parametrize("check", FOR_TRANSFORMERS)
def test_transformer_passes_the_checks_of_names_and_of_set_output(check: str) -> None:
    """The checks of scikit-learn raise AssertionError."""
    transformer = TRANSFORMERS[0]  # the others inherit the same methods
    getattr(estimator_checks, check)(type(transformer).__name__, transformer)
