"""Texts encoded segment by segment, each segment once: most of a text's segments have come before.

Comes in: a tokenizer.json whose BPE works on the whole text, an engine that encodes a text. Goes out: the ids that the engine gives for
whole texts. Why they are the same: BPE joins neighbours, and what it joins is a piece of the vocabulary. Where no piece has byte b behind
byte a, nothing is ever joined across a cut between an a and a b, so that both sides are encoded as if the other were not there; the order
of joins on one side does not depend on the other. A segment is what lies between two such cuts: often a word with the space before it.
The table of segments is compiled from _segments.c, where setup found a C compiler. Does not know: which engine encodes.
"""

import ctypes
import functools
import importlib.util
import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.tokenizer.flat import piece_bytes

SLOTS = 1 << 21
"""Of the table, which remembers three quarters as many segments in 64 to 100 MB."""
_AT_ONCE = 1 << 16
"""Segments that are looked up before their ids are written down."""
_PADDING = b"\0" * 16
_SPACE_LIKE = "▁"
PREPENDED = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
"""The normalizers of a converted sentencepiece model that changes no text."""


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Where texts may be cut."""

    joins: bytes
    """[256 * 256], 1 where some piece has the second byte behind the first, or the second is inside of a character, else 0."""
    separator: int
    """A byte that no piece has beside another."""
    sizes: bytes
    """How many bytes each id spells, uint16 [vocab_size]; 1 where it is no text."""


def safe_cuts(content: dict[str, Any]) -> Cuts | None:
    """Return where texts may be cut for the tokenizer that a tokenizer.json describes; None where nothing is known of it."""
    model = content["model"]
    vocabulary: dict[str, int] = model["vocab"] if model.get("type") == "BPE" else {}
    bytes_are_pieces = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    changes_words = any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
    normalizer, cuts_itself = content.get("normalizer") or {}, content.get("pre_tokenizer") or content.get("added_tokens")
    if not bytes_are_pieces or changes_words or cuts_itself or normalizer.get("normalizers") != PREPENDED:
        return None
    pieces = [piece_bytes(piece) for piece in vocabulary]
    spelled = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    inside = np.ones(len(spelled), dtype=np.bool_)  # of a piece: the byte and the next one belong to it
    inside[np.cumsum(list(map(len, pieces))) - 1] = False
    places = np.flatnonzero(inside)
    joins = np.zeros((256, 256), dtype=np.bool_)
    joins[spelled[places], spelled[places + 1]] = True
    neighbours = np.add(joins.sum(axis=0), joins.sum(axis=1))
    joins[:, 0x80:0xC0] = True
    separator = next((byte for byte in range(1, 0x20) if not neighbours[byte]), None)
    if separator is None:
        return None
    sizes = np.ones(max(vocabulary.values()) + 1, dtype=np.uint16)
    sizes[list(vocabulary.values())] = list(map(len, pieces))
    if model.get("unk_token") in vocabulary:
        sizes[vocabulary[model["unk_token"]]] = 1
    return Cuts(joins=joins.tobytes(), separator=separator, sizes=sizes.tobytes())


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """Return the functions of _segments.c, None where they were not compiled."""
    spec = importlib.util.find_spec("megatron_instruct.tokenizer._segments")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    table, array, number = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("new", table, (ctypes.c_char_p, number, number, ctypes.c_uint8, ctypes.c_int32)),
        ("free", None, (table,)),
        ("cut", number, (table, array, array, number, array, array, number)),
        ("spell", number, (table, array)),
        ("define", number, (table, array, number)),
        ("emit", number, (table, array, number, array, array)),
    ):
        function = library[f"segments_{name}"]
        function.restype, function.argtypes = result, arguments
        setattr(library, name, function)
    return library


class NotApartError(RuntimeError):
    """What an engine gave for segments beside each other is not the ids of as many segments."""


class SegmentTable:
    """Encodes texts, and remembers what their segments became."""

    def __init__(self, library: ctypes.CDLL, cuts: Cuts, encode: Callable[[str], npt.NDArray[Any]], *, slots: int = SLOTS) -> None:
        """encode: a text's ids by the engine. slots: of the table, a power of two, at least 2 ** 16."""
        self._library, self._encode = library, encode
        separator_id = int(encode(chr(cuts.separator))[-1])
        self._table = library.new(cuts.joins, slots, _AT_ONCE, cuts.separator, separator_id)
        if not self._table:
            raise MemoryError(f"no memory for a table of {slots} segments")
        weakref.finalize(self, library.free, self._table)
        self._found = np.empty(_AT_ONCE, dtype=np.int32)

    def encode(self, texts: Sequence[str], contents: Sequence[bytes]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return the ids of the texts, one after another, and how many each has. contents: the texts in UTF-8."""
        if any(map(operator.contains, texts, itertools.repeat(_SPACE_LIKE))):  # the tokenizer writes a space so: both have the same ids
            contents = [text.replace(_SPACE_LIKE, " ").encode() for text in texts]
        whole = b" ".join([b"", *contents, _PADDING])
        bounds = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, contents), np.int64, len(texts)) + 1, out=bounds[1:])
        ids, starts = self._encode_whole(np.frombuffer(whole, dtype=np.uint8), bounds)
        return ids, np.diff(starts, append=len(ids)).astype(np.int32)

    def _encode_whole(
        self, text: npt.NDArray[np.uint8], bounds: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return the ids, and where those of each text begin."""
        ids = np.empty(len(text), dtype=np.int32)
        at, starts = np.array([0, -1], dtype=np.int64), np.empty(len(bounds) - 1, dtype=np.int64)
        made, begun = 0, 0
        while at[0] < len(starts):
            count = self._library.cut(
                self._table, text.ctypes.data, bounds.ctypes.data, len(starts), at.ctypes.data, self._found.ctypes.data, _AT_ONCE
            )
            if count < 0:
                raise MemoryError("no memory for the segments of a text")
            self._define()
            new = starts[begun:]
            more = self._library.emit(self._table, self._found.ctypes.data, count, ids[made:].ctypes.data, new.ctypes.data)
            begins = int(np.count_nonzero(self._found[:count] < 0))
            new[:begins] += made
            made, begun = made + more, begun + begins
        return ids[:made], starts

    def _define(self) -> None:
        """Let the engine encode the segments that are new."""
        size = self._library.spell(self._table, None)
        if not size:
            return
        spelled = np.empty(size, dtype=np.uint8)
        self._library.spell(self._table, spelled.ctypes.data)
        ids = np.ascontiguousarray(self._encode(str(spelled.data, "utf-8")), dtype=np.int32)
        defined = self._library.define(self._table, ids.ctypes.data, len(ids))
        if defined < 0:
            raise MemoryError("no memory for the ids of a text")
        if not defined:
            raise NotApartError("the engine's ids are not those of as many segments as it was given; encode with --fast-tokenizer none")
