"""A corpus -> Megatron indexed data sets: read, render examples, encode in parallel, merge, verify, write the manifest.

Comes in: files with one document per line or row: plain texts, examples with pairs, rendered documents. Goes out:
OUTPUT_PREFIX_KEY_document.{bin,idx,rejects.jsonl,manifest.json}, and .roles where documents have roles. Each part of the input is encoded
by one worker into a folder of its own below OUTPUT_PREFIX.parts, which is removed when all is done. Does not know: torch.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from megatron_instruct.config import run_tool
from megatron_instruct.corpora.part_folders import say_what_is_left, unfinished
from megatron_instruct.corpora.parts import Part, total_lines, usual_parts
from megatron_instruct.corpora.read import find_files, require_outside
from megatron_instruct.corpora.workers import Team, started_team
from megatron_instruct.errors import ConfigError
from megatron_instruct.fingerprints import State, forget, shared_records, states_of, unchanged
from megatron_instruct.manifest import FileRecord, Manifest, check_stage_outputs, finished, read_manifest, write_manifest
from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.documents import DocumentMaker, RenderOptions, render_options
from megatron_instruct.preprocessing.encode import EncodeJob, EncodeOptions
from megatron_instruct.preprocessing.indexed_dataset import bin_file
from megatron_instruct.preprocessing.outputs import RENDERING, STAGE, Origin, describe, write_data_sets
from megatron_instruct.preprocessing.sample import sample_texts
from megatron_instruct.preprocessing.verify import manifest_file, result_files
from megatron_instruct.progress import Progress
from megatron_instruct.shares import Share, at_work, parse_share, remove_folder
from megatron_instruct.tokenizer import Tokenizer, load_tokenizer
from megatron_instruct.tokenizer.fast import FastForm
from megatron_instruct.tokenizer.fast_proof import Backend, with_fast_backend
from megatron_instruct.workspace import is_own, plan_of, require_own, take_up


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a run is asked for, resolved."""

    config: PreprocessConfig
    tokenizer: Tokenizer
    render: RenderOptions
    files: Sequence[Path]
    states: Sequence[State]
    """Of the files, before any was read."""
    inputs: tuple[FileRecord, ...]
    parts: Sequence[Part]
    settings: Mapping[str, Any]
    """What decides the result, but for the rendering of examples."""

    @property
    def folder(self) -> Path:
        """Where unfinished work is."""
        return self.config.output_prefix.with_name(self.config.output_prefix.name + ".parts")

    def prefixes(self) -> dict[str, Path]:
        return {key: self.config.prefix(key) for key in self.config.json_keys}


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How the work is divided."""

    folders: Sequence[Path]
    """The folder that each part is encoded into, in the order of the input."""
    share: Mapping[Path, Part]
    """The parts that are this run's to encode, by folder."""
    left: Mapping[Path, Part]
    """Those of them that are not encoded yet."""
    encoding: Mapping[str, Any]
    """What the manifest says of the backend."""
    fast_form: FastForm | None
    """What workers encode with, see EncodeJob; nothing where no part is left."""
    team: Team | None
    """Workers under way; None where no part is left, or where Ray has its own."""


def run(config: PreprocessConfig) -> dict[str, Manifest]:
    """Do the stage, or a share of it; return the manifest of each JSON key's data set, none where shares are left to merge."""
    started = time.monotonic()
    job = _resolve(config)
    if (done := _finished(job)) is not None and not is_own(job.folder, STAGE):
        forget(_fingerprints(config))
        return done
    require_own(job.folder, STAGE)
    share = parse_share(config.share)

    def prepare(alone: bool) -> _Plan | dict[str, Manifest]:
        found = _finished(job)
        return _plan(job, share, team, alone=alone) if found is None else found

    with ExitStack() as team, at_work(job.folder, share, prepare) as place, team:  # workers end before the folder is given back
        if isinstance(place.prepared, dict):
            done = place.prepared
        else:
            plan = place.prepared
            with unchanged(job.files, job.states, plan.left), team:
                _encode(job, plan)
            if share is not None:
                print(f"Share {share}: all its parts are encoded. When every share's are, the same command without --share merges them.")
                return {}
            done = _write(job, plan)
            describe(done, job.prefixes(), append_eod=config.append_eod, seconds=time.monotonic() - started)
        if share is None:
            remove_folder(job.folder, STAGE)
    forget(_fingerprints(config))
    return done


def _resolve(config: PreprocessConfig) -> _Job:
    """Load and fingerprint everything that decides the result."""
    require_outside(config.input, bin_file(config.prefix(config.json_keys[0])))
    tokenizer = load_tokenizer(config.tokenizer_model)
    if config.tokenizer_type is not None and tokenizer.kind != config.tokenizer_type:
        raise ConfigError(
            f"tokenizer_type={config.tokenizer_type}, but {config.tokenizer_model} is a {tokenizer.kind}; "
            "leave tokenizer_type out, or give the other tokenizer."
        )
    if config.prepend_bos and tokenizer.bos is None:
        raise ConfigError(
            f"prepend_bos, but {config.tokenizer_model} names no bos_token; leave it out, or use the synthesizer's tokenizer."
        )
    files = find_files(config.input)
    states = states_of(files)
    with closing(ThreadPool(1)) as pool:  # whose thread nothing waits for where this one is interrupted
        parts = pool.apply_async(usual_parts, (files, config.partitions))  # this and the next read every file
        inputs = shared_records(files, _fingerprints(config), parse_share(config.share))
    check_stage_outputs(files, inputs)
    return _Job(
        config=config,
        tokenizer=tokenizer,
        render=render_options(seed=config.seed, language=config.language, bank=config.bank, extend_bank=config.extend_bank),
        files=files,
        states=states,
        inputs=inputs,
        parts=parts.get(),
        settings={**config.deciding(), "tokenizer": tokenizer.fingerprint},
    )


def _fingerprints(config: PreprocessConfig) -> Path:
    """Where those of large inputs are kept until the manifest has them."""
    return config.output_prefix.with_name(config.output_prefix.name + ".fingerprints")


def _finished(job: _Job) -> dict[str, Manifest] | None:
    done: dict[str, Manifest] = {}
    for key, prefix in job.prefixes().items():
        place = manifest_file(prefix)
        rendered = place.is_file() and RENDERING in read_manifest(place, stage=STAGE).settings
        settings = {**job.settings, RENDERING: job.render.fingerprint()} if rendered else job.settings
        manifest = finished(place, stage=STAGE, settings=settings, inputs=job.inputs)
        if manifest is None:
            return None
        done[key] = manifest
    print(f"Finished already: {', '.join(map(str, job.prefixes().values()))}.")
    return done


def _proved_backend(job: _Job, team: Team | None) -> Backend:
    """Return what encodes: the tokenizer's library, or what was proved to give the same ids for a sample of the very input.

    team: loads meanwhile what is to be proved.
    """

    def to_be_proved(form: FastForm) -> None:
        if team is not None:
            team.set_up(_encode_job(job, form))

    config = job.config
    sample = sample_texts(job.files, DocumentMaker(config.json_keys, job.render)) if config.fast_tokenizer != "none" else []
    return with_fast_backend(job.tokenizer, sample, choice=config.fast_tokenizer, to_be_proved=to_be_proved)


def _plan(job: _Job, share: Share | None, stack: ExitStack, *, alone: bool) -> _Plan:
    """Take up the folder that parts are encoded into, start workers, and prove what they are to encode with meanwhile.

    stack: ends the workers. alone: no other run is at work in the folder.
    """
    plan: dict[str, Any] = {
        "stage": STAGE,
        "settings": {**job.settings, RENDERING: job.render.fingerprint()},
        "inputs": [[record.path, record.sha256] for record in job.inputs],
        "parts": [part.to_json() for part in job.parts],
    }
    numbered = [(job.folder / f"{number:06d}", part) for number, part in enumerate(job.parts)]
    own = dict(numbered[number] for number in (range(len(numbered)) if share is None else share.parts(len(numbered))))
    known = plan_of(job.folder) or {}
    goes_on = known == {**plan, "encoding": known.get("encoding")}
    encoding: dict[str, Any] = known["encoding"] if goes_on else {}
    left, form, team = unfinished(own) if goes_on else own, None, None
    if left:
        if job.config.executor == "local":
            team = stack.enter_context(started_team(min(job.config.workers, len(left)), EncodeJob))
        backend = _proved_backend(job, team)
        form = backend.form
        if encoding.get("backend") != backend.facts["backend"]:
            encoding = backend.facts
    outputs = [file for prefix in job.prefixes().values() for file in result_files(prefix)]
    take_up(job.folder, {**plan, "encoding": encoding}, outputs=outputs, alone=alone)
    return _Plan(
        folders=[folder for folder, _ in numbered],
        share=own,
        left=unfinished(own),
        encoding=encoding,
        fast_form=form,
        team=team,
    )


def _encode(job: _Job, plan: _Plan) -> None:
    """Encode the parts of this run that are not encoded yet."""
    left = plan.left
    say_what_is_left(plan.share, left)
    if not left:
        return
    encode_job = _encode_job(job, plan.fast_form)
    with Progress("preprocess", total=total_lines(left.values()), unit="documents") as progress:
        if plan.team is not None:
            states = dict(zip(job.files, job.states, strict=True))
            plan.team.do_parts({folder: part.as_of(states) for folder, part in left.items()}, encode_job, report=progress.add)
        else:
            from megatron_instruct.preprocessing.on_ray import encode_parts_on_ray

            encode_parts_on_ray(left, encode_job, address=job.config.ray_address, report=progress.add)


def _encode_job(job: _Job, fast_form: FastForm | None) -> EncodeJob:
    config = job.config
    return EncodeJob(
        tokenizer_path=config.tokenizer_model,
        fingerprint=job.tokenizer.fingerprint,
        fast_form=fast_form,
        options=EncodeOptions(
            json_keys=config.json_keys,
            append_eod=config.append_eod,
            prepend_bos=config.prepend_bos,
            split_sentences=config.lang if config.split_sentences else None,
            min_document_tokens=config.min_document_tokens,
            max_document_tokens=config.max_document_tokens,
            long_documents=config.long_documents,
            render=job.render,
            on_error=config.on_error,
        ),
        log_interval=config.log_interval,
    )


def _write(job: _Job, plan: _Plan) -> dict[str, Manifest]:
    """Write the data set of each key, verify it, and write its manifest last."""
    tokenizer = job.tokenizer
    origin = Origin(
        tokenizer=tokenizer,
        inputs=job.inputs,
        settings=job.settings,
        render=job.render,
        named=", ".join(job.config.input),
        facts={
            "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod},
            "encoding": plan.encoding,
        },
    )
    manifests = write_data_sets(job.config, plan.folders, origin)
    for key, manifest in manifests.items():
        write_manifest(manifest_file(job.config.prefix(key)), manifest)
    return manifests


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(PreprocessConfig, run, argv, prog="preprocess_data.py")
