"""Write the notebooks in `examples/` from the scripts of the same name.

    python docs/notebooks.py

A script has cells that begin with `# %%`, as editors and jupytext know them. Lines of a cell that begins with
`# %% [markdown]` are comments. The notebooks have no outputs. A test fails if a notebook differs from its script.
"""

import sys
from pathlib import Path

import nbformat

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = ("adopt_autoencoder", "adopt_convolutional_vae")  # the examples that are notebooks too
MARKDOWN = "# %% [markdown]"


def notebook_of(script: str) -> str:
    """Return the notebook of a script with cells, as JSON."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, part in enumerate(f"\n{script}".split("\n# %%")[1:]):
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cell = nbformat.v4.new_markdown_cell("\n".join(lines))
        else:
            cell = nbformat.v4.new_code_cell(body.strip())
        cell.id = f"cell-{number}"  # nbformat's own ids are random
        notebook.cells.append(cell)
    return str(nbformat.writes(notebook)) + "\n"


def main() -> int:
    """Write the notebooks."""
    for name in NOTEBOOKS:
        script = (EXAMPLES / f"{name}.py").read_text()
        (EXAMPLES / f"{name}.ipynb").write_text(notebook_of(script))
    return 0


if __name__ == "__main__":
    sys.exit(main())
