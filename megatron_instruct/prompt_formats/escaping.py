"""Texts that spell a marker, made harmless and given back.

A word joiner (U+2060, invisible) goes behind every character at which a marker begins, one more where the text has some already. Joiners do
not count when it is looked where markers begin, so the places are the same before and after, and the change can be undone exactly; markers
may overlap or hold each other. Source of the character: Unicode Standard, section 23.2.
"""

import re
from collections.abc import Iterable

_JOINER = "\u2060"
_ANY = f"{_JOINER}*"


class Escaping:
    """Hides a fixed set of markers. A marker of one character cannot be hidden and is left alone."""

    def __init__(self, markers: Iterable[str]) -> None:
        plain = {marker.replace(_JOINER, "") for marker in markers}
        rests: dict[str, list[str]] = {}
        for marker in sorted(marker for marker in plain if len(marker) > 1):
            rests.setdefault(marker[0], []).append(_ANY.join(map(re.escape, marker[1:])))
        begins = {first: f"(?={_ANY}(?:{'|'.join(rest)}))" for first, rest in rests.items()}
        nothing = "(?!)"
        self._shown = re.compile("|".join(f"{re.escape(first)}{rest}" for first, rest in begins.items()) or nothing)
        self._hidden = re.compile("|".join(f"{re.escape(first)}{_JOINER}{rest}" for first, rest in begins.items()) or nothing)

    def hide(self, text: str) -> str:
        """Return `text` with no marker in it."""
        return self._shown.sub(lambda match: match[0] + _JOINER, text)

    def restore(self, text: str) -> str:
        """Undo `hide`: restore(hide(text)) == text for every text."""
        return self._hidden.sub(lambda match: match[0][0], text)
