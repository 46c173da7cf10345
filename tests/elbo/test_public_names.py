"""`import elbo` is light, and lists its public names."""

import subprocess
import sys
from typing import get_type_hints

import pytest

import elbo
from elbo.options import Options
from tests.data import ROOT
from training.config import TrainConfig


def run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_of_elbo_loads_no_other_package() -> None:
    program = """
import sys
before = set(sys.modules)
import elbo
names = dir(elbo)
loaded = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(loaded))
"""
    assert run(program) == "['elbo']"


def test_dir_of_elbo_lists_every_public_name_and_each_can_be_imported() -> None:
    assert set(elbo.__all__) <= set(dir(elbo))
    for name in elbo.__all__:
        assert getattr(elbo, name) is not None


def test_name_that_elbo_lacks_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'elbo' has no attribute 'trian'"):
        _ = elbo.trian  # type: ignore[attr-defined]  # the name is wrong on purpose


@pytest.mark.parametrize(
    ("name", "package", "distribution"),
    [("load", "torch", "'elbo[serve]'"), ("fit", "sklearn", "'elbo[train]'"), ("client", "httpx", "elbo")],
)
def test_name_that_needs_a_missing_package_names_the_extra_that_has_it(
    name: str, package: str, distribution: str
) -> None:
    program = f"""
import sys
sys.modules[{package!r}] = None
import elbo
try:
    elbo.{name}
    elbo.fit([[float(i % 3), float(i % 5)] for i in range(15)], "pca")
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(program) == f"elbo.{name} needs the package {package}: pip install {distribution}"


def test_options_of_fit_are_the_fields_of_the_training_options() -> None:
    assert set(get_type_hints(Options)) == set(TrainConfig.model_fields) - {"model", "name"}
