"""Parsing of completions: four kinds of pairs, and a reason for whatever is dropped."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_instruct.prompt_formats.escaping import Escaping
from megatron_instruct.prompt_formats.parsing import PairLayout, parse_pairs, read_answer, write_pairs
from megatron_instruct.prompt_formats.prompt_format import load_prompt_format
from megatron_instruct.records import InstructionPair

MARKERS = load_prompt_format("instruction-synthesizer").pair
CHAT = load_prompt_format("chat").pair
CHINESE = load_prompt_format("chat-zh").pair


def test_pairs_are_written_with_the_exact_markers_and_blanks() -> None:
    pairs = [InstructionPair(question="Why?", answer="So."), InstructionPair(question="Who?", answer="I.")]
    assert write_pairs(pairs, MARKERS) == "<QUE> Why? <ANS> So. </END>\n\n<QUE> Who? <ANS> I. </END>"


def test_the_four_kinds_of_pairs_are_recognised() -> None:
    completion = (
        "<QUE> Why? <ANS> So. </END>\n\n"
        "<QUE> Which?\nOptions:\n- red\n- blue <ANS> blue </END>\n\n"
        "<QUE> How many?\nLet's think step by step. <ANS> One and one.\nTherefore, the answer is 2 </END>\n\n"
        "<QUE> How many now?\nOptions:\n- 2\n- 3\nLet's think step by step. <ANS> Two and one.\nTherefore, the answer is 3 </END>"
    )
    parsed = parse_pairs(completion, MARKERS, stopped=True)
    assert parsed.dropped == ()
    assert [(p.kind, p.question, p.options, p.rationale, p.answer) for p in parsed.pairs] == [
        ("free_form", "Why?", (), None, "So."),
        ("options", "Which?", ("red", "blue"), None, "blue"),
        ("chain_of_thought", "How many?", (), "One and one.", "2"),
        ("options_chain_of_thought", "How many now?", ("2", "3"), "Two and one.", "3"),
    ]


@pytest.mark.parametrize("end", ["\n", " \n", "\r\n"])
def test_options_are_recognised_whatever_blanks_end_their_lines(end: str) -> None:
    completion = f"<QUE> Which?{end}Options:{end}- red{end}- blue{end}<ANS> blue </END>"
    (pair,) = parse_pairs(completion, MARKERS, stopped=True).pairs
    assert (pair.kind, pair.question, pair.options, pair.answer) == ("options", "Which?", ("red", "blue"), "blue")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("<QUE> Why? <ANS> So.", "incomplete pair"),
        ("Why? <ANS> So. </END>", "no marker at the beginning"),
        ("<QUE> Why? So. </END>", "not exactly one question and one answer"),
        ("<QUE> Why? <ANS> So. <ANS> No. </END>", "not exactly one question and one answer"),
        ("<QUE> A? <QUE> Why? <ANS> So. </END>", "not exactly one question and one answer"),
        ("<QUE>  <ANS> So. </END>", "empty question or answer"),
        ("<QUE> Why? <ANS>  </END>", "empty question or answer"),
        ("<QUE> Why?\nLet's think step by step. <ANS> So. </END>", "no answer after the rationale"),
        (" </END>", "empty pair"),
        ("<QUE> Why? <ANS> So\0. </END>", "NUL character"),
        ("<QUE> Which?\nOptions:\n- re\0d\n- blue <ANS> blue </END>", "NUL character"),
    ],
)
def test_what_is_no_pair_is_dropped_with_its_reason(completion: str, reason: str) -> None:
    parsed = parse_pairs(completion, MARKERS, stopped=True)
    assert parsed.pairs == ()
    assert [piece.reason for piece in parsed.dropped] == [reason]


def test_a_repeated_question_is_dropped_whatever_its_case() -> None:
    parsed = parse_pairs("<QUE> Why? <ANS> So. </END>\n\n<QUE> WHY? <ANS> No. </END>", MARKERS, stopped=True)
    assert [pair.answer for pair in parsed.pairs] == ["So."]
    assert [(piece.reason, piece.content) for piece in parsed.dropped] == [("repeated question", "<QUE> WHY? <ANS> No.")]


def test_a_last_chat_pair_counts_only_when_the_model_stopped_by_itself() -> None:
    completion = "Question: Why?\nAnswer: So.\n\nQuestion: Who?\nAnswer: The"
    assert len(parse_pairs(completion, CHAT, stopped=True).pairs) == 2
    cut = parse_pairs(completion, CHAT, stopped=False)
    assert [len(cut.pairs), cut.dropped[0].reason] == [1, "incomplete pair"]


@pytest.mark.parametrize(
    ("completion", "layout", "answer"),
    [
        ("\n\nThe bug is green.\n\nIs it?", CHAT, "The bug is green."),
        ("\n\nAnswer:\n\nGreen.", CHAT, "Green."),
        ("\n\n", CHAT, ""),
        (" Green. </END>\n\n<QUE> Next", MARKERS, "Green."),
        (" </END>", MARKERS, ""),
    ],
)
def test_an_answer_alone_may_begin_with_a_blank_line(completion: str, layout: PairLayout, answer: str) -> None:
    assert read_answer(completion, layout) == answer


words = st.text(alphabet=st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12).filter(
    lambda word: not word.startswith("-") and "<" not in word and ":" not in word
)
sentence = st.lists(words, min_size=1, max_size=5).map(" ".join)


@st.composite
def pairs(draw: st.DrawFn) -> InstructionPair:
    options = tuple(draw(st.lists(sentence, max_size=3)))
    rationale = draw(st.none() | sentence)
    kinds = {(False, False): "free_form", (True, False): "options", (False, True): "chain_of_thought"}
    kind = kinds.get((bool(options), rationale is not None), "options_chain_of_thought")
    return InstructionPair(question=draw(sentence), answer=draw(sentence), options=options, rationale=rationale, kind=kind)  # type: ignore[arg-type]


@settings(deadline=None)
@given(given_pairs=st.lists(pairs(), max_size=4, unique_by=lambda pair: pair.question.casefold()), layout=st.sampled_from([MARKERS, CHAT]))
def test_written_pairs_are_read_back(given_pairs: list[InstructionPair], layout: PairLayout) -> None:
    parsed = parse_pairs(write_pairs(given_pairs, layout), layout, stopped=True)
    assert list(parsed.pairs) == given_pairs
    assert [piece.reason for piece in parsed.dropped] == ([] if given_pairs else ["empty completion"])


COMPLETIONS = 2000
GARBAGE = [
    "<QUE>", "<ANS>", "</END>", "<QUE> ", " <ANS> ", " </END>\n\n", "<QUE", "ANS>", "</EN", "Question:", "Answer:", "\n\n",
    "问题：", "回答：", "\nOptions:\n- ", "\n- ", "\nLet's think step by step.", "\nTherefore, the answer is", " ", "\n", "\t",
    "\u2060", "\u200b", "\x00", "\ud800", "\udc00", "\ufeff", "🙂", "e\u0301", "漢", "{}", "null", "- ",
]  # fmt: skip


@pytest.mark.parametrize("layout", [MARKERS, CHAT, CHINESE], ids=["markers", "chat", "chat-zh"])
@pytest.mark.parametrize("stopped", [True, False])
def test_every_piece_of_any_completion_is_a_pair_or_is_dropped(layout: PairLayout, stopped: bool) -> None:
    """Words are numbered, so that each must be met again exactly once, in a pair or in what was dropped for a reason."""
    for seed in range(COMPLETIONS):
        draw = random.Random(seed)
        parts = [draw.choice(GARBAGE) if draw.random() < 0.7 else f" w{number}w " for number in range(draw.randint(0, 24))]
        completion = "".join(parts)
        parsed = parse_pairs(completion, layout, stopped=stopped)
        assert parsed.pairs or parsed.dropped, "a completion that holds nothing is dropped itself"
        fields = [text for pair in parsed.pairs for text in (pair.question, pair.answer, pair.rationale or "", *pair.options)]
        seen = " ".join([*fields, *(piece.content for piece in parsed.dropped)])
        assert sorted(re.findall(r"w\d+w", seen)) == sorted(re.findall(r"w\d+w", completion))
        assert all(piece.reason for piece in parsed.dropped)
        assert all(pair.question.strip() and pair.answer.strip() for pair in parsed.pairs)
        chunks = completion.split(layout.end)
        visible = sum(bool(chunk.strip()) for chunk in chunks) if layout.complete_at_stop else len(chunks) - 1 + bool(chunks[-1].strip())
        assert len(parsed.pairs) + len(parsed.dropped) == max(visible, 1)
        json.dumps([*fields, seen], ensure_ascii=False).encode()


def test_half_of_a_surrogate_pair_is_replaced_since_no_file_could_hold_it() -> None:
    (pair,) = parse_pairs("<QUE> Why \ud83d? <ANS> \ud83d\ude42 </END>", MARKERS, stopped=True).pairs
    assert (pair.question, pair.answer) == ("Why \ufffd?", "🙂")


@settings(deadline=None)
@given(st.data())
def test_markers_that_overlap_or_hold_each_other_are_hidden_too(data: st.DataObject) -> None:
    letters = st.text(alphabet="ab<", min_size=2, max_size=4)
    marks, text = data.draw(st.lists(letters, max_size=4)), data.draw(st.text(alphabet="ab<\u2060", max_size=14))
    hidden = Escaping(marks).hide(text)
    assert not any(mark in hidden for mark in marks)
    assert Escaping(marks).restore(hidden) == text


MARKS = ["<CON>", "</CON>", "<QUE>", "<ANS>", "</END>"]


@settings(deadline=None)
@given(st.lists(st.sampled_from([*MARKS, "<", "QUE>", "\u2060", "text", " "]), max_size=30).map("".join))
def test_hidden_texts_hold_no_marker_and_are_given_back(text: str) -> None:
    escaping = Escaping(MARKS)
    hidden = escaping.hide(text)
    assert not any(mark in hidden for mark in MARKS)
    assert escaping.restore(hidden) == text
