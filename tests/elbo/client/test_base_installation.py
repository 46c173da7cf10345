"""`elbo.client` works in an environment of its own that has the packages of `pip install elbo`, and no torch.

The files of the packages are linked from this environment, where pip has installed them from the lock: that takes two
seconds, and needs no package index. Nothing else of this environment can be imported.
"""

import os
import re
import shutil
import subprocess
import tomllib
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.data import ROOT
from tests.elbo.client.scripted import respond, scripted

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROGRAM = """
import importlib.util, sys
import elbo, elbo.client
with elbo.client.Client(sys.argv[1]) as client:
    print(client.models().models)
print(elbo.__file__.startswith(sys.prefix), importlib.util.find_spec("torch"), "torch" in sys.modules)
"""


def base_distributions() -> dict[str, Distribution]:
    """Return the packages that `pip install elbo` installs, by name."""
    wanted, found = [Requirement(text) for text in PROJECT["project"]["dependencies"]], dict[str, Distribution]()
    while wanted:
        name = canonicalize_name(wanted.pop().name)
        if name not in found:
            found[name] = distribution(name)
            requirements = [Requirement(text) for text in found[name].requires or ()]
            wanted += [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; a copy if they are on different file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a new environment with Elbo and its base packages."""
    folder = tmp_path_factory.mktemp("base") / "venv"
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in base_distributions().values():
        for file in package.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                link(Path(str(package.locate_file(file))), site / file)
    for name in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
        for file in (ROOT / name).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                link(file, site / file.relative_to(ROOT))
    return folder / "bin" / "python"


def test_base_packages_are_those_of_the_lock_and_torch_is_none_of_them() -> None:
    lock = (ROOT / "requirements" / "serve.lock").read_text()
    locked = {
        canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE)
    }
    found = {name: package.version for name, package in base_distributions().items()}
    assert found.items() <= locked.items()
    assert {"httpx", "numpy", "orjson", "typer"} <= found.keys()
    assert found.keys() & {"torch", "fastapi", "polars", "scikit-learn"} == set()


def test_client_sends_requests_where_torch_is_not_installed(python: Path) -> None:
    with scripted(respond("200 OK", b'{"default": null, "models": [], "failures": []}')) as server:
        run = subprocess.run(
            [python, "-I", "-c", PROGRAM, server.address], capture_output=True, text=True, timeout=60, check=False
        )
    assert (run.returncode, run.stdout) == (0, "()\nTrue None False\n"), run.stderr


def test_command_line_shows_its_help_where_torch_is_not_installed(python: Path) -> None:
    run = subprocess.run(
        [python, "-I", "-m", "elbo", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "serve" in run.stdout
