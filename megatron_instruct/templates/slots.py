"""A template text with named slots: "Question: {question}" -> literal pieces and slots, parsed once, filled often.

What fills a slot is inserted as it is: braces, percent signs and markers in it mean nothing. In the template itself, "{{" and "}}"
stand for single braces. Does not know: which slots a family of templates allows.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_TOKEN = re.compile(r"\{\{|\}\}|\{([A-Za-z_]+)\}|[{}]")


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template text."""

    source: str
    """As it stands in the bank."""
    pieces: tuple[tuple[str, str | None], ...]
    """(literal text, slot that follows it or None), in order."""

    @property
    def slots(self) -> frozenset[str]:
        return frozenset(slot for _, slot in self.pieces if slot is not None)

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the text with each slot replaced by its value."""
        return "".join([literal if slot is None else literal + values[slot] for literal, slot in self.pieces])


def parse(source: str) -> Template:
    """Parse a template text; ValueError says what is wrong with it."""
    return Template(source, tuple(_pieces(source)))


def _pieces(source: str) -> Iterator[tuple[str, str | None]]:
    literal, position = "", 0
    for token in _TOKEN.finditer(source):
        literal += source[position : token.start()]
        position = token.end()
        if token[1] is not None:
            yield literal, token[1]
            literal = ""
        elif token[0] in ("{{", "}}"):
            literal += token[0][0]
        else:
            raise ValueError(f"a single {token[0]!r} in {source!r}; write a slot as {{name}}, or double the brace")
    if literal + source[position:]:
        yield literal + source[position:], None
