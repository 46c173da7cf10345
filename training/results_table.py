"""Tables of the results of many trained models, as text and as a page."""

from collections.abc import Mapping, Sequence
from html import escape

from training.evaluation.model_selection import MEANING

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8886; }
tr.best { font-weight: bold; }
"""


def cells_of(means: Mapping[str, float]) -> list[str]:
    """Return a cell for each measure: its mean, or a dash if it was not measured."""
    return [f"{means[name]:.4g}" if name in means else "-" for name in MEANING]


def align(lines: Sequence[Sequence[str]]) -> str:
    """Return a table as text, its columns aligned to the right. All lines have the same number of cells."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def results_page(title: str, summary: str, lines: Sequence[Sequence[str]], explanation: str, best: str = "") -> str:
    """Return a table as one HTML page without scripts.

    Args:
        title: the title of the page.
        summary: what the table shows, in one sentence.
        lines: the header, and the lines of the table.
        explanation: how the models were measured. The meanings of the measures follow it.
        best: lines with this last cell are bold; if empty, none is.
    """
    head, *rest = lines
    rows = [
        f"<tr{' class=best' if best and line[-1] == best else ''}>"
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>"
        for line in rest
    ]
    meanings = "".join(f"<li>{escape(measure)}: {escape(meaning)}</li>" for measure, meaning in MEANING.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{escape(title)}</h1><p>{escape(summary)}</p>"
        f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{''.join(rows)}</table>"
        f"<p>{escape(explanation)}</p><ul>{meanings}</ul>"
    )
