"""Task data -> documents to tune an instruction synthesizer on: draw, write, count, manifest last.

Comes in: rows of contexts with questions and answers, many data sets. Goes out: OUTPUT_DIR/documents/DATA_SET.jsonl, one document an
example; OUTPUT_DIR/{rejects.jsonl,manifest.json}. The input is read twice, so that memory holds the ids of the drawn rows alone.
Method: Instruction Pre-Training (arXiv:2406.14491), section 2.1. Does not know: training.
"""

import hashlib
import heapq
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_instruct.config import run_tool
from megatron_instruct.corpora.read import REJECTS, BrokenRecord, find_files, require_outside
from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_folder, atomic_write
from megatron_instruct.manifest import FileRecord, Manifest, finished, records, write_manifest
from megatron_instruct.progress import Progress
from megatron_instruct.prompt_formats.prompt_format import load_prompt_format
from megatron_instruct.tokenizer import load_tokenizer
from megatron_instruct.tuning.config import PrepareConfig
from megatron_instruct.tuning.documents import DocumentWriter
from megatron_instruct.tuning.rows import TaskRow, read_rows
from megatron_instruct.workspace import held

STAGE = "prepare-synthesizer-data"
_RESULT = "documents"


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """What a run has counted."""

    counts: Counter[str]
    rejected: Counter[str]


def run(config: PrepareConfig) -> Manifest:
    """Do the stage; return its manifest."""
    tokenizer, format_ = load_tokenizer(config.tokenizer_model), load_prompt_format(config.prompt_format)
    writer = DocumentWriter(format_, tokenizer, seq_length=config.seq_length, long_contexts=config.long_contexts)
    require_outside(config.input, config.output_dir, [f"{_RESULT}/DATA_SET.jsonl"])
    files = find_files(config.input)
    inputs = records(files)
    names = ("seq_length", "max_examples", "long_contexts", "seed", "on_error")
    settings = {
        **{name: getattr(config, name) for name in names},
        "prompt_format": format_.fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }
    place = config.output_dir / "manifest.json"
    with held(config.output_dir, [config.output_dir / _RESULT, config.output_dir / REJECTS]):
        if (done := finished(place, stage=STAGE, settings=settings, inputs=inputs)) is not None:
            print(f"Finished already: {config.output_dir}.")
            return done
        drawn = _draw(config, files)
        counted = _write(config, files, drawn, writer)
        manifest = _manifest(config, settings, inputs, counted)
        write_manifest(place, manifest)
    _describe(config, manifest)
    return manifest


def _draw(config: PrepareConfig, files: Sequence[Path]) -> dict[str, frozenset[str]]:
    """Return the ids of the rows of each data set that are taken: those whose hashes with the seed are the smallest."""
    heaps: dict[str, list[tuple[int, str]]] = {}
    for row in _rows(config, files, "draw examples"):
        if isinstance(row, BrokenRecord):
            continue
        heap = heaps.setdefault(row.data_set, [])
        entry = (-_rank(config.seed, row.id), row.id)
        if len(heap) < config.max_examples:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)
    if not heaps:
        raise InputError(f"no row is left of {', '.join(config.input)}; each was set aside.")
    return {name: frozenset(id_ for _, id_ in heap) for name, heap in sorted(heaps.items())}


def _rank(seed: int, id_: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{id_}".encode(), digest_size=8).digest())


def _rows(config: PrepareConfig, files: Sequence[Path], what: str) -> Iterator[TaskRow | BrokenRecord]:
    with Progress(what, total=None, unit="rows") as progress:
        for row in read_rows(files, on_error=config.on_error):
            progress.add()
            yield row


def _write(config: PrepareConfig, files: Sequence[Path], drawn: Mapping[str, frozenset[str]], writer: DocumentWriter) -> _Counted:
    """Write the documents of the drawn rows in the order of the input, and what is set aside."""
    counted = _Counted(counts=Counter(), rejected=Counter())
    names = {name: _file_name(name, drawn) for name in drawn}
    result = config.output_dir / _RESULT
    shutil.rmtree(result, ignore_errors=True)  # of a run that was killed before its manifest
    with atomic_folder(result) as unfinished, ExitStack() as stack:
        rejects = stack.enter_context(atomic_write(config.output_dir / REJECTS))
        streams = {name: stack.enter_context(open(unfinished / f"{names[name]}.jsonl", "w", encoding="utf-8")) for name in drawn}
        for row in _rows(config, files, "write documents"):
            counted.counts["rows"] += 1
            if isinstance(row, BrokenRecord):
                _reject(rejects, counted, "row", row.where, row.reason, row.raw, row.detail)
            elif row.id in drawn[row.data_set]:
                _write_row(row, writer, streams[row.data_set], rejects, counted)
            else:
                counted.counts["rows_not_drawn"] += 1
        for name in drawn:
            if not counted.counts[f"examples of {name}"]:
                (unfinished / f"{names[name]}.jsonl").unlink()
    return counted


def _write_row(row: TaskRow, writer: DocumentWriter, documents: IO[str], rejects: IO[str], counted: _Counted) -> None:
    written = writer.write(row)
    for dropped in written.dropped:
        what = "row" if written.document is None and dropped is written.dropped[-1] else "pair"
        _reject(rejects, counted, what, row.id, dropped.reason, dropped.content, dropped.detail)
    if written.document is not None:
        documents.write(json.dumps(written.document.to_json(), ensure_ascii=False) + "\n")
        counted.counts.update({"examples": 1, "pairs": written.pairs, "tokens": written.tokens, "cut": int(written.cut)})
        counted.counts[f"examples of {row.data_set}"] += 1


def _reject(stream: IO[str], counted: _Counted, what: str, where: str, reason: str, content: str, detail: str) -> None:
    counted.rejected[f"{what}: {reason}"] += 1
    row = {"where": where, "what": what, "reason": reason, "content": content, "detail": detail}
    stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _file_name(name: str, names: Mapping[str, Any]) -> str:
    """Return a data set's name as a file can have it. Raises InputError where two become one."""
    plain = re.sub(r"[^\w.-]+", "_", name)
    twins = [other for other in names if other != name and re.sub(r"[^\w.-]+", "_", other) == plain]
    if twins:
        raise InputError(f"the data sets {name!r} and {twins[0]!r} would both be written to {plain}.jsonl; rename one.")
    return plain


def _manifest(config: PrepareConfig, settings: Mapping[str, Any], inputs: tuple[FileRecord, ...], counted: _Counted) -> Manifest:
    if not counted.counts["examples"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counted.rejected.items()))
        raise InputError(f"no example is left of {', '.join(config.input)}: {reasons}.")
    return Manifest(
        stage=STAGE,
        settings=settings,
        inputs=inputs,
        outputs=records([config.output_dir / _RESULT, config.output_dir / REJECTS], relative_to=config.output_dir),
        counts=dict(sorted(counted.counts.items())),
        rejected=dict(sorted(counted.rejected.items())),
    )


def _describe(config: PrepareConfig, manifest: Manifest) -> None:
    counts = manifest.counts
    sets = sum(name.startswith("examples of ") for name in counts)
    print(
        f"{config.output_dir / _RESULT}: {counts['examples']:,} examples of {sets} data sets, {counts['pairs']:,} pairs, "
        f"{counts['tokens']:,} tokens; "
        f"{counts.get('rows_not_drawn', 0):,} rows above max_examples, {counts.get('cut', 0):,} contexts cut"
    )
    if manifest.rejected:
        print(f"Set aside, in {config.output_dir / REJECTS}: " + ", ".join(f"{r} {n:,}" for r, n in manifest.rejected.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(PrepareConfig, run, argv, prog="prepare_synthesizer_data.py")
