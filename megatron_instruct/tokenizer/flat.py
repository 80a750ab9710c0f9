"""Ids of many texts as one array, and which bytes of its text each token stands for.

Comes in: ids, and the bytes that each id of the vocabulary spells. Goes out: `FlatTokens`. A token's bytes are never guessed: what the
tokens spell is compared with the text, and where it differs (a normalizer changed the text, or a token stands for what is not in the
vocabulary) the tokenizer's library is asked for its offsets into the original text. Does not know: any library.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ends = npt.NDArray[np.int64]
NO_TEXT = b"\xff"
"""What an id spells that stands for no text, such as an unknown or a control token. Occurs in no UTF-8."""
_OTHER = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatTokens:
    """Tokens of several texts, one after another."""

    ids: npt.NDArray[Any]
    """[tokens], in the dtype of a data set with this vocabulary."""
    lengths: npt.NDArray[np.int32]
    """Tokens of each text, [texts]."""
    places: "Places | None" = None
    """Where in their texts the tokens are; None unless asked for."""

    @property
    def ends(self) -> Ends | None:
        """For each token the number of UTF-8 bytes of its text up to its end, [tokens]."""
        if self.places is None:
            return None
        return self.places.bounds[1:] - np.repeat(self.places.origins, self.lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where tokens begin and end, in bytes, counted on through all texts.

    A token begins where the one before it ends, the first with its text; the last ends with the text. Where several tokens share a
    character and nothing says which of its bytes are whose, the last of them has all of it.
    """

    bounds: Ends
    """Where each token ends, and before them 0: [tokens + 1], never falling."""
    origins: Ends
    """Where each text begins, [texts]."""
    contents: Sequence[bytes]
    """The texts in UTF-8."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype for ids below vocab_size: uint16 below 65,500, else int32 (megatron-core's DType.optimal_dtype)."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """The bytes that each id spells; NO_TEXT for an id that stands for none."""

    pieces: Sequence[bytes]
    """Not looked at where `prefix` is known."""
    sizes: Ends
    """Of the pieces, in bytes."""
    prefix: int | None
    """Bytes that the tokenizer puts before a text that it changes in no other way; None where it may change it.

    Where it is known, tokens spell a byte too many nowhere else: an id without text counts for one byte, and a character that is
    written like a space for that space. So tokens whose sizes add up spell their text, and the bytes need not be compared.
    """

    @classmethod
    def of(cls, pieces: Sequence[bytes], *, prefix: int | None) -> "Spelling":
        return cls(pieces=pieces, sizes=np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces)), prefix=prefix)

    def with_places(
        self, texts: Sequence[str], tokens: FlatTokens, from_library: Callable[[str], Ends], contents: Sequence[bytes] | None = None
    ) -> FlatTokens:
        """Return the tokens with their places.

        from_library: called with a text whose tokens spell something else, to return the ends of its tokens. contents: the texts in UTF-8.
        """
        contents = contents or list(map(str.encode, texts))
        first = np.concatenate(([0], np.cumsum(tokens.lengths, dtype=np.int64)))
        sizes = self.sizes[tokens.ids]
        bounds = _through(sizes)
        spelled = np.diff(bounds[first])
        if self.prefix is None:
            extra = self._compared(contents, tokens, first)
        else:
            extra = np.where(spelled == np.fromiter(map(len, contents), np.int64, len(texts)) + self.prefix, self.prefix, _OTHER)
        others = np.flatnonzero((extra == _OTHER) & (tokens.lengths > 0)).tolist()
        for place in others:
            sizes[first[place] : first[place + 1]] = np.diff(from_library(texts[place]), prepend=0)
        if others:
            bounds = _through(sizes)
        origins = bounds[first[:-1]] + np.maximum(extra, 0)
        return dataclasses.replace(tokens, places=Places(bounds=bounds, origins=origins, contents=contents))

    def _compared(self, contents: Sequence[bytes], tokens: FlatTokens, bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many bytes each text's tokens spell before the text, byte by byte the same; _OTHER where they spell something else."""
        pieces = list(map(self.pieces.__getitem__, tokens.ids.tolist()))
        extra = np.full(len(contents), _OTHER, dtype=np.int64)
        for place, (content, (start, stop)) in enumerate(zip(contents, itertools.pairwise(bounds.tolist()), strict=True)):
            spelled = b"".join(pieces[start:stop])
            if spelled == content:
                extra[place] = 0
            elif spelled[:1] == b" " and spelled[1:] == content:  # the space that many tokenizers put before a text
                extra[place] = 1
        return extra


def _through(sizes: npt.NDArray[np.int64]) -> Ends:
    """Return 0 and the sums of the first sizes."""
    bounds = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=bounds[1:])
    return bounds


def piece_bytes(piece: str) -> bytes:
    """Return the bytes that a piece spells where "▁" is a space and "<0xE6>" a byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


def ends_of_characters(text: str, offsets: Sequence[tuple[int, int]]) -> Ends:
    """Return the ends, in bytes, of tokens whose places in `text` are given in characters, [start, end)."""
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    bounds = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    return ends_before_starts(bounds[[start for start, _ in offsets]], int(bounds[-1]))


def ends_before_starts(starts: npt.NDArray[np.int64], size: int) -> Ends:
    """Return the ends of tokens that start at `starts` in a text of `size` bytes: each where the next one starts, the last with the text.

    So a token has what the normalizer dropped behind it, too, and of tokens with one start, such as the bytes of a character, the last
    has all of it.
    """
    in_order = np.minimum.accumulate(starts[::-1])[::-1]
    return np.append(in_order[1:], np.int64(size))


def flat_tokens(ids: Sequence[Sequence[int]] | Sequence[npt.NDArray[Any]], vocab_size: int) -> FlatTokens:
    """Return the ids of several texts as one array, without ends."""
    lengths = np.fromiter(map(len, ids), dtype=np.int32, count=len(ids))
    dtype = token_dtype(vocab_size)
    if ids and isinstance(ids[0], np.ndarray):
        flat = np.concatenate(ids).astype(dtype)
    else:
        flat = np.fromiter(itertools.chain.from_iterable(ids), dtype=dtype, count=int(lengths.sum(dtype=np.int64)))
    return FlatTokens(ids=flat, lengths=lengths)
