"""Writes the files of one part (see part_files.py), in the order of the input, and counts. Does not know: tokenizers."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.corpora.read import BrokenRecord
from megatron_instruct.preprocessing.blocks import Block
from megatron_instruct.preprocessing.documents import set_aside_rows
from megatron_instruct.preprocessing.part_files import (
    REJECTS,
    PartSummary,
    bin_name,
    documents_name,
    plain_roles,
    roles_name,
    sequences_name,
)
from megatron_instruct.preprocessing.roles import STRADDLES, plain_codes
from megatron_instruct.preprocessing.tokens import Tokens


class PartWriter:
    """The open files of one part, and its counts."""

    def __init__(
        self, folder: Path, stack: ExitStack, *, json_keys: Sequence[str], dtype: np.dtype[Any], with_sentences: bool, ended: bool
    ) -> None:
        """stack: closes the files. ended: each document ends with the end-of-document token."""
        self._folder, self._stack, self._dtype, self._ended = folder, stack, dtype, ended
        self._bins = {key: self._open(bin_name(key)) for key in json_keys}
        self._sequences = {key: self._open(sequences_name(key)) for key in json_keys}
        self._documents = {key: self._open(documents_name(key)) for key in json_keys} if with_sentences else {}
        self._roles: dict[str, IO[bytes]] = {}
        self._rejects = self._open(REJECTS)
        self._kept = self._straddling = 0
        self._written, self._tokens = Counter(dict.fromkeys(json_keys, 0)), Counter(dict.fromkeys(json_keys, 0))
        self._rejected: Counter[str] = Counter()
        self._rendering: Counter[str] = Counter()
        self._pairs_set_aside: Counter[str] = Counter()
        self._bank: Mapping[str, Any] | None = None

    def _open(self, name: str) -> IO[bytes]:
        return self._stack.enter_context(open(self._folder / name, "wb"))

    def write(self, key: str, tokens: Tokens) -> None:
        """Write documents of one JSON key."""
        if tokens.codes is not None or key in self._roles:
            self._write_roles(key, tokens)
        self._bins[key].write(np.ascontiguousarray(tokens.ids, dtype=self._dtype).data)
        self._sequences[key].write(np.ascontiguousarray(tokens.sequences, dtype="<i4").data)
        if self._documents:
            self._documents[key].write(np.ascontiguousarray(tokens.documents, dtype="<i4").data)
        self._tokens[key] += len(tokens.ids)
        self._written[key] += len(tokens.documents)

    def _write_roles(self, key: str, tokens: Tokens) -> None:
        if key not in self._roles:  # all before was context
            for file in (self._sequences[key], *self._documents.values()):
                file.flush()
            self._roles[key] = self._open(roles_name(key))
            self._roles[key].write(plain_roles(self._folder, key, ended=self._ended).data)
        codes = tokens.codes
        if codes is None:
            codes = plain_codes(tokens.sequences, np.cumsum(tokens.documents) - 1, ended=self._ended)
        self._straddling += int(np.count_nonzero(codes & STRADDLES))
        self._roles[key].write((codes & ~np.uint8(STRADDLES)).data)

    def count(self, block: Block, kept: npt.NDArray[np.bool_], rejected: Sequence[BrokenRecord]) -> None:
        """Count the documents of a block, and write what is not in the data set to the rejects file, by line.

        That is what is rejected, and of documents rendered here the pairs that no template could take.
        """
        rows: list[tuple[int, Mapping[str, Any]]] = [(one.line, _row(one)) for one in rejected]
        self._kept += int(kept.sum())
        self._rejected.update(one.reason for one in rejected)
        rendered = [(block.numbers[place], rendering) for place, rendering in block.rendered.items() if kept[place]]
        for line, rendering in rendered:
            if rendering.set_aside:
                self._pairs_set_aside.update(one.reason for one in rendering.set_aside)
                rows += [(line, row) for row in set_aside_rows(rendering, block.path, line)]
        if rendered:
            self._bank = rendered[0][1].document.provenance["bank"]
            pairs, set_aside = sum(one.pairs for _, one in rendered), sum(len(one.set_aside) for _, one in rendered)
            self._rendering.update(examples=len(rendered), pairs_rendered=pairs, pairs_set_aside=set_aside)
        for _, row in sorted(rows, key=lambda numbered: numbered[0]):
            self._rejects.write(json.dumps(row).encode() + b"\n")

    def summary(self) -> PartSummary:
        return PartSummary(
            documents_in=self._kept + self._rejected.total(),
            documents_kept=self._kept,
            documents=dict(self._written),
            tokens=dict(self._tokens),
            rejected=dict(sorted(self._rejected.items())),
            rendering=dict(sorted(self._rendering.items())),
            pairs_set_aside=dict(sorted(self._pairs_set_aside.items())),
            bank=self._bank,
            has_roles=bool(self._roles),
            straddling=self._straddling,
        )


def _row(broken: BrokenRecord) -> dict[str, Any]:
    return {"path": str(broken.path), "line": broken.line, "reason": broken.reason, "detail": broken.detail, "raw": broken.raw}
