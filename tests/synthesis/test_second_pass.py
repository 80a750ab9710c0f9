"""Filters that ask the engine again: their prompts, their verdicts, and what the tool makes of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.prompt_formats.escaping import Escaping
from megatron_instruct.prompt_formats.prompt_format import load_prompt_format
from megatron_instruct.records import InstructionPair
from megatron_instruct.synthesis.filter_settings import FilterSettings
from megatron_instruct.synthesis.run import main
from megatron_instruct.synthesis.second_pass import Judge, SecondAnswer, word_f1

PAIR = InstructionPair(question="What is a kluge?", answer="A clumsy repair.")


class NoPrompts:
    """Prompts that nobody asks for."""

    escaping = Escaping(["<ANS>"])


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (" A clumsy repair. </END>\n\n<QUE> Next", None),
        ("<ANS> a CLUMSY repair", None),
        ("It is a clumsy repair of a radio. </END>", None),
        ("A boat. </END>", "second answer disagrees"),
        ("", "second answer disagrees"),
        ("One word.\nTherefore, the answer is a clumsy repair. </END>", None),
    ],
)
def test_a_second_answer_agrees_by_its_words(completion: str, reason: str | None) -> None:
    check = SecondAnswer(load_prompt_format("instruction-synthesizer"), NoPrompts(), FilterSettings(), 100)  # type: ignore[arg-type]
    drop = check.verdict(PAIR, completion)
    assert (drop and drop.reason) == reason


def test_a_second_answer_may_begin_with_a_blank_line() -> None:
    check = SecondAnswer(load_prompt_format("chat"), NoPrompts(), FilterSettings(), 100)  # type: ignore[arg-type]
    assert check.verdict(PAIR, "\n\nA clumsy repair.") is None


@pytest.mark.parametrize(
    ("language", "completion", "reason"),
    [
        ("chat", "Yes, it does.", None),
        ("chat", " **Yes**", None),
        ("chat", "No. The text says otherwise.", "judged wrong"),
        ("chat", "Perhaps", "judge gave no verdict"),
        ("chat", "", "judge gave no verdict"),
        ("chat-zh", "是的。", None),
        ("chat-zh", "否。", "judged wrong"),
    ],
)
def test_a_judge_is_understood_by_the_first_word(language: str, completion: str, reason: str | None) -> None:
    check = Judge(load_prompt_format(language), NoPrompts(), FilterSettings(), 100)  # type: ignore[arg-type]
    drop = check.verdict(PAIR, completion)
    assert (drop and drop.reason) == reason


def test_agreement_is_the_f1_of_words() -> None:
    assert word_f1("a b c d", "A, b") == pytest.approx(2 * 2 / 6)
    assert (word_f1("a", "a"), word_f1("a", "b"), word_f1("!", "?"), word_f1("", "a")) == (1.0, 0.0, 1.0, 0.0)
    assert word_f1("六次", "六") == pytest.approx(2 / 3)


def test_the_tool_drops_what_a_second_answer_contradicts_and_asks_nothing_else(bench: Any) -> None:
    answers = {f"t00{n}?second_answer=0": "It is about a bug. </END>" for n in range(3)}
    answers |= {f"t00{n}?second_answer=1": "Something else. </END>" for n in range(3)}
    log = bench.folder / "log"
    bench.script(completions=answers, failures={"t001?second_answer=0": 9}, log=str(log))
    arguments = bench.arguments(bench.corpus(3), rounds=3, retries=0)
    assert main([*arguments, "--filters", "default", "second_answer"]) == 0
    manifest = json.loads((bench.folder / "out" / "manifest.json").read_text())
    assert manifest["rejected"] == {"incomplete pair": 3, "second answer disagrees": 3, "second_answer failed": 1}
    assert manifest["counts"]["requests"] == 9
    assert manifest["counts"]["pairs"] == 2
    shots = [shot for line in bench.lines("out/examples.jsonl") for shot in line["shots"]]
    kept = {shot["id"]: [pair["provenance"]["filters"][-1] for pair in shot["pairs"]] for shot in shots}
    assert kept == {"t000": ["second_answer"], "t001": [], "t002": ["second_answer"]}
    assert [[shot["id"] for shot in line["shots"]] for line in bench.lines("out/examples.jsonl")] == [["t000", "t002"], ["t001"]]
    detail = next(row["detail"] for row in bench.lines("out/rejects.jsonl") if row["reason"] == "second answer disagrees")
    assert detail == "F1 0.00 with: Something else."
    order = log.read_text().split()
    assert order.index("t000?second_answer=1") < order.index("t001"), "the next text waits for the verdicts"


def test_a_pair_of_a_text_too_long_to_ask_about_again_is_set_aside(bench: Any) -> None:
    """The text fits; with its question behind it, it does not."""
    text = "Entry t000 is about a bug. The bug number one is told of. " + "x" * 120
    room = len(f" <CON> {text} </CON>\n\n") + 2
    arguments = bench.arguments(bench.corpus([{"id": "t000", "text": text}]), max_model_len=room + 50, max_new_tokens=50)
    assert main([*arguments, "--filters", "default", "second_answer"]) == 0
    reasons = [row["reason"] for row in bench.lines("out/rejects.jsonl")]
    assert reasons == ["incomplete pair", "second_answer does not fit", "second_answer does not fit"]


def test_ids_of_texts_may_look_like_those_of_questions_about_pairs(bench: Any) -> None:
    text = "Entry t000 is about a bug. The bug number one is told of here."
    names = ["t000", "t000?second_answer=0", "t000?second_answer=0?", "t000?second_answer=1"]
    arguments = bench.arguments(bench.corpus([{"id": name, "text": text} for name in names]), rounds=1)
    bench.script(completion="<QUE> Which bug is told of? <ANS> The bug number one. </END>", log=str(bench.folder / "log"))
    assert main([*arguments, "--filters", "default", "second_answer"]) == 0
    shots = [shot for line in bench.lines("out/examples.jsonl") for shot in line["shots"]]
    assert [shot["id"] for shot in shots] == names
    asked = (bench.folder / "log").read_text().split()
    assert len(set(asked)) == len(asked) == 8
    assert asked.count("t000") == 1, "an ordinary id is that of its request"


@pytest.fixture
def chat_model(bench: Any, tmp_path: Path) -> Path:
    """The tokenizer with a chat template."""
    folder = tmp_path / "chat-model"
    shutil.copytree(bench.model, folder)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}))
    return folder


def test_a_judge_of_an_instruct_model_is_asked_about_every_pair(bench: Any, chat_model: Path) -> None:
    pairs = "Question: What is entry {id}?\nAnswer: It is about a bug.\n\nQuestion: Which bug is told of?\nAnswer: The bug number one.\n\n"
    bench.script(completion=pairs, completions={"t000?judge=0": "Yes.", "t000?judge=1": "No.", "t001?judge=0": "Hm."})
    settings = {"prompt_format": "chat", "max_model_len": 30_000}
    arguments = bench.arguments(bench.corpus(2), **settings)
    arguments[arguments.index("--model") + 1] = str(chat_model)
    assert main([*arguments, "--filters", "default", "judge"]) == 0
    manifest = json.loads((bench.folder / "out" / "manifest.json").read_text())
    assert manifest["rejected"] == {"judge gave no verdict": 2, "judged wrong": 1}
    assert manifest["counts"]["pairs"] == 1


def test_a_format_that_cannot_ask_a_given_question_is_refused_by_the_name_of_the_flag(
    bench: Any, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = bench.arguments(bench.corpus(2), prompt_format="chat-extractive", question_key="question")
    arguments[arguments.index("--model") + 1] = str(chat_model)
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert "question_key needs the key 'second_answer' in the prompt format, and prompt_format=chat-extractive has none" in printed
    assert "filters" not in printed


@pytest.mark.parametrize("name", ["judge", "second_answer"])
def test_a_filter_that_the_format_has_no_words_for_is_refused_before_work(
    bench: Any, chat_model: Path, name: str, capsys: pytest.CaptureFixture[str], synthesize: Callable[..., Any]
) -> None:
    own = bench.folder / "own.yaml"
    own.write_text("kind: chat\nlanguage: en\nrequest: '{text}'\npair: {question: 'Q:', answer: 'A:', end: '.'}\n")
    arguments = bench.arguments(bench.corpus(2), prompt_format=own)
    arguments[arguments.index("--model") + 1] = str(chat_model)
    assert main([*arguments, "--filters", "default", name]) == 2
    assert f"needs a prompt format with the key '{name}', and own is none" in capsys.readouterr().err
    assert not (bench.folder / "out" / "examples.jsonl").exists()
