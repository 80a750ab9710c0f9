"""Finished parts -> one indexed data set, and its roles.

Comes in: folders of parts in the order of the input (see part_files.py). Goes out: PREFIX.bin, .idx, .roles where a part has roles or the
documents are packed, each under a temporary name until it is whole. Memory does not grow with the tokens, only with the documents.
"""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.files import atomic_write, concatenate
from megatron_instruct.preprocessing.indexed_dataset import bin_file, idx_file, roles_file, write_index
from megatron_instruct.preprocessing.layout import Integers, Layout, layout, ragged
from megatron_instruct.preprocessing.part_files import (
    bin_name,
    document_counts,
    documents_name,
    plain_roles,
    read_counts,
    roles_name,
    sequences_name,
)
from megatron_instruct.preprocessing.roles import PADDING

_CHUNK_TOKENS = 1 << 20
_DROP_EVERY = 16
"""Chunks after which pages that were read are given back."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What decides how documents are laid out."""

    dtype: np.dtype[Any]
    eod: int
    ended: bool
    """Each document ends with the end-of-document token."""
    shuffle_seed: int | None
    pack_sequence_length: int | None


def merge_tokens(folders: Sequence[Path], key: str, prefix: Path, options: MergeOptions, *, with_roles: bool) -> Layout | None:
    """Write the data set of one JSON key; return how its documents lie, None for the order of the input."""
    plan = None
    if options.shuffle_seed is not None or options.pack_sequence_length is not None:
        plan = layout(
            np.concatenate([read_counts(folder / sequences_name(key)) for folder in folders]),
            np.concatenate([document_counts(folder, key) for folder in folders]),
            shuffle_seed=options.shuffle_seed,
            pack_sequence_length=options.pack_sequence_length,
        )
    _write([folder / bin_name(key) for folder in folders], bin_file(prefix), plan, options.dtype, padding=options.eod)
    if with_roles:
        for folder in folders:
            _complete_roles(folder, key, ended=options.ended)
        _write([folder / roles_name(key) for folder in folders], roles_file(prefix), plan, np.dtype(np.uint8), padding=PADDING)
    with atomic_write(idx_file(prefix), "wb") as stream:
        if plan is not None:
            write_index(stream, options.dtype, [plan.sequences], documents=[plan.documents])
        else:
            split = [folder / documents_name(key) for folder in folders]
            documents = [read_counts(path) for path in split] if all(path.is_file() for path in split) else None
            write_index(stream, options.dtype, [read_counts(folder / sequences_name(key)) for folder in folders], documents=documents)
    return plan


def _complete_roles(folder: Path, key: str, *, ended: bool) -> None:
    """Write the roles of a part whose documents have none of their own."""
    if not (folder / roles_name(key)).is_file():
        with atomic_write(folder / roles_name(key), "wb") as stream:
            stream.write(plain_roles(folder, key, ended=ended).data)


def _write(sources: Sequence[Path], target: Path, plan: Layout | None, dtype: np.dtype[Any], *, padding: int) -> None:
    if plan is None:
        concatenate(sources, target)
        return
    with atomic_write(target, "wb") as stream:
        for chunk in _chunks(_MappedParts(sources, dtype), plan, padding):
            stream.write(chunk.data)


def _chunks(parts: "_MappedParts", plan: Layout, padding: int) -> Iterator[npt.NDArray[Any]]:
    """Yield the tokens of a data set in the order of its layout, about a million at a time, never a piece divided."""
    bounds = np.unique(np.searchsorted(plan.targets, np.arange(0, plan.tokens, _CHUNK_TOKENS)))
    bounds = bounds[bounds < len(plan.targets)]  # the last piece may be longer than a chunk
    ends = [*plan.targets[bounds[1:]].tolist(), plan.tokens]
    for number, (first, last, end) in enumerate(zip(bounds, [*bounds[1:], len(plan.targets)], ends, strict=True)):
        start = int(plan.targets[first])
        chunk = np.full(end - start, padding, dtype=parts.dtype)
        pieces = slice(first, last)
        parts.gather(chunk, plan.targets[pieces] - start, plan.starts[pieces], plan.lengths[pieces])
        yield chunk
        if number % _DROP_EVERY == _DROP_EVERY - 1:
            parts.drop_pages()


class _MappedParts:
    """The token files of all parts, as if they were one."""

    def __init__(self, files: Sequence[Path], dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        sizes = [file.stat().st_size for file in files]
        self._starts: Integers = np.cumsum([0, *sizes]) // dtype.itemsize
        self._maps: list[mmap.mmap | None] = []
        for file, size in zip(files, sizes, strict=True):
            with open(file, "rb") as stream:
                self._maps.append(mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) if size else None)

    def gather(self, target: npt.NDArray[Any], places: Integers, starts: Integers, lengths: Integers) -> None:
        """Copy pieces to their places in `target`; none crosses from one part to the next."""
        owners = np.searchsorted(self._starts, starts, side="right") - 1
        for part in np.unique(owners):
            own = owners == part
            tokens = np.frombuffer(self._maps[part] or b"", dtype=self.dtype)
            target[ragged(places[own], lengths[own])] = tokens[ragged(starts[own] - self._starts[part], lengths[own])]

    def drop_pages(self) -> None:
        for mapped in self._maps:
            if mapped is not None:
                mapped.madvise(mmap.MADV_DONTNEED)
