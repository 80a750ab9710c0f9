"""Texts that spell a marker, made harmless and given back.

A word joiner (U+2060, invisible) goes behind the first character of every marker in a text, one more where the text has some already; so
the change can be undone exactly. Source of the character: Unicode Standard, section 23.2.
"""

import re
from collections.abc import Iterable

from megatron_instruct.errors import ConfigError

_JOINER = "\u2060"


class Escaping:
    """Hides a fixed set of markers. Raises ConfigError where two markers overlap, since then hiding one could make another."""

    def __init__(self, markers: Iterable[str], *, where: str) -> None:
        self._markers = sorted({marker for marker in markers if len(marker) > 1}, key=len, reverse=True)
        for first in self._markers:
            for second in self._markers:
                if any(first.endswith(second[:size]) for size in range(1, min(len(first), len(second)))) or (
                    first != second and second in first
                ):
                    raise ConfigError(f"{where}: the markers {first!r} and {second!r} overlap; choose markers that do not.")
        bodies = "|".join(f"{re.escape(marker[0])}{_JOINER}*{re.escape(marker[1:])}" for marker in self._markers)
        self._pattern = re.compile(bodies or r"(?!)")

    def hide(self, text: str) -> str:
        """Return `text` with no marker in it."""
        return self._pattern.sub(lambda match: match[0][0] + _JOINER + match[0][1:], text)

    def restore(self, text: str) -> str:
        """Undo `hide`: restore(hide(text)) == text for every text."""
        return self._pattern.sub(lambda match: match[0].replace(_JOINER, "", 1), text)
