"""The model card, which notebooks render."""

from collections.abc import Mapping, Sequence

from models.artifact import CARD
from models.manifest import Manifest


class Card:
    """A model card. Notebooks render it; `str(card)` is its Markdown.

    Args:
        markdown: the text.
    """

    def __init__(self, markdown: str) -> None:
        self.markdown = markdown

    @classmethod
    def of(cls, manifest: Manifest, version: int | None, exhibits: Mapping[str, bytes], notes: Sequence[str]) -> "Card":
        """Return the card in the exhibits of an artifact. If there is none, write one from the manifest."""
        if CARD in exhibits:
            return cls(exhibits[CARD].decode(errors="replace"))
        from training.reports.model_card import card

        return cls(card(manifest, version, notes, ()))

    def __str__(self) -> str:
        return self.markdown

    def __repr__(self) -> str:
        return f"<elbo.Card, {len(self.markdown.splitlines())} lines: print(card) shows it>"

    def _repr_markdown_(self) -> str:
        return self.markdown
