"""The check of a data set just written, in one reading of each file, piece by piece: what is in it, and the SHA-256 for its manifest.

Comes in: a prefix and what must be there. Goes out: records of the files; InputError where anything differs. Memory does not grow with
the tokens. Does not know: parts.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_instruct.manifest import FileRecord, record
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset, bin_file, idx_file
from megatron_instruct.preprocessing.token_scan import pieces_of, scan_tokens
from megatron_instruct.preprocessing.verify import count_roles, require_sound, structure_faults


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
    scan = scan_tokens(dataset, eod=wanted.eod)
    if (scan.smallest or 0) < 0 or (scan.largest or 0) >= wanted.vocab_size:
        faults.append(f"token ids are {scan.smallest} to {scan.largest}; the tokenizer's are 0 to {wanted.vocab_size - 1}")
    if wanted.eod is not None and scan.ended != len(dataset):
        faults.append(f"only {scan.ended} of {len(dataset)} documents end with the end-of-document token")
    require_sound(prefix, faults)
    size = scan.tokens * dataset.dtype.itemsize
    return FileRecord(path=bin_file(prefix).name, bytes=size, sha256=scan.sha256), record(idx_file(prefix), relative_to=prefix.parent)


def checked_roles(path: Path, prefix: Path, wanted: Wanted) -> tuple[FileRecord, Mapping[str, int]]:
    """Check PREFIX.roles, and return its record and the number of tokens of each role."""
    digest = hashlib.sha256()

    def digested() -> Iterator[npt.NDArray[np.uint8]]:
        for codes in pieces_of(path, np.dtype(np.uint8)):
            digest.update(codes.data)
            yield codes

    roles, faults = count_roles(path.name, digested(), wanted.tokens)
    require_sound(prefix, faults)
    return FileRecord(path=path.name, bytes=wanted.tokens, sha256=digest.hexdigest()), roles
