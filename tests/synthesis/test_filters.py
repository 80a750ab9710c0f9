"""Filters: each keeps what is good, and drops what is bad for its own reason."""

import pytest

from megatron_instruct.errors import ConfigError
from megatron_instruct.records import InstructionPair
from megatron_instruct.synthesis.filter_settings import FilterSettings
from megatron_instruct.synthesis.filters import Filters

TEXT = (
    "kluge\n\nA kluge is a clumsy repair that works for the wrong reasons. Hackers write kluges when a deadline is near. "
    "The word was known in the navy of the 1940s, where it meant any device that failed at sea."
)
GOOD = InstructionPair(question="What is a kluge?", answer="A clumsy repair that works for the wrong reasons.")


def reasons(*pairs: InstructionPair, text: str = TEXT, language: str = "en", **settings: object) -> list[str]:
    return [piece.reason for piece in Filters(FilterSettings(**settings), language=language).keep(pairs, text)[1]]  # type: ignore[arg-type]


def pair(question: str, answer: str, *options: str) -> InstructionPair:
    return InstructionPair(question=question, answer=answer, options=options, kind="options" if options else "free_form")


def test_a_good_pair_passes_every_filter() -> None:
    kept, dropped = Filters(FilterSettings(), language="en").keep([GOOD], TEXT)
    assert (kept, dropped) == ([GOOD], [])


BAD = {
    "question too long": pair("What is a kluge " * 30 + "?", GOOD.answer),
    "answer too long": pair(GOOD.question, "A clumsy repair. " * 80),
    "repetition": pair(GOOD.question, "a clumsy repair is a clumsy repair is a clumsy repair is"),
    "question without content": pair("What is it?", GOOD.answer),
    "answer is a question": pair(GOOD.question, "A clumsy repair?"),
    "answer repeats the question": pair("Kluge repair", "kluge repair"),
    "answer says that there is none": pair(GOOD.question, "The kluge is not mentioned in the text."),
    "options repeat or leave no choice": pair(GOOD.question, "repair", "repair", "Repair."),
    "answer is not among the options": pair(GOOD.question, "repair", "device", "sea"),
    "answer not grounded in the text": pair(GOOD.question, "A musical instrument from Hungary."),
    "question not about the text": pair("What is photon pressure?", "A device that failed at sea."),
    "question not about its answer": pair("What did hackers repair?", "Something failed at sea."),
}


@pytest.mark.parametrize("reason", BAD)
def test_each_fault_is_found_for_its_own_reason(reason: str) -> None:
    text = (
        TEXT
        + " Nothing else was ever told of it in all the long years since the boats came home and were broken up for scrap iron and rope, "
        * 2
    )
    assert reasons(BAD[reason], text=text + "Something failed at sea.") == [reason]


def test_duplicates_are_measured_against_the_pairs_kept_before() -> None:
    same = pair("What is the kluge?", "A device that failed at sea.")
    again = pair("Why do hackers write kluges?", GOOD.answer)
    assert reasons(GOOD, same, again) == ["duplicate question", "duplicate answer"]
    bad_first = pair("What is a kluge?", "A musical instrument from Hungary.")
    assert reasons(bad_first, GOOD) == ["answer not grounded in the text"]


def test_options_of_a_good_question_pass() -> None:
    assert reasons(pair("When do hackers write kluges?", "near a deadline", "at sea", "near a deadline")) == []


def test_an_answer_without_content_words_is_not_judged() -> None:
    assert reasons(pair("Does a kluge work?", "No.")) == []


def test_a_language_without_spaces_is_measured_too() -> None:
    text = "水在一百摄氏度沸腾。"
    assert reasons(pair("水在多少度沸腾？", "一百摄氏度"), text=text, language="zh", min_relevance=0.3) == []
    assert reasons(pair("水在多少度沸腾？", "零下三十华氏度"), text=text, language="zh", min_relevance=0.3) == [
        "answer not grounded in the text"
    ]


def test_filters_are_those_that_are_named_in_their_order() -> None:
    bad = BAD["answer not grounded in the text"]
    assert reasons(bad, filters=("length",)) == []
    with pytest.raises(ConfigError, match="did you mean 'grounding'"):
        FilterSettings(filters=("groundings",))
    with pytest.raises(ConfigError, match="min_grounding=2"):
        FilterSettings(min_grounding=2)
