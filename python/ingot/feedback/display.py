"""Text of models and people on a terminal: what could command the terminal is shown, never sent."""

from __future__ import annotations

import unicodedata

# Marks that reorder, join or hide text, beyond the control characters: a text could show other words than it holds.
_HIDDEN = frozenset("\u00ad\u061c\u180e\u200b\u200e\u200f\u2028\u2029\u2060\ufeff") | frozenset(
    chr(code)
    for start, stop in ((0x202A, 0x202F), (0x2066, 0x2070), (0xFFF9, 0xFFFC), (0xE0000, 0xE0080))
    for code in range(start, stop)
)


def is_hidden(character: str) -> bool:
    """Whether a character must not reach the terminal as it is."""
    if character in "\n\t":
        return False
    return character in _HIDDEN or unicodedata.category(character) in ("Cc", "Cs")


def escape(character: str) -> str:
    r"""A hidden character as Python writes it: ``\x1b``, ``\u202e``."""
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def visible(text: str) -> str:
    """``text`` with hidden characters written out."""
    return "".join(escape(character) if is_hidden(character) else character for character in text)
