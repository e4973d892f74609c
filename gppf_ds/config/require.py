"""How configuration is judged."""

from __future__ import annotations

from gppf_ds.errors import UserError


def require(condition: bool, sentence: str) -> None:
    """Raises :class:`UserError` with the sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)
