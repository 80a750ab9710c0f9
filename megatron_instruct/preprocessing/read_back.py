"""The check of a data set just written, in one reading of each file, piece by piece: what is in it, and the SHA-256 for its manifest.

Comes in: a prefix and what must be there. Goes out: records of the files; InputError where anything differs. Memory does not grow with
the tokens: nothing is mapped that would be counted as this process's own. Does not know: parts.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.manifest import FileRecord, record
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset, bin_file, idx_file
from megatron_instruct.preprocessing.verify import count_roles, require_sound, structure_faults

_CHUNK_BYTES = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a data set must be."""

    documents: int
    tokens: int
    vocab_size: int
    eod: int | None
    """Token that every document must end with; None where they need not."""


def checked_files(prefix: Path, wanted: Wanted) -> tuple[FileRecord, FileRecord]:
    """Check PREFIX.bin and PREFIX.idx, and return their records. Raises InputError that lists the faults."""
    dataset = IndexedDataset(prefix)
    faults = structure_faults(dataset)
    require_sound(prefix, faults)
    for name, found, value in (("documents", len(dataset), wanted.documents), ("tokens", len(dataset.tokens), wanted.tokens)):
        if found != value:
            faults.append(f"{found} {name} were written where {value} were encoded")
    ends = np.concatenate(([0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)))[dataset.document_bounds]
    digest, offset, ended, smallest, largest = hashlib.sha256(), 0, 0, 0, 0
    for tokens in _pieces(bin_file(prefix), dataset.dtype):
        digest.update(tokens.data)
        smallest, largest = min(smallest, int(tokens.min())), max(largest, int(tokens.max()))
        if wanted.eod is not None:
            first, last = np.searchsorted(ends, (offset + 1, offset + len(tokens) + 1))
            ended += int((tokens[ends[first:last] - 1 - offset] == wanted.eod).sum())
        offset += len(tokens)
    if smallest < 0 or largest >= wanted.vocab_size:
        faults.append(f"token ids are {smallest} to {largest}; the tokenizer's are 0 to {wanted.vocab_size - 1}")
    if wanted.eod is not None and ended != len(dataset):
        faults.append(f"only {ended} of {len(dataset)} documents end with the end-of-document token")
    require_sound(prefix, faults)
    size = offset * dataset.dtype.itemsize
    return FileRecord(path=bin_file(prefix).name, bytes=size, sha256=digest.hexdigest()), record(
        idx_file(prefix), relative_to=prefix.parent
    )


def checked_roles(path: Path, prefix: Path, wanted: Wanted) -> tuple[FileRecord, Mapping[str, int]]:
    """Check PREFIX.roles, and return its record and the number of tokens of each role."""
    digest = hashlib.sha256()

    def digested() -> Iterator[npt.NDArray[np.uint8]]:
        for codes in _pieces(path, np.dtype(np.uint8)):
            digest.update(codes.data)
            yield codes

    roles, faults = count_roles(path.name, digested(), wanted.tokens)
    require_sound(prefix, faults)
    return FileRecord(path=path.name, bytes=wanted.tokens, sha256=digest.hexdigest()), roles


def _pieces(path: Path, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    buffer = bytearray(_CHUNK_BYTES)
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            yield np.frombuffer(buffer, dtype=dtype, count=size // dtype.itemsize)
