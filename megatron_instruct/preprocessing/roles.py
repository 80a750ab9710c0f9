"""Roles of characters -> a role for each token, as the bytes of PREFIX.roles.

Comes in: texts with the roles of their characters, and where each token ends in its text. Goes out: one uint8 code per token (see
records.ROLE_CODES). A token that spans several roles is response where any visible character of it is response, else it has the role of
its first visible character, else, all white space, that of its first character. Does not know: token ids, files.
"""

import bisect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_instruct.preprocessing.documents import Spans
from megatron_instruct.records import ROLE_CODES
from megatron_instruct.tokenizer import FlatTokens

Codes = npt.NDArray[np.uint8]
CONTEXT, RESPONSE, END, PADDING = (ROLE_CODES[role] for role in ("context", "response", "end_of_document", "padding"))
STRADDLES = 0x80
"""Added to the code of a token that spans several roles, to count them; never written."""
_VISIBLE = np.array([not chr(byte).isspace() for byte in range(0x80)])
"""Which characters of one byte are no white space."""


def token_roles(texts: Sequence[str], spans: Mapping[int, Spans], tokens: FlatTokens) -> Codes:
    """Return the roles of the tokens of all texts, with the mark STRADDLES.

    spans: roles of the texts that have them, by place; the rest is context. tokens: of the texts, with their places.
    """
    assert tokens.places is not None, "places were asked for"
    laid = _laid_out(
        texts, tokens.places.contents, [spans.get(place) or Spans((len(text),), ("context",)) for place, text in enumerate(texts)]
    )
    counts = np.diff(laid.firsts, append=len(laid.starts))
    first_tokens = np.concatenate(([0], np.cumsum(tokens.lengths, dtype=np.int64)))
    low, high = np.repeat(first_tokens[:-1], counts), np.repeat(first_tokens[1:], counts)
    shifts = np.repeat(tokens.places.origins - laid.texts, counts)
    first = np.searchsorted(tokens.places.bounds, laid.starts + shifts)  # the first token that starts in each span or after it
    first[laid.firsts] = first_tokens[:-1]  # a text's first token may begin before it, with what the tokenizer put there
    first = np.minimum(first, high)
    codes = np.repeat(laid.codes, np.diff(first, append=len(tokens.ids)))
    before = first - 1
    straddles = (before >= low) & (tokens.places.bounds[first] > laid.starts + shifts)
    straddles[1:] &= before[1:] != before[:-1]  # a token may span more than two
    straddlers, shifts = before[straddles], shifts[straddles]
    starts = np.maximum(tokens.places.bounds[straddlers] - shifts, np.repeat(laid.texts, counts)[straddles])
    codes[straddlers] = STRADDLES | _roles_over(laid, starts, tokens.places.bounds[straddlers + 1] - shifts)
    return codes


class _LaidOut(NamedTuple):
    """Texts one after another, a byte between two, so that what ends one text does not begin the next."""

    content: bytes
    texts: npt.NDArray[np.int64]
    """The byte where each text starts."""
    firsts: npt.NDArray[np.int64]
    """The first span of each text."""
    starts: npt.NDArray[np.int64]
    """The byte where each span starts."""
    codes: Codes
    """Of the spans."""


def _laid_out(texts: Sequence[str], contents: Sequence[bytes], spans: Sequence[Spans]) -> _LaidOut:
    sizes = _fromiter(map(len, contents), len(texts))
    counts = _fromiter((len(of_text.ends) for of_text in spans), len(texts))
    text_starts, firsts = np.cumsum(sizes + 1) - sizes - 1, np.cumsum(counts) - counts
    ends = _fromiter(itertools.chain.from_iterable(of_text.ends for of_text in spans), int(counts.sum()))
    starts = np.roll(ends, 1)
    starts[firsts] = 0
    for place in np.flatnonzero(sizes != _fromiter(map(len, texts), len(texts))).tolist():
        text, first = texts[place], firsts[place]
        pieces = itertools.pairwise((0, *spans[place].ends))
        byte_ends = list(itertools.accumulate(len(text[start:end].encode()) for start, end in pieces))
        starts[first + 1 : first + counts[place]] = byte_ends[:-1]
    roles = itertools.chain.from_iterable(of_text.roles for of_text in spans)
    codes = np.fromiter(map(ROLE_CODES.__getitem__, roles), dtype=np.uint8, count=len(starts))
    return _LaidOut(b"\n".join(contents), text_starts, firsts, starts + np.repeat(text_starts, counts), codes)


def _fromiter(values: Iterable[int], count: int) -> npt.NDArray[np.int64]:
    return np.fromiter(values, dtype=np.int64, count=count)


def _roles_over(laid: _LaidOut, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Codes:
    """Return the roles of tokens over bytes [start, end)."""
    if not len(starts):
        return np.empty(0, dtype=np.uint8)
    sizes = ends - starts
    offsets = np.cumsum(sizes) - sizes
    numbers = np.arange(sizes.sum())
    places = numbers + np.repeat(starts - offsets, sizes)
    content = np.frombuffer(laid.content, dtype=np.uint8)[places]
    roles = laid.codes[np.searchsorted(laid.starts, places, side="right") - 1]
    rank = np.where(_VISIBLE[content & 0x7F], roles != RESPONSE, 2)
    found: Codes = roles[np.minimum.reduceat(rank * len(numbers) + numbers, offsets) % len(numbers)]
    for token in np.flatnonzero(np.maximum.reduceat(content, offsets) >= 0x80).tolist():
        found[token] = _role_over(laid, int(starts[token]), int(ends[token]))
    return found


def _role_over(laid: _LaidOut, start: int, end: int) -> int:
    """Do it for a token that may begin or end inside a character."""
    content = laid.content
    while content[start] & 0xC0 == 0x80:
        start -= 1
    while end < len(content) and content[end] & 0xC0 == 0x80:
        end += 1
    first, last = np.searchsorted(laid.starts, start, side="right") - 1, np.searchsorted(laid.starts, end)
    bounds = [start, *laid.starts[first + 1 : last].tolist(), end]
    parts = [content[left:right].decode() for left, right in itertools.pairwise(bounds)]
    codes = laid.codes[first:last].tolist()
    visible = [code for code, part in zip(codes, parts, strict=True) if not part.isspace()]
    if RESPONSE in visible:
        return RESPONSE
    return visible[0] if visible else int(codes[0])


def clipped(spans: Spans, start: int, end: int) -> Spans:
    """Return the roles of characters [start, end) of a text, counted from its start."""
    first, last = bisect.bisect_right(spans.ends, start), bisect.bisect_left(spans.ends, end)
    assert last < len(spans.ends), "a sentence lies inside its document"
    return Spans((*(stop - start for stop in spans.ends[first:last]), end - start), spans.roles[first : last + 1])


def plain_codes(sequence_lengths: npt.NDArray[Any], last_sequences: npt.NDArray[Any], *, ended: bool) -> Codes:
    """Return the codes of documents without roles: context, and the end of each where it has one.

    last_sequences: places of the sequences that end a document.
    """
    ends = np.cumsum(sequence_lengths, dtype=np.int64)
    codes = np.full(int(ends[-1]) if len(ends) else 0, CONTEXT, dtype=np.uint8)
    if ended:
        codes[ends[last_sequences] - 1] = END
    return codes
