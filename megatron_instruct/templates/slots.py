"""A template text with named slots: "Question: {question}", checked once, filled often.

What fills a slot is inserted as it is: braces, percent signs and markers in it mean nothing. In the template itself, "{{" and "}}"
stand for single braces. Does not know: which slots a family of templates allows.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from operator import attrgetter, itemgetter
from typing import Any

_TOKEN = re.compile(r"\{\{|\}\}|\{([A-Za-z_]+)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A checked template text."""

    source: str
    """As it stands in the bank. Its slots are plain names, so that it is a format string of Python that can do nothing else."""
    slots: frozenset[str]
    text: str
    """What a template without slots says."""

    @cached_property
    def fill(self) -> Callable[[Mapping[str, str]], str]:
        """What returns the text with each slot replaced by its value."""
        return self._filled_by(itemgetter)

    @cached_property
    def of(self) -> Callable[[Any], str]:
        """What returns the text with each slot replaced by an object's attribute of this name."""
        return self._filled_by(attrgetter)

    def _filled_by(self, getter: Callable[..., Callable[[Any], Any]]) -> Callable[[Any], str]:
        """Return what fills the slots, without reading the text anew each time, as a format string is."""
        slots = [token for token in _TOKEN.finditer(self.source) if token[1] is not None]
        if not slots:
            return lambda values: self.text
        get = getter(*(slot[1] for slot in slots))
        if len(slots) > 1:
            marked = self.source.replace("%", "%%").format_map(dict.fromkeys(self.slots, "%s"))
            return lambda values: marked % get(values)
        before, after = self.source[: slots[0].start()].format(), self.source[slots[0].end() :].format()
        return (lambda values: before + get(values) + after) if before or after else get


@cache
def parse(source: str) -> Template:
    """Parse a template text, each once: banks repeat few texts in many styles. ValueError says what is wrong with it."""
    slots = set()
    for token in _TOKEN.finditer(source):
        if token[1] is not None:
            slots.add(token[1])
        elif token[0] not in ("{{", "}}"):
            raise ValueError(f"a single {token[0]!r} in {source!r}; write a slot as {{name}}, or double the brace")
    return Template(source, frozenset(slots), source if slots else source.format_map({}))
