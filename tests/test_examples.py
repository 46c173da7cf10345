"""The scripts in `examples/` run, and the notebooks are those of the scripts."""

import os
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from docs.notebooks import NOTEBOOKS, notebook_of
from tests.data import ROOT
from tests.preloaded import run_preloaded

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
# The cells of a notebook are its script, so only the notebook runs.
SCRIPTS = sorted({path.stem for path in EXAMPLES.glob("*.py")} - {*NOTEBOOKS})


@pytest.mark.parametrize("script", SCRIPTS)
def test_example_runs_in_an_empty_folder(script: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ELBO_")}
    program = f"import runpy; runpy.run_path({str(EXAMPLES / f'{script}.py')!r}, run_name='__main__')"
    command = [sys.executable, "-c", program]
    run = run_preloaded(command, cwd=tmp_path, env=environment | {"OMP_NUM_THREADS": "1"}, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_the_one_of_its_script_and_has_no_outputs(name: str) -> None:
    content = (EXAMPLES / f"{name}.ipynb").read_text()
    assert content == notebook_of((EXAMPLES / f"{name}.py").read_text()), "run python docs/notebooks.py"
    cells = nbformat.reads(content, as_version=4).cells
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_from_the_first_cell_to_the_last(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises the error of a cell
    assert (tmp_path / "artifacts").is_dir()
