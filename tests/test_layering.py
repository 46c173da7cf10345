"""A file imports only the modules that MAY_IMPORT allows for its folder, and no imports form a cycle."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.data import ROOT

# Each key is a folder or a file. The value lists the modules that may be imported there: full names if they begin with
# a package, else names within the key's package. Files of one folder may import each other, but not in a cycle.
MAY_IMPORT = {
    "models": "",
    "training.config": "models.manifest models.season",
    "training.errors": "models.errors",
    "training.progress": "",
    "training.random_streams": "",
    "training.data": "models errors random_streams",
    "training.fitting": "models data config errors progress random_streams",
    "training.reports": "models fitting data config errors progress random_streams",
    "training.evaluation": "models reports fitting data config errors progress random_streams",
    "training.publishing": "models evaluation reports fitting data config errors progress",
    "training.adoption": (
        "models publishing evaluation reports fitting data config errors progress random_streams train"
    ),
    "training.exporting": "models adoption errors",
    "training.scoring": "models evaluation data errors",
    "training.train": "models publishing evaluation reports fitting data config errors progress",
    "training.results_table": "evaluation",
    "training.served_version": "models evaluation",
    "training.sweep": "models train served_version results_table publishing evaluation config errors progress",
    "training.groups": (
        "models train served_version results_table publishing evaluation reports fitting data config errors progress"
    ),
    "training.ray_tasks": "models.errors scoring sweep groups",
    "training.__main__": "elbo.cli",
    "elbo.errors": "models.errors",
    "elbo.options": "models.season",
    "elbo.verdicts": "",
    "elbo.notes": "training.progress errors",
    "elbo.sources": "training.data training.errors",
    "elbo.card": "models training.reports",
    "elbo.figures": "models training.reports training.errors errors sources verdicts",
    "elbo.saving": "models training.publishing",
    "elbo.recalibration": "models training",
    "elbo.model": "models training service errors sources verdicts card figures saving recalibration",
    "elbo.adopting": "models training notes sources model",
    "elbo.fitting": "models training errors notes options sources model",
    "elbo.sklearn": "models training errors notes model fitting",
    "elbo.pyod": "errors sklearn",
    "elbo.cli": "models training service errors",
    "elbo.mlflow": "model sources",
    "elbo.client": "",  # works where only the base dependencies are installed
    "elbo.__main__": "elbo.cli",
    "service.errors": "models.errors",
    "service.platforms": "",
    "service.settings": "platforms repository",
    "service.repository": (
        "models.archive_check models.errors models.keys models.manifest models.signatures models.staging "
        "models.versions"
    ),
    "service.mirroring": "inference monitoring repository settings",
    "service.healthcheck": "platforms",
    "service.shared_memory": "",
    "service.freed_memory": "",
    "service.access": "models.errors errors shared_memory",
    "service.codec": "models.categories models.columns models.pixels models.timestamps models.errors errors",
    "service.inference": (
        "models.artifact models.baseline models.categories models.keys models.manifest models.onset models.signatures "
        "models.errors models.silences models.trial codec errors freed_memory shared_memory"
    ),
    "service.schemas": "models.manifest inference",
    "service.anomaly": (
        "models.baseline models.categories models.columns models.feature_baseline models.onset models.silences "
        "models.timestamps models.errors schemas inference codec errors"
    ),
    "service.monitoring": "models.errors anomaly inference codec settings shared_memory",
    "service.http": "access monitoring inference codec errors shared_memory",
    "service.backtest": "models.errors models.policy_rules models.timestamps schemas anomaly codec inference",
    "service.endpoints": (
        "models.artifact models.manifest models.onset models.errors access backtest http monitoring anomaly schemas "
        "inference codec errors settings"
    ),
    "service.app": (
        "models.artifact models.signatures access endpoints http mirroring monitoring anomaly inference errors "
        "settings freed_memory shared_memory"
    ),
    "service.scaleout": "models.errors app monitoring server settings",
    "service.server": (
        "models.errors models.staging models.trial app inference endpoints http monitoring settings platforms "
        "freed_memory shared_memory"
    ),
    "service.__main__": "models.errors server settings",
}
# What the __init__.py of a package imports: for type checkers, and by name when a public name is first used.
PUBLIC = {
    "elbo": [
        "elbo.adopting",
        "elbo.client",
        "elbo.fitting",
        "elbo.model",
        "elbo.pyod",
        "elbo.sklearn",
        "models.errors",
    ]
}
PACKAGES = ("models", "training", "service", "elbo")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def is_within(module: str, place: str) -> bool:
    return f"{module}.".startswith(f"{place}.")


def allowed(place: str) -> list[str]:
    """Return the full names of the modules that files in `place` may import, including `place` itself."""
    package = place.partition(".")[0]
    named = [name if name.split(".")[0] in PACKAGES else f"{package}.{name}" for name in MAY_IMPORT[place].split()]
    return [place, *named]


def place_of(module: str) -> str | None:
    """Return the key of MAY_IMPORT that contains `module`; None for the __init__.py of a package."""
    return next((place for place in MAY_IMPORT if is_within(module, place)), None)


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of this project that a file imports.

    `from a import b` yields a.b if a.b is a module, else a.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_only_modules_that_its_folder_may_import(path: Path) -> None:
    place = place_of(module_of(path))
    may = allowed(place) if place else PUBLIC.get(module_of(path), [])
    assert [name for name in imported(path) if not any(is_within(name, one) for one in may)] == []


def test_table_of_allowed_imports_lists_every_folder_and_top_level_file() -> None:
    roots = {"training", "service", "elbo"}
    children = {".".join(name.split(".")[:2]) for name in MODULES if name.split(".")[0] in roots} - roots
    assert children | {"models"} == set(MAY_IMPORT)


def test_table_of_allowed_imports_contains_no_cycle() -> None:
    graph = {
        place: [
            other for other in MAY_IMPORT if other != place and any(is_within(name, other) for name in allowed(place))
        ]
        for place in MAY_IMPORT
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(MAY_IMPORT)
    assert all(order.index(other) < order.index(place) for place, others in graph.items() for other in others)


def test_imports_between_files_form_no_cycle() -> None:
    graph = {module: {name for name in imported(path) if name != module} for module, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) >= set(MODULES)
    assert order.index("service.errors") < order.index("service.app") < order.index("service.server.run")


def test_every_folder_has_an_init_file() -> None:
    folders = {path.parent for path in SOURCES}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_tests_do_not_import_from_test_modules() -> None:
    files = sorted((ROOT / "tests").rglob("*.py"))
    pattern = re.compile(
        r"\b(?:from|import) tests[\w.]*\.test_\w+"
    )  # also finds imports in programs that the tests contain as strings
    assert [(path.name, found) for path in files for found in pattern.findall(path.read_text())] == []


def test_help_of_elbo_imports_no_heavy_library() -> None:
    program = """
import sys
sys.argv = ["elbo", "--help"]
from elbo import cli
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code
loaded = {"torch", "numpy", "sklearn", "polars", "fastapi", "pydantic", "rich"} & sys.modules.keys()
print("loaded:", sorted(loaded))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout
    assert result.stdout.splitlines()[-1] == "loaded: []"
