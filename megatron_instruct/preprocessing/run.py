"""A corpus -> Megatron indexed data sets: read, encode in parallel, merge, verify, write the manifest.

Comes in: files with one document per line or row, or instruction-augmented texts of the render stage. Goes out:
OUTPUT_PREFIX_KEY_document.{bin,idx,rejects.jsonl,manifest.json}. Each part of the input is encoded by one worker into a folder of its
own below OUTPUT_PREFIX.parts, which is removed when all is done. Does not know: torch.
"""

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_instruct.config import run_tool
from megatron_instruct.corpora.parts import Part, plan_parts
from megatron_instruct.corpora.read import find_files
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import locked
from megatron_instruct.manifest import FileRecord, Manifest, check_stage_outputs, finished, records, write_manifest
from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.encode import EncodeOptions, PartSummary, read_summary
from megatron_instruct.preprocessing.indexed_dataset import bin_file, idx_file, token_dtype
from megatron_instruct.preprocessing.merge import merge_rejects, merge_tokens
from megatron_instruct.preprocessing.verify import manifest_faults, manifest_file, require_sound, verify
from megatron_instruct.preprocessing.workers import WorkerSetup, encode_parts
from megatron_instruct.preprocessing.workspace import take_up
from megatron_instruct.progress import Progress
from megatron_instruct.tokenizer import Tokenizer, load_tokenizer

STAGE = "preprocess"
_SMALLEST_PART, _LARGEST_PART, _USUAL_PARTS = 1 << 20, 1 << 26, 64


def run(config: PreprocessConfig) -> dict[str, Manifest]:
    """Do the stage and return the manifest of each JSON key's data set."""
    started = time.monotonic()
    tokenizer = _load(config)
    files = find_files(config.input)
    before = _states(files)
    inputs = records(files)
    check_stage_outputs(files, inputs)
    settings = {
        "json_keys": list(config.json_keys),
        "append_eod": config.append_eod,
        "on_error": config.on_error,
        "tokenizer": tokenizer.fingerprint,
    }
    folder = config.output_prefix.with_name(config.output_prefix.name + ".parts")
    if (done := _finished(config, settings, inputs)) is not None:
        return done
    with locked(folder):
        if (done := _finished(config, settings, inputs)) is None:
            parts = _plan(config, files, folder, settings, inputs)
            _encode(config, parts, tokenizer)
            if _states(files) != before:
                raise InputError("an input file changed while it was read; run the same command again.")
            done = _merge(config, list(parts), tokenizer, settings, inputs)
            _print_summary(config, done, seconds=time.monotonic() - started)
        shutil.rmtree(folder)
    return done


def _load(config: PreprocessConfig) -> Tokenizer:
    tokenizer = load_tokenizer(config.tokenizer_model)
    if config.tokenizer_type is not None and tokenizer.kind != config.tokenizer_type:
        raise ConfigError(
            f"tokenizer_type={config.tokenizer_type}, but {config.tokenizer_model} is a {tokenizer.kind}; "
            "leave tokenizer_type out, or give the other tokenizer."
        )
    return tokenizer


def _states(files: Sequence[Path]) -> list[tuple[int, int]]:
    return [(state.st_size, state.st_mtime_ns) for state in (file.stat() for file in files)]


def _finished(config: PreprocessConfig, settings: dict[str, Any], inputs: Sequence[FileRecord]) -> dict[str, Manifest] | None:
    done: dict[str, Manifest] = {}
    for key in config.json_keys:
        manifest = finished(manifest_file(config.prefix(key)), stage=STAGE, settings=settings, inputs=inputs)
        if manifest is None:
            return None
        done[key] = manifest
    print(f"Finished already: {', '.join(str(config.prefix(key)) for key in config.json_keys)}.")
    return done


def _plan(
    config: PreprocessConfig, files: Sequence[Path], folder: Path, settings: dict[str, Any], inputs: Sequence[FileRecord]
) -> dict[Path, Part]:
    """Cut the input into parts, and return the folder that each is encoded into, in the order of the input."""
    total = sum(record.bytes for record in inputs)
    usual = min(max(total // _USUAL_PARTS, _SMALLEST_PART), _LARGEST_PART)
    parts = plan_parts(files, part_bytes=usual if config.partitions is None else max(-(-total // config.partitions), 1))
    plan = {
        "settings": settings,
        "inputs": [[record.path, record.sha256] for record in inputs],
        "parts": [[[str(piece.path), piece.start, piece.end] for piece in part.slices] for part in parts],
    }
    outputs = [file for key in config.json_keys for file in (bin_file(config.prefix(key)), idx_file(config.prefix(key)))]
    take_up(folder, plan, outputs=outputs)
    return {folder / f"{number:06d}": part for number, part in enumerate(parts)}


def _encode(config: PreprocessConfig, parts: dict[Path, Part], tokenizer: Tokenizer) -> None:
    left = {folder: part for folder, part in parts.items() if read_summary(folder) is None}
    if len(left) < len(parts):
        print(f"{len(parts) - len(left)} of {len(parts)} parts are finished already; going on with the rest.")
    if not left:
        return
    setup = WorkerSetup(
        tokenizer_path=config.tokenizer_model,
        fingerprint=tokenizer.fingerprint,
        options=EncodeOptions(json_keys=config.json_keys, append_eod=config.append_eod, on_error=config.on_error),
        log_interval=config.log_interval,
    )
    lines = [part.lines for part in left.values()]
    total = None if None in lines else sum(count for count in lines if count is not None)
    with Progress("preprocess", total=total, unit="documents") as progress:
        encode_parts(left, setup, workers=config.workers, report=progress.add)


def _merge(
    config: PreprocessConfig, folders: Sequence[Path], tokenizer: Tokenizer, settings: dict[str, Any], inputs: Sequence[FileRecord]
) -> dict[str, Manifest]:
    """Write the data set of each key, verify it, and write its manifest last."""
    summaries = [summary for folder in folders if (summary := read_summary(folder)) is not None]
    assert len(summaries) == len(folders), "every part is finished"
    rejected: Counter[str] = sum((Counter(summary.rejected) for summary in summaries), Counter())
    manifests: dict[str, Manifest] = {}
    for key in config.json_keys:
        prefix = config.prefix(key)
        rejects = prefix.with_name(prefix.name + ".rejects.jsonl")
        merge_rejects(folders, rejects)
        if not any(summary.documents for summary in summaries):
            raise InputError(f"no document is left of {', '.join(config.input)}: {_reasons(rejected)}; see {rejects}.")
        merge_tokens(folders, key, prefix, token_dtype(tokenizer.vocab_size))
        manifests[key] = Manifest(
            stage=STAGE,
            settings=settings,
            inputs=tuple(inputs),
            outputs=records([bin_file(prefix), idx_file(prefix), rejects], relative_to=prefix.parent),
            counts=_counts(summaries, key),
            rejected=dict(sorted(rejected.items())),
            facts={
                "json_key": key,
                "dtype": token_dtype(tokenizer.vocab_size).name,
                "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod},
            },
        )
        found = verify(prefix, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod)
        require_sound(prefix, [*found.faults, *manifest_faults(prefix, found, manifests[key])])
    for key, manifest in manifests.items():
        write_manifest(manifest_file(config.prefix(key)), manifest)
    return manifests


def _counts(summaries: Sequence[PartSummary], key: str) -> dict[str, int]:
    return {
        "documents_in": sum(summary.documents_in for summary in summaries),
        "documents": sum(summary.documents for summary in summaries),
        "tokens": sum(summary.tokens[key] for summary in summaries),
    }


def _reasons(rejected: Counter[str]) -> str:
    return f"{rejected.total():,} rejected" + (f" ({', '.join(f'{why} {n:,}' for why, n in sorted(rejected.items()))})" if rejected else "")


def _print_summary(config: PreprocessConfig, manifests: dict[str, Manifest], *, seconds: float) -> None:
    for key, manifest in manifests.items():
        counts, prefix = manifest.counts, config.prefix(key)
        megabytes = sum(record.bytes for record in manifest.inputs) / 1e6
        print(
            f"{prefix}: {counts['documents_in']:,} documents in = {counts['documents']:,} documents + "
            f"{_reasons(Counter(manifest.rejected))}; {counts['tokens']:,} tokens, {manifest.facts['dtype']}; "
            f"{megabytes:,.1f} MB in {seconds:,.1f} s ({megabytes / seconds:.2f} MB/s)"
        )
        if manifest.rejected:
            print(f"What was set aside is in {prefix}.rejects.jsonl")
    if not config.append_eod:
        print("Nothing marks where a document ends: --append-eod was not given.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(PreprocessConfig, run, argv, prog="preprocess_data.py")
