"""The import graph and line lengths of the page's JavaScript modules, and the locked tools that check the modules."""

import json
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.data import ROOT

STATIC = ROOT / "service" / "static"
EXPLORER = STATIC / "explorer"
MODULES = sorted(STATIC.rglob("*.js"))
MAX_LINE_LENGTH = 120
# The other folders from which the modules of each folder of `explorer/` may import.
MAY_IMPORT = {
    "lib": set(),
    "ui": {"lib"},
    "map": {"lib", "ui"},
    "views": {"lib", "ui", "map"},
    ".": {"lib", "ui", "views"},  # main.js and theme.js
}
# Matches `import {a, b} from "./x.js"`, `export … from "./x.js"`, `import "./x.js"` and `import("./x.js")`.
IMPORT = re.compile(
    r"""^import\b[^"'();]*["']([^"']+)["']|^export\b[^"'();=]*\bfrom\s*["']([^"']+)["']|\bimport\(\s*["']([^"']+)["']""",
    re.MULTILINE,
)


def imports_of(module: Path) -> set[Path]:
    """Return the files that `module` imports, statically or dynamically."""
    matches = IMPORT.findall(module.read_text())
    return {(module.parent / "".join(groups)).resolve() for groups in matches}


def folder_of(module: Path) -> str:
    return module.relative_to(EXPLORER).parts[0] if module.parent != EXPLORER else "."


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(STATIC)))
def test_module_imports_only_existing_files_of_its_own_or_lower_folders(module: Path) -> None:
    for imported in imports_of(module):
        assert imported in MODULES, f"{imported} does not exist"
        assert folder_of(imported) in {folder_of(module), *MAY_IMPORT[folder_of(module)]}, imported


def test_import_parser_finds_every_import_statement() -> None:
    for module in MODULES:
        text = module.read_text()
        statements = re.findall(r"^(?:import|export .* from)\b|\bimport\(", text, re.MULTILINE)
        assert len(IMPORT.findall(text)) == len(statements), module


def test_modules_have_no_import_cycle() -> None:
    graph = {module: imports_of(module) for module in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order[-1] == EXPLORER / "main.js"  # no module imports main.js


def test_every_module_is_reachable_from_main() -> None:
    reached: set[Path] = set()
    pending = {EXPLORER / "main.js"}
    while pending:
        module = pending.pop()
        reached.add(module)
        pending |= imports_of(module) - reached
    assert reached == set(MODULES)


@pytest.mark.parametrize("path", [*MODULES, *STATIC.rglob("*.css")], ids=lambda path: str(path.relative_to(STATIC)))
def test_no_line_is_longer_than_120_characters(path: Path) -> None:
    too_long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > MAX_LINE_LENGTH]
    assert not too_long, f"lines {too_long} of {path}"


def test_npm_lock_file_names_no_registry_host() -> None:
    lock = json.loads((ROOT / "package-lock.json").read_text())
    manifest = json.loads((ROOT / "package.json").read_text())
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert all("integrity" in package and "resolved" not in package for package in packages.values())
    for name, version in manifest["devDependencies"].items():
        assert packages[f"node_modules/{name}"]["version"] == version
