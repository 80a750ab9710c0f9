"""Examples of synthesis -> instruction-augmented texts.

Comes in: files of M-shot examples, one a line. Goes out: OUTPUT_DIR/augmented.jsonl in the order of the input, rejects.jsonl and
manifest.json, which is written last. Each part of the input is rendered by one worker into a folder of its own below OUTPUT_DIR/parts,
which is removed when all is done. Does not know: tokens.
"""

import glob
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_instruct.config import run_tool
from megatron_instruct.corpora.part_folders import say_what_is_left, unfinished
from megatron_instruct.corpora.parts import total_lines, usual_parts
from megatron_instruct.corpora.read import find_files, require_outside
from megatron_instruct.corpora.workers import started_team
from megatron_instruct.errors import InputError
from megatron_instruct.files import LOCK, TEMPORARY_SUFFIX, concatenate, locked
from megatron_instruct.fingerprints import State, states_of, unchanged
from megatron_instruct.manifest import FileRecord, Manifest, check_stage_outputs, finished, records, write_manifest
from megatron_instruct.progress import Progress
from megatron_instruct.templates.bank import Bank, load_bank, shipped_bank
from megatron_instruct.templates.config import RenderConfig
from megatron_instruct.templates.parts import AUGMENTED, REJECTS, RenderJob, total_of
from megatron_instruct.templates.sampling import SAMPLING_VERSION
from megatron_instruct.templates.show import as_terminal_text, first_documents, write_page
from megatron_instruct.workspace import remove, take_up

STAGE = "render"
MANIFEST, PARTS = "manifest.json", "parts"


def run(config: RenderConfig) -> Manifest:
    """Do the stage and return its manifest."""
    bank = load_bank(_bank_file(config), extension=config.extend_bank)
    patterns = [_examples_of(given) for given in config.input]
    require_outside(patterns, config.output_dir, [AUGMENTED])
    files = find_files(patterns)
    before, inputs = states_of(files), records(files)
    check_stage_outputs(files, inputs)
    settings = {"seed": config.seed, "bank": bank.fingerprint, "language": bank.language, "on_error": config.on_error}
    settings["sampling"] = SAMPLING_VERSION
    place = config.output_dir / MANIFEST
    manifest = finished(place, stage=STAGE, settings=settings, inputs=inputs)
    if manifest is not None:
        print(f"Finished already: {config.output_dir}.")
        if (config.output_dir / LOCK).is_file():  # killed after its manifest was written
            with locked(config.output_dir):
                _remove_work(config.output_dir)
    else:
        _require_free(config.output_dir)
        with locked(config.output_dir):
            manifest = finished(place, stage=STAGE, settings=settings, inputs=inputs)  # another run may have ended meanwhile
            if manifest is None:
                folders = _render_parts(files, bank, config, settings, inputs, before)
                manifest = _put_together(folders, bank, config, settings, inputs)
                write_manifest(place, manifest)
            _remove_work(config.output_dir)
        _print_summary(config, manifest)
    _show(config)
    return manifest


def _remove_work(folder: Path) -> None:
    remove(folder / PARTS, STAGE)
    (folder / LOCK).unlink(missing_ok=True)


def _bank_file(config: RenderConfig) -> Path:
    return config.bank or shipped_bank(config.language or "en")


def _examples_of(given: str) -> str:
    """Return a folder of synthesis as the pattern of its example files; anything else as it is."""
    return f"{glob.escape(given.rstrip('/'))}/**/examples.jsonl" if Path(given).is_dir() else given


def _require_free(folder: Path) -> None:
    """Refuse a folder with files that no run of this stage left there; one that did has left its lock, and nothing but its own."""
    own = {LOCK, PARTS, *(name + suffix for name in (AUGMENTED, REJECTS, MANIFEST) for suffix in ("", TEMPORARY_SUFFIX))}
    found = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if found and not {LOCK} <= found <= own:
        raise InputError(f"{folder} holds files and no {MANIFEST}, so they are not of this stage; choose another output_dir or remove it.")


def _put_together(
    folders: list[Path], bank: Bank, config: RenderConfig, settings: Mapping[str, Any], inputs: Sequence[FileRecord]
) -> Manifest:
    """Write the documents and the rejects of all parts, and return the manifest that describes them."""
    counts, rejected = total_of(folders)
    if not counts["documents"]:
        raise InputError(f"no example could be rendered from {', '.join(config.input)}: {_reasons(rejected)}.")
    for name in (AUGMENTED, REJECTS):
        concatenate([folder / name for folder in folders], config.output_dir / name)
    outputs = records([config.output_dir / AUGMENTED, config.output_dir / REJECTS], relative_to=config.output_dir)
    return Manifest(
        stage=STAGE,
        settings=dict(settings),
        inputs=tuple(inputs),
        outputs=outputs,
        counts=dict(sorted(counts.items())),
        rejected=dict(sorted(rejected.items())),
        facts={"bank": {"language": bank.language, "version": bank.version, "sha256": bank.fingerprint}},
    )


def _render_parts(
    files: Sequence[Path],
    bank: Bank,
    config: RenderConfig,
    settings: Mapping[str, Any],
    inputs: Sequence[FileRecord],
    states: Sequence[State],
) -> list[Path]:
    """Render the parts that are not rendered yet; return the folders of all parts in the order of the input.

    states: of the files, before they were read.
    """
    parts = usual_parts(files)
    plan = {
        "stage": STAGE,
        "settings": settings,
        "inputs": [[record.path, record.sha256] for record in inputs],
        "parts": [part.to_json() for part in parts],
    }
    place = config.output_dir / PARTS
    take_up(place, plan, outputs=[config.output_dir / name for name in (AUGMENTED, REJECTS)])
    of_each = dict(zip(files, states, strict=True))
    work = {place / f"{number:06d}": part.as_of(of_each) for number, part in enumerate(parts)}
    left = unfinished(work)
    say_what_is_left(work, left)
    job = RenderJob(
        bank=_bank_file(config),
        extension=config.extend_bank,
        fingerprint=bank.fingerprint,
        seed=config.seed,
        on_error=config.on_error,
    )
    if left:
        with (
            unchanged(files, states, left),
            Progress(STAGE, total=total_lines(left.values()), unit="examples") as progress,
            started_team(min(config.workers, len(left)), RenderJob) as team,
        ):
            team.do_parts(left, job, report=progress.add)
    return list(work)


def _reasons(rejected: Counter[str]) -> str:
    return ", ".join(f"{why} {count:,}" for why, count in sorted(rejected.items())) or "nothing rejected"


def _print_summary(config: RenderConfig, manifest: Manifest) -> None:
    counts = manifest.counts
    layouts = ", ".join(f"{name.removeprefix('layout_')} {count:,}" for name, count in counts.items() if name.startswith("layout_"))
    print(
        f"{config.output_dir}: {counts['examples']:,} examples in = {counts['documents']:,} documents + "
        f"{counts['examples_rejected']:,} rejected; "
        f"{counts['pairs']:,} pairs in = {counts['pairs_rendered']:,} rendered + {counts['pairs_rejected']:,} set aside; "
        f"{layouts}; inverted {counts['inverted']:,}"
    )
    if manifest.rejected:
        print(f"What was set aside ({_reasons(Counter(manifest.rejected))}) is in {config.output_dir / REJECTS}")


def _show(config: RenderConfig) -> None:
    if config.show == 0:
        return
    documents = first_documents(config.output_dir / AUGMENTED, config.show)
    if config.show_html is not None:
        write_page(config.show_html, documents)
        print(f"{len(documents)} documents are shown in {config.show_html}")
    else:
        print(as_terminal_text(documents, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(RenderConfig, run, argv, prog="render_templates.py")
