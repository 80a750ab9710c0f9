"""Roles of characters -> a role for each token, as the bytes of PREFIX.roles.

Comes in: texts with the roles of their characters, and where each token ends in its text. Goes out: one uint8 code per token (see
records.ROLE_CODES). A token that spans several roles is response where any visible character of it is response, else it has the role of
its first visible character, else, all white space, that of its first character. Does not know: token ids, files.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_instruct.preprocessing.documents import Spans
from megatron_instruct.records import ROLE_CODES

Codes = npt.NDArray[np.uint8]
CONTEXT, RESPONSE, END, PADDING = (ROLE_CODES[role] for role in ("context", "response", "end_of_document", "padding"))
STRADDLES = 0x80
"""Added to the code of a token that spans several roles, to count them; never written."""


def token_roles(texts: Sequence[str], spans: Mapping[int, Spans], lengths: npt.NDArray[np.int32], ends: npt.NDArray[np.int64]) -> Codes:
    """Return the roles of the tokens of all texts, one text after another, with the mark STRADDLES.

    spans: roles of the texts that have them, by place; the rest is context. lengths: tokens per text. ends: bytes of its text that end
    with each token, int64 [tokens].
    """
    codes = np.full(len(ends), CONTEXT, dtype=np.uint8)
    of_texts = lengths[list(spans)]
    if not of_texts.any():
        return codes
    have_roles = np.zeros(len(lengths), dtype=np.bool_)
    have_roles[list(spans)] = True
    tokens = slice(None) if have_roles.all() else np.repeat(have_roles, lengths)
    laid = _laid_out(texts, spans)
    shifts, token_ends = np.repeat(laid.texts, of_texts), ends[tokens]
    token_starts = np.concatenate(([0], token_ends[:-1]))
    token_starts[(np.cumsum(of_texts) - of_texts)[of_texts > 0]] = 0
    token_starts, token_ends = token_starts + shifts, token_ends + shifts
    first = np.searchsorted(token_starts, laid.starts)  # the first token that starts in each span or after it
    found = np.repeat(laid.codes, np.diff(first, append=len(token_ends)))
    before = first[1:] - 1
    straddlers = np.unique(before[(before >= 0) & (token_ends[before] > laid.starts[1:])])
    places = laid.starts.tolist() if len(straddlers) else []
    for token, start, end in zip(straddlers.tolist(), token_starts[straddlers].tolist(), token_ends[straddlers].tolist(), strict=True):
        found[token] = STRADDLES | _role_over(laid, start, end, places)
    codes[tokens] = found
    return codes


class _LaidOut(NamedTuple):
    """Texts one after another, a byte between two, so that what ends one text does not begin the next."""

    content: bytes
    texts: npt.NDArray[np.int64]
    """The byte where each text starts."""
    starts: npt.NDArray[np.int64]
    """The byte where each span starts."""
    codes: Codes
    """Of the spans."""


def _laid_out(texts: Sequence[str], spans: Mapping[int, Spans]) -> _LaidOut:
    """Return the texts that have spans."""
    contents: list[bytes] = []
    text_starts: list[int] = []
    starts: list[int] = []
    position = 0
    for place, roles in spans.items():
        text = texts[place]
        content = text.encode()
        contents.append(content)
        text_starts.append(position)
        if len(content) == len(text):
            starts += [position + start for start, _, _ in roles]
        else:
            sizes = [len(text[start:end].encode()) for start, end, _ in roles]
            starts += itertools.accumulate(sizes[:-1], initial=position)
        position += len(content) + 1
    codes = [code for roles in spans.values() for _, _, code in roles]
    return _LaidOut(b"\n".join(contents), np.array(text_starts), np.array(starts), np.array(codes, dtype=np.uint8))


def _role_over(laid: _LaidOut, start: int, end: int, places: Sequence[int]) -> int:
    """Return the role of a token over bytes [start, end), which may begin or end inside a character. places: starts of the spans."""
    content = laid.content
    while content[start] & 0xC0 == 0x80:
        start -= 1
    while end < len(content) and content[end] & 0xC0 == 0x80:
        end += 1
    spans = range(bisect.bisect_right(places, start) - 1, bisect.bisect_left(places, end))
    bounds = [start, *places[spans.start + 1 : spans.stop], end]
    parts = [content[left:right].decode() for left, right in itertools.pairwise(bounds)]
    visible = [int(laid.codes[span]) for span, part in zip(spans, parts, strict=True) if not part.isspace()]
    if RESPONSE in visible:
        return RESPONSE
    return visible[0] if visible else int(laid.codes[spans.start])


def clipped(spans: Spans, start: int, end: int) -> list[tuple[int, int, int]]:
    """Return the roles of characters [start, end) of a text, counted from its start."""
    found = [(max(left, start) - start, min(right, end) - start, code) for left, right, code in spans if left < end and right > start]
    assert found, "a sentence lies inside its document"
    return found


def plain_codes(sequence_lengths: npt.NDArray[Any], last_sequences: npt.NDArray[Any], *, ended: bool) -> Codes:
    """Return the codes of documents without roles: context, and the end of each where it has one.

    last_sequences: places of the sequences that end a document.
    """
    ends = np.cumsum(sequence_lengths, dtype=np.int64)
    codes = np.full(int(ends[-1]) if len(ends) else 0, CONTEXT, dtype=np.uint8)
    if ended:
        codes[ends[last_sequences] - 1] = END
    return codes
