"""From evaluation texts through synthesis, with the scripted engine, to the table: shots shown, questions asked alone, measures counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_instruct.prompt_formats.prompt_format import FORMATS
from megatron_instruct.synthesis.run import main as synthesize
from megatron_instruct.tuning.evaluate import main as evaluate
from megatron_instruct.tuning.questions import main as make_questions
from tests.tuning.conftest import lines, row, write_rows

GOOD = "<QUE> What is bug 0? <ANS> Bug 0 is small. </END>\n\n<QUE> Who found it? <ANS> Grace did, in Paris. </END>\n\n<QUE> Cut"
"""A grounded pair, one that is not grounded, and an unfinished one."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows" / "seen.jsonl", [row(number, "seen") for number in range(4)])
    return write_rows(tmp_path / "rows" / "new.jsonl", [row(number, "new") for number in range(10, 14)]).parent


@pytest.fixture
def written(tmp_path: Path, rows: Path, synthesizer_tokenizer: Path) -> Callable[..., Path]:
    """Make questions with so many shots, and let the scripted engine write for them; return the output folder."""

    def write(shots: int, *flags: str, **script: Any) -> Path:
        questions, output = tmp_path / f"questions-{shots}", tmp_path / f"written-{shots}"
        command = ["--input", str(rows), "--output-dir", str(questions), "--shots", str(shots), "--contexts", "2", "--questions", "1"]
        assert make_questions([*command, "--held-out", "new"]) == 0
        (tmp_path / "script.yaml").write_text(yaml.safe_dump({"completion": GOOD, "log": str(tmp_path / f"log-{shots}"), **script}))
        words = ["--input", str(questions / "texts.jsonl"), "--output-dir", str(output), "--model", str(synthesizer_tokenizer)]
        words += ["--engine", "scripted", "--script", str(tmp_path / "script.yaml"), "--rounds", str(shots + 1)]
        assert synthesize([*words, "--question-key", "question", "--pairs-key", "pairs", *(flags or ("--filters", "grounding"))]) == 0
        return output

    return write


def test_measures_through_synthesis(tmp_path: Path, written: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    answers = {
        "seen/seen.jsonl:1?0": " Bug 0 is small. </END>\n\n<QUE> Another",
        "seen/seen.jsonl:2?0": " It is a bug",
        "new/new.jsonl:1?0": " ",
    }
    output = written(0, completions=answers)
    assert evaluate(["--runs", "one", str(output), "--output-dir", str(tmp_path / "table")]) == 0
    by_set = {line["data_set"]: line for line in json.loads((tmp_path / "table" / "results.json").read_text())}
    seen = by_set["seen"]
    assert (seen["texts"], seen["pieces"], seen["pairs"], seen["questions"], seen["held_out"]) == (2, 6, 4, 2, False)
    assert seen["parseable"] == pytest.approx(4 / 6)
    assert seen["grounded"] == pytest.approx(1 / 4), "bug 0 is in the first text only, Paris in none"
    assert seen["distinct"] == pytest.approx(2 / 4)
    assert seen["answer_f1"] == pytest.approx((1 + 2 * 2 / (4 + 3)) / 2), "'it is bug' against 'bug 1 is small'"
    assert by_set["new"]["held_out"]
    assert by_set["new"]["answer_f1"] < 1, "a question without an answer counts as wrong"
    assert {"all seen", "all held out"} <= by_set.keys()
    shown = capsys.readouterr().out
    assert "| new (held out) | one | 0 | 2 | 4 | 2 | 0.67 |" in shown
    answered = {line["id"]: line for line in lines(tmp_path / "table" / "answers.jsonl")}
    assert answered["new/new.jsonl:1?0"]["answer"] == ""
    assert answered["seen/seen.jsonl:1?0"] == {
        "run": "one",
        "id": "seen/seen.jsonl:1?0",
        "question": "What is bug 0?",
        "gold": "Bug 0 is small.",
        "answer": "Bug 0 is small.",
        "f1": 1.0,
    }


def test_shots_of_the_same_data_set_are_shown_and_never_asked_about(tmp_path: Path, written: Callable[..., Path]) -> None:
    output = written(2, completion="<QUE> When was it mended? <ANS> It was mended on day </END>")
    asked = (tmp_path / "log-2").read_text().split("\n")[:-1]
    assert sorted(asked) == sorted(f"{name}/{name}.jsonl:{n}{q}" for name in ("seen", "new") for n in (1, 2) for q in ("", "?0"))
    examples = [[shot["id"] for shot in line["shots"]] for line in lines(output / "examples.jsonl")]
    assert len(examples) == 8
    for first, second, last in examples:
        name = last.split("/")[0]
        assert first == f"{last} after {name}/{name}.jsonl:3", "gold rows of the same data set that are not evaluated, in every chain"
        assert second == f"{last} after {name}/{name}.jsonl:4"


def test_gold_pairs_written_word_for_word_are_a_perfect_match(tmp_path: Path, rows: Path, written: Callable[..., Path]) -> None:
    pairs = [
        ("Who found the bug?\nOptions:\n- Ada\n- Grace", "Ada"),
        ("Was it Ada?\nLet's think step by step.", "Ada found it.\nTherefore, the answer is yes"),
        ("Who mended it?\nOptions:\n- Paris\n- Rome\nLet's think step by step.", "It was mended in Paris.\nTherefore, the answer is Paris"),
    ]
    write_rows(rows / "new.jsonl", [row(10, "new", pairs=pairs)])
    completion = "\n\n".join(f"<QUE> {question} <ANS> {answer} </END>" for question, answer in pairs)
    output = written(0, completions={"new/new.jsonl:1": completion})
    assert evaluate(["--runs", "one", str(output), "--output-dir", str(tmp_path / "table")]) == 0
    (new,) = (line for line in json.loads((tmp_path / "table" / "results.json").read_text()) if line["data_set"] == "new")
    assert (new["pairs"], new["pair_f1"]) == (3, 1.0)
    assert 0 < new["grounded"] < 1, "what is dropped is compared in the same words"


def test_grounding_that_knows_no_word_of_the_language_is_no_measure(tmp_path: Path, written: Callable[..., Path]) -> None:
    german = tmp_path / "german.yaml"
    german.write_text((FORMATS / "instruction-synthesizer.yaml").read_text().replace("language: en", "language: de"))
    output = written(0, "--filters", "grounding", "--prompt-format", str(german))
    assert evaluate(["--runs", "one", str(output), "--output-dir", str(tmp_path / "table")]) == 0
    results = json.loads((tmp_path / "table" / "results.json").read_text())
    assert {line["grounded"] for line in results} == {None}
    assert {line["parseable"] for line in results} == {2 / 3}


def test_no_context_is_shown_with_its_answers_and_evaluated(tmp_path: Path) -> None:
    rows = [row(number % 3, "seen", pairs=[(f"Question {number}?", f"Answer {number}")]) for number in range(5)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert make_questions(["--input", str(path), "--output-dir", str(tmp_path / "q"), "--shots", "2"]) == 0
    made = lines(tmp_path / "q" / "texts.jsonl")
    shown = {line["text"] for line in made if "pairs" in line}
    assert len(shown) == 2
    assert [line["id"] for line in made if "gold" in line] == ["seen/rows.jsonl:3", "seen/rows.jsonl:3?0"]
    assert shown.isdisjoint(line["text"] for line in made if "gold" in line)


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, written: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    output = written(0, "--filters", "length", "grounding")
    assert evaluate(["--runs", "one", str(output), "--output-dir", str(tmp_path / "table")]) == 3
    assert "made with filters=['length', 'grounding'], and the evaluation needs ['grounding']" in capsys.readouterr().err
    other = written(1)
    (tmp_path / "questions-1" / "texts.jsonl").write_text("{}\n")
    assert evaluate(["--runs", "one", str(other), "--output-dir", str(tmp_path / "table")]) == 3
    assert "texts.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rounds", "2"), "made with rounds=2, and the evaluation needs 3"),
        (("--limit", "5"), "made with limit=5, and the evaluation needs None"),
        (("--pairs-key", "gold"), "made with pairs_key='gold', and the evaluation needs 'pairs'"),
        (
            ("--max-model-len", "300", "--max-new-tokens", "250"),
            "being too long for the model; run synthesize.py with a larger --max-model-len",
        ),
    ],
)
def test_synthesis_that_was_asked_for_something_else_is_refused(
    tmp_path: Path, written: Callable[..., Path], capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    output = written(2, "--filters", "grounding", *flags)
    assert evaluate(["--runs", "one", str(output), "--output-dir", str(tmp_path / "table")]) == 3
    assert message in capsys.readouterr().err


def test_files_of_one_name_are_data_sets_of_their_own(tmp_path: Path) -> None:
    for name in ("squad", "drop"):
        rows = [{key: value for key, value in row(number, name).items() if key != "rc_name"} for number in range(3)]
        write_rows(tmp_path / name / "train.jsonl", rows)
    files = ["--input", str(tmp_path / "squad" / "train.jsonl"), str(tmp_path / "drop" / "train.jsonl")]
    assert make_questions([*files, "--output-dir", str(tmp_path / "q"), "--shots", "0"]) == 0
    made = lines(tmp_path / "q" / "texts.jsonl")
    assert {line["data_set"] for line in made} == {"squad/train", "drop/train"}
    assert len({line["id"] for line in made}) == len(made)
    assert made[0]["id"] == "squad/train/squad/train.jsonl:1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--held-out", "newer"), "held_out names newer, and the input has new, seen"),
        (("--shots", "4"), "has 4 rows, and shots=4 leaves none"),
        (("--contexts", "0"), "contexts=0 must be at least 1"),
    ],
)
def test_questions_that_cannot_be_made(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    assert make_questions(["--input", str(rows), "--output-dir", str(tmp_path / "q"), *flags]) in (2, 3)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "q" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": 3}, "broken question"),
        ({"question": ""}, "broken question"),
        ({"pairs": "no"}, "broken pairs"),
        ({"pairs": [{"question": "q"}]}, "'answer' is None"),
    ],
)
def test_synthesis_names_a_question_or_pairs_that_are_none(
    tmp_path: Path, synthesizer_tokenizer: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], message: str
) -> None:
    corpus = write_rows(tmp_path / "texts.jsonl", [{"id": "1", "text": "A text.", **fields}])
    (tmp_path / "script.yaml").write_text("completion: none\n")
    words = ["--input", str(corpus), "--output-dir", str(tmp_path / "out"), "--model", str(synthesizer_tokenizer), "--engine", "scripted"]
    assert synthesize([*words, "--script", str(tmp_path / "script.yaml"), "--question-key", "question", "--pairs-key", "pairs"]) == 3
    assert message in capsys.readouterr().err
