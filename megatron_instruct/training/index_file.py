"""What PREFIX.idx says of a data set before it is used: the dtype of its tokens and the length of each sequence.

Comes in: a file in Megatron's format (megatron.core.datasets.indexed_dataset, megatron-core 0.19). Goes out: small values, and lengths that
stay on the disk until they are looked at. Does not know: torch, megatron-core, manifests.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.index_format import DTYPES, HEADER, MAGIC, VERSION

_SHARES = ("training", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class IndexFile:
    """A data set's index."""

    prefix: str
    dtype: np.dtype[Any]
    """Of the tokens in PREFIX.bin."""
    lengths: npt.NDArray[np.int32]
    """Tokens of each sequence; megatron-core's samples know sequences only, which are documents unless documents were split."""

    def tokens(self, share: tuple[float, float] = (0.0, 1.0)) -> int:
        """Return the number of tokens between two bounds of `split`, cut as megatron-core cuts: by number of sequences."""
        start, stop = (round(bound * float(len(self.lengths))) for bound in share)
        return int(self.lengths[start:stop].sum(dtype=np.int64))


def read_index(prefix: str) -> IndexFile:
    """Read the header and map the lengths. Raises InputError for a file that is no index, is cut short, or does not fit PREFIX.bin."""
    path, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    size = path.stat().st_size
    with open(path, "rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise InputError(f"{path} is no index of a Megatron data set: it does not begin with {MAGIC!r}; preprocess the data again.")
    _, version, code, count, bounds = HEADER.unpack(header)
    if version != VERSION or code not in DTYPES:
        raise InputError(
            f"{path} has version {version} and dtype code {code}; this reads version {VERSION} and the codes 1 to {len(DTYPES)}."
        )
    if size < HEADER.size + 12 * count + 8 * bounds:
        raise InputError(f"{path} has {size} bytes, too few for its {count} sequences: it is cut short; preprocess the data again.")
    lengths = np.memmap(path, dtype="<i4", mode="r", offset=HEADER.size, shape=(count,)) if count else np.zeros(0, dtype="<i4")
    index = IndexFile(prefix=prefix, dtype=DTYPES[code], lengths=lengths)
    needed = index.tokens() * index.dtype.itemsize
    if tokens.stat().st_size != needed:
        raise InputError(
            f"{tokens} has {tokens.stat().st_size} bytes, and {path.name} tells of {index.tokens()} tokens in {needed} bytes: they do not "
            "belong together; preprocess the data again."
        )
    return index


def shares_of(split: str) -> list[tuple[float, float]]:
    """Return the bounds of the training, validation and test share, each from 0 to 1. Raises ConfigError unless `split` is three shares."""
    parts = split.split(",")
    if len(parts) != 3 or not all(_is_share(part) for part in parts) or not 0.0 < sum(map(float, parts)) < float("inf"):
        raise ConfigError(f"split={split!r} must be three shares for training, validation and test, such as 969,30,1.")
    total = sum(map(float, parts))
    ends = list(itertools.accumulate(float(part) / total for part in parts))  # rounded as megatron-core rounds
    return list(zip([0.0, *ends[:2]], ends, strict=True))


def check_share(index: IndexFile, split: str | None, *, part: int) -> int:
    """Return the tokens of a data set's share: 0 training, 1 validation, 2 test. split: None where the data set is taken whole.

    Raises InputError where it has no token: megatron-core would look for its end forever.
    """
    share = (0.0, 1.0) if split is None else shares_of(split)[part]
    tokens = index.tokens(share)
    if tokens == 0:
        cut = "" if split is None else f" in its {_SHARES[part]} share (split={split!r} of {len(index.lengths)} documents)"
        raise InputError(
            f"data set {index.prefix} has no token{cut}; leave it out of the blend, give it more documents, or "
            f"{'preprocess it again' if split is None else 'give train_data_path and valid_data_path, which are not divided'}."
        )
    return tokens


def _is_share(word: str) -> bool:
    try:
        return float(word) >= 0.0
    except ValueError:
        return False
