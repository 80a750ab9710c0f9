"""Records survive the way through JSON lines, and a value that is no record is refused with its place."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_instruct.errors import InputError
from megatron_instruct.records import AugmentedText, InstructionPair, MShotExample, OneShotExample, Span

ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
TEXT = ANY_TEXT.filter(lambda text: bool(text.strip()))
PAIRS = st.builds(
    InstructionPair,
    question=TEXT,
    answer=TEXT,
    kind=st.sampled_from(["free_form", "options", "chain_of_thought", "options_chain_of_thought"]),
    options=st.lists(ANY_TEXT, max_size=3).map(tuple),
    rationale=st.none() | ANY_TEXT,
    provenance=st.dictionaries(ANY_TEXT, st.none() | st.booleans() | st.integers() | ANY_TEXT, max_size=2),
)
SHOTS = st.builds(OneShotExample, id=TEXT, text=TEXT, pairs=st.lists(PAIRS, max_size=2).map(tuple))
EXAMPLES = st.builds(MShotExample, id=TEXT, shots=st.lists(SHOTS, min_size=1, max_size=3).map(tuple))


def through_json(value: Any, *, ascii_only: bool) -> Any:
    line = json.dumps(value, ensure_ascii=ascii_only)
    assert "\n" not in line
    return json.loads(line)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(example=EXAMPLES, ascii_only=st.booleans())
def test_an_example_survives_the_way_through_json(example: MShotExample, ascii_only: bool) -> None:
    assert MShotExample.from_json(through_json(example.to_json(), ascii_only=ascii_only), where="a:1") == example


def test_optional_fields_may_be_missing_or_null() -> None:
    expected = InstructionPair(question="Q", answer="A")
    assert InstructionPair.from_json({"question": "Q", "answer": "A"}, where="a:1") == expected
    empty = {"question": "Q", "answer": "A", "options": None, "rationale": None, "provenance": None}
    assert InstructionPair.from_json(empty, where="a:1") == expected


PAIR: dict[str, Any] = {"question": "Q", "answer": "A"}
SHOT: dict[str, Any] = {"id": "1", "text": "T", "pairs": [PAIR]}
EXAMPLE: dict[str, Any] = {"id": "1", "shots": [SHOT]}


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (InstructionPair.from_json, "Q", "a JSON object is needed, not a str"),
        (InstructionPair.from_json, {**PAIR, "question": " \n"}, "'question' is ' .n'; it must be a non-empty string"),
        (InstructionPair.from_json, {"question": "Q"}, "'answer' is None; it must be a non-empty string"),
        (InstructionPair.from_json, {**PAIR, "answer": 5}, "'answer' is 5; it must be a non-empty string"),
        (InstructionPair.from_json, {**PAIR, "kind": "essay"}, "pair kind 'essay' is none of free_form, options"),
        (InstructionPair.from_json, {**PAIR, "kind": ["options"]}, "is none of free_form"),
        (InstructionPair.from_json, {**PAIR, "options": "abc"}, "'options' is 'abc'; it must be a list of strings"),
        (InstructionPair.from_json, {**PAIR, "options": ["a", 1]}, r"'options' is \['a', 1\]; it must be a list of strings"),
        (InstructionPair.from_json, {**PAIR, "rationale": ["so"]}, r"'rationale' is \['so'\]; it must be a string or null"),
        (InstructionPair.from_json, {**PAIR, "provenance": "me"}, "'provenance': a JSON object is needed, not a str"),
        (OneShotExample.from_json, {**SHOT, "text": ""}, "'text' is ''"),
        (OneShotExample.from_json, {**SHOT, "pairs": None}, "'pairs' is NoneType; it must be a list of pairs"),
        (OneShotExample.from_json, {**SHOT, "pairs": [PAIR, 3]}, "a JSON object is needed, not a int"),
        (MShotExample.from_json, {"text": "a raw text"}, "'shots' must be a non-empty list"),
        (MShotExample.from_json, {**EXAMPLE, "shots": []}, "'shots' must be a non-empty list"),
        (MShotExample.from_json, {**EXAMPLE, "shots": [None]}, "a JSON object is needed, not a NoneType"),
        (MShotExample.from_json, {**EXAMPLE, "id": 1}, "'id' is 1; it must be a non-empty string"),
    ],
)
def test_a_value_that_is_no_record_is_refused_with_its_place(read: Callable[..., object], value: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^corpus\.jsonl:7: .*{message}"):
        read(value, where="corpus.jsonl:7")


def test_an_augmented_text_is_one_line_with_its_spans() -> None:
    text = AugmentedText(id="1", text="ab\ncd", ends=(2, 5), roles=("context", "response"), provenance={"raw_texts": ["1"]})
    assert text.spans == (Span(start=0, end=2, role="context"), Span(start=2, end=5, role="response"))
    assert through_json(text.to_json(), ascii_only=False) == {
        "id": "1",
        "text": "ab\ncd",
        "spans": [[0, 2, "context"], [2, 5, "response"]],
        "provenance": {"raw_texts": ["1"]},
    }
