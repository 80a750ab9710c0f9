"""Best-fit packing of documents into sequences of one length (Ding et al., arXiv:2404.10830, algorithm 1).

Comes in: the token counts of documents. Goes out: which pieces of which documents lie in which pack. A document longer than a pack is cut
into whole packs, and only its remainder is packed further; any other stays whole. Pieces go, longest first, into the pack with the
least room that still fits them, else into a new one. Pure: the result depends on the counts alone.

Since pieces of one length go the same way, they are placed together: the work grows with the number of different lengths, not of
documents. Does not know: tokens, files.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Packs:
    """Pieces of documents, in the order of packs, and within a pack of documents."""

    documents: Integers
    """Document of each piece, [pieces]."""
    starts: Integers
    """First token of each piece in its document, [pieces]."""
    lengths: Integers
    """Tokens of each piece, [pieces]."""
    packs: Integers
    """Pack of each piece, from 0, ascending, [pieces]."""
    count: int
    """Number of packs."""
    cut: int
    """Documents that were cut."""


def pack(document_lengths: npt.NDArray[np.int32], sequence_length: int) -> Packs:
    """Pack documents. Packs come in the order of their first documents."""
    documents, starts, lengths = _pieces(document_lengths.astype(np.int64), sequence_length)
    order = np.argsort(-lengths, kind="stable")  # longest first, and of one length in the order of documents
    packs = np.empty(len(order), dtype=np.int64)
    packs[order] = _best_fit(lengths[order], sequence_length)
    count = int(packs.max(initial=-1)) + 1
    first_piece = np.full(count, len(packs), dtype=np.int64)
    np.minimum.at(first_piece, packs, np.arange(len(packs)))
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(first_piece)] = np.arange(count)
    packs = rank[packs]
    final = np.argsort(packs, kind="stable")
    return Packs(
        documents=documents[final],
        starts=starts[final],
        lengths=lengths[final],
        packs=packs[final],
        count=count,
        cut=int((document_lengths > sequence_length).sum()),
    )


def _pieces(lengths: Integers, sequence_length: int) -> tuple[Integers, Integers, Integers]:
    """Return document, first token and length of each piece, in the order of the documents."""
    counts = -(-lengths // sequence_length)
    documents = np.repeat(np.arange(len(lengths)), counts)
    starts = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * sequence_length
    return documents, starts, np.minimum(lengths[documents] - starts, sequence_length)


def _best_fit(lengths: Integers, sequence_length: int) -> Integers:
    """Return the pack of each piece. lengths: descending, from 1 to sequence_length.

    All packs with the same room are alike to best fit, and a pack just filled, if there is room for one more piece of the same length,
    is the one that fits best again: so a pack takes as many of them as it has room for before the next pack is looked at.
    """
    packs = np.empty(len(lengths), dtype=np.int64)
    open_packs: dict[int, list[Integers]] = {}
    rooms = 0  # the bit of each room that an open pack has, to find the least that fits
    opened = 0
    bounds = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        length, left = int(lengths[start]), stop - start
        while left:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else sequence_length
            each = room // length
            wanted = -(-left // each)
            if fitting:
                candidates = _joined(open_packs.pop(room))
                taken, kept = candidates[:wanted], candidates[wanted:]
                rooms ^= 1 << room
                rooms |= _put(open_packs, room, kept)
            else:
                taken = np.arange(opened, opened + wanted)
                opened += wanted
            placed = min(left, len(taken) * each)
            packs[stop - left : stop - left + placed] = np.repeat(taken, each)[:placed]
            full, rest = divmod(placed, each)
            rooms |= _put(open_packs, room - each * length, taken[:full])
            rooms |= _put(open_packs, room - rest * length, taken[full:])
            left -= placed
    return packs


def _joined(arrays: list[Integers]) -> Integers:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _put(open_packs: dict[int, list[Integers]], room: int, packs: Integers) -> int:
    """Keep packs that have some room; return the bit of that room."""
    if room == 0 or not len(packs):
        return 0
    open_packs.setdefault(room, []).append(packs)
    return 1 << room
