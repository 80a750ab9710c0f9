#!/usr/bin/env python
"""Rendering of examples, ours against the reference's script, on the same examples, in documents per second.

Timed on both sides: the line of JSON that holds an example -> the text of its document, parsed as each side parses: ours as
preprocess_data.py does, the reference's by json.loads (--json-loads: both by json.loads). Nothing is read or written while
the clock runs, and no random seed is made outside it. Ours does more in that time: it checks the record, keeps the role of every
character, and records what was drawn. The sides take turns in one process, and its processor time is what counts, so that
other work on the machine disturbs less. Then from file to file, by the clock: tools/render_templates.py, a whole process with a worker for
each core, against the reference's rendering in a loop that reads and writes lines of JSON, one process without its start. The last line is
JSON with the medians and their ratios (above 1: ours is faster).

The reference is the folder instruction_pretrain of Microsoft's LMOps. It is no part of this project; fetch it and name its folder:

    git clone --depth 1 https://github.com/microsoft/LMOps
    benchmarks/rendering.py --reference LMOps/instruction_pretrain     (or set INSTRUCTION_PRETRAIN)

Without it only our side is timed, and the ratio is null. The examples: entries of the Jargon File that the project ships, two to an
example, five pairs each, of all four kinds, the same for both sides, each in its own form.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Render = Callable[[str, int], str]
KINDS = ("free_form", "options", "chain_of_thought", "options_chain_of_thought")


def make_examples(count: int) -> list[dict[str, Any]]:
    """Return examples as synthesis writes them: each question asks for a word that a sentence of the text holds."""
    entries = [json.loads(line) for line in (ROOT / "examples/quickstart/jargon.jsonl").read_text(encoding="utf-8").splitlines()]
    entries = [entry for entry in entries if len(entry["text"].split()) >= 40]
    made = []
    for number in range(count):
        generator = random.Random(number)
        shots = [_shot(generator.choice(entries), f"{number}.{place}", generator) for place in range(2)]
        made.append({"id": f"{number}.0", "shots": shots})
    return made


def _shot(entry: dict[str, str], name: str, generator: random.Random) -> dict[str, Any]:
    words = sorted({word for word in entry["text"].split() if word.isalpha()})
    pairs = []
    for place in range(5):
        options = generator.sample(words, 4)
        kind = KINDS[0] if place < 2 else generator.choice(KINDS)
        pairs.append(
            {
                "question": f"Which word stands in the entry on {entry['title']}, at place {place}?",
                "answer": options[1],
                "kind": kind,
                "options": options if "options" in kind else [],
                "rationale": f"The entry says {' '.join(options)}, of which {options[1]} is meant" if "chain" in kind else None,
                "provenance": {"synthesizer": "benchmark", "round": int(name[-1])},
            }
        )
    return {"id": name, "text": entry["text"], "pairs": pairs}


def reference_entries(example: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an example as the reference's script takes it after parsing: options and reasoning inside of question and answer."""
    return [
        {
            "context": shot["text"],
            "QA_list": [_reference_pair(pair) for pair in shot["pairs"]],
            "inherit_from_prev": place > 0,
        }
        for place, shot in enumerate(example["shots"])
    ]


def _reference_pair(pair: dict[str, Any]) -> dict[str, str]:
    question, answer = pair["question"], pair["answer"]
    if pair["options"]:
        question += "\nOptions:" + "".join(f"\n- {option}" for option in pair["options"])
    if pair["rationale"]:
        question += "\nLet's think step by step."
        answer = f"{pair['rationale']}\nTherefore, the answer is {answer}"
    return {"Q": question, "A": answer}


def our_side(*, json_loads: bool) -> Render:
    from megatron_instruct.records import MShotExample
    from megatron_instruct.templates.bank import load_bank, shipped_bank
    from megatron_instruct.templates.rendering import render

    bank = load_bank(shipped_bank("en"))

    def one(line: str, number: int) -> str:
        example = MShotExample.from_json(json.loads(line), where="benchmark") if json_loads else MShotExample.from_line(line)
        assert example is not None, "every line is an example"
        return render(example, bank, seed=1234).document.text

    return one


def reference_side(folder: Path) -> Render:
    if not (folder / "utils" / "read_compre.py").is_file():
        sys.exit(f"{folder} holds no utils/read_compre.py: it is not the reference's folder instruction_pretrain; see --help.")
    if importlib.util.find_spec("tqdm") is None:  # the script imports it for progress bars, which rendering does not show
        sys.modules["tqdm"] = types.SimpleNamespace(tqdm=lambda items, **_: items)  # type: ignore[assignment]
    sys.path.insert(0, str(folder))
    from utils.read_compre import cook_pt_entries  # type: ignore[import-not-found]

    def one(line: str, number: int) -> str:
        (text,) = cook_pt_entries(read_collection=json.loads(line), random_seed=number + 12345)
        return str(text)

    return one


def seconds(render: Render, lines: Sequence[str]) -> float:
    start = time.process_time()
    for number, line in enumerate(lines):
        render(line, number)
    return time.process_time() - start


def file_to_file(render: Render | None, folder: Path, examples: Sequence[dict[str, Any]], turns: int) -> dict[str, Any]:
    """Return documents per second of both sides, medians, and their ratio. render: the reference's, if it is there."""
    ours, theirs = folder / "examples.jsonl", folder / "entries.jsonl"
    ours.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    theirs.write_text("".join(json.dumps(reference_entries(example)) + "\n" for example in examples), encoding="utf-8")
    taken: dict[str, list[float]] = {"ours": [], "reference": []}
    for turn in range(turns):
        start = time.perf_counter()
        output = folder / f"rendered{turn}"
        command = [sys.executable, str(ROOT / "tools" / "render_templates.py"), "--input", str(ours), "--output-dir", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        taken["ours"].append(time.perf_counter() - start)
        shutil.rmtree(output)
        if render is not None:
            start = time.perf_counter()
            with open(theirs, encoding="utf-8") as stream, open(folder / "reference.jsonl", "w", encoding="utf-8") as target:
                for number, line in enumerate(stream):
                    target.write(json.dumps({"text": render(line, number)}, ensure_ascii=False) + "\n")
            taken["reference"].append(time.perf_counter() - start)
    rates = {name: len(examples) / statistics.median(each) for name, each in taken.items() if each}
    return {
        **{f"{name}_documents_per_second": round(rate) for name, rate in rates.items()},
        "documents": len(examples),
        "workers": len(os.sched_getaffinity(0)),
        "ratio": round(rates["ours"] / rates["reference"], 2) if "reference" in rates else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = os.environ.get("INSTRUCTION_PRETRAIN")
    default = Path(known) if known else None
    parser.add_argument("--reference", type=Path, default=default, help="the reference's folder instruction_pretrain")
    parser.add_argument("--examples", type=int, default=1000, help="documents of one turn")
    parser.add_argument("--turns", type=int, default=11, help="turns of each side")
    parser.add_argument("--file-examples", type=int, default=40_000, help="documents of one turn from file to file")
    parser.add_argument("--file-turns", type=int, default=3, help="turns of each side from file to file")
    parser.add_argument("--json-loads", action="store_true", help="parse by json.loads on our side, too")
    options = parser.parse_args()

    examples = make_examples(options.examples)
    sides = {"ours": (our_side(json_loads=options.json_loads), [json.dumps(example) for example in examples])}
    if options.reference is not None:
        sides["reference"] = (reference_side(options.reference), [json.dumps(reference_entries(example)) for example in examples])
    else:
        print("The reference is missing, so there is no ratio; --help says how to get it.")
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, options.turns):
        for name in list(sides) if turn % 2 else reversed(list(sides)):
            elapsed = seconds(*sides[name])
            if turn >= 0:  # the first turn warms up
                taken[name].append(elapsed)
    rates = {name: options.examples / statistics.median(each) for name, each in taken.items()}
    best = {name: options.examples / min(each) for name, each in taken.items()}
    texts = {name: [render(line, number) for number, line in enumerate(lines)] for name, (render, lines) in sides.items()}
    with tempfile.TemporaryDirectory() as folder:
        render = sides["reference"][0] if "reference" in sides else None
        files = file_to_file(render, Path(folder), make_examples(options.file_examples), options.file_turns)
    print(
        json.dumps(
            {
                **{f"{name}_documents_per_second": round(rate) for name, rate in rates.items()},
                **{f"{name}_best_documents_per_second": round(rate) for name, rate in best.items()},
                **{f"{name}_characters_per_document": round(statistics.mean(map(len, each))) for name, each in texts.items()},
                "ratio": round(rates["ours"] / rates["reference"], 2) if "reference" in rates else None,
                "ratio_of_best": round(best["ours"] / best["reference"], 2) if "reference" in best else None,
                "file_to_file": files,
                "documents": options.examples,
                "turns": options.turns,
                "python": platform.python_version(),
                "machine": platform.processor() or platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
