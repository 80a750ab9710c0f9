#!/usr/bin/env python
"""A corpus divided for the quick start: texts to synthesize pairs for, texts that stay raw, and texts held out whole.

Comes in: any corpus that the tools read. Goes out: OUTPUT_DIR/{synthesize,raw,heldout,rejects}.jsonl and manifest.json.
Which text goes where depends on the seed and the text's id alone.
"""

import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_instruct.config import flat, run_tool
from megatron_instruct.corpora.read import BrokenRecord, find_files, raw_text, read_records
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import atomic_write
from megatron_instruct.manifest import Manifest, finished, records, write_manifest

STAGE = "divide corpus"
SMALLEST_CORPUS = 30


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Divide a corpus into texts to synthesize pairs for, texts that stay raw, and texts held out whole."""

    input: tuple[str, ...]
    """Files, folders or glob patterns: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt."""
    output_dir: Path
    """Folder of the three parts."""
    heldout: int = 40
    """Texts held out for the evaluation; at most a fifth of the corpus."""
    synthesize: int = 100
    """Texts that get instruction-response pairs, at most; at least a quarter of those not held out stay raw."""
    synthesize_characters: int = 90_000
    """Characters of these texts together, at most."""
    seed: int = 1234
    """Of the choice."""

    def __post_init__(self) -> None:
        for name in ("heldout", "synthesize", "synthesize_characters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")


def run(config: CorpusConfig) -> None:
    """Write the parts; the manifest last. Raises InputError for a corpus that is too small."""
    files = find_files(config.input)
    settings = {name: value for name, value in flat(config).items() if name not in ("input", "output_dir")}
    inputs = records(files)
    manifest_path = config.output_dir / "manifest.json"
    if finished(manifest_path, stage=STAGE, settings=settings, inputs=inputs) is not None:
        print(f"Finished already: {config.output_dir}.")
        return
    documents, broken = _read(files)
    if len(documents) < SMALLEST_CORPUS:
        why = f", and {len(broken)} lines could not be read (the first: {broken[0].where}: {broken[0].reason})" if broken else ""
        raise InputError(
            f"the corpus {', '.join(config.input)} holds {len(documents)} texts{why}; the quick start needs at least {SMALLEST_CORPUS}, "
            "one JSON object a line with a 'text'."
        )
    parts = _divide(documents, config)
    for name, rows in [*parts.items(), ("rejects", [_reject(item) for item in broken])]:
        with atomic_write(config.output_dir / f"{name}.jsonl") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    outputs = records([config.output_dir / f"{name}.jsonl" for name in [*parts, "rejects"]], relative_to=config.output_dir)
    counts = {"texts": len(documents), **{name: len(rows) for name, rows in parts.items()}}
    rejected = dict(sorted(Counter(item.reason for item in broken).items()))
    write_manifest(
        manifest_path, Manifest(stage=STAGE, settings=settings, inputs=inputs, outputs=outputs, counts=counts, rejected=rejected)
    )
    print(f"{len(documents):,} texts: " + ", ".join(f"{len(rows):,} {name}" for name, rows in parts.items()))
    if broken:
        print(f"{len(broken):,} lines set aside in {config.output_dir / 'rejects.jsonl'}: {rejected}")


def _read(files: list[Path]) -> tuple[dict[str, dict[str, Any]], list[BrokenRecord]]:
    """Return the objects by id, each with 'id' and 'text', and what could not be read."""
    documents: dict[str, dict[str, Any]] = {}
    broken: list[BrokenRecord] = []
    for record in (record for path in files for record in read_records(path)):
        text = record if isinstance(record, BrokenRecord) else raw_text(record)
        if isinstance(text, BrokenRecord):
            broken.append(text)
        elif text.id in documents:
            detail = f"the id {text.id!r} was read before"
            broken.append(BrokenRecord(path=record.path, line=record.line, reason="repeated id", detail=detail, raw=text.text))
        else:
            assert not isinstance(record, BrokenRecord)
            documents[text.id] = {**record.value, "id": text.id}
    return documents, broken


def _divide(documents: dict[str, dict[str, Any]], config: CorpusConfig) -> dict[str, list[dict[str, Any]]]:
    drawn = sorted(documents, key=lambda name: hashlib.sha256(f"{config.seed}/{name}".encode()).digest())
    held = min(config.heldout, len(drawn) // 5)
    most = min(config.synthesize, (len(drawn) - held) * 3 // 4)
    part_of = dict.fromkeys(drawn[:held], "heldout")
    characters = chosen = 0
    for name in drawn[held:]:
        length = len(documents[name]["text"])
        fits = chosen < most and characters + length <= config.synthesize_characters
        part_of[name] = "synthesize" if fits else "raw"
        chosen, characters = chosen + fits, characters + fits * length
    if not chosen:
        raise InputError(f"no text has at most synthesize_characters={config.synthesize_characters} characters; raise it or cut the texts.")
    return {part: [row for name, row in documents.items() if part_of[name] == part] for part in ("synthesize", "raw", "heldout")}


def _reject(item: BrokenRecord) -> dict[str, Any]:
    return {"path": str(item.path), "line": item.line, "reason": item.reason, "detail": item.detail, "raw": item.raw}


if __name__ == "__main__":
    sys.exit(run_tool(CorpusConfig, run, prog="corpus.py"))
