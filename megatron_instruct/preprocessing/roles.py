"""Roles of characters -> a role for each token, as the bytes of PREFIX.roles.

Comes in: texts with the roles of their characters, and where each token ends in its text. Goes out: one uint8 code per token (see
records.ROLE_CODES). A token that spans several roles is response where any visible character of it is response, else it has the role of
its first visible character, else, all white space, that of its first character. Does not know: token ids, files.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
    first_tokens = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    for place, roles in spans.items():
        tokens = slice(int(first_tokens[place]), int(first_tokens[place + 1]))
        _fill(codes[tokens], texts[place], roles, ends[tokens])
    return codes


def _fill(codes: Codes, text: str, spans: Spans, ends: npt.NDArray[np.int64]) -> None:
    """Set the codes of one text's tokens."""
    if not len(ends):
        return
    byte_starts = _byte_starts(text, spans)
    starts = np.concatenate(([0], ends[:-1]))
    first = np.searchsorted(starts, byte_starts)  # the first token that starts in each span or after it
    counts = np.diff(first, append=len(ends))
    codes[:] = np.repeat(np.array([code for _, _, code in spans], dtype=np.uint8), counts)
    before = first[1:] - 1
    over = before[(before >= 0) & (ends[before] > byte_starts[1:])]
    straddlers = np.unique(over).tolist()
    if straddlers:
        content = text.encode()
        places = byte_starts.tolist()
        for token in straddlers:
            codes[token] = STRADDLES | _role_over(content, int(starts[token]), int(ends[token]), places, spans)


def _byte_starts(text: str, spans: Spans) -> npt.NDArray[np.int64]:
    if text.isascii():
        return np.array([start for start, _, _ in spans], dtype=np.int64)
    sizes = [len(text[start:end].encode()) for start, end, _ in spans]
    return np.cumsum([0, *sizes[:-1]], dtype=np.int64)


def _role_over(content: bytes, start: int, end: int, byte_starts: Sequence[int], spans: Spans) -> int:
    """Return the role of a token over bytes [start, end), which may begin or end inside a character."""
    roles = [(spans[bisect.bisect_right(byte_starts, place) - 1][2], character) for place, character in _characters(content, start, end)]
    visible = [role for role, character in roles if not character.isspace()]
    if RESPONSE in visible:
        return RESPONSE
    return visible[0] if visible else roles[0][0]


def _characters(content: bytes, start: int, end: int) -> Iterator[tuple[int, str]]:
    """Yield the characters that bytes [start, end) touch, with the byte where each starts."""
    while content[start] & 0xC0 == 0x80:
        start -= 1
    while end < len(content) and content[end] & 0xC0 == 0x80:
        end += 1
    for character in content[start:end].decode():
        yield start, character
        start += len(character.encode())


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
