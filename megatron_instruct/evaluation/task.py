"""Held-out documents -> a task of lm-eval in a folder.

Comes in: files with one document per line or row. Goes out: NAME.yaml (names NAME.jsonl by its full path, since lm-eval resolves
paths against the working directory), NAME.jsonl, rejects.jsonl, manifest.json.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_instruct.config import run_tool
from megatron_instruct.corpora.read import REJECTS, BrokenRecord, find_files, require_outside
from megatron_instruct.errors import InputError
from megatron_instruct.evaluation.config import MakeTaskConfig
from megatron_instruct.evaluation.documents import read_documents
from megatron_instruct.evaluation.questions import Questions, make_questions
from megatron_instruct.files import atomic_write
from megatron_instruct.manifest import Manifest, finished, records, write_manifest
from megatron_instruct.workspace import held

STAGE = "evaluation-task"
_NOT_DECIDING = ("input", "output_dir")
_SPLIT = "test"


def run(config: MakeTaskConfig) -> Manifest:
    """Do the stage and return its manifest."""
    require_outside(config.input, config.output_dir, [f"{config.name}.jsonl"])
    files = find_files(config.input)
    inputs = records(files)
    yaml_file, data_file = config.output_dir / f"{config.name}.yaml", config.output_dir / f"{config.name}.jsonl"
    settings = {name: value for name, value in vars(config).items() if name not in _NOT_DECIDING}
    settings |= {"data_file": str(data_file.resolve()), "fewshot_split": _SPLIT}
    manifest_file = config.output_dir / "manifest.json"
    if (done := finished(manifest_file, stage=STAGE, settings=settings, inputs=inputs)) is not None:
        print(f"Finished already: {config.output_dir}.")
        return done
    rejects_file = config.output_dir / REJECTS
    with held(config.output_dir, [yaml_file, data_file, rejects_file]):
        documents, broken = read_documents(files, text_key=config.text_key, title_key=config.title_key)
        made = make_questions(documents, style=config.style, choices=config.choices, seed=config.seed, max_questions=config.max_questions)
        _write_lines(rejects_file, [*map(_broken_line, broken), *({"id": id, "reason": why} for id, why in made.rejected.items())])
        rejected = Counter([*(item.reason for item in broken), *made.rejected.values()])
        if not made.asked:
            reasons = ", ".join(f"{why}: {count:,}" for why, count in sorted(rejected.items())) or "there is no document"
            raise InputError(f"no question can be made of {', '.join(config.input)} ({reasons}); see {rejects_file}.")
        _write_lines(data_file, [question.to_json() for question in made.asked])
        with atomic_write(yaml_file) as stream:
            yaml.safe_dump(_task(config.name, data_file.resolve()), stream, sort_keys=False, allow_unicode=True)
        manifest = Manifest(
            stage=STAGE,
            settings=settings,
            inputs=inputs,
            outputs=records([yaml_file, data_file, rejects_file], relative_to=config.output_dir),
            counts={"documents_in": len(documents) + len(broken), "questions": len(made.asked), "left_over": made.left_over},
            rejected=dict(sorted(rejected.items())),
        )
        write_manifest(manifest_file, manifest)
    _print_summary(config, manifest, made)
    return manifest


def _task(name: str, data_file: Path) -> dict[str, Any]:
    """Return the task as lm-eval reads it. The number of solved examples is left open: lm-eval takes a written 0 for unchangeable.

    They are drawn from the other questions: without fewshot_split, lm-eval 0.4.13 draws the question that is asked, with its answer, too.
    """
    mean = {"aggregation": "mean", "higher_is_better": True}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {_SPLIT: str(data_file)}},
        "test_split": _SPLIT,
        "fewshot_split": _SPLIT,
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        "metadata": {"version": 1},
    }


def _broken_line(item: BrokenRecord) -> dict[str, Any]:
    return {"file": str(item.path), "line": item.line, "reason": item.reason, "detail": item.detail, "raw": item.raw}


def _write_lines(path: Path, values: Sequence[Mapping[str, Any]]) -> None:
    with atomic_write(path) as stream:
        stream.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _print_summary(config: MakeTaskConfig, manifest: Manifest, made: Questions) -> None:
    set_aside = sum(manifest.rejected.values())
    print(
        f"{config.output_dir}: {manifest.counts['documents_in']:,} documents in = {len(made.asked):,} questions "
        f"+ {made.left_over:,} beyond max_questions + {set_aside:,} set aside"
    )
    for why, count in manifest.rejected.items():
        print(f"  {count:,} set aside: {why}")
    first = made.asked[0]
    print(f"The first question (right: {first.gold + 1}):\n  {first.query}")
    for number, choice in enumerate(first.choices, 1):
        print(f"  {number}. {choice.strip()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(MakeTaskConfig, run, argv, prog="make_evaluation_task.py")
