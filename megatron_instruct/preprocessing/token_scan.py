"""One reading of a data set's tokens, piece by piece: their range, how many documents end as they should, the SHA-256 of the file.

Comes in: an opened data set. Goes out: a `TokenScan`. Memory does not grow with the tokens, nor with the documents: nothing is mapped
that would be counted as this process's own, but for the index. Does not know: what the values should be.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset, bin_file

_PIECE_BYTES = 1 << 23
_DOCUMENTS = 1 << 18
"""Documents whose ends are looked up at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScan:
    """What PREFIX.bin holds."""

    tokens: int
    smallest: int | None
    """Smallest token id; None without tokens."""
    largest: int | None
    ended: int | None
    """Documents whose last token is the end-of-document token; None where that was not asked for."""
    sha256: str


def scan_tokens(dataset: IndexedDataset, *, eod: int | None) -> TokenScan:
    """Read PREFIX.bin once. eod: the end-of-document token, to count it at the ends of documents; the index must be sound then."""
    digest, offset, ended = hashlib.sha256(), 0, 0
    smallest: int | None = None
    largest: int | None = None
    ends = _DocumentEnds(dataset) if eod is not None else None
    with ThreadPoolExecutor(1) as pool:  # SHA-256 takes as long as all the rest
        for tokens in pieces_of(bin_file(dataset.prefix), dataset.dtype):
            digested = pool.submit(digest.update, tokens.data)
            low, high = int(tokens.min()), int(tokens.max())
            smallest = low if smallest is None else min(smallest, low)
            largest = high if largest is None else max(largest, high)
            if ends is not None:
                ended += int((tokens[ends.up_to(offset + len(tokens)) - 1 - offset] == eod).sum())
            offset += len(tokens)
            digested.result()  # before the buffer is filled anew
    return TokenScan(
        tokens=offset, smallest=smallest, largest=largest, ended=ended if ends is not None else None, sha256=digest.hexdigest()
    )


def pieces_of(path: Path, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield the content of a file, read into one buffer again and again."""
    buffer = bytearray(_PIECE_BYTES)
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            yield np.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize)


def document_tokens(dataset: IndexedDataset) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield, for one run of documents after another, the first token of each and the token past its last."""
    size, sequences = dataset.dtype.itemsize, len(dataset.sequence_lengths)
    for start in range(0, len(dataset), _DOCUMENTS):
        bounds = dataset.document_bounds[start : min(start + _DOCUMENTS, len(dataset)) + 1]
        at = np.minimum(bounds, max(sequences - 1, 0))
        tokens = np.where(bounds < sequences, dataset.sequence_offsets[at] // size, len(dataset.tokens))
        yield tokens[:-1], tokens[1:]


class _DocumentEnds:
    """The tokens past the last of each document that is not empty, in order, handed out as far as they are asked for."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self._more = (end[end > first] for first, end in document_tokens(dataset))
        self._ends = np.empty(0, dtype=np.int64)

    def up_to(self, token: int) -> npt.NDArray[np.int64]:
        """Return the next ends until `token`, itself included."""
        while (not len(self._ends) or self._ends[-1] <= token) and (more := next(self._more, None)) is not None:
            self._ends = np.concatenate((self._ends, more))
        count = np.searchsorted(self._ends, token, side="right")
        found, self._ends = self._ends[:count], self._ends[count:]
        return found
