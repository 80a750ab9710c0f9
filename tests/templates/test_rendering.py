"""Properties of every rendered document, whatever the texts hold, and each layout word by word."""

import dataclasses
import itertools
import re
from functools import cache

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_instruct.records import AugmentedText, InstructionPair, MShotExample, OneShotExample, PairKind, Role
from megatron_instruct.templates.bank import LAYOUTS_OF_SEVERAL, Bank, Style, load_bank, shipped_bank
from megatron_instruct.templates.numbering import NUMBERINGS
from megatron_instruct.templates.rendering import Rendering, render
from megatron_instruct.templates.slots import parse

NASTY = [
    "  padded \n\n",
    "{question}",
    "{}",
    "{0}",
    "{{answer}}",
    "%s %(x)s",
    "$x",
    "\\n",
    "</s>",
    "<CON> </CON>",
    "<QUE> a <ANS> b </END>",
    "答案：",
    "🙂",
    "\0",
]
KINDS: tuple[PairKind, ...] = ("free_form", "options", "chain_of_thought", "options_chain_of_thought")

texts = st.one_of(st.sampled_from(NASTY), st.text(min_size=1, max_size=30)).filter(str.strip)


@st.composite
def pairs(draw: st.DrawFn) -> InstructionPair:
    """Good pairs, and now and then one whose answer is no option, or that lacks what its kind promises."""
    kind = draw(st.sampled_from(KINDS))
    options = draw(st.lists(texts, max_size=30)) if "options" in kind else []
    answer = draw(st.sampled_from(options)) if options and draw(st.integers(0, 9)) else draw(texts)
    rationale = draw(st.one_of(texts, st.none())) if "chain" in kind else None
    return InstructionPair(question=draw(texts), answer=answer, kind=kind, options=tuple(options), rationale=rationale)


@st.composite
def examples(draw: st.DrawFn) -> MShotExample:
    shots = draw(st.lists(st.tuples(texts, st.lists(pairs(), max_size=4)), min_size=1, max_size=3))
    shots_with_ids = tuple(OneShotExample(id=f"t{i}", text=text, pairs=tuple(found)) for i, (text, found) in enumerate(shots))
    return MShotExample(id=draw(st.text(max_size=5)), shots=shots_with_ids)


@cache
def bank_with(language: str = "en", layout: str | None = None, inversion: float | None = None) -> Bank:
    """The bank of a language, perhaps with one layout only."""
    bank = load_bank(shipped_bank(language)) if layout is inversion is None else bank_with(language)
    chosen = bank.probabilities
    if layout is not None:
        weights = {name: float(name == layout) for name in LAYOUTS_OF_SEVERAL}
        chosen = dataclasses.replace(chosen, layouts_of_several=weights)
    if inversion is not None:
        chosen = dataclasses.replace(chosen, inversion=inversion)
    return dataclasses.replace(bank, probabilities=chosen)


def of_role(document: AugmentedText, role: Role) -> list[str]:
    return [document.text[span.start : span.end] for span in document.spans if span.role == role]


def drawn_style(rendering: Rendering, bank: Bank, family: str) -> Style:
    return bank.families[family][rendering.document.provenance["drawn"][family]]


@settings(max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    example=examples(),
    seed=st.integers(0, 2**32),
    language=st.sampled_from(["en", "zh"]),
    layout=st.sampled_from([None, *LAYOUTS_OF_SEVERAL]),
    inversion=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_properties_of_every_document(example: MShotExample, seed: int, language: str, layout: str | None, inversion: float) -> None:
    bank = bank_with(language, layout, inversion)
    rendering = render(example, bank, seed=seed)
    document = rendering.document
    spans = document.spans
    assert spans[0].start == 0
    assert spans[-1].end == len(document.text) > 0
    assert all(one.end == other.start and one.role != other.role for one, other in itertools.pairwise(spans))
    assert all(span.start < span.end for span in spans)
    assert of_role(document, "context") == [shot.text for shot in example.shots], "each raw text is there, exactly and once"
    assert rendering.pairs + len(rendering.set_aside) == sum(len(shot.pairs) for shot in example.shots)
    check_responses(example, rendering, bank)
    assert render(example, bank, seed=seed) == rendering
    if rendering.pairs == 0:
        assert rendering.layout == "raw"
        assert not of_role(document, "response")


def check_responses(example: MShotExample, rendering: Rendering, bank: Bank) -> None:
    """Every pair that was not set aside has its response, and loses neither answer nor rationale."""
    responses = of_role(rendering.document, "response")
    aside = [id(one.pair) for one in rendering.set_aside]
    kept = [pair for shot in example.shots for pair in shot.pairs if id(pair) not in aside]
    assert len(responses) == len(kept) == rendering.pairs, "one response each"
    for pair, response in zip(kept, responses, strict=True):
        assert pair.question.strip() in rendering.document.text
        if pair.rationale is not None and pair.rationale.strip():
            assert pair.rationale.strip() in response
        if pair.options:
            assert any(f"{label}{pair.answer.strip()}" in rendering.document.text for label in labels_of(response, pair, rendering, bank))
        elif rendering.layout != "classic" or pair.rationale:
            assert pair.answer.strip() in response
        else:
            style = drawn_style(rendering, bank, "free_form")
            assert response == style["reply"].fill({"question": pair.question.strip(), "answer": pair.answer.strip()})


def labels_of(response: str, pair: InstructionPair, rendering: Rendering, bank: Bank) -> list[str]:
    """Return the labels that the response may mean; the right option must stand behind one of them."""
    style = drawn_style(rendering, bank, "option_labels")
    numerals = [NUMBERINGS[style["numbering"].text](number) for number in range(1, len(pair.options) + 2)]
    values = [{"n": numeral, "option": pair.answer.strip()} for numeral in numerals]
    return [style["label"].fill(value) for value in values if response.endswith(style["answer"].fill(value))]


def pair(number: int, kind: PairKind = "free_form", **changes: object) -> InstructionPair:
    made = InstructionPair(
        question=f"Question number {number}?",
        answer=f"answer {number}",
        kind=kind,
        options=("w", "x", f"answer {number}", "z") if "options" in kind else (),
        rationale=f"reason {number}" if "chain" in kind else None,
    )
    return msgspec.structs.replace(made, **changes)  # type: ignore[arg-type]


def example_of(*found: InstructionPair, shots: int = 1, name: str = "e") -> MShotExample:
    made = [OneShotExample(id=f"{name}.{i}", text=f"Raw text {i}.", pairs=tuple(found)) for i in range(shots)]
    return MShotExample(id=name, shots=tuple(made))


def test_a_text_without_pairs_stays_raw_text() -> None:
    rendering = render(example_of(), bank_with(), seed=1)
    document = rendering.document
    assert (rendering.layout, document.text) == ("raw", "Raw text 0.")
    assert [(span.start, span.end, span.role) for span in document.spans] == [(0, len(document.text), "context")]
    assert document.provenance["drawn"] == {}


def test_a_text_whose_pairs_are_all_set_aside_stays_raw_text() -> None:
    rendering = render(example_of(pair(1, "options", answer="no option")), bank_with(), seed=1)
    assert rendering.document.text == "Raw text 0."
    assert [one.reason for one in rendering.set_aside] == ["answer is no option"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (pair(1, "options", answer="v"), "answer is no option"),
        (pair(1, "options", options=()), "options missing"),
        (pair(1, "options", options=("answer 1", " ", "x")), "empty option"),
        (pair(1, "options", options=("answer 1", "answer 1 ")), "repeated option"),
        (pair(1, "options", options=("Answer 1", "ANSWER 1")), "answer fits several options"),
        (pair(1, "chain_of_thought", rationale=None), "rationale missing"),
        (pair(1, "options_chain_of_thought", rationale=" "), "rationale missing"),
    ],
)
def test_a_pair_that_no_template_can_take_is_set_aside_with_its_reason(bad: InstructionPair, reason: str) -> None:
    rendering = render(example_of(pair(0), bad, pair(2)), bank_with(), seed=1)
    assert [(one.reason, one.pair, one.raw_text_id) for one in rendering.set_aside] == [(reason, bad, "e.0")]
    assert rendering.pairs == 2
    assert "number 1" not in rendering.document.text


def test_an_answer_that_repeats_an_option_loosely_is_that_option() -> None:
    bank = bank_with(layout="classic")
    for answer in ("ANSWER 1", " answer  1. ", "answer １"):
        assert render(example_of(pair(1, "options", answer=answer)), bank, seed=1).pairs == 1


@pytest.mark.parametrize("name", [f"e{number}" for number in range(40)])
def test_none_of_these_is_a_right_answer_and_stands_last(name: str) -> None:
    added = render(example_of(pair(1, "options", answer="None of these", options=("x", "y")), name=name), bank_with(), seed=1)
    given_first = pair(1, "options", answer="none of them", options=("None of the above.", "x", "y"))
    chosen = render(example_of(given_first, name=name), bank_with(), seed=1)
    for rendering, phrase in ((added, "None of these"), (chosen, "None of the above.")):
        style = drawn_style(rendering, bank_with(), "option_labels")
        last = {"n": NUMBERINGS[style["numbering"].text](3), "option": phrase}
        assert rendering.pairs == 1
        assert style["label"].fill(last) + phrase in rendering.document.text
        assert of_role(rendering.document, "response") == [style["answer"].fill(last)]


def test_options_are_shuffled_for_each_pair() -> None:
    found = [pair(number, "options", options=("w", "x", "y", "z"), answer="x") for number in range(20)]
    responses = of_role(render(example_of(*found, name="e1"), bank_with(layout="classic"), seed=5).document, "response")
    assert len(set(responses)) == 4, "the right option comes to every place"


@pytest.mark.parametrize("layout", LAYOUTS_OF_SEVERAL)
@pytest.mark.parametrize("inverted", [False, True])
def test_layouts_put_text_and_pairs_in_their_order(layout: str, inverted: bool) -> None:
    found = [pair(number, KINDS[number % 4]) for number in range(5)]
    rendering = render(example_of(*found, shots=2), bank_with(layout=layout, inversion=float(inverted)), seed=11)
    document = rendering.document
    roles = [span.role for span in document.spans]
    halves = document.text.split("Raw text 1.") if not inverted else document.text.split("Raw text 0.")
    assert (rendering.layout, rendering.inverted, rendering.pairs) == (layout, inverted, 10)
    assert (roles.index("context") > roles.index("response")) == inverted
    assert all(half.count("Question number") == 5 for half in halves)
    places = [[match.start() for match in re.finditer(f"Question number {number}", document.text)] for number in range(5)]
    assert [place[0] for place in places] == sorted(place[0] for place in places)
    first_response = next(span for span in document.spans if span.role == "response")
    assert (first_response.start > places[4][0]) == (layout == "numbered"), "all questions come first in the numbered layout alone"
    assert all(document.text.count(f"reason {number}") == 2 for number in (2, 3)), "no rationale is lost"


def test_numbered_questions_go_on_beyond_26() -> None:
    found = [pair(number) for number in range(60)]
    bank = bank_with(layout="numbered")
    for name in ("a", "b", "c", "d", "e", "f"):
        rendering = render(example_of(*found, name=name), bank, seed=2)
        style = drawn_style(rendering, bank, "question_numbers")
        for number in range(60):
            numeral = NUMBERINGS[style["numbering"].text](number + 1)
            assert f"{style['question'].fill({'n': numeral})}Question number {number}?" in rendering.document.text
        assert of_role(rendering.document, "response") == [f"answer {number}" for number in range(60)]


def test_few_shot_explains_where_a_pair_has_a_rationale() -> None:
    bank = bank_with(layout="few_shot")
    plain = render(example_of(pair(0), pair(1)), bank, seed=1).document.provenance["drawn"]
    explained = render(example_of(pair(0), pair(1, "chain_of_thought")), bank, seed=1)
    assert "few_shot" in plain
    assert "few_shot_explained" not in plain
    assert "few_shot_explained" in explained.document.provenance["drawn"]
    first, second = of_role(explained.document, "response")
    assert first == drawn_style(explained, bank, "few_shot_explained")["plain_reply"].fill({"answer": "answer 0"})
    assert "reason 1" in second


def test_a_pair_with_more_than_its_kind_says_loses_nothing() -> None:
    odd = pair(1, "free_form", options=("answer 1", "b"), rationale="because")
    rendering = render(example_of(odd), bank_with(), seed=1)
    assert "options_chain_of_thought" in rendering.document.provenance["drawn"] or rendering.layout == "dialogue"
    assert "because" in rendering.document.text


def test_one_style_a_kind_and_one_separator_serve_the_whole_document() -> None:
    bank = bank_with(layout="classic", inversion=0.0)
    rendering = render(example_of(pair(0), pair(1), pair(2), shots=3), bank, seed=9)
    document, style = rendering.document, drawn_style(rendering, bank, "free_form")
    asked = [style["ask"].fill({"question": f"Question number {n}?", "answer": f"answer {n}"}) for n in (0, 1, 2)] * 3
    assert of_role(document, "instruction") == asked
    separator = drawn_style(rendering, bank, "shot_separators")["text"].fill({})
    assert sum(glue.startswith(separator) for glue in of_role(document, "glue")) >= 2


def test_provenance_names_texts_seed_bank_and_what_was_drawn() -> None:
    made = example_of(pair(0, provenance={"synthesizer": "s", "round": 1}), pair(1, provenance={"synthesizer": "s", "round": 1}), shots=2)
    bank = bank_with()
    provenance = render(made, bank, seed=42).document.provenance
    assert provenance["raw_texts"] == ["e.0", "e.1"]
    assert provenance["synthesis"] == [{"synthesizer": "s", "round": 1}]
    assert (provenance["seed"], provenance["bank"]) == (42, {"language": "en", "version": 2, "sha256": bank.fingerprint})
    assert {"free_form", "shot_separators", "text_separators"} <= provenance["drawn"].keys()


def test_the_seed_and_the_id_change_the_document() -> None:
    documents = {
        render(example_of(pair(0), pair(1), name=name), bank_with(), seed=seed).document.text for name in "abc" for seed in range(5)
    }
    assert len(documents) == 15


def test_slots_are_filled_as_they_are() -> None:
    template = parse("{{x}} {question} {answer}}}")
    assert template.fill({"question": "{answer}", "answer": "%s{"}) == "{x} {answer} %s{}"
    assert template.slots == {"question", "answer"}
