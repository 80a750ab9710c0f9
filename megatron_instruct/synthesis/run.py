"""Raw texts -> M-shot examples: take in, plan columns and shards, let workers make the shards, merge, write the manifest.

Comes in: a corpus and a synthesizer. Goes out: OUTPUT_DIR/{examples.jsonl,rejects.jsonl,manifest.json}. Finished shards, and the journals
of unfinished ones, are kept in OUTPUT_DIR/shards until all is merged.
Method: Instruction Pre-Training (arXiv:2406.14491). Does not know: templates.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_instruct.config import run_tool
from megatron_instruct.corpora.read import find_files, require_outside
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import read_json, sha256_of
from megatron_instruct.fingerprints import forget, shared_records
from megatron_instruct.manifest import FileRecord, Manifest, finished, records, write_manifest
from megatron_instruct.progress import Progress
from megatron_instruct.prompt_formats.prompt_format import PromptFormat, load_prompt_format
from megatron_instruct.records import InstructionPair
from megatron_instruct.shares import at_work, parse_share
from megatron_instruct.synthesis.chains import ColumnPlan
from megatron_instruct.synthesis.config import SynthesizeConfig
from megatron_instruct.synthesis.contamination import evaluation_files
from megatron_instruct.synthesis.content_words import WORDS, words_of
from megatron_instruct.synthesis.executors.local import run_local
from megatron_instruct.synthesis.executors.on_ray import run_on_ray
from megatron_instruct.synthesis.filters import Filters
from megatron_instruct.synthesis.intake import TEXTS, IntakeOptions, IntakeSummary, take_in
from megatron_instruct.synthesis.merge import EXAMPLES, REJECTS, merge_shards
from megatron_instruct.synthesis.prompts import fit, load_prompts
from megatron_instruct.synthesis.report import ReportOptions, read_answers, write_report
from megatron_instruct.synthesis.schedule import Usage
from megatron_instruct.synthesis.second_pass import load_checks
from megatron_instruct.synthesis.shard import TIMING, holds_work, read_shard
from megatron_instruct.synthesis.worker import INTAKE, Assignment, Report, ShardPlan
from megatron_instruct.tokenizer import load_tokenizer
from megatron_instruct.workspace import remove, take_up

STAGE = "synthesize"
_SERVED = "served"
"""Stands for the fingerprint of a model that only a server has."""


def run(config: SynthesizeConfig) -> Manifest | None:
    """Do the stage, or a share of it; return the manifest, or None where shares are left to merge."""
    started = time.monotonic()
    job = _resolve(config)
    share = parse_share(config.share)
    manifest_file = config.output_dir / "manifest.json"

    def prepare(alone: bool) -> Manifest | IntakeSummary:
        done = finished(manifest_file, stage=STAGE, settings=job.settings, inputs=job.inputs)
        if done is None:
            _take_up(job, alone=alone)
            return _take_in(job)
        return done

    with at_work(config.output_dir, share, prepare) as place:
        if isinstance(place.prepared, Manifest):
            print(f"Finished already: {config.output_dir}.")
            if share is None:
                _report(job, place.prepared)
                remove(job.folder)
            forget(_fingerprints(config))
            return place.prepared
        plan = ShardPlan(columns=ColumnPlan(place.prepared.texts, config.rounds), size=config.shard_size)
        _make_shards(job, plan, range(len(plan)) if share is None else share.parts(len(plan)))
        if share is not None:
            print(f"Share {share}: all its shards are finished. When every share is, the same command without --share merges them.")
            return None
        done = _merge(job, [job.shard(number) for number in range(len(plan))], place.prepared)
        write_manifest(manifest_file, done)
        _report(job, done)
        remove(job.folder)
        forget(_fingerprints(config))
    _print_summary(config, done, seconds=time.monotonic() - started)
    return done


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The settings, and what was found out about them."""

    config: SynthesizeConfig
    prompt_format: PromptFormat
    files: Sequence[Path]
    inputs: tuple[FileRecord, ...]
    model: str
    """Fingerprint."""
    settings: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where the texts and the shards are until they are merged."""
        return self.config.output_dir / "shards"

    @property
    def synthesizer(self) -> str:
        return f"{self.config.model.name}@{self.settings['revision']}"

    @property
    def assignment(self) -> Assignment:
        return Assignment(config=self.config, folder=self.folder, synthesizer=self.synthesizer)

    def shard(self, number: int) -> Path:
        return self.assignment.shard(number)


def _resolve(config: SynthesizeConfig) -> _Job:
    require_outside((*config.input, *config.filtering.decontaminate), config.output_dir, [EXAMPLES, f"shards/{INTAKE}/{TEXTS}"])
    prompt_format = load_prompt_format(config.prompt_format, config.structured_output)
    files = find_files(config.input)
    model = f"{_SERVED} {config.model}" if _is_only_named(config) else _fingerprint(config, config.model, what="model")
    _check_length(config)
    settings = _settings(config, prompt_format, model)
    inputs = shared_records(files, _fingerprints(config), parse_share(config.share))
    return _Job(config=config, prompt_format=prompt_format, files=files, inputs=inputs, model=model, settings=settings)


def _fingerprints(config: SynthesizeConfig) -> Path:
    """Where those of a large model and of large inputs are kept until the manifest has them."""
    return config.output_dir / "fingerprints"


def _check_length(config: SynthesizeConfig) -> None:
    """Refuse more tokens than the model has positions, unless it stretches them, which vLLM knows better, or a server has the model."""
    file = config.model / "config.json"
    about = read_json(file) if config.engine != "server" and file.is_file() else {}
    if not isinstance(about, dict):
        raise InputError(f"{file} is not a JSON object; copy the model's folder again.")
    positions = about.get("max_position_embeddings")
    rotary = [about.get(name) for name in ("rope_scaling", "rope_parameters")]
    plain = all(one.get("rope_type", one.get("type", "default")) == "default" for one in rotary if isinstance(one, dict))
    if isinstance(positions, int) and plain and config.max_model_len > positions:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is above the {positions} positions of the model (max_position_embeddings in {file}); "
            f"pass --max-model-len {positions} or less."
        )


def _is_only_named(config: SynthesizeConfig) -> bool:
    """Whether the model is a server's, and no folder here."""
    return config.engine == "server" and not config.model.is_dir()


def _settings(config: SynthesizeConfig, prompt_format: PromptFormat, model: str) -> dict[str, Any]:
    """Return what decides the result. model: its fingerprint."""
    same_folder = config.model.is_dir() and config.tokenizer_folder == config.model  # then it is not read twice
    names = ("text_key", "id_key", "limit", "rounds", "max_new_tokens", "max_model_len", "long_texts", "temperature", "repetition_penalty")
    chosen = {
        name: getattr(config, name)
        for name in (*names, "seed", "dtype", "shard_size", "retries", "on_error", "engine", "structured_output")
    }
    return {
        **chosen,
        **{name: key for name in ("question_key", "pairs_key") if (key := getattr(config, name)) is not None},
        **{name: getattr(config.server, name) for name in ("server_model", "server_prompt") if config.engine == "server"},
        "prompt_format": prompt_format.fingerprint,
        "words": words_of(prompt_format.language).fingerprint,
        "model": model,
        "tokenizer": model if same_folder else _fingerprint(config, config.tokenizer_folder, what="tokenizer"),
        "revision": config.revision or (_SERVED if _is_only_named(config) else model[:12]),
        "script": None if config.script is None else sha256_of(config.script) if config.script.is_file() else str(config.script),
        **asdict(config.filtering),
        "filters": list(config.filtering.names),
        "decontaminate": [[file.name, sha256_of(file)] for file in evaluation_files(config.filtering.decontaminate)],
    }


def _fingerprint(config: SynthesizeConfig, folder: Path, *, what: str) -> str:
    """Return one SHA-256 of all files of a model or tokenizer that decide what it says."""
    if not folder.is_dir():
        raise InputError(f"{what} {folder}: no such folder; give a folder in Hugging Face form, with config.json and tokenizer.json.")
    suffixes = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"}
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in suffixes and file.name != "manifest.json"]
    found = shared_records(files, _fingerprints(config), parse_share(config.share))
    return hashlib.sha256(json.dumps([[file.name, one.sha256] for file, one in zip(files, found, strict=True)]).encode()).hexdigest()


def _take_up(job: _Job, *, alone: bool) -> None:
    """Make the folder hold this plan and nothing of another one."""
    plan = {"settings": job.settings, "inputs": [[file.path, file.sha256] for file in job.inputs]}
    outputs = [job.config.output_dir / name for name in (EXAMPLES, REJECTS)]
    take_up(job.folder, plan, outputs=outputs, alone=alone, dear=holds_work(job.folder))


def _take_in(job: _Job) -> IntakeSummary:
    config = job.config
    prompts = load_prompts(job.prompt_format, load_tokenizer(config.tokenizer_folder), config.tokenizer_folder)
    load_checks(job.prompt_format, prompts, config.filtering, max_new_tokens=config.max_new_tokens)  # refused before the corpus is read
    _tell_silent(Filters(config.filtering, language=job.prompt_format.language), job.prompt_format)  # likewise
    if config.question_key is not None:
        prompts.encode_question("", InstructionPair(question="?", answer="."))  # likewise
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
        text_key=config.text_key,
        id_key=config.id_key,
        question_key=config.question_key,
        pairs_key=config.pairs_key,
        limit=config.limit,
        on_error=config.on_error,
        long_texts=config.long_texts,
    )
    taken = take_in(job.folder / INTAKE, job.files, options, fits)
    if not taken.texts:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in taken.rejected.items()) or "nothing was there"
        raise InputError(f"no text is left of {', '.join(config.input)}: {reasons}.")
    return taken


def _tell_silent(filters: Filters, prompt_format: PromptFormat) -> None:
    if filters.silent:
        print(
            f"filters: {' and '.join(filters.silent)} drop nothing, since {WORDS} has no words of language={prompt_format.language!r} "
            f"(of prompt_format={prompt_format.name}); add some there, under function_words and question_words.",
            flush=True,
        )


def _make_shards(job: _Job, plan: ShardPlan, shards: Sequence[int]) -> None:
    """Make those of these shards that are not finished."""
    left = [number for number in shards if read_shard(job.shard(number)) is None]
    if len(left) < len(shards):
        print(f"{len(shards) - len(left)} of {len(shards)} shards are finished already; going on with the rest.")
    if not left:
        return
    with Progress("synthesize", total=sum(map(plan.texts, left)), unit="texts") as progress:
        if job.config.executor == "ray":
            run_on_ray(job.assignment, left, _Display(progress))
        else:
            run_local(job.assignment, left, _Display(progress))


class _Display:
    """Adds the rate of generated tokens, and what the prefix cache spares, to the progress display."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._usage, self._started = progress, Usage(), time.monotonic()

    def __call__(self, report: Report) -> None:
        self._usage += report.usage
        rate = self._usage.generated / max(time.monotonic() - self._started, 1e-3)
        note = f"{rate:,.0f} tokens/s generated, {self._usage.cached / max(self._usage.prompt, 1):.0%} of prompt tokens cached"
        self._progress.add(report.texts, note=note)


def _merge(job: _Job, shards: Sequence[Path], taken: IntakeSummary) -> Manifest:
    """Write the outputs in the order of the shards, and return the manifest with counts and fingerprints."""
    output_dir = job.config.output_dir
    merged = merge_shards(shards, output_dir, intake=job.folder / INTAKE, scratch=job.folder, filtering=job.config.filtering)
    assert merged.counts["texts"] == taken.texts, "every text that was taken in was asked about once"
    rejected = Counter(taken.rejected) + merged.rejected
    return Manifest(
        stage=STAGE,
        settings=job.settings,
        inputs=job.inputs,
        outputs=records([output_dir / EXAMPLES, output_dir / REJECTS], relative_to=output_dir),
        counts={"records_in": taken.records, "records_split": taken.split, **dict(sorted(merged.counts.items()))},
        rejected=dict(sorted(rejected.items())),
        facts={"model": job.model, "prompt_format": job.prompt_format.name, "synthesizer": job.synthesizer},
    )


def _report(job: _Job, manifest: Manifest) -> None:
    config = job.config
    if config.report is None:
        return
    options = ReportOptions(
        output_dir=config.output_dir,
        tokenizer=load_tokenizer(config.tokenizer_folder),
        answers=read_answers(job.folder.glob(f"*/{TIMING}")),
        examples=config.report_examples,
        seed=config.seed,
    )
    write_report(config.report, manifest, options)
    print(f"Report: {config.report}")


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
