"""What synthesis wrote for evaluation texts -> a table of measures, by synthesizer and data set.

Comes in: output folders of synthesize.py, each made from the texts.jsonl of make_synthesizer_questions.py with --filters grounding.
Goes out: OUTPUT_DIR/results.json, answers.jsonl (each question with gold answer, answer and F1), manifest.json last. Meets synthesis on
the disk alone.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_instruct.config import run_tool
from megatron_instruct.corpora.read import BrokenRecord, read_records
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import atomic_write, write_json
from megatron_instruct.manifest import FileRecord, Manifest, finished, read_manifest, record, records, write_manifest
from megatron_instruct.prompt_formats.parsing import PairLayout, parse_pairs, write_pairs
from megatron_instruct.prompt_formats.prompt_format import load_prompt_format
from megatron_instruct.records import InstructionPair, MShotExample
from megatron_instruct.tuning.measures import MEASURES, WrittenFor, measure, token_f1
from megatron_instruct.tuning.questions import STAGE as QUESTIONS
from megatron_instruct.workspace import held

STAGE = "evaluate-synthesizer"
RESULTS, ANSWERS = "results.json", "answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure what synthesizers wrote for evaluation texts: parseable, grounded, distinct, token F1 with gold answers and gold pairs.

    Writes OUTPUT_DIR/results.json, answers.jsonl and manifest.json, and prints a table.
    """

    runs: dict[str, Path]
    """NAME FOLDER pairs: what a row of the table is called, and the output folder of synthesize.py that it measures."""
    output_dir: Path
    """Folder of the result."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("runs is empty; give NAME FOLDER pairs.")


@dataclass(kw_only=True)
class _Run:
    """One output of synthesis, and the texts that it was made from."""

    name: str
    shots: int
    inputs: tuple[FileRecord, ...]
    texts: Mapping[str, dict[str, Any]]
    """Those that were asked about, by id."""
    written: dict[str, WrittenFor] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    judged: bool = True
    """The filter grounding knew the language, so that it could drop pairs."""


def run(config: EvaluateConfig) -> Manifest:
    """Do the stage; return its manifest."""
    runs = [_read(name, folder) for name, folder in config.runs.items()]
    settings = {"runs": {one.name: [file.sha256 for file in one.inputs] for one in runs}}
    inputs = tuple({file.path: file for one in runs for file in one.inputs}.values())
    place = config.output_dir / "manifest.json"
    with held(config.output_dir, [config.output_dir / RESULTS, config.output_dir / ANSWERS]):
        manifest = finished(place, stage=STAGE, settings=settings, inputs=inputs)
        if manifest is None:
            rows = [row for one in runs for row in _rows(one)]
            write_json(config.output_dir / RESULTS, rows)
            with atomic_write(config.output_dir / ANSWERS) as stream:
                stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for one in runs for line in _answer_lines(one))
            outputs = records([config.output_dir / RESULTS, config.output_dir / ANSWERS], relative_to=config.output_dir)
            manifest = Manifest(stage=STAGE, settings=settings, inputs=inputs, outputs=outputs, counts={"rows": len(rows)})
            write_manifest(place, manifest)
    print(table(json.loads((config.output_dir / RESULTS).read_text(encoding="utf-8"))))
    return manifest


def _read(name: str, folder: Path) -> _Run:
    """Read an output folder of synthesis. Raises InputError where it was not made as this evaluation needs."""
    manifest = read_manifest(folder / "manifest.json", stage="synthesize")
    if len(manifest.inputs) != 1:
        raise InputError(f"{folder} was made from {len(manifest.inputs)} files; the evaluation needs one texts.jsonl.")
    source = Path(manifest.inputs[0].path)
    questions = read_manifest(source.parent / "manifest.json", stage=QUESTIONS)
    if record(source).sha256 != manifest.inputs[0].sha256:
        raise InputError(f"{source} was changed since {folder} was made from it; run synthesize.py again.")
    _check_settings(folder, manifest, rounds=questions.facts["rounds"])
    texts = {line["id"]: line for line in _lines(source) if "gold" in line}
    files = (record(source), record(folder / "examples.jsonl"), record(folder / "rejects.jsonl"))
    one = _Run(name=name, shots=questions.settings["shots"], inputs=files, texts=texts)
    layout = load_prompt_format("instruction-synthesizer").pair  # that of the public collection, too
    one.written = {id_: WrittenFor(gold=_gold(line, layout)) for id_, line in texts.items() if "question" not in line}
    for line in _lines(folder / "examples.jsonl"):
        for shot in MShotExample.from_json(line, where=str(folder / "examples.jsonl")).shots:
            if shot.id in one.written:
                one.written[shot.id].pairs += map(_compared, shot.pairs)
                one.judged &= all("grounding" in pair.provenance["filters"] for pair in shot.pairs)
            elif shot.id in texts and shot.pairs:
                one.answers[shot.id] = shot.pairs[0].answer
    for line in _lines(folder / "rejects.jsonl"):
        if (text := one.written.get(line["id"])) is not None:
            if line["where"] == "filter":
                question, _, answer = line["content"].partition("\n")
                text.ungrounded.append((question, answer))
            elif line["where"] == "completion":
                text.unparsed += 1
    return one


def _check_settings(folder: Path, manifest: Manifest, *, rounds: int) -> None:
    """Raise InputError where synthesis was not asked for what is measured. rounds: as many as show all shots to each text."""
    wanted = {"filters": ["grounding"], "rounds": rounds, "question_key": "question", "pairs_key": "pairs", "limit": None}
    for name, value in wanted.items():
        if (found := manifest.settings.get(name)) != value:
            raise InputError(f"{folder} was made with {name}={found!r}, and the evaluation needs {value!r}; run synthesize.py again so.")
    if (split := manifest.counts["records_split"]) or (left_out := manifest.rejected.get("text too long", 0)):
        what = f"{split} contexts were split" if split else f"{left_out} contexts were left out"
        raise InputError(f"{folder}: {what}, being too long for the model; run synthesize.py with a larger --max-model-len.")


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    for item in read_records(path) if path.stat().st_size else ():
        if isinstance(item, BrokenRecord):
            raise InputError(f"{item.where}: {item.reason}: {item.detail}; make the file again.")
        yield item.value


def _gold(line: Mapping[str, Any], layout: PairLayout) -> list[tuple[str, str]]:
    """Return the gold pairs of a text, read as what is written is: the words that announce options and steps are not compared."""
    found = []
    for plain in (InstructionPair(question=one["question"], answer=one["answer"]) for one in line["gold"]):
        parsed = parse_pairs(write_pairs([plain], layout), layout, stopped=True)
        found.append(_compared(plain if parsed.dropped else parsed.pairs[0]))
    return found


def _compared(pair: InstructionPair) -> tuple[str, str]:
    return pair.question, "\n".join((*pair.options, pair.rationale or "", pair.answer))


def _rows(one: _Run) -> Iterable[dict[str, Any]]:
    """Yield a row for each data set, and for the seen and the held-out ones together."""
    names = sorted({line["data_set"] for line in one.texts.values()})
    held_out = {line["data_set"] for line in one.texts.values() if line["held_out"]}
    groups = [(name, {name}) for name in names]
    groups += [(name, group) for name, group in (("all seen", {*names} - held_out), ("all held out", held_out)) if group]
    for name, group in groups:
        written = [text for id_, text in one.written.items() if one.texts[id_]["data_set"] in group]
        asked = [line for line in one.texts.values() if "question" in line and line["data_set"] in group]
        answers = [(one.answers.get(line["id"], ""), line["gold"][0]["answer"]) for line in asked]
        row = {"run": one.name, "shots": one.shots, "data_set": name, "held_out": group <= held_out}
        yield {**row, **dataclasses.asdict(measure(written, answers)), **({} if one.judged else {"grounded": None})}


def _answer_lines(one: _Run) -> Iterable[dict[str, Any]]:
    for id_, line in one.texts.items():
        if "question" in line:
            gold, answer = line["gold"][0]["answer"], one.answers.get(id_, "")
            yield {"run": one.name, "id": id_, "question": line["question"], "gold": gold, "answer": answer, "f1": token_f1(answer, gold)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = ("data set", "run", "shots", "texts", "pairs", "questions", *MEASURES)
    lines = [head, ("---",) * len(head)]
    for row in sorted(
        rows, key=lambda row: (row["held_out"], row["data_set"].startswith("all "), row["data_set"], row["shots"], row["run"])
    ):
        name = row["data_set"] + (" (held out)" if row["held_out"] and not row["data_set"].startswith("all ") else "")
        values = ("–" if row[measure] is None else f"{row[measure]:.2f}" for measure in MEASURES)
        lines.append((name, row["run"], str(row["shots"]), str(row["texts"]), str(row["pairs"]), str(row["questions"]), *values))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(EvaluateConfig, run, argv, prog="evaluate_synthesizer.py")
