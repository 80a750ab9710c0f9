"""Rendered documents for the eye: coloured by role on a terminal, named by role in a plain log, or as a self-contained page."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from megatron_instruct.files import atomic_write
from megatron_instruct.records import Role

_ROLES: tuple[Role, ...] = get_args(Role)
_MEANING: dict[Role, str] = {
    "context": "raw text",
    "instruction": "leads up to a response",
    "response": "what a model should write",
    "glue": "holds the parts together",
}
_ANSI: dict[Role, str] = {"context": "\033[0m", "instruction": "\033[34m", "response": "\033[1;32m", "glue": "\033[35m"}
_RESET = "\033[0m"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; background: #fff }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; border: 1px solid #ccc; border-radius: .4rem; padding: 1rem }
h2 { font-size: 1rem; margin: 2rem 0 .3rem } p { margin: .3rem 0; color: #555; font-size: .9rem; overflow-wrap: anywhere }
.context { background: #f1f1f1 } .instruction { background: #dbe8ff } .response { background: #cdf0d3; font-weight: 600 }
.glue { background: #f3e0f7 } .legend span { padding: .1rem .4rem; margin-right: .6rem; color: #1c1c1c }
"""


def first_documents(path: Path, count: int) -> list[dict[str, Any]]:
    """Return the first `count` documents of an augmented.jsonl."""
    with open(path, encoding="utf-8") as stream:
        return [json.loads(line) for line in islice(stream, count)]


def as_terminal_text(documents: Sequence[Mapping[str, Any]], *, colour: bool) -> str:
    """Return the documents with the colours of a terminal, or, without colour, each span after its role in brackets."""
    legend = "  ".join(f"{_ANSI[role]}{role}{_RESET}" if colour else f"[{role}] {_MEANING[role]}" for role in _ROLES)
    lines = [legend]
    for document in documents:
        lines.append(f"\n{'=' * 20} {_title(document)}\n{_drawn(document)}\n{'-' * 20}")
        spans = _spans(document)
        lines.append("".join(f"{_ANSI[role]}{text}{_RESET}" if colour else f"[{role}]{text}" for role, text in spans))
    return "\n".join(lines) + "\n"


def write_page(path: Path, documents: Sequence[Mapping[str, Any]]) -> None:
    """Write the documents as an HTML page that needs nothing else."""
    legend = "".join(f'<span class="{role}">{role}: {_MEANING[role]}</span>' for role in _ROLES)
    with atomic_write(path) as stream:
        stream.write(
            f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Instruction-augmented texts</title>\n<style>{_STYLE}</style>\n'
        )
        stream.write(f'<h1>Instruction-augmented texts</h1>\n<p class="legend">{legend}</p>\n')
        for document in documents:
            body = "".join(f'<span class="{role}">{html.escape(text)}</span>' for role, text in _spans(document))
            stream.write(f"<h2>{html.escape(_title(document))}</h2>\n<p>{html.escape(_drawn(document))}</p>\n<pre>{body}</pre>\n")
        stream.write("</html>\n")


def _title(document: Mapping[str, Any]) -> str:
    provenance = document["provenance"]
    return f"{document['id']}: {provenance['layout']}" + (", inverted" if provenance["inverted"] else "")


def _drawn(document: Mapping[str, Any]) -> str:
    return ", ".join(f"{family} {number}" for family, number in document["provenance"]["drawn"].items()) or "nothing drawn"


def _spans(document: Mapping[str, Any]) -> Iterator[tuple[Role, str]]:
    for start, end, role in document["spans"]:
        yield role, document["text"][start:end]
