"""One part of the examples -> a folder with its documents, whole or absent. The work of one worker process.

The folder holds augmented.jsonl, rejects.jsonl and summary.json. Does not know: other parts, other workers.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import msgspec

from megatron_instruct.corpora.lines import is_utf8, json_lines, line_blocks
from megatron_instruct.corpora.part_folders import read_summary, write_summary
from megatron_instruct.corpora.parts import Part
from megatron_instruct.corpora.read import BrokenRecord, Record, read_slice
from megatron_instruct.corpora.workers import DoPart
from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_folder
from megatron_instruct.records import MShotExample
from megatron_instruct.templates.bank import Bank, load_bank
from megatron_instruct.templates.rendering import Rendering, fault_of, render

AUGMENTED, REJECTS = "augmented.jsonl", "rejects.jsonl"
_BUFFER = 1 << 18
_COUNTS = ("examples", "documents", "examples_rejected", "pairs", "pairs_rendered", "pairs_rejected", "inverted")
_encoded = msgspec.json.Encoder().encode


@dataclass(frozen=True, kw_only=True)
class RenderJob:
    """What every worker needs to render parts."""

    bank: Path
    extension: Path | None
    fingerprint: str
    """Of the bank as the parent process loaded it."""
    seed: int
    on_error: Literal["stop", "reject"]
    log_interval: int = 1000
    """Examples between two reports."""

    def ready(self) -> DoPart:
        """Raises InputError where the bank is another than the parent process loaded."""
        bank = load_bank(self.bank, extension=self.extension)
        if bank.fingerprint != self.fingerprint:
            raise InputError(f"bank {self.bank} changed while it was in use; run the same command again.")

        def do_part(part: Part, folder: Path, report: Callable[[int], None]) -> None:
            with atomic_folder(folder) as unfinished:
                with open(unfinished / AUGMENTED, "wb", _BUFFER) as documents, open(unfinished / REJECTS, "wb", _BUFFER) as rejects:
                    writer = _Writer(self, bank, documents, rejects)
                    for item in _examples(part):
                        writer.write(item)
                        report(1)
                summary = {"counts": writer.counts, "rejected": writer.rejected}
                write_summary(unfinished, part, summary)

        return do_part


def total_of(folders: list[Path]) -> tuple[Counter[str], Counter[str]]:
    """Return the counts of finished parts, and what they rejected by reason."""
    counts, rejected = Counter(dict.fromkeys(_COUNTS, 0)), Counter[str]()
    for folder in folders:
        summary = read_summary(folder)
        counts.update(summary["counts"])
        rejected.update(summary["rejected"])
    return counts, rejected


class _Read(NamedTuple):
    """An example, and what it was read from: a line, or the record of one."""

    example: MShotExample
    path: Path
    line: int
    source: bytes | dict[str, Any]

    def broken(self, reason: str, detail: str) -> BrokenRecord:
        value = msgspec.json.decode(self.source) if isinstance(self.source, bytes) else self.source
        return Record(self.path, self.line, value).broken(reason, detail)


def _examples(part: Part) -> Iterator[_Read | BrokenRecord]:
    """Yield the examples of a part. Lines that msgspec reads as one are taken at once; what it refuses, the careful readers look at."""
    for piece in part.slices:
        number, found = piece.first_line - 1, False
        if piece.path.suffix == ".jsonl":
            for content in line_blocks(piece):
                all_utf8 = is_utf8(content)
                for line in content.removesuffix(b"\n").split(b"\n"):
                    number += 1
                    example = MShotExample.from_line(line) if all_utf8 or is_utf8(line) else None
                    if example is not None:
                        yield _Read(example, piece.path, number, line)
                    else:
                        yield from map(_checked, json_lines([line], piece.path, first_line=number))
                    found = found or bool(line.strip())
        if not found and (piece.whole or piece.path.suffix != ".jsonl"):
            yield from map(_checked, read_slice(piece))


def _checked(record: Record | BrokenRecord) -> _Read | BrokenRecord:
    if isinstance(record, BrokenRecord):
        return record
    try:
        return _Read(MShotExample.from_json(record.value, where=record.where), *record)
    except InputError as error:
        return record.broken("no example", str(error).removeprefix(f"{record.where}: "))


class _Writer:
    """Renders and writes one example after another, and counts.

    examples = documents + examples_rejected; pairs = pairs_rendered + pairs_rejected, over the examples that became documents.
    """

    def __init__(self, job: RenderJob, bank: Bank, documents: IO[bytes], rejects: IO[bytes]) -> None:
        self._job, self._bank, self._documents, self._rejects = job, bank, documents, rejects
        self.counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
        self.rejected: Counter[str] = Counter()

    def write(self, item: _Read | BrokenRecord) -> None:
        self.counts["examples"] += 1
        rendered = item if isinstance(item, BrokenRecord) else self._rendered(item)
        if isinstance(rendered, BrokenRecord):
            self._reject_example(rendered)
            return
        rendering, line, rows = rendered
        self._documents.write(line)
        self._rejects.writelines(rows)
        self.counts["documents"] += 1
        self.counts["pairs"] += rendering.pairs + len(rows)
        self.counts["pairs_rendered"] += rendering.pairs
        self.counts["pairs_rejected"] += len(rows)
        self.counts[f"layout_{rendering.layout}"] += 1
        self.counts["inverted"] += rendering.inverted
        if rows:
            self.rejected.update(one.reason for one in rendering.set_aside)

    def _rendered(self, read: _Read) -> tuple[Rendering, bytes, list[bytes]] | BrokenRecord:
        """Return the rendered example, its line of augmented.jsonl, and those of rejects.jsonl for pairs that were set aside."""
        rendering = render(read.example, self._bank, seed=self._job.seed)
        rows: list[dict[str, Any]] = [
            {"file": str(read.path), "line": read.line, "reason": one.reason, "raw_text": one.raw_text_id, "pair": one.pair.to_json()}
            for one in rendering.set_aside
        ]
        if "\0" not in rendering.document.text:
            try:
                return rendering, _line(rendering.document.to_json()), list(map(_line, rows))
            except UnicodeEncodeError:
                pass  # said in words below
        fault = fault_of(rendering)
        assert fault is not None, "what cannot be encoded has a fault"
        return read.broken(*fault)

    def _reject_example(self, broken: BrokenRecord) -> None:
        if self._job.on_error == "stop":
            raise InputError(
                f"{broken.where}: {broken.reason}: {broken.detail}; mend the line, or set such lines aside with --on-error reject."
            )
        self.counts["examples_rejected"] += 1
        self.rejected[broken.reason] += 1
        row = {"file": str(broken.path), "line": broken.line, "reason": broken.reason, "detail": broken.detail, "raw": broken.raw}
        self._rejects.write(json.dumps(row).encode() + b"\n")  # which escapes what is no Unicode


def _line(value: object) -> bytes:
    return _encoded(value) + b"\n"
