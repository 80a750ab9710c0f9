"""The files of a finished part, and what it says of itself.

For each JSON key: KEY.bin (tokens), KEY.sequences (int32, tokens per sequence), with sentences KEY.documents (int32, sequences per
document), and KEY.roles (uint8 per token) where a document of the part has roles; rejects.jsonl; summary.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.preprocessing.roles import Codes, plain_codes

REJECTS = "rejects.jsonl"


@dataclass(frozen=True, kw_only=True)
class PartSummary:
    """What a finished part says of itself. documents_in = documents_kept + the sum of rejected."""

    documents_in: int
    documents_kept: int
    documents: dict[str, int]
    """Documents written, by JSON key: those kept, the pieces of long ones counted singly."""
    tokens: dict[str, int]
    """By JSON key."""
    rejected: dict[str, int]
    """Documents set aside, by reason."""
    rendering: dict[str, int]
    """Examples rendered here, their pairs, and what became of those; empty where there was none."""
    pairs_set_aside: dict[str, int]
    """By reason."""
    bank: Mapping[str, Any] | None
    """Language, version and SHA-256 of the templates that were used."""
    has_roles: bool
    straddling: int
    """Tokens that span several roles."""


def bin_name(key: str) -> str:
    return f"{key}.bin"


def roles_name(key: str) -> str:
    return f"{key}.roles"


def sequences_name(key: str) -> str:
    return f"{key}.sequences"


def documents_name(key: str) -> str:
    return f"{key}.documents"


def read_counts(path: Path) -> npt.NDArray[np.int32]:
    """Return the counts in a file, memory-mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, "<i4")
    return np.memmap(path, dtype="<i4", mode="r")


def document_counts(folder: Path, key: str) -> npt.NDArray[np.int32]:
    """Return the sequences of each document of a part."""
    if (folder / documents_name(key)).is_file():
        return read_counts(folder / documents_name(key))
    return np.ones(len(read_counts(folder / sequences_name(key))), dtype=np.int32)


def plain_roles(folder: Path, key: str, *, ended: bool) -> Codes:
    """Return the roles of a part whose documents have none of their own. ended: they end with the end-of-document token."""
    return plain_codes(read_counts(folder / sequences_name(key)), np.cumsum(document_counts(folder, key)) - 1, ended=ended)
