"""Task data -> the texts that a synthesizer is evaluated on, for synthesis to work on as it works on any corpus.

Comes in: rows of task data. Goes out: OUTPUT_DIR/texts.jsonl. For each context one text to write pairs for, and one for each question, to
be answered alone; with gold pairs, data set and whether that was held out. With shots, rows of the same data set stand in blocks before
them, so that synthesis in shots + 1 rounds shows one of each block before each text. manifest.json last. Does not know: models, prompts.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_instruct.config import run_tool
from megatron_instruct.corpora.read import BrokenRecord, find_files, require_outside
from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_write
from megatron_instruct.manifest import Manifest, finished, records, write_manifest
from megatron_instruct.tuning.config import QuestionsConfig
from megatron_instruct.tuning.rows import TaskRow, read_rows
from megatron_instruct.workspace import held

STAGE, TEXTS = "make-synthesizer-questions", "texts.jsonl"
_THINK = re.compile(r"\n(?:Options:\n|Let's think step by step\.)")
"""A question that asks for more than an answer in words."""


def run(config: QuestionsConfig) -> Manifest:
    """Do the stage; return its manifest."""
    require_outside(config.input, config.output_dir, [TEXTS])
    files = find_files(config.input)
    inputs = records(files)
    names = ("shots", "contexts", "questions", "on_error")
    settings = {**{name: getattr(config, name) for name in names}, "held_out": sorted(config.held_out)}
    place = config.output_dir / "manifest.json"
    with held(config.output_dir, [config.output_dir / TEXTS]):
        if (done := finished(place, stage=STAGE, settings=settings, inputs=inputs)) is not None:
            print(f"Finished already: {config.output_dir}.")
            return done
        rejected, tests, shown = _divided(config, files)
        with atomic_write(config.output_dir / TEXTS) as stream:
            lines = list(_lines(config, tests, shown))
            stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        counts = {"contexts": len(tests), "texts": len(lines), "questions": sum("question" in line for line in lines)}
        manifest = Manifest(
            stage=STAGE,
            settings=settings,
            inputs=inputs,
            outputs=records([config.output_dir / TEXTS], relative_to=config.output_dir),
            counts=counts,
            rejected={"row": rejected} if rejected else {},
            facts={"rounds": config.shots + 1, "data_sets": sorted({row.data_set for row in tests})},
        )
        write_manifest(place, manifest)
    print(
        f"{config.output_dir / TEXTS}: {counts['contexts']:,} contexts, {counts['questions']:,} questions; "
        f"pass --rounds {config.shots + 1} --question-key question --pairs-key pairs --filters grounding to synthesize.py"
    )
    return manifest


def _divided(config: QuestionsConfig, files: Sequence[Path]) -> tuple[int, list[TaskRow], dict[str, list[TaskRow]]]:
    """Return how many rows were set aside, the rows to evaluate on, and those to show by data set: its last ones.

    A row with the context of a shown one is not evaluated: its prompt would hold its answers.
    """
    rejected, by_set = 0, dict[str, list[TaskRow]]()
    for row in read_rows(files, on_error=config.on_error):
        if isinstance(row, BrokenRecord):
            rejected += 1
        elif row.pairs:
            by_set.setdefault(row.data_set, []).append(row)
    unknown = sorted({*config.held_out} - by_set.keys())
    if unknown:
        raise InputError(f"held_out names {', '.join(unknown)}, and the input has {', '.join(sorted(by_set)) or 'no data set'}.")
    shown = {name: rows[max(len(rows) - config.shots, 0) :] for name, rows in by_set.items()}
    tests = []
    for name, rows in by_set.items():
        known = {row.context for row in shown[name]}
        left = [row for row in rows if row.context not in known][: config.contexts]
        if not left:
            raise InputError(f"the data set {name} has {len(rows)} rows, and shots={config.shots} leaves none to evaluate on; lower shots.")
        tests += left
    return rejected, tests, shown


def _lines(config: QuestionsConfig, tests: Sequence[TaskRow], shown: dict[str, list[TaskRow]]) -> Iterator[dict[str, Any]]:
    """Yield the lines of texts.jsonl: blocks of shown examples, each as long as the block of tests that comes last."""
    asked = [line for row in tests for line in _asked(row, held_out=row.data_set in config.held_out, most=config.questions)]
    for number in range(config.shots):
        for line in asked:
            shot = shown[line["data_set"]][number]
            yield {"id": f"{line['id']} after {shot.id}", "text": shot.context, "pairs": _pairs(shot)}
    yield from asked


def _asked(row: TaskRow, *, held_out: bool, most: int) -> Iterator[dict[str, Any]]:
    base = {"text": row.context, "data_set": row.data_set, "held_out": held_out}
    yield {"id": row.id, **base, "gold": _pairs(row)}
    plain = [pair for pair in _pairs(row) if not _THINK.search(pair["question"])]
    for number, pair in enumerate(plain[:most]):
        yield {"id": f"{row.id}?{number}", **base, "question": pair["question"], "gold": [pair]}


def _pairs(row: TaskRow) -> list[dict[str, str]]:
    return [
        {"question": question.strip(), "answer": answer.strip()} for question, answer in row.pairs if question.strip() and answer.strip()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(QuestionsConfig, run, argv, prog="make_synthesizer_questions.py")
