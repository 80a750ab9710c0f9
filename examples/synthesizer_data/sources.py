"""Documents of Debian packages -> questions with the prose that answers them, and dictionary entries.

Comes in: the text of one file. Goes out: `Entry` values: a heading (the question of a FAQ, the headword of a dictionary) and paragraphs of
prose. Code, lists and tables are left out, markup is taken off. Does not know: packages, pairs.
"""

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

_BLANK_LINES = re.compile(r"\n[ \t]*\n")
_POD = re.compile(r"[BCEFILSXZ]<+\s*([^<>]*?)\s*>+")
_ROLE = re.compile(r":[a-z:]+:`~?([^`<]+?)(?:\s*<[^>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^>]*>`_*")
_FOLDOC_NOTES = re.compile(r"\[[^\]]*\]|\(\d{4}-\d\d-\d\d\)")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A heading and what stands below it."""

    heading: str
    paragraphs: tuple[str, ...]


def pod_questions(text: str) -> Iterator[Entry]:
    """Perl's FAQ: =head2 lines are questions."""
    for part in re.split(r"^=head2 ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n\n")
        body = re.split(r"^=head1 ", body, flags=re.MULTILINE)[0]
        yield _entry(_plain_pod(heading), (_plain_pod(paragraph) for paragraph in _BLANK_LINES.split(body) if _is_prose(paragraph)))


def rst_questions(text: str) -> Iterator[Entry]:
    """Python's FAQ: headings that are underlined with - or =."""
    parts = re.split(r"^([^\n]+\?)\n[-=~]{5,}\n", text, flags=re.MULTILINE)
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        body = re.split(r"^[^\n]+\n[=-]{5,}\n", body, flags=re.MULTILINE)[0]
        yield _entry(_plain_rst(heading), (_plain_rst(paragraph) for paragraph in _BLANK_LINES.split(body) if _is_prose(paragraph)))


def numbered_questions(text: str) -> Iterator[Entry]:
    """Debian's FAQ as plain text: "1.2. Question?" at the margin, prose indented by four blanks."""
    parts = re.split(r"^\d+\.\d+\.(?:\d+\.)?[ \u00a0]((?:[^\n]+\n)+)\n", text, flags=re.MULTILINE)
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        body = re.split(r"^\S", body, flags=re.MULTILINE)[0]
        unindented = re.sub(r"^ {4}", "", body, flags=re.MULTILINE)
        yield _entry(heading, (paragraph for paragraph in _BLANK_LINES.split(unindented) if _is_prose(paragraph)))


def html_questions(text: str) -> Iterator[Entry]:
    """A FAQ that Texinfo wrote: numbered <h3> headings, <p> paragraphs."""
    for part in re.split(r"<h3[^>]*>", text)[1:]:
        heading, _, body = part.partition("</h3>")
        body = re.split(r"<h[1-6]", body)[0]
        heading = re.sub(r"^\s*[\d.]+\s*|\s*#.*$", "", _plain_html(heading), flags=re.DOTALL)
        paragraphs = re.findall(
            r"<p>(.*?)</p>",
            re.sub(r"<pre.*?</pre>|<li>.*?</li>|<p>\s*(?:Next|Previous|Up):.*?</p>", "", body, flags=re.DOTALL),
            flags=re.DOTALL,
        )
        yield _entry(heading, map(_plain_html, paragraphs))


def dictionary(text: str) -> Iterator[Entry]:
    """FOLDOC: headwords at the margin, their definitions indented by three blanks. Entries of the Jargon File are left out."""
    for heading, body in re.findall(r"^(\S[^\n]*)\n\n((?:   [^\n]*\n|\n)+)", text, flags=re.MULTILINE):
        if "Jargon" in body or re.search(r"^ *(?:1\. |or /)", body, flags=re.MULTILINE):
            continue
        unindented = re.sub(r"^ {3}", "", body, flags=re.MULTILINE).replace("{", "").replace("}", "")
        prose = _FOLDOC_NOTES.sub("", re.sub(r"^\s*<[^>]*>\s*", "", unindented))
        prose = re.sub(r"^\s*(?:\([^)]*\)\s+(?=[A-Z])|/[^/]+/\s+)", "", prose)  # how it is spelt out or pronounced
        yield _entry(heading, (paragraph for paragraph in _BLANK_LINES.split(prose) if _is_prose(paragraph)))


def _entry(heading: str, paragraphs: "Iterator[str] | map[str]") -> Entry:
    cleaned = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return Entry(heading=" ".join(heading.split()), paragraphs=tuple(paragraph for paragraph in cleaned if paragraph))


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is neither code, a list, a table nor a directive."""
    lines = [line for line in paragraph.split("\n") if line.strip()]
    return (
        bool(lines)
        and "contributed by" not in lines[0]
        and not lines[0].startswith((" ", "\t", "=", "*", "-", "+", "..", ">>>", "#", "|", "::"))
    )


def _plain_pod(text: str) -> str:
    text = text.replace("E<lt>", "\0").replace("E<gt>", "\1")
    for _ in range(2):  # one may stand in another
        text = _POD.sub(lambda match: match[1].rpartition("|")[0] or match[1], text)
    return text.replace("\0", "<").replace("\1", ">")


def _plain_rst(text: str) -> str:
    text = _LINK.sub(r"\1", _ROLE.sub(r"\1", text))
    return re.sub(r"``?([^`]+)``?_*", r"\1", text).replace("::", ":").replace("*", "")


def _plain_html(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", text)).replace("\u2019", "'").replace("\u2018", "'")


def jargon(text: str) -> Iterator[Entry]:
    """The Jargon File, one JSON object a line: the headword, its pronunciation and part of speech, then prose."""
    for line in text.splitlines():
        row = json.loads(line)
        paragraphs = [re.sub(r"^\s*\[[^\]]*\]\s*", "", paragraph) for paragraph in row["text"].split("\n\n")[1:]]
        first = next((place for place, paragraph in enumerate(paragraphs) if len(paragraph) > 40), len(paragraphs))
        if not re.match(r"1\. ", paragraphs[first] if first < len(paragraphs) else "1. "):
            yield _entry(row["title"], iter(paragraphs[first:]))
