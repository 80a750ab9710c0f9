"""Megatron's indexed data set: PREFIX.bin (tokens) and PREFIX.idx (where each sequence and document lies).

PREFIX.bin has no header: the tokens of all sequences one after another, in one dtype. PREFIX.idx, little-endian: magic (9 bytes),
uint64 version 1, uint8 dtype code, uint64 number of sequences S, uint64 length D of the document array, int32[S] tokens per
sequence, int64[S] byte offset of each, int64[D] document boundaries as sequence indices, from 0 to S.
Source: megatron.core.datasets.indexed_dataset, megatron-core 0.19; the bytes are the same, and a test compares them. Written anew
because importing that module loads torch, and because its index is a Python list in memory.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.errors import InputError
from megatron_instruct.index_format import DTYPES, HEADER, MAGIC, VERSION
from megatron_instruct.records import ROLES_SUFFIX

Tokens = npt.NDArray[Any]

_CHUNK = 1 << 20
"""Entries of the index written at a time."""


def bin_file(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_file(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def roles_file(prefix: Path) -> Path:
    """Return the file that holds the role of each token, one byte each, where there are roles."""
    return prefix.with_name(prefix.name + ROLES_SUFFIX)


def write_index(
    stream: IO[bytes],
    dtype: np.dtype[Any],
    lengths: Sequence[npt.NDArray[np.int32]],
    *,
    documents: Sequence[npt.NDArray[np.int32]] | None = None,
) -> None:
    """Write the .idx of a data set.

    lengths: tokens per sequence, as one or more arrays (memory-mapped ones are read piece by piece). documents: sequences per document,
    likewise; None where every document is one sequence.
    """
    count = sum(len(part) for part in lengths)
    code = next(code for code, known in DTYPES.items() if known == dtype)
    bounds = count + 1 if documents is None else sum(len(part) for part in documents) + 1
    stream.write(HEADER.pack(MAGIC, VERSION, code, count, bounds))
    for piece in _pieces(lengths):
        stream.write(piece.astype("<i4").tobytes())
    for ends in _sums(lengths, dtype.itemsize):
        stream.write(ends[:-1].tobytes())
    if documents is None:
        for start in range(0, count + 1, _CHUNK):
            stream.write(np.arange(start, min(start + _CHUNK, count + 1), dtype="<i8").tobytes())
    else:
        stream.write(struct.pack("<q", 0))
        for ends in _sums(documents, 1):
            stream.write(ends[1:].tobytes())


def _sums(counts: Iterable[npt.NDArray[np.int32]], factor: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield for one run of counts after another the sum before each of them, and at last the sum of all until then, times `factor`."""
    total = 0
    for piece in _pieces(counts):
        ends = np.empty(len(piece) + 1, dtype="<i8")
        ends[0] = total
        np.cumsum(piece, dtype="<i8", out=ends[1:])
        ends[1:] *= factor
        ends[1:] += total
        total = int(ends[-1])
        yield ends


def _pieces(lengths: Iterable[npt.NDArray[np.int32]]) -> Iterator[npt.NDArray[np.int32]]:
    for part in lengths:
        for start in range(0, len(part), _CHUNK):
            yield part[start : start + _CHUNK]


class IndexedDataset:
    """A data set opened for reading, memory-mapped. Raises InputError, with the first fault, for files that are none.

    sequence_lengths: int32 [S] tokens; sequence_offsets: int64 [S] bytes; document_bounds: int64 [D]; tokens: [N] of `dtype`;
    has_modes: each sequence has a mode, as in multimodal data.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = idx_file(prefix)
        for file in (index, bin_file(prefix)):
            if not file.is_file():
                raise InputError(f"{file}: no such file; give the data set's prefix, without .bin or .idx.")
        with open(index, "rb") as stream:
            header = stream.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise InputError(f"{index} is not the index of a Megatron indexed data set: its first bytes are {header[:9]!r}.")
        _, version, code, sequences, bounds = HEADER.unpack(header)
        if version != VERSION or code not in DTYPES:
            raise InputError(f"{index} has version {version} and dtype code {code}; known are version {VERSION} and codes 1 to 8.")
        self.dtype = DTYPES[code]
        size, needed = index.stat().st_size, HEADER.size + 12 * sequences + 8 * bounds
        if size not in (needed, needed + sequences):  # one byte more per sequence holds its mode, in multimodal data
            raise InputError(f"{index} has {size} bytes; {sequences} sequences and {bounds} document bounds take {needed}.")
        self.has_modes = size != needed
        self.sequence_lengths: npt.NDArray[np.int32] = self._array(index, "<i4", HEADER.size, sequences)
        self.sequence_offsets: npt.NDArray[np.int64] = self._array(index, "<i8", HEADER.size + 4 * sequences, sequences)
        self.document_bounds: npt.NDArray[np.int64] = self._array(index, "<i8", HEADER.size + 12 * sequences, bounds)
        size = bin_file(prefix).stat().st_size
        if size % self.dtype.itemsize:
            raise InputError(f"{bin_file(prefix)} has {size} bytes, which is no multiple of {self.dtype.itemsize}, the size of a token.")
        self.tokens: Tokens = self._array(bin_file(prefix), self.dtype.str, 0, size // self.dtype.itemsize)

    @staticmethod
    def _array(path: Path, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
        if count == 0:
            return np.empty(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))

    def __len__(self) -> int:
        """Number of documents."""
        return max(len(self.document_bounds) - 1, 0)

    def document(self, number: int) -> Tokens:
        """Return the tokens of one document."""
        first, last = int(self.document_bounds[number]), int(self.document_bounds[number + 1])
        sequences = [self._sequence(index) for index in range(first, last)]
        return np.concatenate(sequences) if sequences else np.empty(0, self.dtype)

    def _sequence(self, index: int) -> Tokens:
        start = int(self.sequence_offsets[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[index])]
