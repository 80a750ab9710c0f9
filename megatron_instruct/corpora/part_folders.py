"""The folders that parts of a corpus become: whole or absent, each with what it says of itself in summary.json.

Does not know: what else such a folder holds, or who makes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_instruct.corpora.parts import Part
from megatron_instruct.files import read_json
from megatron_instruct.fingerprints import require_unchanged

_SUMMARY = "summary.json"


def write_summary(folder: Path, part: Part, summary: Mapping[str, Any]) -> None:
    """Write it into the unfinished folder of a part, which atomic_folder flushes to the disk as a whole.

    Raises InputError where a file of the part changed since its state was taken: the folder may hold what nobody fingerprinted.
    """
    if part.states is not None:
        require_unchanged([piece.path for piece in part.slices], part.states)
    (folder / _SUMMARY).write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")


def read_summary(folder: Path) -> dict[str, Any]:
    """Return what a finished part says of itself, or raise InputError."""
    summary: dict[str, Any] = read_json(folder / _SUMMARY)
    return summary


def unfinished(work: Mapping[Path, Part]) -> dict[Path, Part]:
    """Return the parts, by folder, that are still to be worked on."""
    return {folder: part for folder, part in work.items() if not (folder / _SUMMARY).is_file()}


def say_what_is_left(work: Mapping[Path, Part], left: Mapping[Path, Part]) -> None:
    if len(left) < len(work):
        print(f"{len(work) - len(left)} of {len(work)} parts are finished already; going on with the rest.")
