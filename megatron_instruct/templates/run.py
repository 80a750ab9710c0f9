"""Examples of synthesis -> instruction-augmented texts: read, render, write, one example at a time.

Comes in: files of M-shot examples, one a line. Goes out: OUTPUT_DIR/augmented.jsonl in the order of the input, rejects.jsonl and
manifest.json, which is written last. Does not know: tokens.
"""

import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from megatron_instruct.config import run_tool
from megatron_instruct.corpora.read import BrokenRecord, Record, find_files, read_records
from megatron_instruct.errors import InputError
from megatron_instruct.files import LOCK, atomic_write, locked
from megatron_instruct.manifest import FileRecord, Manifest, check_stage_outputs, finished, records, write_manifest
from megatron_instruct.progress import Progress
from megatron_instruct.records import MShotExample
from megatron_instruct.templates.bank import Bank, load_bank, shipped_bank
from megatron_instruct.templates.config import RenderConfig
from megatron_instruct.templates.rendering import Rendering, render
from megatron_instruct.templates.sampling import SAMPLING_VERSION
from megatron_instruct.templates.show import as_terminal_text, first_documents, write_page

STAGE = "render"
AUGMENTED, REJECTS, MANIFEST = "augmented.jsonl", "rejects.jsonl", "manifest.json"


def run(config: RenderConfig) -> Manifest:
    """Do the stage and return its manifest."""
    bank = load_bank(config.bank or shipped_bank(config.language or "en"), extension=config.extend_bank)
    files = find_files([_examples_of(given) for given in config.input])
    inputs = records(files)
    check_stage_outputs(files, inputs)
    settings = {"seed": config.seed, "bank": bank.fingerprint, "language": bank.language, "on_error": config.on_error}
    settings["sampling"] = SAMPLING_VERSION
    place = config.output_dir / MANIFEST
    manifest = finished(place, stage=STAGE, settings=settings, inputs=inputs)
    if manifest is not None:
        print(f"Finished already: {config.output_dir}.")
    else:
        _require_free(config.output_dir)
        with locked(config.output_dir):
            manifest = finished(place, stage=STAGE, settings=settings, inputs=inputs)  # another run may have ended meanwhile
            if manifest is None:
                manifest = _render_files(files, bank, config, settings, inputs)
                write_manifest(place, manifest)
            (config.output_dir / LOCK).unlink(missing_ok=True)
        _print_summary(config, manifest)
    _show(config)
    return manifest


def _examples_of(given: str) -> str:
    """Return a folder of synthesis as the pattern of its example files; anything else as it is."""
    return f"{glob.escape(given.rstrip('/'))}/**/examples.jsonl" if Path(given).is_dir() else given


def _require_free(folder: Path) -> None:
    """Refuse a folder with files that no run of this stage left there; one that did has left its lock."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LOCK).is_file():
        raise InputError(f"{folder} holds files and no {MANIFEST}, so they are not of this stage; choose another output_dir or remove it.")


def _render_files(
    files: Sequence[Path], bank: Bank, config: RenderConfig, settings: dict[str, Any], inputs: Sequence[FileRecord]
) -> Manifest:
    """Write the documents and the rejects of all files, and return the manifest that describes them."""
    writer = _Writer(config)
    with ExitStack() as stack:
        documents = stack.enter_context(atomic_write(config.output_dir / AUGMENTED, "wb"))
        rejects = stack.enter_context(atomic_write(config.output_dir / REJECTS, "wb"))
        progress = stack.enter_context(Progress(STAGE, total=None, unit="examples"))
        for item in _all_records(files):
            writer.write(item, bank, documents, rejects)
            progress.add()
        if not writer.counts["documents"]:
            raise InputError(f"no example could be rendered from {', '.join(config.input)}: {_reasons(writer.rejected)}.")
    return Manifest(
        stage=STAGE,
        settings=settings,
        inputs=tuple(inputs),
        outputs=records([config.output_dir / AUGMENTED, config.output_dir / REJECTS], relative_to=config.output_dir),
        counts=dict(sorted(writer.counts.items())),
        rejected=dict(sorted(writer.rejected.items())),
        facts={"bank": {"language": bank.language, "version": bank.version, "sha256": bank.fingerprint}},
    )


def _all_records(files: Sequence[Path]) -> Iterator[Record | BrokenRecord]:
    for file in files:
        yield from read_records(file)


class _Writer:
    """Renders and writes one example after another, and counts.

    examples = documents + examples_rejected; pairs = pairs_rendered + pairs_rejected, over the examples that became documents.
    """

    def __init__(self, config: RenderConfig) -> None:
        self._seed, self._stop = config.seed, config.on_error == "stop"
        self.counts: Counter[str] = Counter(
            dict.fromkeys(("examples", "documents", "examples_rejected", "pairs", "pairs_rendered", "pairs_rejected"), 0)
        )
        self.rejected: Counter[str] = Counter()

    def write(self, item: Record | BrokenRecord, bank: Bank, documents: IO[bytes], rejects: IO[bytes]) -> None:
        self.counts["examples"] += 1
        rendered = item if isinstance(item, BrokenRecord) else _rendered(item, bank, self._seed)
        if isinstance(rendered, BrokenRecord):
            self._reject_example(rendered, rejects)
            return
        rendering, line = rendered
        documents.write(line)
        self.counts["documents"] += 1
        self.counts["pairs"] += rendering.pairs + len(rendering.set_aside)
        self.counts["pairs_rendered"] += rendering.pairs
        self.counts["pairs_rejected"] += len(rendering.set_aside)
        self.counts[f"layout_{rendering.layout}"] += 1
        self.counts["inverted"] += rendering.inverted
        for one in rendering.set_aside:
            self.rejected[one.reason] += 1
            row = {"file": str(item.path), "line": item.line, "reason": one.reason, "raw_text": one.raw_text_id, "pair": one.pair.to_json()}
            rejects.write(_json_line(row))

    def _reject_example(self, broken: BrokenRecord, rejects: IO[bytes]) -> None:
        if self._stop:
            raise InputError(
                f"{broken.where}: {broken.reason}: {broken.detail}; mend the line, or set such lines aside with --on-error reject."
            )
        self.counts["examples_rejected"] += 1
        self.rejected[broken.reason] += 1
        row = {"file": str(broken.path), "line": broken.line, "reason": broken.reason, "detail": broken.detail, "raw": broken.raw}
        rejects.write(_json_line(row, escape=True))


def _rendered(record: Record, bank: Bank, seed: int) -> tuple[Rendering, bytes] | BrokenRecord:
    """Return the rendered example and its line of augmented.jsonl."""
    try:
        rendering = render(MShotExample.from_json(record.value, where=record.where), bank, seed=seed)
        for one in rendering.set_aside:
            _json_line(one.pair.to_json())
        return rendering, _json_line(rendering.document.to_json())
    except InputError as error:
        reason, detail = "no example", str(error).removeprefix(f"{record.where}: ")
    except UnicodeEncodeError as error:
        reason, detail = "lone surrogate", f"half of a surrogate pair, which is no text ({error.reason})"
    return BrokenRecord(path=record.path, line=record.line, reason=reason, detail=detail, raw=json.dumps(record.value))


def _json_line(value: object, *, escape: bool = False) -> bytes:
    return json.dumps(value, ensure_ascii=escape).encode() + b"\n"


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
