"""Finished parts, in the order of the input -> one indexed data set and one rejects file."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.files import atomic_write
from megatron_instruct.preprocessing.encode import REJECTS, bin_name, lengths_name
from megatron_instruct.preprocessing.indexed_dataset import bin_file, idx_file, write_index

_CHUNK = 1 << 22


def merge_tokens(folders: Sequence[Path], key: str, prefix: Path, dtype: np.dtype[Any]) -> None:
    """Write PREFIX.bin and PREFIX.idx from the parts in `folders`."""
    _concatenate([folder / bin_name(key) for folder in folders], bin_file(prefix))
    with atomic_write(idx_file(prefix), "wb") as stream:
        write_index(stream, dtype, [_lengths(folder / lengths_name(key)) for folder in folders])


def merge_rejects(folders: Sequence[Path], target: Path) -> None:
    """Write one rejects file from those of the parts."""
    _concatenate([folder / REJECTS for folder in folders], target)


def _concatenate(sources: Sequence[Path], target: Path) -> None:
    with atomic_write(target, "wb") as stream:
        for source in sources:
            with open(source, "rb") as part:
                shutil.copyfileobj(part, stream, _CHUNK)


def _lengths(path: Path) -> npt.NDArray[np.int32]:
    if path.stat().st_size == 0:
        return np.empty(0, "<i4")
    return np.memmap(path, dtype="<i4", mode="r")
