"""Where the tokens of each document go in the finished data set: the order of the input, shuffled, packed.

Comes in: the counts of documents. Goes out: a `Layout`, or None for the order of the input. Pure: it depends on counts and settings alone,
so neither on workers nor on parts. Does not know: files.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.preprocessing.packing import pack

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Pieces of the tokens as they were encoded, in the order in which they are written."""

    starts: Integers
    """First token of each piece, counted over all parts, [pieces]."""
    lengths: Integers
    """Tokens of each piece, [pieces]."""
    targets: Integers
    """Place of its first token in the data set, ascending, [pieces]; what no piece covers is padding."""
    tokens: int
    """Tokens of the data set, padding included."""
    sequences: npt.NDArray[np.int32]
    """Tokens of each sequence, [sequences]."""
    documents: npt.NDArray[np.int32]
    """Sequences of each document, [documents]."""
    packing: Mapping[str, Any] | None
    """What the manifest says of packing; None where nothing is packed."""


def layout(
    sequences: npt.NDArray[np.int32], documents: npt.NDArray[np.int32], *, shuffle_seed: int | None, pack_sequence_length: int | None
) -> Layout | None:
    """Lay out documents. sequences: tokens of each sequence; documents: sequences of each document, one where they are to be packed."""
    if shuffle_seed is None and pack_sequence_length is None:
        return None
    order = shuffled(len(documents), shuffle_seed) if shuffle_seed is not None else np.arange(len(documents))
    if pack_sequence_length is not None:
        return _packed(sequences, order, pack_sequence_length)
    sequence_ends = np.concatenate(([0], np.cumsum(sequences, dtype=np.int64)))
    bounds = np.concatenate(([0], np.cumsum(documents, dtype=np.int64)))
    starts, ends = sequence_ends[bounds[:-1]][order], sequence_ends[bounds[1:]][order]
    lengths = ends - starts
    return Layout(
        starts=starts,
        lengths=lengths,
        targets=np.cumsum(lengths) - lengths,
        tokens=int(lengths.sum()),
        sequences=sequences[ragged(bounds[:-1][order], documents[order])],
        documents=documents[order],
        packing=None,
    )


def _packed(lengths: npt.NDArray[np.int32], order: Integers, sequence_length: int) -> Layout:
    document_starts = (np.cumsum(lengths, dtype=np.int64) - lengths)[order]
    packs = pack(lengths[order], sequence_length)
    within = np.cumsum(packs.lengths) - packs.lengths  # tokens before each piece, without padding
    firsts = np.flatnonzero(np.diff(packs.packs, prepend=-1))
    within -= np.repeat(within[firsts], np.diff(firsts, append=len(within)))
    tokens, filled = packs.count * sequence_length, int(packs.lengths.sum())
    return Layout(
        starts=document_starts[packs.documents] + packs.starts,
        lengths=packs.lengths,
        targets=packs.packs * sequence_length + within,
        tokens=tokens,
        sequences=np.full(packs.count, sequence_length, dtype=np.int32),
        documents=np.ones(packs.count, dtype=np.int32),
        packing={
            "sequence_length": sequence_length,
            "documents": len(lengths),
            "cut_documents": packs.cut,
            "padding_tokens": tokens - filled,
            "fill_percent": round(100 * filled / tokens, 3) if tokens else 100.0,
        },
    )


def shuffled(count: int, seed: int) -> Integers:
    """Return 0 … count - 1 in an order that depends on the seed alone: by a mixed number of each (SplitMix64, Steele et al. 2014)."""
    state = np.arange(count, dtype=np.uint64)
    state *= np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state ^= state >> np.uint64(shift)
        state *= np.uint64(factor)
    state ^= state >> np.uint64(31)
    return np.argsort(state, kind="stable")


def ragged(starts: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> Integers:
    """Return the numbers start, start + 1, … start + length - 1 for each start in turn."""
    lengths = lengths.astype(np.int64)
    first = np.cumsum(lengths) - lengths
    numbers: Integers = np.repeat(starts - first, lengths) + np.arange(int(lengths.sum()))
    return numbers
