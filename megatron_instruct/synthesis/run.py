"""Raw texts -> M-shot examples: take in, plan columns and shards, ask, parse, filter, merge, write the manifest.

Comes in: a corpus and a synthesizer. Goes out: OUTPUT_DIR/{examples.jsonl,rejects.jsonl,manifest.json}. Finished shards are kept in
OUTPUT_DIR/shards until all is merged. Method: Instruction Pre-Training (arXiv:2406.14491). Does not know: templates.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_instruct.config import run_tool
from megatron_instruct.corpora.read import find_files
from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_write, locked, read_json, sha256_of, write_json
from megatron_instruct.manifest import FileRecord, Manifest, finished, records, write_manifest
from megatron_instruct.progress import Progress
from megatron_instruct.synthesis.chains import plan_columns
from megatron_instruct.synthesis.config import SynthesizeConfig
from megatron_instruct.synthesis.engines.engine import EngineSettings, load_engine
from megatron_instruct.synthesis.intake import IntakeOptions, IntakeSummary, Texts, take_in
from megatron_instruct.synthesis.prompt_format import PromptFormat, load_prompt_format
from megatron_instruct.synthesis.prompts import Prompts, fit, load_prompts
from megatron_instruct.synthesis.shard import ShardSummary, Work, make_shard, read_shard
from megatron_instruct.tokenizer import load_tokenizer

STAGE = "synthesize"
EXAMPLES, REJECTS = "examples.jsonl", "rejects.jsonl"


def run(config: SynthesizeConfig) -> Manifest:
    """Do the stage and return its manifest."""
    started = time.monotonic()
    prompt_format = load_prompt_format(config.prompt_format)
    files = find_files(config.input)
    inputs = records(files)
    model = _fingerprint(config.model, what="model")
    settings = _settings(config, prompt_format, model)
    manifest_file = config.output_dir / "manifest.json"
    folder = config.output_dir / "shards"
    with locked(config.output_dir):
        if (done := finished(manifest_file, stage=STAGE, settings=settings, inputs=inputs)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            print(f"Finished already: {config.output_dir}.")
            return done
        _take_up(folder, {"settings": settings, "inputs": [[file.path, file.sha256] for file in inputs]}, config.output_dir)
        prompts = load_prompts(prompt_format, load_tokenizer(config.tokenizer_folder), config.tokenizer_folder)
        taken = _take_in(config, folder, files, prompts)
        shards = _make_shards(config, folder, prompt_format, prompts, revision=settings["revision"])
        facts = {"model": model, "prompt_format": prompt_format.name, "synthesizer": f"{config.model.name}@{settings['revision']}"}
        done = _merge(config, folder, shards, taken, Manifest(stage=STAGE, settings=settings, inputs=inputs, facts=facts))
        write_manifest(manifest_file, done)
        shutil.rmtree(folder)
    _print_summary(config, done, seconds=time.monotonic() - started)
    return done


def _settings(config: SynthesizeConfig, prompt_format: PromptFormat, model: str) -> dict[str, Any]:
    """Return what decides the result."""
    names = ("text_key", "id_key", "limit", "rounds", "max_new_tokens", "max_model_len", "long_texts", "temperature", "repetition_penalty")
    chosen = {name: getattr(config, name) for name in (*names, "seed", "dtype", "shard_size", "retries", "on_error", "engine")}
    return {
        **chosen,
        "prompt_format": prompt_format.fingerprint,
        "model": model,
        "tokenizer": _fingerprint(config.tokenizer_folder, what="tokenizer"),
        "revision": config.revision or model[:12],
        "script": None if config.script is None else sha256_of(config.script) if config.script.is_file() else str(config.script),
        **json.loads(json.dumps(asdict(config.filtering))),
    }


def _fingerprint(folder: Path, *, what: str) -> str:
    """Return one SHA-256 of all files of a model or tokenizer that decide what it says."""
    if not folder.is_dir():
        raise InputError(f"{what} {folder}: no such folder; give a folder in Hugging Face form, with config.json and tokenizer.json.")
    suffixes = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"}
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in suffixes and file.name != "manifest.json"]
    return hashlib.sha256(json.dumps([[file.name, sha256_of(file)] for file in files]).encode()).hexdigest()


def _take_up(folder: Path, plan: dict[str, Any], output_dir: Path) -> None:
    """Make `folder` hold this plan and nothing of another one; refuse to write over what this tool did not write."""
    plan = json.loads(json.dumps(plan))
    plan_file = folder / "plan.json"
    if plan_file.is_file() and read_json(plan_file) == plan:
        return
    if folder.is_dir():
        if plan_file.is_file():
            print(f"Leftovers of an unfinished run with other inputs or settings are removed from {folder}.")
        shutil.rmtree(folder)
    else:
        for name in (EXAMPLES, REJECTS):
            if (output_dir / name).exists():
                raise InputError(f"{output_dir / name} exists already and has no manifest; choose another output_dir or remove it.")
    write_json(plan_file, plan)


def _take_in(config: SynthesizeConfig, folder: Path, files: Sequence[Path], prompts: Prompts) -> IntakeSummary:
    fixed = fit(prompts, (), "", most=config.longest_prompt)
    if fixed is None:
        needed = len(prompts.encode((), ""))
        raise InputError(
            f"the prompt format alone takes {needed} tokens, and max_model_len - max_new_tokens = {config.longest_prompt}; "
            "raise max_model_len, lower max_new_tokens, or use a shorter format."
        )
    room = config.longest_prompt - len(fixed[0])

    def fits(text: str) -> bool:
        """A token is at least one byte, so short texts fit without being encoded; a few are left for what meets at the seams."""
        short = len(prompts.escaping.hide(text).encode()) + 8 <= room
        return short or fit(prompts, (), text, most=config.longest_prompt) is not None

    options = IntakeOptions(
        text_key=config.text_key, id_key=config.id_key, limit=config.limit, on_error=config.on_error, long_texts=config.long_texts
    )
    taken = take_in(folder / "intake", files, options, fits)
    if not taken.texts:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in taken.rejected.items()) or "nothing was there"
        raise InputError(f"no text is left of {', '.join(config.input)}: {reasons}.")
    return taken


def _make_shards(config: SynthesizeConfig, folder: Path, prompt_format: PromptFormat, prompts: Prompts, *, revision: str) -> list[Path]:
    """Make the shards that are not finished, and return the folders of all."""
    with Texts(folder / "intake") as texts:
        columns = plan_columns(len(texts), config.rounds)
        size = max(config.shard_size // config.rounds, 1)
        groups = {folder / f"{number:06d}": columns[start : start + size] for number, start in enumerate(range(0, len(columns), size))}
        left = {shard: group for shard, group in groups.items() if read_shard(shard) is None}
        if len(left) < len(groups):
            print(f"{len(groups) - len(left)} of {len(groups)} shards are finished already; going on with the rest.")
        if not left:
            return list(groups)
        work = Work(
            prompt_format=prompt_format,
            prompts=prompts,
            engine=load_engine(config.engine, _engine_settings(config, prompt_format)),
            filtering=config.filtering,
            synthesizer=f"{config.model.name}@{revision}",
            max_new_tokens=config.max_new_tokens,
            longest_prompt=config.longest_prompt,
            retries=config.retries,
        )
        total = sum(len(column) for group in left.values() for column in group)
        with Progress("synthesize", total=total, unit="texts") as progress:
            report = _Report(progress)
            for shard, group in left.items():
                make_shard(shard, [[texts[index] for index in column] for column in group], work, report)
    return list(groups)


class _Report:
    """Adds the rate of generated tokens to the progress display."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._tokens, self._started = progress, 0, time.monotonic()

    def __call__(self, texts: int, tokens: int) -> None:
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._started, 1e-3)
        self._progress.add(texts, note=f"{self._tokens:,} tokens generated, {rate:,.0f} tokens/s")


def _engine_settings(config: SynthesizeConfig, prompt_format: PromptFormat) -> EngineSettings:
    return EngineSettings(
        model=config.model,
        tokenizer=config.tokenizer_folder,
        max_model_len=config.max_model_len,
        temperature=config.temperature,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
        dtype=config.dtype,
        structured=prompt_format.structured_output != "none",
        script=config.script,
        **asdict(config.vllm),
    )


def _merge(config: SynthesizeConfig, folder: Path, shards: Sequence[Path], taken: IntakeSummary, manifest: Manifest) -> Manifest:
    """Write the outputs in the order of the shards, and return the manifest with counts and fingerprints."""
    summaries: list[ShardSummary] = [summary for shard in shards if (summary := read_shard(shard)) is not None]
    assert len(summaries) == len(shards), "every shard is finished"
    _concatenate([shard / EXAMPLES for shard in shards], config.output_dir / EXAMPLES)
    _concatenate([folder / "intake" / REJECTS, *(shard / REJECTS for shard in shards)], config.output_dir / REJECTS)
    counts = sum((Counter(summary.counts) for summary in summaries), Counter({"texts": 0, "texts_with_pairs": 0, "pairs": 0}))
    assert counts["texts"] == taken.texts, "every text that was taken in was asked about once"
    rejected = sum((Counter(summary.rejected) for summary in summaries), Counter(taken.rejected))
    outputs: tuple[FileRecord, ...] = records([config.output_dir / EXAMPLES, config.output_dir / REJECTS], relative_to=config.output_dir)
    return Manifest(
        stage=manifest.stage,
        settings=manifest.settings,
        inputs=manifest.inputs,
        outputs=outputs,
        counts={"records_in": taken.records, "records_split": taken.split, **dict(sorted(counts.items()))},
        rejected=dict(sorted(rejected.items())),
        facts=manifest.facts,
    )


def _concatenate(parts: Sequence[Path], target: Path) -> None:
    with atomic_write(target, "wb") as out:
        for part in parts:
            with open(part, "rb") as stream:
                shutil.copyfileobj(stream, out)


def _print_summary(config: SynthesizeConfig, manifest: Manifest, *, seconds: float) -> None:
    counts = manifest.counts
    print(
        f"{config.output_dir}: {counts['texts']:,} texts, {counts.get('texts_with_pairs', 0):,} with pairs; "
        f"{counts.get('pairs', 0):,} pairs in {counts.get('examples', 0):,} M-shot examples; "
        f"{counts.get('generated_tokens', 0):,} tokens generated in {seconds:,.1f} s"
    )
    if manifest.rejected:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejected.items())
        print(f"Set aside, in {config.output_dir / REJECTS}: {reasons}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(SynthesizeConfig, run, argv, prog="synthesize.py")
